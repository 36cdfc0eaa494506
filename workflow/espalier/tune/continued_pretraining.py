"""Continued pretraining: all weights go on learning to predict the next token of running text (2402.02834, CPT).

Documents are read as a stream in the dataset's own order, each followed by the end token, joined and cut into windows;
after the last document comes the first again. Shuffle the dataset's files beforehand if their order is not random. The
loss is the mean negative log-likelihood over all tokens of the windows but each one's first.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from espalier import full_training, training
from espalier.data import Text
from espalier.document_stream import Windows
from espalier.errors import UserError
from espalier.token_loss import TokenLoss

if TYPE_CHECKING:
    from pathlib import Path

    from espalier.training_state import Saving

TAKES = ("causal-lm",)


@dataclass(frozen=True)
class Recipe:
    """The text, and how all weights are trained on it. A step learns `batch_size` windows of `length` tokens."""

    text: Text  # documents that are trained on
    steps: int  # optimizer steps
    length: int = 2048  # tokens a window
    batch_size: int = 64  # windows in an optimizer step
    micro_batch: int = 4  # windows computed at once; it does not change the result beyond rounding
    learning_rate: float = 1.0e-4  # peak, of AdamW
    schedule: Literal["linear", "cosine"] = "cosine"  # how the learning rate falls to zero
    warmup_steps: int = 100  # steps in which the learning rate rises
    weight_decay: float = 0.1  # of matrices; never of biases and norms
    adam_beta2: float = 0.95  # AdamW's decay of squared gradients
    max_gradient_norm: float = 1.0  # gradients are scaled down to this norm
    validation: Text | None = None  # documents that are not trained on; none: keep the last weights
    validation_windows: int = 64  # windows of them, from the first on, at most
    validate_every: int = 200  # steps; the last step is always validated
    gradient_checkpointing: bool = False  # activations of a block are computed again for its gradients, not kept
    autocast: bool = False  # matrix products in bfloat16; weights and their updates stay in float32
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the result
    attention: Literal["sdpa", "eager"] = "sdpa"  # eager is faster for tiny models on a CPU

    def check(self) -> None:
        if min(self.steps, self.batch_size, self.micro_batch, self.validate_every, self.validation_windows) < 1:
            raise ValueError(
                "'steps', 'batch_size', 'micro_batch', 'validate_every' and 'validation_windows' must be at least 1."
            )
        if self.length < 2 or self.warmup_steps < 0:
            raise ValueError("'length' must be at least 2 and 'warmup_steps' at least 0.")


class Packed:
    """Batches of windows as samples of `TokenLoss`."""

    def __init__(self, windows: Windows, batch_size: int):
        self.windows, self.batch_size = windows, batch_size

    def take(self) -> list[dict]:
        return [sample(window) for window in self.windows.take(self.batch_size)]

    def position(self) -> dict:
        return self.windows.position()

    def seek(self, position: dict) -> None:
        self.windows.seek(position)

    def fingerprint(self) -> str:
        return self.windows.fingerprint()


def sample(window: list[int]) -> dict:
    """Return a window as a sample: nothing stands before its first token, so that one is not learned."""
    return {"input_ids": window, "labels": [training.UNSEEN, *window[1:]]}


def processes(recipe: Recipe, most: int) -> int:
    """Return how many of `most` processes share the training: all."""
    return most


def apply(
    parent: Path, output: Path | None, recipe: Recipe, *, seed: int, device: str, saving: Saving | None = None
) -> dict:
    """Train all weights of `parent` and save the model into `output` (None: take part, and write nothing).

    Returns the loss curve, the validation losses, the step kept, the tokens read, how often the end of the data was
    reached, and the seconds. Raises UserError for a parent with packed weights, and for text without documents.
    """
    checkpoint = full_training.load(parent, device, recipe.attention, recipe.gradient_checkpointing, seed)
    tokenizer = checkpoint.tokenizer
    validation = held_out(recipe, tokenizer)
    windows = Windows(recipe.text, tokenizer, recipe.length)
    trained = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    started = time.perf_counter()
    report = training.fit(
        checkpoint.model,
        Packed(windows, recipe.batch_size),
        TokenLoss(tokenizer.pad_token_id, device, recipe.autocast),
        training.plan_of(recipe, recipe.steps),
        device=device,
        label="continued pretraining, steps",
        validation=validation,
        saving=saving,
    )
    seconds = time.perf_counter() - started
    full_training.save(checkpoint, output, recipe.dtype)
    counts = {
        "tokens": recipe.steps * recipe.batch_size * recipe.length,
        "ends_of_data": windows.passes,
        "validation_windows": len(validation),
        "trained_parameters": trained,
    }
    return {**counts, "seconds": round(seconds, 2), **report}


def held_out(recipe: Recipe, tokenizer) -> list[dict]:
    """Return the validation windows as samples; raises UserError where the text does not fill one."""
    if recipe.validation is None:
        return []
    found = Windows(recipe.validation, tokenizer, recipe.length).rest(recipe.validation_windows)
    if not found:
        raise UserError(
            f"The dataset '{recipe.validation.dataset.name}', split '{recipe.validation.split}', is shorter than one"
            f" window of {recipe.length} tokens: lower 'length' or leave 'validation' out."
        )
    return [sample(window) for window in found]
