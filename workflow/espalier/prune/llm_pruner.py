"""LLM-Pruner (Ma et al. 2023, arXiv 2305.11627): heads and neurons go that the loss misses least, by Taylor expansion.

A coupled structure (section 3.1) is a group of heads, the rows of query, key and value with the columns of the output
layer, or a neuron of the MLP, the rows of gate and up with the column of down. Its importance (section 3.2) is
estimated from w, a weight; g, the mean over samples of its gradient; and H, the mean over samples of the squared
gradient, which stands for the diagonal of the Hessian.

What the paper leaves open: biases go with their rows but do not count in the importance, as in the published code; with
grouped-query attention, a structure is a key/value head with all query heads that read it.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from espalier import checkpoints
from espalier.data import Calibration
from espalier.models import footprint, widths
from espalier.models.anatomy import adopt, keep, parts_of
from espalier.models.streaming import BlockStream, gradients
from espalier.progress import progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from espalier.models.anatomy import Parts

TAKES = ("causal-lm",)
CHANGES_WIDTHS = True

# What a weight contributes: the change of the loss without it, up to an order.
TERMS = {
    "first": lambda w, g, h: w * g,
    "second": lambda w, g, h: w * w * h,
    "mixed": lambda w, g, h: w * g - w * w * h / 2,
}
# How the weights of one channel are joined; `axis` is the other one.
GROUPINGS = {
    "element": lambda term, axis: term.abs().sum(axis),
    "vector": lambda term, axis: term.sum(axis).abs(),
}


@dataclass(frozen=True)
class Recipe:
    """How much to remove, from which blocks, and what ranks it."""

    calibration: Calibration
    ratio: float | None = None  # share removed: of each pruned block's heads and neurons; global, of their parameters
    parameters: float | None = None  # the model's size afterwards, the nearest that can be met; in place of ratio
    grouping: Literal["element", "vector"] = "element"  # sum of absolute contributions, or absolute value of the sum
    order: Literal["first", "second", "mixed"] = "first"  # of the Taylor expansion
    scope: Literal["per-layer", "global"] = "per-layer"  # the lowest of each block, or of all pruned blocks together
    keep_first: int = 4  # blocks at the start that stay whole (the paper prunes 4 to 29 of 32)
    keep_last: int = 2  # blocks at the end that stay whole
    round_to: int | None = None  # kept widths of attention and MLP become the nearest multiples of this

    def check(self) -> None:
        widths.check(self)


def plan(model: PreTrainedModel, recipe: Recipe) -> bool:
    """Shrink a model on the meta device to the size that the recipe leads to; return whether that is exact.

    per-layer: of c query channels and n neurons, c - floor(c (1 - ratio)) channels, as far as they are whole groups,
    and n - floor(n (1 - ratio)) neurons go from each pruned block, as in the published code: exact. global: units of
    all pruned blocks go, the lowest first, until the parameters that go are nearest `ratio` of those of all units: the
    data decide it within half a group. Raises UserError for a target that cannot be met.
    """
    widths.shrink(model, _counts(model, recipe, widths.even_scores(widths.widths_of(model, recipe))))
    return recipe.scope == "per-layer"


def peak_bytes(model: PreTrainedModel, recipe: Recipe) -> int:
    """Return the most bytes on the device, in 32 bits: a block's weights, and three more tensors of that size.

    They are the gradient of a sample, and the means of gradients and of their squares.
    """
    itemsize = max(4, model.dtype.itemsize)
    return footprint.peak_bytes(model, recipe.calibration, 1, copies=4, itemsize=itemsize, losses=True)


def apply(parent: Path, output: Path, recipe: Recipe, *, seed: int, device: str) -> dict:
    """Write the parent without its least important heads and neurons into `output`; return all scores and what went."""
    import torch

    windows = torch.tensor(recipe.calibration.token_ids(checkpoints.load_tokenizer(parent)))
    plan(checkpoints.skeleton(parent), recipe)
    checkpoint = checkpoints.load(parent, device="cpu")
    model = checkpoint.model
    # Squared gradients of 16 bits would vanish.
    stream = BlockStream(model, windows, device, 1, torch.promote_types(model.dtype, torch.float32))
    scores = _scores(stream, recipe)
    kept = widths.choose(scores, _counts(model, recipe, scores))
    parts = parts_of(model)
    for block, (groups, neurons) in kept.items():
        keep(parts[block], groups, neurons)
    adopt(model)
    parameters = checkpoints.logical_parameters(model)
    checkpoints.save(model, checkpoint.tokenizer, output, {**checkpoint.info, "parameters": parameters})
    return {"blocks": widths.report(scores, kept)}


def importance(
    parts: Parts, slopes: dict[torch.nn.Parameter, tuple[torch.Tensor, torch.Tensor]], recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the importance of a block's groups and of its neurons (float64, on the CPU).

    `slopes`: weight → (g, H). A channel's importance is, by element, the sum over its weights of |w g|, |w² H| or
    |w g - w² H / 2| (order first, second, mixed); by vector, the absolute value of the sum of the same terms. It is
    summed over the matrices of the structure, and over the channels of a group.
    """

    def channels(layer: torch.nn.Linear, axis: int) -> torch.Tensor:
        term = TERMS[recipe.order](layer.weight.detach(), *slopes[layer.weight])
        return GROUPINGS[recipe.grouping](term, axis).double().cpu()

    rows, columns = 1, 0
    members = [(parts.query, rows), (parts.key, rows), (parts.value, rows), (parts.output, columns)]
    groups = sum(channels(layer, axis).view(parts.groups, -1).sum(1) for layer, axis in members)
    up = sum(channels(layer, rows).view(parts.stacked, -1).sum(0) for layer in parts.up)
    return groups, up + channels(parts.down, columns)


def _scores(stream: BlockStream, recipe: Recipe) -> widths.Scores:
    parts, found = parts_of(stream.model), {}
    wanted = widths.widths_of(stream.model, recipe)
    with contextlib.closing(gradients(stream)) as backwards:
        for block, means in progress(backwards, "scoring blocks, last first", len(stream) - min(wanted)):
            if block in wanted:
                names = {weight: name for name, weight in stream.blocks[block].named_parameters()}
                # No name of its own: it would hold the means while the next block's are made.
                found[block] = importance(parts[block], {one: means[name] for one, name in names.items()}, recipe)
            if block == min(wanted):
                break
    return {block: found[block] for block in wanted}


def _counts(model: PreTrainedModel, recipe: Recipe, scores: widths.Scores) -> widths.Counts:
    if recipe.scope == "per-layer":
        return widths.uniform(model, recipe, _removed)
    whole = widths.widths_of(model, recipe)
    counts = widths.pooled_counts(whole, scores, widths.parameters_to_remove(model, recipe))
    return widths.rounded(whole, counts, recipe.round_to)


def _removed(width: widths.Width, ratio: Fraction) -> tuple[int, int]:
    channels = math.ceil(width.groups * width.channels * ratio)  # = c - floor(c (1 - ratio))
    return channels // width.channels, math.ceil(width.neurons * ratio)
