"""Latency, throughput and memory of generating text, over input lengths, output lengths and batch sizes.

The protocol is Shortened LLaMA's (Kim et al. 2024, 2402.02834): one fixed prompt repeated over the batch, a forced
output length, wall time around the whole call, so that reading the prompt is inside; throughput = batch · output /
latency. Added to it: the time to the first token (a call that generates one token) and, from the difference of the two,
the speed of decoding alone. Memory is measured in a run of its own, which also warms up. A shape for which memory runs
out is a row with the outcome "oom", and so are the larger batches of that shape, untried.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from espalier import checkpoints, memory, plugins
from espalier.measured import Measured
from espalier.progress import progress
from espalier.prompts import check_shapes, prompt

if TYPE_CHECKING:
    from espalier.checkpoints import Checkpoint

TAKES = ("causal-lm",)
TIMED = True  # so its jobs have the machine to themselves
UNITS = {
    "latency": "s",
    "time_to_first_token": "s",
    "throughput": "tokens/s",
    "decode_throughput": "tokens/s",
    "peak_allocated": "bytes",
    "peak_reserved": "bytes",
    "weights_allocated": "bytes",
    "weights_allocated_after_forward": "bytes",
    "weights_on_disk": "bytes",
}


@dataclass(frozen=True)
class Recipe:
    """Which shapes are measured, and how often."""

    input_tokens: list[int]  # lengths of the prompt
    output_tokens: list[int]  # numbers of new tokens
    batch_sizes: list[int]  # rising: what follows one that memory does not hold is not tried
    engine: str = "hf"  # a file of espalier/engines
    sampling: Literal["greedy", "top-k-top-p"] = "greedy"  # top-k-top-p: k 50, p 0.95, as the paper has it
    warmup: int = 1  # untimed runs of each shape; the first one measures the memory
    repeats: int = 5  # timed runs of each shape

    def check(self) -> None:
        check_shapes(self.input_tokens, self.output_tokens, self.batch_sizes)
        if self.warmup < 1 or self.repeats < 1:
            raise ValueError("'warmup' and 'repeats' must be at least 1.")


def uses(recipe: Recipe) -> list[str]:
    """Return the modules of the plugins that the recipe names: they are part of a job's code version."""
    return [plugins.module_name("engines", recipe.engine, "engine")]


def measure(checkpoint: Checkpoint, recipe: Recipe, *, seed: int, device: str) -> Measured:
    """Return the rows of every shape, and every single timing in seconds."""
    engine = plugins.load("engines", recipe.engine, "engine").Engine(device)
    engine.load(checkpoint)
    measurements = [
        _row(engine.name, None, "weights_allocated", engine.allocated_bytes()),
        _row(engine.name, None, "weights_on_disk", checkpoints.weight_bytes(checkpoint.folder)),
    ]
    rows, samples = measure_engine(engine, prompt(checkpoint, max(recipe.input_tokens), seed), recipe, seed)
    return Measured(measurements + rows, samples)


def measure_engine(
    engine: Any, tokens: list[int], recipe: Recipe, seed: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[list[dict], dict]:
    """Return rows and timings of a loaded engine, for every shape of the recipe with prompts that begin `tokens`."""
    _seed(seed)
    engine.generate([tokens[:1]], 2, recipe.sampling)  # what a library sets up once is not part of any shape
    rows = [_row(engine.name, None, "weights_allocated_after_forward", engine.allocated_bytes())]
    outputs = sorted({1, *recipe.output_tokens})
    shapes = [(i, o, b) for i in recipe.input_tokens for o in outputs for b in sorted(recipe.batch_sizes)]
    timings: dict[tuple, list[float] | None] = {}
    peaks: dict[tuple, dict[str, int]] = {}
    for shape in progress(shapes, f"generation with {engine.name}, shapes"):
        length, output, batch = shape
        # A batch that fits for no token more fits for none of a longer output.
        smaller = [(length, o, b) for o in outputs for b in recipe.batch_sizes if o <= output and b <= batch]
        failed = any(timings.get(other, ()) is None for other in smaller)
        timings[shape] = None if failed else _run(engine, tokens, shape, recipe, clock, peaks)
    for length in recipe.input_tokens:
        for batch in recipe.batch_sizes:
            first = timings[length, 1, batch]
            rows.append(_timing_row(engine.name, (length, 1, batch), "time_to_first_token", first))
            for output in recipe.output_tokens:
                shape = (length, output, batch)
                rows += _shape_rows(engine, shape, timings[shape], first, peaks.get(shape))
    names = ("input_tokens", "output_tokens", "batch_size")
    samples = [{**dict(zip(names, shape, strict=True)), "seconds": seconds} for shape, seconds in timings.items()]
    return rows, {"timings": samples}


def _run(engine, tokens: list[int], shape: tuple, recipe: Recipe, clock, peaks: dict) -> list[float] | None:
    """Return the seconds of each timed run, or None where memory ran out; puts the peaks into `peaks`."""
    length, output, batch = shape
    prompts = [tokens[:length]] * batch

    def runs() -> list[float]:
        if output in recipe.output_tokens:
            peaks[shape] = engine.peaks(prompts, output, recipe.sampling)
        else:
            engine.generate(prompts, output, recipe.sampling)
        for _ in range(recipe.warmup - 1):
            engine.generate(prompts, output, recipe.sampling)
        seconds = []
        for _ in range(recipe.repeats):
            started = clock()
            generated = engine.generate(prompts, output, recipe.sampling)
            seconds.append(clock() - started)
            if len(generated) != batch or any(len(row) != output for row in generated):
                raise RuntimeError(f"the engine {engine.name} did not generate {batch} rows of {output} tokens")
        return seconds

    seconds, error = _attempt(runs)
    if error is not None:
        peaks.pop(shape, None)
        _empty_cache()
    return seconds


def _attempt(work: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """Return (result, None), or (None, error) where memory ran out; any other error is raised."""
    try:
        return work(), None
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
        return None, error.with_traceback(None)  # the traceback would hold on to the tensors


def _shape_rows(
    engine: Any, shape: tuple, seconds: list[float] | None, first: list[float] | None, peaks: dict[str, int] | None
) -> list[dict]:
    name, (_, output, batch) = engine.name, shape
    kinds = memory.kinds(engine.device)
    rows = [_timing_row(name, shape, "latency", seconds)]
    if seconds is None:
        metrics = ["throughput", *(f"peak_{kind}" for kind in kinds)] + ["decode_throughput"] * (output > 1)
        return rows + [_row(name, shape, metric, None, outcome="oom") for metric in metrics]
    latency, error = mean_and_error(seconds)
    rows.append(_rate_row(name, shape, "throughput", batch * output, latency, error, len(seconds)))
    if output > 1:
        first_latency, first_error = mean_and_error(first)
        both = None if error is None else math.hypot(error, first_error)
        tokens, duration = batch * (output - 1), latency - first_latency
        rows.append(_rate_row(name, shape, "decode_throughput", tokens, duration, both, len(seconds)))
    return rows + [_row(name, shape, f"peak_{kind}", peaks[kind]) for kind in kinds]


def _timing_row(engine: str, shape: tuple, metric: str, seconds: list[float] | None) -> dict:
    if seconds is None:
        return _row(engine, shape, metric, None, outcome="oom")
    value, error = mean_and_error(seconds)
    return _row(engine, shape, metric, value, error, len(seconds))


def _rate_row(engine: str, shape: tuple, metric: str, tokens: int, duration: float, error, count: int) -> dict:
    """Return tokens / duration; its standard error is the duration's, to first order."""
    if duration <= 0:
        outcome = "unavailable: decoding is too short to be told from the noise of the timing"
        return _row(engine, shape, metric, None, outcome=outcome)
    rate = tokens / duration
    return _row(engine, shape, metric, rate, None if error is None else rate * error / duration, count)


def _row(engine: str, shape: tuple | None, metric: str, value, stderr=None, n=None, outcome: str = "ok") -> dict:
    length, output, batch = shape or (None, None, None)
    return {
        **{"task": "generation", "metric": metric, "value": value, "stderr": stderr, "n": n, "unit": UNITS[metric]},
        **{"engine": engine, "batch_size": batch, "input_tokens": length, "output_tokens": output, "outcome": outcome},
    }


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error (None for a single value)."""
    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _empty_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
