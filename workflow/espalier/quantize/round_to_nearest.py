"""Round to nearest: every weight becomes its nearest code, without a look at data. The floor for all other methods.

A group of input channels, or a whole row, shares a scale by which its values just fit (models/lowbit.py has the
formulas). With `activations: 8` each token's inputs are rounded too, and products are computed in integers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from espalier import checkpoints, lowbit_checkpoints

TAKES = ("causal-lm",)


@dataclass(frozen=True)
class Recipe:
    """How weights are stored, and what they are multiplied with."""

    bits: Literal[2, 3, 4, 8]  # a weight
    group_size: Literal[-1, 16, 32, 64, 128, 256, 512, 1024] = -1  # input channels that share a scale; -1: all of them
    symmetric: bool = False  # no zero points; otherwise a group's values span from its smallest to its largest
    activations: Literal[8] | None = None  # bits of the inputs, rounded token by token; none: they stay as they are

    def check(self) -> None:
        if self.activations and (self.group_size != -1 or not self.symmetric):
            raise ValueError("'activations: 8' needs 'group_size: -1' and 'symmetric: true', for products in integers.")


def apply(parent: Path, output: Path, recipe: Recipe, *, seed: int, device: str) -> dict:
    """Round the parent's weights and save them packed; returns the seconds taken and the bytes before and after.

    Raises UserError for a parent that is quantized already, or whose layers the groups do not divide.
    """
    from espalier.models import lowbit

    checkpoints.refuse_quantized(parent, "round-to-nearest")
    scheme = lowbit.Scheme(recipe.bits, recipe.group_size, recipe.symmetric, recipe.activations)
    lowbit.check_widths(lowbit.linear_layers(checkpoints.skeleton(parent)), scheme, parent)
    checkpoint = checkpoints.load(parent, device="cpu")
    started = time.monotonic()
    lowbit.round_layers(checkpoint.model, scheme)
    seconds = time.monotonic() - started
    dtype = checkpoints.weights_dtype(parent)
    lowbit_checkpoints.save(checkpoint.model, checkpoint.tokenizer, output, checkpoint.info, scheme, dtype)
    return {
        "seconds": seconds,
        "bytes": {"before": checkpoints.weight_bytes(parent), "after": checkpoints.weight_bytes(output)},
    }
