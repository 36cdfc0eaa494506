"""How the next token is chosen from logits, batch × vocabulary: a function of logits and a generator, by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TOP_K, TOP_P = 50, 0.95  # Shortened LLaMA's own settings (Kim et al. 2024, 2402.02834)


def greedy(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return logits.argmax(-1)


def top_k_top_p(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw from the TOP_K likeliest tokens, and of these from the fewest that hold TOP_P of their probability."""
    largest, tokens = logits.float().topk(min(TOP_K, logits.shape[-1]))
    likely = largest.softmax(-1)
    before = likely.cumsum(-1) - likely  # of all that are likelier
    drawn = likely.masked_fill_(before >= TOP_P, 0).multinomial(1, generator=generator)
    return tokens.gather(-1, drawn)[:, 0]


SAMPLINGS = {"greedy": greedy, "top-k-top-p": top_k_top_p}
