"""Depth pruning: whole transformer blocks are removed, those first that the model misses least.

Shortened LLaMA (Kim et al. 2024, arXiv 2402.02834), section 3.2, criterion PPL: the importance of block n is the
perplexity, on a small calibration set, of the model without block n. One-shot ranks all blocks once; greedy measures
again after each removal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from espalier import checkpoints
from espalier.data import Calibration
from espalier.errors import UserError
from espalier.models.anatomy import blocks_of, remove_blocks
from espalier.progress import progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TAKES = ("causal-lm",)


@dataclass(frozen=True)
class Recipe:
    """How many blocks to remove, and which may go."""

    blocks: int  # number of blocks to remove
    calibration: Calibration
    criterion: Literal["perplexity"] = "perplexity"  # what ranks the blocks: the calibration perplexity without each
    schedule: Literal["one-shot", "greedy"] = "one-shot"  # greedy scores the blocks again after each removal
    keep_first: int = 0  # blocks at the start that always stay (the paper's "+" variants keep 4)
    keep_last: int = 0  # blocks at the end that always stay (the paper's "+" variants keep 2)
    batch_size: int = 32  # calibration windows a forward pass

    def check(self) -> None:
        if self.blocks < 1 or self.batch_size < 1:
            raise ValueError("'blocks' and 'batch_size' must be at least 1.")
        if self.keep_first < 0 or self.keep_last < 0:
            raise ValueError("'keep_first' and 'keep_last' must not be negative.")


def apply(parent: Path, output: Path, recipe: Recipe, *, seed: int, device: str) -> dict:
    """Write the parent without `recipe.blocks` blocks into `output`; return every score and the order of removal."""
    import torch

    checkpoint = checkpoints.load(parent, device=device)
    model = checkpoint.model
    count = len(blocks_of(model))
    candidates = list(range(recipe.keep_first, count - recipe.keep_last))
    if recipe.blocks > len(candidates) or recipe.blocks >= count:
        raise UserError(
            f"{parent} has {count} blocks, of which {len(candidates)} may be removed;"
            f" the recipe removes {recipe.blocks}."
        )
    windows = torch.tensor(recipe.calibration.token_ids(checkpoint.tokenizer), device=checkpoint.device)
    original = perplexity_without(model, (), windows, recipe.batch_size)
    removed: list[int] = []
    scans: list[dict[int, float]] = []
    for _ in range(recipe.blocks if recipe.schedule == "greedy" else 1):
        scores = {
            block: perplexity_without(model, [*removed, block], windows, recipe.batch_size)
            for block in progress([block for block in candidates if block not in removed], "scoring blocks")
        }
        scans.append(scores)
        order = sorted(scores, key=scores.__getitem__)
        removed += order[:1] if recipe.schedule == "greedy" else order[: recipe.blocks]
    remove_blocks(model, removed)
    parameters = checkpoints.logical_parameters(model)
    checkpoints.save(model, checkpoint.tokenizer, output, {**checkpoint.info, "parameters": parameters})
    return {"original_perplexity": original, "scores": scans, "removed": removed, "blocks": count}


def perplexity_without(model: PreTrainedModel, removed: Sequence[int], windows: torch.Tensor, batch_size: int) -> float:
    """Return exp(mean next-token loss) over `windows` (samples × length token ids) of the model without some blocks."""
    import torch

    decoder, whole = model.get_decoder(), blocks_of(model)
    kept = [block for i, block in enumerate(whole) if i not in set(removed)]
    total = 0.0
    try:
        decoder.layers = torch.nn.ModuleList(kept)
        with torch.inference_mode():
            for batch in windows.split(batch_size):
                logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
                losses = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
                )
                total += losses.item()
    finally:
        decoder.layers = whole
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))
