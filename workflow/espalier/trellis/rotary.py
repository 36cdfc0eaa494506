"""Rotary position embeddings (Su et al. 2021, 2104.09864) of every architecture as one expression:

    turned = x · cosine + x[swap] · sine

over the whole width of a head, where `swap` is each channel's partner and the sign is in the sine. Channels that do not
turn have cosine 1 and sine 0. The angles come from transformers' own module.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn


class Rotary(NamedTuple):
    """Tables positions × head_dim, and each channel's partner, head_dim."""

    cosine: torch.Tensor
    sine: torch.Tensor
    swap: torch.Tensor

    def at(self, positions: torch.Tensor) -> Rotary:
        """Return the tables of these positions alone, positions × 1 × head_dim."""
        cosine = self.cosine.index_select(0, positions).unsqueeze(1)
        return Rotary(cosine, self.sine.index_select(0, positions).unsqueeze(1), self.swap)

    def turn(self, heads: torch.Tensor) -> torch.Tensor:
        """Return … × positions × heads × head_dim turned by the tables that `at` gave."""
        return torch.addcmul(heads * self.cosine, heads.index_select(-1, self.swap), self.sine)


def tables(module: nn.Module, interleaved: bool, positions: int, head_dim: int, like: torch.Tensor) -> Rotary:
    """Return the tables of positions 0 to `positions` − 1, in the dtype and on the device of `like`.

    `module` is transformers' own, `interleaved` whether it turns channels (2i, 2i + 1) and not (i, i + half).
    """
    numbers = torch.arange(positions, device=like.device)
    cosine, sine = (table[0] for table in module(like, numbers[None]))
    turning = cosine.shape[-1]  # of the head's channels; each angle stands there twice
    half, channels = turning // 2, torch.arange(turning, device=like.device)
    if interleaved:
        cosine, sine = (table[:, :half].repeat_interleave(2, -1) for table in (cosine, sine))
        swap, first = channels ^ 1, channels % 2 == 0
    else:
        swap, first = channels.roll(half), channels < half
    sine = torch.where(first, -sine, sine)
    still = head_dim - turning
    return Rotary(
        torch.cat([cosine, cosine.new_ones(positions, still)], -1),
        torch.cat([sine, sine.new_zeros(positions, still)], -1),
        torch.cat([swap, torch.arange(turning, head_dim, device=like.device)]),
    )
