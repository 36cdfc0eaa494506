"""Perplexity on running text: documents joined, cut into windows that do not overlap (Kim et al. 2024, 2402.02834).

All rows, empty ones too, are joined by `joiner` and tokenized as one text, with the BOS token before it or not.
WikiText has blank rows between its lines, which are part of the published numbers. The tokens are cut
into windows of `window` tokens, BOS counted; a last incomplete window is dropped. Each window is scored by itself:
its first token is not predicted, so a window gives window − 1 predictions. Perplexity = exp(mean negative
log-likelihood over all predictions), natural logarithm, log-softmax in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from espalier.data import Text
from espalier.errors import UserError
from espalier.measured import Measured
from espalier.progress import progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from espalier.checkpoints import Checkpoint

TAKES = ("causal-lm",)
LARGEST_MEAN = 700.0  # nats a token; e to this power is near the largest float


@dataclass(frozen=True)
class Recipe:
    """How perplexity is measured."""

    text: Text
    window: int = 128  # tokens in a window
    bos_first_window: bool = True  # the BOS token opens the first window only; false: no BOS at all
    joiner: str = "\n\n"  # stands between two documents
    batch_size: int = 16  # windows scored at once; it does not change the result beyond rounding

    def check(self) -> None:
        if self.window < 2 or self.batch_size < 1:
            raise ValueError("'window' must be at least 2 and 'batch_size' at least 1.")


def passages(recipe: Recipe) -> Iterator[str]:
    """Yield the documents."""
    return (document for _, document in recipe.text.numbered())


def measure(checkpoint: Checkpoint, recipe: Recipe, *, seed: int, device: str) -> Measured:
    """Return perplexity (unit ppl; n = predicted tokens) and each window's summed negative log-likelihood (nats).

    The standard error is the delta method's over windows: perplexity × standard error of the mean of window means.
    """
    tokens = token_windows(checkpoint.tokenizer, recipe)
    sums = window_losses(checkpoint.model, tokens, recipe.batch_size, device)
    predicted = recipe.window - 1
    name = recipe.text.dataset.name
    measurement = {"task": name, "metric": "perplexity", "n": predicted * len(sums), "unit": "ppl"}
    measurement |= _perplexity([total / predicted for total in sums])
    nll = [total if math.isfinite(total) else None for total in sums]
    return Measured([measurement], {name: {"nll": nll, "tokens": [predicted] * len(sums)}})


def _perplexity(means: list[float]) -> dict:
    """Return value and stderr from the windows' mean losses, or an outcome where there is none."""
    mean = sum(means) / len(means)
    if not mean < LARGEST_MEAN:
        return {"value": None, "stderr": None, "outcome": "undefined: the model's losses are not finite"}
    value, stderr = math.exp(mean), None
    if len(means) > 1:
        variance = sum((one - mean) ** 2 for one in means) / (len(means) - 1)
        stderr = value * math.sqrt(variance / len(means))
    return {"value": value, "stderr": stderr}


def token_windows(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> torch.Tensor:
    """Return the windows' token ids [windows, window]. Raises UserError for too short a text or a missing BOS token."""
    import torch

    ids = tokenizer(recipe.joiner.join(recipe.text.each()), add_special_tokens=False, verbose=False)["input_ids"]
    if recipe.bos_first_window:
        if tokenizer.bos_token_id is None:
            raise UserError("The tokenizer has no BOS token: set the perplexity recipe's 'bos_first_window' to false.")
        ids = [tokenizer.bos_token_id, *ids]
    count = len(ids) // recipe.window
    if count == 0:
        raise UserError(
            f"The dataset '{recipe.text.dataset.name}', split '{recipe.text.split}', holds {len(ids)} tokens, fewer"
            f" than one window of {recipe.window}."
        )
    return torch.tensor(ids[: count * recipe.window]).view(count, recipe.window)


def window_losses(model: PreTrainedModel, windows: torch.Tensor, batch_size: int, device: str) -> list[float]:
    """Return each window's negative log-likelihood, summed over its predictions (nats), for ids [windows, window]."""
    import torch
    from torch.nn.functional import cross_entropy

    sums: list[float] = []
    with torch.no_grad():
        for ids in progress(windows.split(batch_size), "perplexity, batches of windows"):
            ids = ids.to(device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            losses = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            sums += losses.double().sum(1).tolist()
    return sums
