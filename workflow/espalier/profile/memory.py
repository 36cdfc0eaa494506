"""Memory of generating text, without timing it: other jobs of the run may share the machine meanwhile.

The peak is that of the whole call, as in the workload `generation`: weights, cache and temporaries. A shape for which
memory runs out is a row with the outcome "oom".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from espalier import checkpoints, memory, plugins
from espalier.measured import Measured
from espalier.progress import progress
from espalier.prompts import check_shapes, prompt

if TYPE_CHECKING:
    from espalier.checkpoints import Checkpoint

TAKES = ("causal-lm",)
TIMED = False
UNITS = {
    "weights_allocated": "bytes",
    "weights_allocated_after_forward": "bytes",
    "weights_on_disk": "bytes",
    "peak_allocated": "bytes",
    "peak_reserved": "bytes",
}


@dataclass(frozen=True)
class Recipe:
    """Which shapes are measured, each once."""

    input_tokens: list[int]  # lengths of the prompt
    output_tokens: list[int]  # numbers of new tokens
    batch_sizes: list[int]  # prompts at once
    engine: str = "hf"  # a file of espalier/engines

    def check(self) -> None:
        check_shapes(self.input_tokens, self.output_tokens, self.batch_sizes)


def uses(recipe: Recipe) -> list[str]:
    """Return the modules of the plugins that the recipe names: they are part of a job's code version."""
    return [plugins.module_name("engines", recipe.engine, "engine")]


def measure(checkpoint: Checkpoint, recipe: Recipe, *, seed: int, device: str) -> Measured:
    """Return the bytes of the weights, in memory and on disk, and the peaks of every shape."""
    engine = plugins.load("engines", recipe.engine, "engine").Engine(device)
    engine.load(checkpoint)
    rows = [
        _row("weights_allocated", engine.allocated_bytes()),
        _row("weights_on_disk", checkpoints.weight_bytes(checkpoint.folder)),
    ]
    tokens = prompt(checkpoint, max(recipe.input_tokens), seed)
    engine.generate([tokens[:1]], 2, "greedy")  # what a library sets up once is not part of any shape
    rows.append(_row("weights_allocated_after_forward", engine.allocated_bytes()))
    shapes = [(i, o, b) for i in recipe.input_tokens for o in recipe.output_tokens for b in sorted(recipe.batch_sizes)]
    for shape in progress(shapes, f"memory of generation with {engine.name}, shapes"):
        peaks = peaks_of(engine, [tokens[: shape[0]]] * shape[2], shape[1])
        names = dict(zip(("input_tokens", "output_tokens", "batch_size"), shape, strict=True))
        about = {"engine": engine.name, **names, **({"outcome": "oom"} if peaks is None else {})}
        rows += [_row(f"peak_{kind}", (peaks or {}).get(kind)) | about for kind in memory.kinds(device)]
    return Measured(rows, {"peaks": [row for row in rows if row["metric"].startswith("peak_")]})


def peaks_of(engine: Any, prompts: list[list[int]], output: int) -> dict[str, int] | None:
    """Return the peak bytes while `engine` generates `output` tokens a prompt; None where memory runs out."""
    try:
        return engine.peaks(prompts, output, "greedy")
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
        return None


def _row(metric: str, value: int | None) -> dict:
    return {"task": "generation", "metric": metric, "value": value, "stderr": None, "n": None, "unit": UNITS[metric]}
