"""Supervised fine-tuning of all weights on prompts and responses (Ouyang et al. 2022, 2203.02155, Section 3.5).

The loss is the mean negative log-likelihood over the tokens of the responses, the end token included; prompts are read
but not learned. Weights are trained in float32 by AdamW; those with the lowest validation loss are kept.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from espalier import full_training, instructions, training
from espalier.data import Dataset
from espalier.token_loss import TokenLoss

if TYPE_CHECKING:
    from pathlib import Path

    from espalier.training_state import Saving

TAKES = ("causal-lm",)


@dataclass(frozen=True)
class Recipe:
    """The data, and how all weights are trained on it. Give exactly one of `steps` and `epochs`."""

    dataset: Dataset
    split: str = "train"  # rows that are trained on, and of which some are set aside
    config: str | None = None  # a subset of the dataset
    template: Literal["plain", "alpaca"] = "plain"  # columns: prompt, response; or instruction, input, output
    separator: str = ""  # plain: stands between prompt and response, and is learned with the response
    end_token: bool = True  # whether the end of a response is learned too
    cutoff: int = 256  # tokens of prompt and response; what is longer is cut
    steps: int | None = None  # optimizer steps
    epochs: float | None = None  # passes over the training rows
    batch_size: int = 64  # rows in an optimizer step
    micro_batch: int = 4  # rows computed at once; it does not change the result beyond rounding
    learning_rate: float = 2.0e-5  # peak, of AdamW
    schedule: Literal["linear", "cosine"] = "linear"  # how the learning rate falls to zero
    warmup_steps: int = 100  # steps in which the learning rate rises
    weight_decay: float = 0.0  # of matrices; never of biases and norms
    adam_beta2: float = 0.999  # AdamW's decay of squared gradients
    max_gradient_norm: float = 1.0  # gradients are scaled down to this norm
    validation_samples: int = 2000  # rows set aside, drawn by the seed; 0: keep the last weights
    validate_every: int = 200  # steps; the last step is always validated
    gradient_checkpointing: bool = False  # activations of a block are computed again for its gradients, not kept
    autocast: bool = False  # matrix products in bfloat16; weights and their updates stay in float32
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the result
    attention: Literal["sdpa", "eager"] = "sdpa"  # eager is faster for tiny models on a CPU

    def check(self) -> None:
        training.check_duration(self.steps, self.epochs)
        self.dataset.check_part(self.split, self.config)
        if min(self.batch_size, self.micro_batch, self.validate_every) < 1:
            raise ValueError("'batch_size', 'micro_batch' and 'validate_every' must be at least 1.")
        if self.cutoff < 2 or self.validation_samples < 0 or self.warmup_steps < 0:
            raise ValueError("'cutoff' must be at least 2, 'validation_samples' and 'warmup_steps' at least 0.")


def processes(recipe: Recipe, most: int) -> int:
    """Return how many of `most` processes share the training: all."""
    return most


def apply(
    parent: Path, output: Path | None, recipe: Recipe, *, seed: int, device: str, saving: Saving | None = None
) -> dict:
    """Train all weights of `parent` and save the model into `output` (None: take part, and write nothing).

    Returns the loss curve, the validation losses, the step kept, the number of trained parameters and the seconds.
    Raises UserError for a parent with packed weights.
    """
    checkpoint = full_training.load(parent, device, recipe.attention, recipe.gradient_checkpointing, seed)
    tokenizer = checkpoint.tokenizer
    items, dropped = instructions.examples(tokenizer, recipe)
    train, validation = instructions.split_rows(items, recipe.validation_samples, seed)
    trained = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    steps = training.steps_of(len(train), recipe.batch_size, recipe.steps, recipe.epochs)
    plan = training.plan_of(recipe, steps)
    started = time.perf_counter()
    report = training.fit(
        checkpoint.model,
        training.Rows(train, recipe.batch_size, steps, seed),
        TokenLoss(tokenizer.pad_token_id, device, recipe.autocast),
        plan,
        device=device,
        label="supervised fine-tuning, steps",
        validation=validation,
        saving=saving,
    )
    seconds = time.perf_counter() - started
    full_training.save(checkpoint, output, recipe.dtype)
    counts = {"train_rows": len(train), "validation_rows": len(validation), "dropped_rows": dropped}
    return {**counts, "trained_parameters": trained, "seconds": round(seconds, 2), **report}
