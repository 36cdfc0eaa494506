"""Wanda-sp: whole heads and neurons by the criterion of Wanda (Sun et al. 2023, arXiv 2306.11695), block after block.

The structured variant is a baseline of FLAP (An et al. 2024, arXiv 2312.11983). Input channel j of the
output layer of attention, or of the MLP's last layer, scores the mean over its output rows i of |W_ij| · ‖X_j‖₂, where
X_j is the channel's value at every token of every sample. A group of heads scores the sum of its channels. Every block
loses the same share, nothing compensates for the loss, and the pruned block's outputs are what the next block sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from espalier import checkpoints
from espalier.data import Calibration
from espalier.models import footprint, widths
from espalier.models.anatomy import adopt, keep, parts_of
from espalier.models.input_moments import observed
from espalier.models.streaming import BlockStream
from espalier.progress import progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from espalier.models.input_moments import Moments

TAKES = ("causal-lm",)
CHANGES_WIDTHS = True


@dataclass(frozen=True)
class Recipe:
    """How much to remove."""

    calibration: Calibration
    ratio: float | None = None  # share of each block's groups of heads and neurons that goes, rounded down
    parameters: float | None = None  # the model's size afterwards, the nearest that can be met; in place of ratio
    keep_first: int = 0  # blocks at the start that stay whole
    keep_last: int = 0  # blocks at the end that stay whole
    round_to: int | None = None  # kept widths of attention and MLP become the nearest multiples of this
    batch_size: int = 8  # calibration windows a forward pass

    def check(self) -> None:
        widths.check(self)
        if self.batch_size < 1:
            raise ValueError("'batch_size' must be at least 1.")


def plan(model: PreTrainedModel, recipe: Recipe) -> bool:
    """Shrink a model on the meta device to the exact size that the recipe leads to.

    Raises UserError for a target that cannot be met.
    """
    widths.shrink(model, widths.uniform(model, recipe, widths.share))
    return True


def peak_bytes(model: PreTrainedModel, recipe: Recipe) -> int:
    """Return the most bytes on the device: one block at work on a batch, or the embeddings."""
    size = model.dtype.itemsize
    return footprint.peak_bytes(model, recipe.calibration, recipe.batch_size, copies=1, itemsize=size)


def apply(parent: Path, output: Path, recipe: Recipe, *, seed: int, device: str) -> dict:
    """Write the parent without its lowest heads and neurons into `output`; return all scores and what went."""
    import torch

    windows = torch.tensor(recipe.calibration.token_ids(checkpoints.load_tokenizer(parent)))
    plan(checkpoints.skeleton(parent), recipe)
    checkpoint = checkpoints.load(parent, device="cpu")
    model = checkpoint.model
    stream = BlockStream(model, windows, device, recipe.batch_size)
    counts, parts = widths.uniform(model, recipe, widths.share), parts_of(model)
    scores: widths.Scores = {}
    kept: widths.Kept = {}
    with torch.no_grad():
        hidden = stream.enter()
        for block in progress(range(max(counts) + 1), "pruning blocks"):
            if block in counts:
                one = parts[block]
                with stream.resident(block), observed(one.output, one.down) as (heads, mlp):
                    stream.run(block, hidden)
                groups = channel_scores(one.output, heads).view(one.groups, -1).sum(1)
                scores[block] = groups, channel_scores(one.down, mlp)
                kept |= widths.choose({block: scores[block]}, counts)
                keep(one, *kept[block])
            if block < max(counts):
                with stream.resident(block):
                    hidden = stream.run(block, hidden)
    adopt(model)
    parameters = checkpoints.logical_parameters(model)
    checkpoints.save(model, checkpoint.tokenizer, output, {**checkpoint.info, "parameters": parameters})
    return {"blocks": widths.report(scores, kept)}


def channel_scores(layer: torch.nn.Linear, inputs: Moments) -> torch.Tensor:
    """Return the score of each input channel (float64): mean over output rows i of |W_ij| · ‖X_j‖₂."""
    return layer.weight.double().abs().mean(0) * inputs.norm()
