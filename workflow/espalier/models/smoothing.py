"""SmoothQuant's smoothing (Xiao et al. 2022, arXiv 2211.10438): outliers of activations move into the weights.

What a norm gives is divided by s, channel by channel, and the columns of the linear layers that read it are multiplied
by s; the model computes what it did before. Equation 4:

    s_j = max|X_j|^α / max|W_:,j|^(1−α)

with X the norm's output at every token of every sample, and W the rows of all layers that read it. α, the migration
strength, says how much of the difficulty goes into the weights: 0 makes all columns of W, and 1 all channels of X, as
large as one another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from espalier.errors import UserError
from espalier.models.anatomy import LAYOUTS, PRUNED, blocks_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SMALLEST = 1e-5  # of s, and of max|W_:,j|, as in the published code


@dataclass
class Pair:
    """A norm, and the linear layers of the same block that read what it gives; nothing else does."""

    name: str  # attention or mlp
    norm: torch.nn.Module
    readers: list[torch.nn.Linear]


class Range:
    """The largest magnitude of each channel, over all tokens added so far."""

    def __init__(self) -> None:
        self.largest: torch.Tensor | None = None  # channels

    def add(self, inputs: torch.Tensor) -> None:
        """Take in activations, … × channels."""
        largest = inputs.flatten(0, -2).abs().amax(0)
        self.largest = largest if self.largest is None else self.largest.maximum(largest)


@contextlib.contextmanager
def observed(*pairs: Pair) -> Iterator[tuple[Range, ...]]:
    """Yield the range of what each pair's norm gives; it grows with every forward pass inside the context.

    Afterwards it is on the CPU.
    """
    ranges = tuple(Range() for _ in pairs)
    handles = [
        pair.norm.register_forward_hook(lambda _, __, given, one=one: one.add(given))
        for pair, one in zip(pairs, ranges, strict=True)
    ]
    try:
        yield ranges
    finally:
        for handle in handles:
            handle.remove()
    for one in ranges:
        one.largest = one.largest.cpu()


def factors(largest: torch.Tensor, weights: Sequence[torch.Tensor], alpha: float) -> torch.Tensor:
    """Return the smoothing factors s of equation 4, at least 1e-5: one a channel, float32 (float64 stays what it is).

    `largest` is max|X_j| of each channel, and `weights` are those of the layers that read the channels, out × channels.
    A channel that was 0 at every token says nothing of how large it gets: its s is 1.
    """
    import torch

    of_weights = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    largest, of_weights = (one.to(torch.promote_types(one.dtype, torch.float32)) for one in (largest, of_weights))
    found = largest.pow(alpha) / of_weights.clamp(min=SMALLEST).pow(1 - alpha)
    return torch.where(largest > 0, found.clamp(min=SMALLEST), torch.ones_like(found))


def smooth(pair: Pair, factors: torch.Tensor) -> None:
    """Divide what the norm gives by the factors, one a channel, and multiply its readers' columns by them, in place."""
    import torch

    with torch.no_grad():
        for parameter in pair.norm.parameters():
            parameter.div_(factors)
        for layer in pair.readers:
            layer.weight.mul_(factors)


def pairs_of(model: PreTrainedModel) -> list[tuple[Pair, Pair]]:
    """Return for each block its pairs: before attention, and before the MLP.

    Raises UserError for an architecture whose norms are not known, and for one whose norms stand behind attention and
    MLP or have no weights.
    """
    layout = LAYOUTS.get(model.config.model_type.removeprefix(PRUNED))
    if layout is None:
        known = ", ".join(name for name, layout in LAYOUTS.items() if layout)
        raise UserError(
            f"The norms of a '{model.config.model_type}' model, into which scales are folded, are not known; those of"
            f" these are: {known}."
        )
    if not getattr(model.config, "do_layer_norm_before", True):
        raise UserError(
            "The model's norms stand behind attention and MLP ('do_layer_norm_before' is false in its config.json), so"
            " that no scales of their inputs can be folded into them."
        )

    def pair(name: str, block: torch.nn.Module, norm: str, readers: Sequence[str]) -> Pair:
        if block.get_submodule(norm).weight is None:
            raise UserError(f"The blocks' norms {norm} have no weights, into which scales could be folded.")
        return Pair(name, block.get_submodule(norm), [block.get_submodule(reader) for reader in readers])

    attention = layout.attention_norm, (layout.query, layout.key, layout.value)
    mlp = layout.mlp_norm, layout.up
    return [(pair("attention", block, *attention), pair("mlp", block, *mlp)) for block in blocks_of(model)]
