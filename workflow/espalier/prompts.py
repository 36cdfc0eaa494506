"""Prompts of fixed token ids: what is measured with them is time and memory, for which the words do not matter."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from espalier.checkpoints import Checkpoint


def prompt(checkpoint: Checkpoint, length: int, seed: int) -> list[int]:
    """Return `length` ordinary token ids, drawn once: shorter prompts are its beginnings."""
    special = set(checkpoint.tokenizer.all_special_ids)
    ordinary = [token for token in range(len(checkpoint.tokenizer)) if token not in special]
    return random.Random(f"prompt-{seed}").choices(ordinary, k=length)
