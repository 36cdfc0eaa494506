"""GLUE scores of a sequence classifier on the validation split, with the benchmark's own metrics.

CoLA: Matthews correlation; SST-2, QNLI, RTE: accuracy; MRPC, QQP: accuracy and F1 of label 1; STS-B: Pearson and
Spearman correlation; MNLI: accuracy on matched (task "mnli") and mismatched (task "mnli_mismatched"). Values are
fractions, not percent. The standard error of an accuracy p is sqrt(p (1 - p) / (n - 1)); that of any other metric is
the standard deviation over bootstrap resamples of the rows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from espalier import glue_tasks
from espalier.data import Dataset
from espalier.errors import UserError
from espalier.measured import Measured
from espalier.progress import progress

if TYPE_CHECKING:
    import numpy

    from espalier.checkpoints import Checkpoint

TAKES = ("sequence-classification",)
RESAMPLES = 200


@dataclass(frozen=True)
class Recipe:
    """Which task is scored, and on what."""

    task: glue_tasks.Name  # a GLUE task
    dataset: Dataset
    batch_size: int = 64  # it does not change the result beyond rounding
    max_length: int = 128  # tokens; longer inputs are cut

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
    """Return the task's metrics and every prediction (a label, or STS-B's raw score) beside its label.

    Raises UserError for a checkpoint that was made for another task or number of labels.
    """
    task = glue_tasks.TASKS[recipe.task]
    _check(checkpoint, recipe.task, task.labels)
    measurements, samples = [], {}
    for name, split in task.splits.items():
        found = glue_tasks.rows(recipe.dataset, recipe.task, split)
        labels = [row["label"] for row in found]
        predictions = predict(checkpoint, recipe, found, device)
        samples[name] = {"predictions": predictions, "labels": labels}
        for metric in task.metrics:
            measurement = {"task": name, "metric": metric, "n": len(labels), "unit": "fraction"}
            measurements.append(measurement | scored(metric, predictions, labels, seed))
    return Measured(measurements, samples)


def predict(checkpoint: Checkpoint, recipe: Recipe, found: list[dict], device: str) -> list[int] | list[float]:
    """Return one prediction a row: the most likely label (the first of equals), or the raw score of a regression."""
    import torch

    items = glue_tasks.encode(checkpoint.tokenizer, recipe.task, found, recipe.max_length)
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


def scored(metric: str, predictions: list, labels: list, seed: int) -> dict:
    """Return value and stderr of a metric; a correlation with something constant has an outcome instead."""
    import numpy

    guesses, truth = numpy.asarray(predictions, dtype=float), numpy.asarray(labels, dtype=float)
    if not numpy.isfinite(guesses).all():
        return {"value": None, "stderr": None, "outcome": "undefined: predictions are not finite"}
    value = score(metric, guesses, truth)
    if math.isnan(value):
        return {"value": None, "stderr": None, "outcome": "undefined: constant predictions or labels"}
    count = len(truth)
    if count < 2:
        return {"value": value, "stderr": None}
    if metric == "accuracy":
        return {"value": value, "stderr": math.sqrt(value * (1 - value) / (count - 1))}
    draw = numpy.random.default_rng(random.Random(f"bootstrap-{seed}").getrandbits(64))
    resamples = []
    for _ in range(RESAMPLES):
        chosen = draw.integers(count, size=count)
        resamples.append(score(metric, guesses[chosen], truth[chosen]))
    resamples = [one for one in resamples if not math.isnan(one)]
    return {"value": value, "stderr": float(numpy.std(resamples, ddof=1)) if len(resamples) > 1 else None}


def score(metric: str, predictions: numpy.ndarray, labels: numpy.ndarray) -> float:
    """Return one metric, as a fraction.

    By convention mcc is 0 when predictions or labels are constant, and f1 is 0 when label 1 is neither predicted nor
    there; a correlation is NaN when either side is constant.
    """
    if metric in ("pearson", "spearman"):
        import scipy.stats

        if min(predictions.std(), labels.std()) == 0:
            return math.nan
        compare = scipy.stats.pearsonr if metric == "pearson" else scipy.stats.spearmanr
        return float(compare(predictions, labels).statistic)
    import sklearn.metrics

    if metric == "accuracy":
        return float(sklearn.metrics.accuracy_score(labels, predictions))
    if metric == "f1":
        return float(sklearn.metrics.f1_score(labels, predictions, pos_label=1, zero_division=0.0))
    if (predictions == predictions[0]).all() or (labels == labels[0]).all():
        return 0.0
    return float(sklearn.metrics.matthews_corrcoef(labels, predictions))


def _check(checkpoint: Checkpoint, task: str, labels: int) -> None:
    trained = checkpoint.info.get("glue_task")
    if trained is not None and trained != task:
        raise UserError(f"The checkpoint {checkpoint.folder} was trained for GLUE task {trained}, not for {task}.")
    found = checkpoint.model.config.num_labels
    if found != labels:
        raise UserError(
            f"The checkpoint {checkpoint.folder} gives {found} outputs, but GLUE task {task} needs {labels}: it was not"
            " trained for this task."
        )
