"""What every training loop shares: a seeded order of batches, the learning-rate schedule, and autocast."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def steps_of(count: int, batch_size: int, steps: int | None, epochs: float | None) -> int:
    """Return the number of optimizer steps: `steps`, or those of `epochs` passes over `count` samples."""
    return steps if steps is not None else math.ceil(epochs * math.ceil(count / batch_size))


def check_duration(steps: int | None, epochs: float | None) -> None:
    """Raise ValueError unless exactly one of the two is given, and positive."""
    if (steps is None) == (epochs is None):
        raise ValueError("give exactly one of 'steps' and 'epochs'.")
    if (steps if steps is not None else epochs) <= 0:
        raise ValueError("'steps' or 'epochs' must be positive.")


def batches(count: int, batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Yield `steps` lists of sample indices: each pass takes every sample once, in a new seeded order.

    The last batch of a pass is smaller where `batch_size` does not divide `count`.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    done = 0
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, batch_size):
            if done == steps:
                return
            done += 1
            yield order[start : start + batch_size]


def warmup_then_linear(step: int, steps: int, warmup: int) -> float:
    """Return the learning rate's factor at `step` (from 0): up to 1 over `warmup` steps, then down to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / max(1, steps - warmup)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def autocast(device: str, enabled: bool) -> torch.autocast:
    """Return a context in which matrix products run in bfloat16 if `enabled`."""
    import torch

    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)
