"""Depth pruning: whole transformer blocks are removed, those first that score lowest by a criterion.

Shortened LLaMA (Kim et al. 2024, arXiv 2402.02834), section 3.2: magnitude, Taylor and perplexity; ShortGPT (Men et al.
2024, arXiv 2403.03853): block influence; a random order as a control. The criteria's formulas are in
`models/block_scores.py`. One-shot ranks all blocks once, as both papers do; greedy scores those that are left again
after each removal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal

from espalier import checkpoints
from espalier.data import Calibration
from espalier.errors import UserError
from espalier.models.anatomy import blocks_of, remove_blocks
from espalier.models.block_scores import CRITERIA

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TAKES = ("causal-lm",)
Ranking = Literal["magnitude", "taylor", "perplexity", "block-influence", "random"]
TARGETS = ("blocks", "ratio", "parameters")


@dataclass(frozen=True)
class Recipe:
    """How many blocks to remove, which may go, and what ranks them."""

    blocks: int | None = None  # number of blocks to remove
    ratio: float | None = None  # in place of blocks: share of the model's parameters; the nearest number of blocks goes
    parameters: float | None = None  # in place of blocks: the model's size afterwards, the nearest that can be met
    calibration: Calibration | None = None  # what taylor, perplexity and block-influence measure on; others have none
    criterion: Ranking = "perplexity"  # what ranks the blocks, the lowest first; random, by the seed, is a control
    schedule: Literal["one-shot", "greedy"] = "one-shot"  # greedy scores the blocks again after each removal
    keep_first: int = 0  # blocks at the start that always stay (the paper's "+" variants keep 4)
    keep_last: int = 0  # blocks at the end that always stay (the paper's "+" variants keep 2)
    batch_size: int = 32  # calibration windows a forward pass; taylor takes them one by one

    def check(self) -> None:
        if sum(getattr(self, key) is not None for key in TARGETS) != 1:
            raise ValueError("exactly one of 'blocks', 'ratio' and 'parameters' must be given.")
        if self.blocks is not None and self.blocks < 1:
            raise ValueError("'blocks' must be at least 1.")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ValueError("'ratio' must lie between 0 and 1.")
        if self.parameters is not None and self.parameters <= 0:
            raise ValueError("'parameters' must be positive.")
        if self.keep_first < 0 or self.keep_last < 0:
            raise ValueError("'keep_first' and 'keep_last' must not be negative.")
        if self.batch_size < 1:
            raise ValueError("'batch_size' must be at least 1.")
        calibrated = CRITERIA[self.criterion].calibrated
        if calibrated and self.calibration is None:
            raise ValueError(f"the criterion '{self.criterion}' needs the key 'calibration'.")
        if not calibrated and self.calibration is not None:
            raise ValueError(f"the criterion '{self.criterion}' does not use the key 'calibration'; leave it out.")


def plan(model: PreTrainedModel, recipe: Recipe) -> bool:
    """Shrink a model on the meta device to the size that the recipe leads to; return whether that is exact.

    It is, unless the blocks differ in size; then those go whose size is nearest the mean of all that may go. Raises
    UserError for a target that cannot be met.
    """
    sizes = _sizes(model, recipe)
    count = blocks_to_remove(model, recipe)
    mean = Fraction(sum(sizes.values()), len(sizes))
    remove_blocks(model, sorted(sizes, key=lambda block: abs(sizes[block] - mean))[:count])
    return len(set(sizes.values())) == 1


def peak_bytes(model: PreTrainedModel, recipe: Recipe) -> int:
    """Return the most bytes on the device, from arithmetic; `model` may be on the meta device."""
    return CRITERIA[recipe.criterion].peak_bytes(model, recipe.calibration, recipe.batch_size)


def blocks_to_remove(model: PreTrainedModel, recipe: Recipe) -> int:
    """Return how many blocks go; `model` may be on the meta device.

    For a target in parameters or a share of them it is the number that comes nearest (of two, the smaller), counted in
    blocks of the mean size of those that may go. Raises UserError if that is none, or more than may go.
    """
    sizes, total, whole = _sizes(model, recipe), checkpoints.logical_parameters(model), len(blocks_of(model))
    most, mean = min(len(sizes), whole - 1), Fraction(sum(sizes.values()), len(sizes))
    if recipe.blocks is not None:
        wanted, asked = recipe.blocks, f"blocks: {recipe.blocks}"
    elif recipe.ratio is not None:
        wanted, asked = _nearest(Fraction(str(recipe.ratio)) * total / mean), f"ratio: {recipe.ratio}"
    else:
        wanted, asked = _nearest((total - Fraction(recipe.parameters)) / mean), f"parameters: {recipe.parameters:,.0f}"
    if 1 <= wanted <= most:
        return wanted
    raise UserError(
        f"'{asked}' cannot be met: the model has {whole} blocks and {total:,} parameters; at most {most} blocks may be"
        f" removed, and without 1 to {most} of them it has {round(total - mean):,} to {round(total - most * mean):,}"
        " parameters."
    )


def apply(parent: Path, output: Path, recipe: Recipe, *, seed: int, device: str) -> dict:
    """Write the parent without its lowest blocks into `output`; return every score and the order of removal."""
    import torch

    tokenizer, sets = checkpoints.load_tokenizer(parent), recipe.calibration
    windows = torch.tensor(sets.token_ids(tokenizer)) if sets else torch.empty(0, 0)
    count = blocks_to_remove(checkpoints.skeleton(parent), recipe)
    checkpoint = checkpoints.load(parent, device="cpu")
    model, criterion, draw = checkpoint.model, CRITERIA[recipe.criterion], Random(f"depth-{seed}")
    stream = criterion.stream(model, windows, device, recipe.batch_size)
    may_go, there = set(_sizes(model, recipe)), list(range(len(blocks_of(model))))  # numbers as in the parent
    removed: list[int] = []
    scans: list[dict[int, float]] = []
    perplexities: list[float | None] = []
    for _ in range(count if recipe.schedule == "greedy" else 1):
        candidates = [place for place, block in enumerate(there) if block in may_go]
        scan = criterion.score(stream, candidates, draw)
        scores = {there[place]: score for place, score in scan.scores.items()}
        for block, score in scores.items():
            if not math.isfinite(score):
                raise UserError(f"The score of block {block} is not a finite number: the model overflows.")
        lowest = sorted(scores, key=scores.__getitem__)[: 1 if recipe.schedule == "greedy" else count]
        remove_blocks(model, [there.index(block) for block in lowest])
        there = [block for block in there if block not in lowest]
        removed += lowest
        scans.append(scores)
        perplexities.append(scan.perplexity)
    parameters = checkpoints.logical_parameters(model)
    checkpoints.save(model, checkpoint.tokenizer, output, {**checkpoint.info, "parameters": parameters})
    return {
        "criterion": recipe.criterion,
        "blocks": len(there) + len(removed),
        "original_perplexity": perplexities[0],
        "scores": scans,
        "removed": removed,
    }


def _sizes(model: PreTrainedModel, recipe: Recipe) -> dict[int, int]:
    """Return block → number of its parameters, of the blocks that may go; UserError if there is none."""
    blocks = blocks_of(model)
    may_go = range(recipe.keep_first, len(blocks) - recipe.keep_last)
    if not may_go:
        raise UserError(
            f"The model has {len(blocks)} blocks; 'keep_first: {recipe.keep_first}' and 'keep_last: {recipe.keep_last}'"
            " leave none of them to remove."
        )
    return {block: sum(weight.numel() for weight in blocks[block].parameters()) for block in may_go}


def _nearest(number: Fraction) -> int:
    return math.ceil(number - Fraction(1, 2))
