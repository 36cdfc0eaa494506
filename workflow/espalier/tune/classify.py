"""Fine-tunes an encoder on one GLUE task: a new classification head, all weights trained (Devlin et al. 2019).

Cross-entropy on the labels, or the mean squared error for STS-B; AdamW with warm-up, then linear decay to zero.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from espalier import glue_tasks, parallel, training
from espalier.data import Dataset

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from espalier.training_state import Saving

TAKES = ("masked-lm",)
GIVES = "sequence-classification"


@dataclass(frozen=True)
class Recipe:
    """The task, its data, and how the encoder is trained on it. Give exactly one of `steps` and `epochs`."""

    task: glue_tasks.Name  # a GLUE task
    dataset: Dataset
    split: str = "train"  # rows that are trained on
    steps: int | None = None  # optimizer steps
    epochs: float | None = None  # passes over the split
    batch_size: int = 32  # rows an optimizer step
    learning_rate: float = 2.0e-5  # peak, of AdamW; it rises and falls linearly
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 0.01  # of matrices; never of biases and norms
    adam_beta2: float = 0.999  # AdamW's decay of squared gradients
    max_gradient_norm: float = 1.0  # gradients are scaled down to this norm
    max_length: int = 128  # tokens, at most those that the model can take; longer inputs are cut
    autocast: bool = False  # matrix products in bfloat16; weights and their updates stay in float32
    attention: Literal["sdpa", "eager"] = "sdpa"  # eager is faster for tiny models on a CPU

    def check(self) -> None:
        training.check_duration(self.steps, self.epochs)
        if self.batch_size < 1 or self.max_length < 4:
            raise ValueError("'batch_size' must be at least 1 and 'max_length' at least 4.")
        if not 0 <= self.warmup < 1:
            raise ValueError("'warmup' is a share of the steps: at least 0 and below 1.")


def apply(
    parent: Path, output: Path | None, recipe: Recipe, *, seed: int, device: str, saving: Saving | None = None
) -> dict:
    """Fine-tune `parent` and save the classifier into `output`; return rows, steps, the loss curve and the seconds."""
    import torch

    from espalier import checkpoints

    parallel.refuse("Fine-tuning a classifier")
    found = glue_tasks.rows(recipe.dataset, recipe.task, recipe.split)
    torch.manual_seed(seed)  # the new head and dropout
    checkpoint = checkpoints.load(
        parent,
        device,
        GIVES,
        **glue_tasks.outputs(recipe.task),
        dtype=torch.float32,
        attn_implementation=recipe.attention,
    )
    tokenizer = checkpoint.tokenizer
    encoded = glue_tasks.encode(checkpoint, recipe.task, found, recipe.max_length)
    items = [{"inputs": one, "label": row["label"]} for one, row in zip(encoded, found, strict=True)]
    steps = training.steps_of(len(items), recipe.batch_size, recipe.steps, recipe.epochs)
    started = time.perf_counter()
    report = training.fit(
        checkpoint.model,
        training.Rows(items, recipe.batch_size, steps, seed),
        LabelLoss(tokenizer, device, recipe.autocast),
        training.plan_of_rows(recipe, steps),
        device=device,
        label=f"fine-tuning on {recipe.task}",
        saving=saving,
    )
    seconds = time.perf_counter() - started
    parameters = checkpoints.logical_parameters(checkpoint.model)
    info = {**checkpoint.info, "task": GIVES, "parameters": parameters, "glue_task": recipe.task}
    checkpoints.save(checkpoint.model, tokenizer, output, info)
    losses = report["losses"]
    return {"rows": len(items), "steps": len(losses), "seconds": round(seconds, 2), "losses": losses}


@dataclass(frozen=True)
class LabelLoss:
    """Mean loss over rows {"inputs", "label"}: squared error for one output, cross-entropy for more."""

    tokenizer: PreTrainedTokenizerBase
    device: str
    autocast: bool  # matrix products in bfloat16

    def weight(self, item: dict) -> int:
        return 1

    def loss(self, model: PreTrainedModel, items: list[dict], total: int) -> torch.Tensor:
        """Return the mean loss of `items` as their share of a mean over `total` rows."""
        batch = glue_tasks.pad(self.tokenizer, [item["inputs"] for item in items], self.device)
        with training.autocast(self.device, self.autocast):
            logits = model(**batch).logits
        return loss_of(logits, [item["label"] for item in items], self.device) * (len(items) / total)


def loss_of(logits: torch.Tensor, labels: list, device: str) -> torch.Tensor:
    """Return the mean loss of logits [batch, labels]: squared error for one output, cross-entropy for more."""
    import torch
    from torch.nn.functional import cross_entropy, mse_loss

    logits = logits.float()
    if logits.shape[1] == 1:
        return mse_loss(logits[:, 0], torch.tensor(labels, dtype=torch.float32, device=device))
    return cross_entropy(logits, torch.tensor(labels, device=device))
