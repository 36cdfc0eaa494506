"""GLUE scores of a sequence classifier on the validation split, with the benchmark's own metrics.

CoLA: Matthews correlation; SST-2, QNLI, RTE: accuracy; MRPC, QQP: accuracy and F1 of label 1; STS-B: Pearson and
Spearman correlation; MNLI: accuracy on matched (task "mnli") and mismatched (task "mnli_mismatched"). Values are
fractions, not percent. The standard error of an accuracy p is sqrt(p (1 - p) / (n - 1)); that of any other metric is
the standard deviation over bootstrap resamples of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from espalier import checkpoints, glue_metrics, glue_tasks, memory
from espalier.data import Dataset
from espalier.measured import Measured
from espalier.progress import progress

if TYPE_CHECKING:
    from espalier.checkpoints import Checkpoint

TAKES = ("sequence-classification",)


@dataclass(frozen=True)
class Recipe:
    """Which task is scored, and on what."""

    task: glue_tasks.Name  # a GLUE task
    dataset: Dataset
    batch_size: int = 64  # it does not change the result beyond rounding
    max_length: int = 128  # tokens, at most those that the model can take; longer inputs are cut

    def check(self) -> None:
        if self.batch_size < 1 or self.max_length < 4:
            raise ValueError("'batch_size' must be at least 1 and 'max_length' at least 4.")


def passages(recipe: Recipe) -> Iterator[str]:
    """Yield the input of every validation row: its columns, one after another."""
    task = glue_tasks.TASKS[recipe.task]
    for split in task.splits.values():
        for row in glue_tasks.rows(recipe.dataset, recipe.task, split):
            yield " ".join(row[column] for column in task.columns)


def measure(checkpoint: Checkpoint, recipe: Recipe, *, seed: int, device: str) -> Measured:
    """Return the model's sizes, the task's metrics, and every prediction (STS-B: a raw score) with its label.

    Raises UserError for a checkpoint that was made for another task or number of labels.
    """
    task = glue_tasks.TASKS[recipe.task]
    glue_tasks.check_classifier(checkpoint, recipe.task)
    sizes = {
        "weights_allocated": memory.allocated_bytes(device),
        "weights_on_disk": checkpoints.weight_bytes(checkpoint.folder),
    }
    measurements = [{"task": recipe.task, "metric": name, "value": n, "unit": "bytes"} for name, n in sizes.items()]
    samples = {}
    for name, split in task.splits.items():
        found = glue_tasks.rows(recipe.dataset, recipe.task, split)
        labels = [row["label"] for row in found]
        predictions = predict(checkpoint, recipe, found, device)
        samples[name] = {"predictions": predictions, "labels": labels}
        for metric in task.metrics:
            measurement = {"task": name, "metric": metric, "n": len(labels), "unit": "fraction"}
            measurements.append(measurement | glue_metrics.scored(metric, predictions, labels, seed))
    return Measured(measurements, samples)


def predict(checkpoint: Checkpoint, recipe: Recipe, found: list[dict], device: str) -> list[int] | list[float]:
    """Return one prediction a row: the most likely label (the first of equals), or the raw score of a regression."""
    import torch

    items = glue_tasks.encode(checkpoint, recipe.task, found, recipe.max_length)
    order = sorted(range(len(items)), key=lambda i: -len(items[i]["input_ids"]))  # little padding
    starts = range(0, len(order), recipe.batch_size)
    predictions = [0] * len(items)
    checkpoint.model.eval()
    with torch.no_grad():
        for start in progress(starts, f"glue {recipe.task}, batches"):
            rows = order[start : start + recipe.batch_size]
            batch = glue_tasks.pad(checkpoint.tokenizer, [items[i] for i in rows], device)
            logits = checkpoint.model(**batch).logits.float()
            best = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(-1)
            for i, prediction in zip(rows, best.tolist(), strict=True):
                predictions[i] = prediction
    return predictions
