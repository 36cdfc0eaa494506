"""Latency, throughput and memory of generating text, over input lengths, output lengths and batch sizes.

The protocol is Shortened LLaMA's (Kim et al. 2024, 2402.02834): one fixed prompt repeated over the batch, a forced
output length, wall time around the whole call, so that reading the prompt is inside; throughput = batch · output /
latency. Added to it: the moment of the first new token within the same call, which parts reading the prompt from
decoding; medians and spread; CPU time and energy. Memory is measured in a run of its own, which also warms up. A shape
for which memory runs out, or at which the engine fails, is a row without a value that says so.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from espalier import engine_rows, neighbours, plugins
from espalier.engine_process import Died, EngineProcess, Generated
from espalier.engine_rows import Number, interquartile_range, mean, rate, row, weights_rows
from espalier.measured import Measured
from espalier.prompts import check_shapes
from espalier.sweep import Shape, Sweep, check_engine

TAKES = ("causal-lm",)
TIMED = True  # so its jobs have the machine to themselves
UNITS = engine_rows.UNITS
NO_FIRST_TOKEN = "unavailable: this engine does not tell when the first token is there"
PRESETS = {
    # Kim et al. 2024 (2402.02834): 30 runs, of which the first 10 are discarded.
    "shortened-llama": {
        "input_tokens": [12, 82],
        "output_tokens": [128, 512],
        "batch_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256, 384],
        "sampling": "top-k-top-p",
        "warmup": 10,
        "repeats": 20,
    },
    # Hong et al. 2023, Fig. 10: decoding at four context lengths; how many tokens it decodes is not said.
    "flashdecoding": {
        "input_tokens": [128, 1024, 8192, 32768],
        "output_tokens": [33],
        "batch_sizes": [1, 2, 4, 8],
        "sampling": "greedy",
    },
}


@dataclass(frozen=True)
class Recipe:
    """Which shapes are measured, and how often."""

    input_tokens: list[int]  # lengths of the prompt
    output_tokens: list[int]  # numbers of new tokens
    batch_sizes: list[int]  # prompts at once; what is larger than one that memory does not hold is not tried
    engine: str = "hf"  # a file of espalier/engines
    sampling: Literal["greedy", "top-k-top-p"] = "greedy"  # top-k-top-p: k 50, p 0.95, as Shortened LLaMA has it
    warmup: int = 1  # untimed runs of each shape; the first one measures the memory
    repeats: int = 5  # timed runs of each shape
    limit: float = 1800.0  # seconds after which an engine that does not answer has failed

    def check(self) -> None:
        check_shapes(self.input_tokens, self.output_tokens, self.batch_sizes)
        check_engine(self.engine, self.sampling, self.limit)
        if self.warmup < 1 or self.repeats < 1:
            raise ValueError("'warmup' and 'repeats' must be at least 1.")


class Timed(NamedTuple):
    """What came of one shape."""

    peaks: dict[str, int]  # bytes, by memory.kinds
    calls: list[Generated]  # without their tokens
    beside: dict  # what neighbours.Watch found during the calls


def uses(recipe: Recipe) -> list[str]:
    """Return the modules of the plugins that the recipe names: they are part of a job's code version."""
    return [plugins.module_name("engines", recipe.engine, "engine")]


def measure(
    folder: Path,
    recipe: Recipe,
    *,
    seed: int,
    device: str,
    environment: Path | None,
    start: Callable[..., EngineProcess] = EngineProcess,
) -> Measured:
    """Return the rows of every shape, and every sample of every timed call, of an engine in a process of its own.

    `device` may be auto; `environment` is the file about the engine's own Python, None if it has none. Raises UserError
    for a checkpoint that is damaged; all else that goes wrong is the outcome of a row.
    """
    sweep = Sweep(recipe, folder, device=device, environment=environment, seed=seed, start=start)
    watch = neighbours.Watch(device)
    sweep.run(lambda worker, shape, prompts: _time(worker, shape, prompts, recipe, watch))
    rows = weights_rows(sweep, folder)
    for shape, outcome in sweep.outcomes.items():
        numbers = _numbers(sweep.results[shape], shape) if outcome == "ok" else _gaps(outcome, shape, sweep.kinds)
        rows += [row(sweep.engine, name, number, shape) for name, number in numbers.items()]
    if sweep.results:
        share = watch.cpu_of_others()
        outcome = "unavailable: the calls are too short for it to be counted" if share is None else "ok"
        rows.append(row(sweep.engine, "cpu_of_others", Number(share, outcome=outcome)))
    samples = {
        "timings": [_sample(shape, outcome, sweep.results.get(shape)) for shape, outcome in sweep.outcomes.items()],
        "engine": sweep.details,
        "shared_with": sorted(watch.jobs),
    }
    for job in samples["shared_with"]:
        print(f"warning: these times are not to be trusted: the same run was also at work on {job}", file=sys.stderr)
    return Measured(rows, samples, sweep.checkpoint(), sweep.made_with())


def _time(worker: EngineProcess, shape: Shape, prompts: list, recipe: Recipe, watch: neighbours.Watch) -> Timed:
    asked = prompts, shape.output_tokens, recipe.sampling
    peaks = worker.peaks(*asked)
    for _ in range(recipe.warmup - 1):
        worker.generate(*asked)
    calls = []
    with watch.during() as beside:
        for _ in range(recipe.repeats):
            call = worker.generate(*asked)
            lengths = [len(tokens) for tokens in call.token_ids]
            if lengths != [shape.output_tokens] * shape.batch_size:
                raise Died(f"it did not generate {shape.output_tokens} tokens for each of {shape.batch_size} prompts")
            calls.append(call._replace(token_ids=[]))
    return Timed(peaks, calls, beside)


def _numbers(timed: Timed, shape: Shape) -> dict[str, Number]:
    """Return the numbers of a shape; a rate's standard error is that of its time, to first order (the delta method)."""
    batch, output = shape.batch_size, shape.output_tokens
    seconds = [call.seconds for call in timed.calls]
    first = [call.first_token_seconds for call in timed.calls if call.first_token_seconds is not None]
    found = {
        "latency": mean(seconds),
        "latency_median": Number(statistics.median(seconds), n=len(seconds)),
        "latency_iqr": interquartile_range(seconds),
        "throughput": rate(batch * output, seconds),
        "cpu_time": mean([call.cpu_seconds for call in timed.calls]),
    }
    if len(first) == len(seconds):
        found["time_to_first_token"] = mean(first)
        decoding = [whole - until for whole, until in zip(seconds, first, strict=True)]
        if output > 1:
            known = statistics.mean(call.first_tokens for call in timed.calls)
            found["decode_throughput"] = rate(batch * output - known, decoding)
    else:
        missing = ["time_to_first_token"] + ["decode_throughput"] * (output > 1)
        found |= dict.fromkeys(missing, Number(None, outcome=NO_FIRST_TOKEN))
    joules = [call.joules for call in timed.calls if call.joules is not None]
    if joules:
        found["energy_per_token"] = mean([one / (batch * output) for one in joules])
    return found | {f"peak_{kind}": Number(size) for kind, size in timed.peaks.items()}


def _gaps(outcome: str, shape: Shape, kinds: Iterable[str]) -> dict[str, Number]:
    names = ["latency", "latency_median", "latency_iqr", "time_to_first_token", "throughput", "cpu_time"]
    names += ["decode_throughput"] * (shape.output_tokens > 1) + [f"peak_{kind}" for kind in kinds]
    return dict.fromkeys(names, Number(None, outcome=outcome))


def _sample(shape: Shape, outcome: str, timed: Timed | None) -> dict:
    sample = {**shape._asdict(), "outcome": outcome}
    if timed is None:
        return sample
    names = ("seconds", "first_token_seconds", "first_tokens", "cpu_seconds", "joules")
    return sample | {name: [getattr(call, name) for call in timed.calls] for name in names} | timed.beside
