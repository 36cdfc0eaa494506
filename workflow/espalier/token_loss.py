"""The loss of a causal language model on chosen tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from espalier import training

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TokenLoss:
    """Mean negative log-likelihood (nats) over learned tokens; a sample is {"input_ids", "labels"}, lists of ints."""

    pad: int  # token id; it fills short rows and is never learned
    device: str
    autocast: bool  # matrix products in bfloat16

    def weight(self, item: dict) -> int:
        """Return the number of learned tokens."""
        return sum(label != training.UNSEEN for label in item["labels"])

    def loss(self, model, items: list[dict], total: int) -> torch.Tensor:
        """Return the negative log-likelihood summed over the learned tokens, divided by `total`."""
        import torch
        from torch.nn.functional import cross_entropy

        longest = max(len(item["input_ids"]) for item in items)
        ids = torch.full((len(items), longest), self.pad)
        labels = torch.full((len(items), longest), training.UNSEEN)
        for row, item in enumerate(items):
            ids[row, : len(item["input_ids"])] = torch.tensor(item["input_ids"])
            labels[row, : len(item["labels"])] = torch.tensor(item["labels"])
        ids, labels = ids.to(self.device), labels.to(self.device)
        # Padding is on the right and attention is causal: no learned token sees it, and no mask is needed.
        with training.autocast(self.device, self.autocast):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
        return loss / total
