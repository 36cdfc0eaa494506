"""Mean, variance and norm of every input channel of linear layers, over all tokens that pass through them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TOKENS = 2048  # reduced at once: what bounds the memory that this takes


class Moments:
    """Mean and squared deviations of each channel, over all tokens added so far.

    Some tokens at a time are reduced in float32 (float64 stays what it is) and joined in float64 to what is there
    (Chan, Golub and LeVeque 1983, equation 2.1), so that neither many tokens nor 16-bit activations cost digits.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.mean: torch.Tensor | float = 0.0  # channels
        self.deviations: torch.Tensor | float = 0.0  # channels; sum over tokens of (x - mean)^2

    def add(self, inputs: torch.Tensor) -> None:
        """Take in activations, … × channels."""
        import torch

        for values in inputs.flatten(0, -2).split(TOKENS):
            values = values.to(torch.promote_types(values.dtype, torch.float32))
            new, tokens = values.mean(0), len(values)
            deviations = (values - new).square().sum(0).double()
            difference, together = new.double() - self.mean, self.tokens + tokens
            self.deviations = self.deviations + deviations + difference.square() * self.tokens * tokens / together
            self.mean = self.mean + difference * tokens / together
            self.tokens = together

    def variance(self) -> torch.Tensor:
        """Return the variance of each channel (divided by tokens - 1)."""
        return self.deviations / (self.tokens - 1)

    def norm(self) -> torch.Tensor:
        """Return the Euclidean norm of each channel over all tokens."""
        return (self.deviations + self.tokens * self.mean.square()).sqrt()


@contextlib.contextmanager
def observed(*layers: torch.nn.Linear) -> Iterator[tuple[Moments, ...]]:
    """Yield the moments of each layer's inputs; they grow with every forward pass inside the context.

    Afterwards they are on the CPU.
    """
    all_moments = tuple(Moments() for _ in layers)
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, moments=moments: moments.add(inputs[0]))
        for layer, moments in zip(layers, all_moments, strict=True)
    ]
    try:
        yield all_moments
    finally:
        for handle in handles:
            handle.remove()
    for moments in all_moments:
        moments.mean, moments.deviations = moments.mean.cpu(), moments.deviations.cpu()
