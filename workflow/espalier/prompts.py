"""Shapes of a workload, and prompts of fixed token ids: for time and memory the words do not matter."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from espalier.checkpoints import Checkpoint


def check_shapes(input_tokens: list[int], output_tokens: list[int], batch_sizes: list[int]) -> None:
    """Raise ValueError unless each list holds different whole numbers from 1 up, at least one."""
    for key, values in (("input_tokens", input_tokens), ("output_tokens", output_tokens), ("batch_sizes", batch_sizes)):
        if not values or min(values) < 1 or len(set(values)) != len(values):
            raise ValueError(f"'{key}' must be a list of whole numbers from 1 up, none twice.")


def prompt(checkpoint: Checkpoint, length: int, seed: int) -> list[int]:
    """Return `length` ordinary token ids, drawn once: shorter prompts are its beginnings."""
    special = set(checkpoint.tokenizer.all_special_ids)
    ordinary = [token for token in range(len(checkpoint.tokenizer)) if token not in special]
    return random.Random(f"prompt-{seed}").choices(ordinary, k=length)
