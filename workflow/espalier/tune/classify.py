"""Fine-tunes an encoder on one GLUE task: a new classification head, all weights trained (Devlin et al. 2019).

Cross-entropy on the labels, or the mean squared error for STS-B; AdamW with warm-up, then linear decay to zero.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from espalier import glue_tasks, training
from espalier.data import Dataset
from espalier.progress import progress

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

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
    max_length: int = 128  # tokens; longer inputs are cut
    autocast: bool = False  # matrix products in bfloat16; weights and their updates stay in float32
    attention: Literal["sdpa", "eager"] = "sdpa"  # eager is faster for tiny models on a CPU

    def check(self) -> None:
        training.check_duration(self.steps, self.epochs)
        if self.batch_size < 1 or self.max_length < 4:
            raise ValueError("'batch_size' must be at least 1 and 'max_length' at least 4.")
        if not 0 <= self.warmup < 1:
            raise ValueError("'warmup' is a share of the steps: at least 0 and below 1.")


def apply(parent: Path, output: Path, recipe: Recipe, *, seed: int, device: str) -> dict:
    """Fine-tune `parent` and save the classifier into `output`; return rows, steps, the loss curve and the seconds."""
    import torch

    from espalier import checkpoints

    task = glue_tasks.TASKS[recipe.task]
    found = glue_tasks.rows(recipe.dataset, recipe.task, recipe.split)
    torch.manual_seed(seed)  # the new head and dropout
    checkpoint = checkpoints.load(
        parent,
        device,
        GIVES,
        num_labels=task.labels,
        dtype=torch.float32,
        attn_implementation=recipe.attention,
    )
    items = glue_tasks.encode(checkpoint.tokenizer, recipe.task, found, recipe.max_length)
    labels = [row["label"] for row in found]
    started = time.perf_counter()
    losses = _train(checkpoint, recipe, items, labels, seed)
    seconds = time.perf_counter() - started
    model = checkpoint.model.eval()
    parameters = checkpoints.logical_parameters(model)
    info = {"task": GIVES, "parameters": parameters, "glue_task": recipe.task}
    checkpoints.save(model, checkpoint.tokenizer, output, info)
    return {"rows": len(items), "steps": len(losses), "seconds": round(seconds, 2), "losses": losses}


def optimizer_of(model: PreTrainedModel, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [one for one in trained if one.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [one for one in trained if one.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, recipe.adam_beta2), fused=True)


def loss_of(logits: torch.Tensor, labels: list, device: str) -> torch.Tensor:
    """Return the mean loss of logits [batch, labels]: squared error for one output, cross-entropy for more."""
    import torch
    from torch.nn.functional import cross_entropy, mse_loss

    logits = logits.float()
    if logits.shape[1] == 1:
        return mse_loss(logits[:, 0], torch.tensor(labels, dtype=torch.float32, device=device))
    return cross_entropy(logits, torch.tensor(labels, device=device))


def _train(checkpoint, recipe: Recipe, items: list[dict], labels: list, seed: int) -> list[float]:
    """Train in place; return each step's loss."""
    import torch

    model, device = checkpoint.model.train(), checkpoint.device
    optimizer = optimizer_of(model, recipe)
    steps = training.steps_of(len(items), recipe.batch_size, recipe.steps, recipe.epochs)
    warmup = round(recipe.warmup * steps)
    losses = []
    bar = progress(training.batches(len(items), recipe.batch_size, steps, seed), f"fine-tuning on {recipe.task}", steps)
    for step, rows in enumerate(bar):
        training.set_learning_rate(optimizer, recipe.learning_rate * training.warmup_then_linear(step, steps, warmup))
        batch = glue_tasks.pad(checkpoint.tokenizer, [items[i] for i in rows], device)
        with training.autocast(device, recipe.autocast):
            logits = model(**batch).logits
        loss = loss_of(logits, [labels[i] for i in rows], device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(loss.item(), 5))
        bar.note(f"loss {losses[-1]:.3f}")
    return losses
