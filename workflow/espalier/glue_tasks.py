"""The eight GLUE tasks: their columns, labels and metrics, and their rows as token ids.

Wang et al. 2019 (arXiv 1804.07461); WNLI is left out, as in BERT and XTC. Column names and label numbers are those of
the hub's nyu-mll/glue.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from espalier.data import local_file
from espalier.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from espalier.checkpoints import Checkpoint
    from espalier.data import Dataset

HIGHEST_SCORE = 5  # of STS-B, from 0
Name = Literal["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]


@dataclass(frozen=True)
class GlueTask:
    """One task. `names` are its labels from 0, none for a regression; `splits` maps names in results to splits."""

    columns: tuple[str, ...]
    names: tuple[str, ...]
    metrics: tuple[str, ...]
    splits: dict[str, str]

    @property
    def labels(self) -> int:
        """The outputs of a classifier: one a label, or the one score of a regression."""
        return max(1, len(self.names))


def _task(name: str, columns: tuple[str, ...], names: tuple[str, ...], *metrics: str) -> GlueTask:
    return GlueTask(columns, names, metrics, {name: "validation"})


TASKS: dict[str, GlueTask] = {
    "cola": _task("cola", ("sentence",), ("unacceptable", "acceptable"), "mcc"),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        {"mnli": "validation_matched", "mnli_mismatched": "validation_mismatched"},
    ),
    "mrpc": _task("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "accuracy", "f1"),
    "qnli": _task("qnli", ("question", "sentence"), ("entailment", "not_entailment"), "accuracy"),
    "qqp": _task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), "accuracy", "f1"),
    "rte": _task("rte", ("sentence1", "sentence2"), ("entailment", "not_entailment"), "accuracy"),
    "sst2": _task("sst2", ("sentence",), ("negative", "positive"), "accuracy"),
    "stsb": _task("stsb", ("sentence1", "sentence2"), (), "pearson", "spearman"),
}


def rows(dataset: Dataset, task: str, split: str) -> list[dict]:
    """Return the rows of a split, checked.

    Of a folder they are the file `{path}/glue/{task}/{split}.jsonl`, without `glue/` where there is no such folder; of
    the hub, the config that is named after the task. An empty text is a text: QQP has some.

    Raises UserError for a split that is absent or empty, lacks a column, or has a text or a label that is none.
    """
    if dataset.source == "hub":
        found, where = dataset.rows(split, task), f"The dataset '{dataset.name}', config {task}, split '{split}',"
    else:
        subset = folder(dataset, task)
        found, where = dataset.rows(split, subset), f"The file {local_file(dataset, split, subset)}"
    if not found:
        raise UserError(f"{where} has no rows.")
    for number, row in enumerate(found, 1):
        _check_row(row, TASKS[task], f"row {number}", where)
    return found


def folder(dataset: Dataset, task: str) -> str:
    """Return the subset of a demo or local dataset that holds a task; raises UserError where there is none."""
    subset = f"glue/{task}" if Path(dataset.path, "glue").is_dir() else task
    if not (path := Path(dataset.path, subset)).is_dir():
        near = did_you_mean(task, (other.name for other in path.parent.glob("*/")))
        raise UserError(f"The dataset '{dataset.name}' has no folder {path}.{near}")
    return subset


def _check_row(row: object, task: GlueTask, which: str, where: str) -> None:
    if not isinstance(row, dict):
        raise UserError(f"{where} holds {row!r} in {which}, and not columns with their names.")
    for column in (*task.columns, "label"):
        if column not in row:
            raise UserError(f"{where} lacks the column '{column}' in {which}.{did_you_mean(column, row)}")
    for column in task.columns:
        if not isinstance(row[column], str):
            raise UserError(f"{where} holds {row[column]!r} in the column '{column}' of {which}, and not text.")
    label = row["label"]
    if task.names and (type(label) is not int or label not in range(task.labels)):
        needed = f"a whole number from 0 to {task.labels - 1}"
    elif not task.names and (type(label) not in (int, float) or not 0 <= label <= HIGHEST_SCORE):  # nor NaN
        needed = f"a number from 0 to {HIGHEST_SCORE}"
    else:
        return
    why = " The test splits of GLUE have no labels." if label == -1 else ""
    raise UserError(f"{where} has the label {label!r} in {which}; it must be {needed}.{why}")


def outputs(task: str) -> dict:
    """Return what a new classifier's config says of its outputs: their number, and the names of labels."""
    names = TASKS[task].names
    named = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    return {"num_labels": TASKS[task].labels, **(named if names else {})}


def check_classifier(checkpoint: Checkpoint, task: str) -> None:
    """Raise UserError unless a sequence classifier was made for this task, as far as its files tell."""
    where = f"The checkpoint {checkpoint.folder}"
    trained = checkpoint.info.get("glue_task")
    if trained is not None and trained != task:
        raise UserError(f"{where} was trained for GLUE task {trained}, not for {task}.")
    check_labels(checkpoint.model.config.id2label, task, where)


def check_labels(names: Mapping[int, str], task: str, where: str) -> None:
    """Raise UserError, opened by `where`, unless outputs of these names (a config's id2label) can be those of a task.

    Many a classifier calls its outputs LABEL_0, LABEL_1, …, which says nothing; one that has GLUE's own names for them
    in another order would be scored, and distilled, against the wrong labels.
    """
    needed = TASKS[task]
    if len(names) != needed.labels:
        raise UserError(
            f"{where} gives {len(names)} outputs, but GLUE task {task} needs {needed.labels}: it was not trained for"
            " this task."
        )
    for number, name in names.items():
        plain = re.sub("[- ]", "_", str(name).strip().lower())
        if plain in needed.names and needed.names.index(plain) != int(number):
            found = ", ".join(map(str, names.values()))
            raise UserError(
                f"{where} says in its config.json (id2label) that its outputs are {found}, but the labels of GLUE"
                f" task {task} are, in this order, {', '.join(needed.names)}."
            )


def encode(checkpoint: Checkpoint, task: str, found: list[dict], max_length: int) -> list[dict]:
    """Return one {"input_ids", "token_type_ids" if the model tells sentences apart by them} a row.

    Each has at most `max_length` tokens, and no more than the model has positions for.
    """
    texts = [[row[column] for row in found] for column in TASKS[task].columns]
    longest = min(max_length, _positions(checkpoint.model) or max_length)
    encoded = checkpoint.tokenizer(*texts, truncation=True, max_length=longest, return_attention_mask=False)
    # transformers 5 gives DistilBERT, which has no types, the tokenizer of BERT; RoBERTa has a single one.
    keys = {"input_ids"} if getattr(checkpoint.model.config, "type_vocab_size", 1) < 2 else encoded.keys()
    return [{key: encoded[key][i] for key in keys} for i in range(len(found))]


def _positions(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model with a table of positions can take; None without one.

    A table with a row for padding, as RoBERTa's, holds the first token's position behind that row.
    """
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if table is None:
        return None
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)


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
