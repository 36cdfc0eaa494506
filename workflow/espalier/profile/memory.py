"""Memory of generating text, without timing it: other jobs of the run may share the machine meanwhile.

The peak is that of the whole call, as in the workload `generation`: weights, cache and temporaries. A shape for which
memory runs out is a row with the outcome "oom".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from espalier import plugins
from espalier.engine_process import EngineProcess
from espalier.engine_rows import Number, row, weights_rows
from espalier.measured import Measured
from espalier.prompts import check_shapes
from espalier.sweep import Sweep, check_engine

TAKES = ("causal-lm",)
TIMED = False
METRICS = (
    "weights_allocated",
    "weights_allocated_after_forward",
    "weights_on_disk",
    "peak_allocated",
    "peak_reserved",
)


@dataclass(frozen=True)
class Recipe:
    """Which shapes are measured, each once."""

    input_tokens: list[int]  # lengths of the prompt
    output_tokens: list[int]  # numbers of new tokens
    batch_sizes: list[int]  # prompts at once; what is larger than one that memory does not hold is not tried
    engine: str = "hf"  # a file of espalier/engines
    limit: float = 1800.0  # seconds after which an engine that does not answer has failed

    def check(self) -> None:
        check_shapes(self.input_tokens, self.output_tokens, self.batch_sizes)
        check_engine(self.engine, "greedy", self.limit)


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
    """Return the bytes of the weights, in memory and on disk, and the peaks of every shape.

    The arguments are those of the workload `generation`.
    """
    sweep = Sweep(recipe, folder, device=device, environment=environment, seed=seed, start=start)
    sweep.run(lambda worker, shape, prompts: worker.peaks(prompts, shape.output_tokens, "greedy"))
    peaks = [
        row(sweep.engine, f"peak_{kind}", Number(sweep.results.get(shape, {}).get(kind), outcome=outcome), shape)
        for shape, outcome in sweep.outcomes.items()
        for kind in sweep.kinds
    ]
    samples = {"peaks": peaks, "engine": sweep.details}
    return Measured(weights_rows(sweep, folder) + peaks, samples, sweep.checkpoint(), sweep.made_with())
