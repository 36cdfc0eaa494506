"""The eight GLUE tasks: their columns, labels and metrics, and their rows as token ids.

Wang et al. 2019 (arXiv 1804.07461); WNLI is left out, as in BERT and XTC. Column names and label numbers are those of
the hub's nyu-mll/glue.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from espalier.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from espalier.data import Dataset

Name = Literal["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]


@dataclass(frozen=True)
class GlueTask:
    """One task. `labels` 1 means regression; `splits` maps the name in results to the validation split."""

    columns: tuple[str, ...]
    labels: int
    metrics: tuple[str, ...]
    splits: dict[str, str]


def _task(name: str, columns: tuple[str, ...], labels: int, *metrics: str) -> GlueTask:
    return GlueTask(columns, labels, metrics, {name: "validation"})


TASKS: dict[str, GlueTask] = {
    "cola": _task("cola", ("sentence",), 2, "mcc"),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        3,
        ("accuracy",),
        {"mnli": "validation_matched", "mnli_mismatched": "validation_mismatched"},
    ),
    "mrpc": _task("mrpc", ("sentence1", "sentence2"), 2, "accuracy", "f1"),
    "qnli": _task("qnli", ("question", "sentence"), 2, "accuracy"),
    "qqp": _task("qqp", ("question1", "question2"), 2, "accuracy", "f1"),
    "rte": _task("rte", ("sentence1", "sentence2"), 2, "accuracy"),
    "sst2": _task("sst2", ("sentence",), 2, "accuracy"),
    "stsb": _task("stsb", ("sentence1", "sentence2"), 1, "pearson", "spearman"),
}


def rows(dataset: Dataset, task: str, split: str) -> list[dict]:
    """Return the rows of a split, checked: `{path}/glue/{task}/{split}.jsonl`, or without `glue/` where it is absent.

    Raises UserError for a split that is empty, lacks a column, or has a label outside the task's.
    """
    config = task
    if dataset.source != "hub" and (Path(dataset.path) / "glue").is_dir():
        config = f"glue/{task}"
    found = dataset.rows(split, config)
    where = f"The dataset '{dataset.name}', task {task}, split '{split}',"
    if not found:
        raise UserError(f"{where} has no rows.")
    labels = TASKS[task].labels
    for number, row in enumerate(found, 1):
        for column in (*TASKS[task].columns, "label"):
            if column not in row:
                raise UserError(f"{where} lacks the column '{column}' in row {number}.{did_you_mean(column, row)}")
        if labels > 1 and row["label"] not in range(labels):
            raise UserError(f"{where} has the label {row['label']!r} in row {number}; it must be 0 to {labels - 1}.")
    return found


def encode(tokenizer: PreTrainedTokenizerBase, task: str, found: list[dict], max_length: int) -> list[dict]:
    """Return one {"input_ids", "token_type_ids" if the tokenizer has them} a row, cut to `max_length` tokens."""
    texts = [[row[column] for row in found] for column in TASKS[task].columns]
    encoded = tokenizer(*texts, truncation=True, max_length=max_length, return_attention_mask=False)
    return [{key: values[i] for key, values in encoded.items()} for i in range(len(found))]


def pad(tokenizer: PreTrainedTokenizerBase, items: list[dict], device: str) -> dict[str, torch.Tensor]:
    """Return the model's inputs [len(items), longest], padded on the right, with an attention mask."""
    import torch

    lengths = [len(item["input_ids"]) for item in items]
    longest = max(lengths)
    batch = {}
    for key in items[0]:
        fill = tokenizer.pad_token_id if key == "input_ids" else 0
        padded = [item[key] + [fill] * (longest - len(item[key])) for item in items]
        batch[key] = torch.tensor(padded, device=device)
    batch["attention_mask"] = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long().to(device)
    return batch
