"""What ranks whole transformer blocks for removal: one function a criterion, and the table of all of them.

A block that scores low goes first. A score function gets a `BlockStream`, the indices of the blocks that may go, and a
generator of random numbers; it returns a `Scan` and leaves the model as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from espalier.models import footprint
from espalier.models.anatomy import blocks_of
from espalier.models.streaming import BlockStream, gradients
from espalier.progress import progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from espalier.data import Calibration


class Scan(NamedTuple):
    """The score of each block that may go and, where the criterion measures it, the perplexity with all blocks."""

    scores: dict[int, float]
    perplexity: float | None = None


def magnitude(stream: BlockStream, candidates: Sequence[int], draw: Random) -> Scan:
    """Return Σ |W| over all matrices of a block (Kim et al. 2024, arXiv 2402.02834, section 3.2)."""
    import torch

    scores = {}
    for block in progress(candidates, "scoring blocks"):
        weights = (weight.detach().to(stream.device) for weight in _matrices(stream.blocks[block]).values())
        # Row by row: summing a matrix in float64 would make a copy of it in float64.
        scores[block] = sum(weight.abs().sum(1, dtype=torch.float32).double().sum().item() for weight in weights)
    return Scan(scores)


def taylor(stream: BlockStream, candidates: Sequence[int], draw: Random) -> Scan:
    """Return Σ |W · g| over all matrices of a block (Kim et al. 2024, arXiv 2402.02834, section 3.2).

    g is the gradient of the mean over samples of their mean next-token losses.
    """
    import torch

    scores = {}
    with contextlib.closing(gradients(stream)) as backwards:
        for block, means in progress(backwards, "scoring blocks, last first", len(stream) - min(candidates)):
            if block in candidates:
                scores[block] = sum(
                    (weight.detach() * means[name][0]).abs().sum(dtype=torch.float64).item()
                    for name, weight in _matrices(stream.blocks[block]).items()
                )
            if block == min(candidates):
                break
    return Scan({block: scores[block] for block in candidates})


def perplexity(stream: BlockStream, candidates: Sequence[int], draw: Random) -> Scan:
    """Return exp(mean next-token loss) of the model without each block.

    Criterion PPL of Kim et al. 2024 (arXiv 2402.02834), section 3.2. The model without block n is the whole model as
    far as n. So the samples go through the blocks once: hidden states of the whole model, and, behind block n, those of
    the model without n. With L blocks that may all go, that is L + L (L - 1) / 2 evaluations of a block on all samples;
    one model after another takes L + L (L - 1). Each block is on the device once.
    """
    import torch

    waiting: dict[int | None, torch.Tensor] = {}  # block left out → hidden states; None: the whole model
    with torch.no_grad():
        waiting[None] = stream.enter()
        for block in progress(range(len(stream)), "scoring blocks"):
            before = waiting[None]
            with stream.resident(block):
                for without, hidden in waiting.items():
                    waiting[without] = stream.run(block, hidden)
            if block in candidates:
                waiting[block] = before
        with stream.surroundings():
            found = {
                without: stream.losses(hidden).mean(dtype=torch.float64).exp().item()
                for without, hidden in waiting.items()
            }
    return Scan({block: found[block] for block in candidates}, found[None])


def block_influence(stream: BlockStream, candidates: Sequence[int], draw: Random) -> Scan:
    """Return 1 - the mean over all tokens of cos(X_i, X_i+1): the hidden states before and behind block i.

    Block Influence of ShortGPT (Men et al. 2024, arXiv 2403.03853). Behind the last block are the hidden
    states before the final norm.
    """
    import torch

    scores = {}
    with torch.no_grad():
        before = stream.enter()
        for block in progress(range(max(candidates) + 1), "scoring blocks"):
            with stream.resident(block):
                behind = stream.run(block, before)
            if block in candidates:
                cosines = [
                    torch.cosine_similarity(x.double(), y.double(), dim=-1).mean()
                    for x, y in zip(before, behind, strict=True)
                ]
                scores[block] = 1 - torch.stack(cosines).mean().item()
            before = behind
    return Scan(scores)


def random(stream: BlockStream, candidates: Sequence[int], draw: Random) -> Scan:
    """Return a random number between 0 and 1 for each block: the control that a criterion has to beat."""
    return Scan({block: draw.random() for block in candidates})


@dataclass(frozen=True)
class Criterion:
    """How blocks are scored, and what that needs."""

    score: Callable[[BlockStream, Sequence[int], Random], Scan]
    calibrated: bool = True  # scores depend on calibration windows
    gradients: bool = False  # taken sample by sample, in 32 bits at least, because smaller ones would vanish

    def stream(self, model: PreTrainedModel, windows: torch.Tensor, device: str, batch_size: int) -> BlockStream:
        """Return what `score` gets; raises UserError if a weight is not a finite number."""
        import torch

        if self.gradients:
            return BlockStream(model, windows, device, 1, torch.promote_types(model.dtype, torch.float32))
        return BlockStream(model, windows, device, batch_size)

    def peak_bytes(self, model: PreTrainedModel, calibration: Calibration | None, batch_size: int) -> int:
        """Return the most bytes on the device, of a model that may be on the meta device."""
        itemsize = model.dtype.itemsize
        if calibration is None:
            return max(sum(weight.nbytes for weight in block.parameters()) for block in blocks_of(model))
        if not self.gradients:
            losses = self.score is perplexity
            return footprint.peak_bytes(model, calibration, batch_size, copies=1, itemsize=itemsize, losses=losses)
        # Of a block: weights, gradient of a sample, means of gradients and of their squares.
        return footprint.peak_bytes(model, calibration, 1, copies=4, itemsize=max(4, itemsize), losses=True)


CRITERIA = {
    "magnitude": Criterion(magnitude, calibrated=False),
    "taylor": Criterion(taylor, gradients=True),
    "perplexity": Criterion(perplexity),
    "block-influence": Criterion(block_influence),
    "random": Criterion(random, calibrated=False),
}


def _matrices(block: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return name → weight of all linear layers of a block."""
    from torch.nn import Linear

    return {f"{name}.weight": layer.weight for name, layer in block.named_modules() if isinstance(layer, Linear)}
