"""Text and rows for training, calibration and evaluation: a generated folder, a local folder, or the hub.

A dataset is a mapping from the study's config, resolved: {"name", "source", ...}. `demo` and `local` are folders that
hold `{config}/{split}.jsonl` (a config is a subset, such as a GLUE task, and may be absent); `hub` is a data set of the
Hugging Face hub with a pinned revision.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from espalier.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Dataset:
    """Where rows come from. `path` is for demo and local, `id` and `revision` are for hub."""

    name: str
    source: Literal["demo", "local", "hub"]
    path: str | None = None
    fingerprint: str | None = None  # of a local folder's files: a change of them is a change of the recipe
    id: str | None = None
    revision: str | None = None

    def rows(self, split: str, config: str | None = None) -> list[dict]:
        """Return all rows of a split. Raises UserError for a split or config that does not exist."""
        return _hub_rows(self, split, config) if self.source == "hub" else _local_rows(self, split, config)


def fingerprint(folder: Path) -> str:
    """Return 16 hex digits for the files below a folder: their content, or, above 64 MB, their size and time."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        status = file.stat()
        small = status.st_size <= 64_000_000
        content = file.read_bytes() if small else f"{status.st_size} {status.st_mtime_ns}".encode()
        digest.update(str(file.relative_to(folder)).encode() + hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Text:
    """Documents: one column of one split of a dataset."""

    dataset: Dataset
    split: str  # of the dataset
    config: str | None = None  # subset of the dataset
    column: str = "text"  # the rows' column that holds the documents

    def documents(self) -> list[str]:
        """Return the non-empty documents, in the dataset's order."""
        rows = self.dataset.rows(self.split, self.config)
        if rows and self.column not in rows[0]:
            raise UserError(
                f"The dataset '{self.dataset.name}', split '{self.split}', has no column '{self.column}'."
                + did_you_mean(self.column, rows[0])
            )
        return [row[self.column] for row in rows if row[self.column].strip()]


@dataclass(frozen=True)
class Calibration:
    """A calibration set: `samples` windows of `length` tokens, each from the documents of `text` in a seeded order.

    Sets of different size and the same seed are nested: the first 20 of 200 are the set of 20.
    """

    text: Text
    samples: int  # windows
    length: int  # tokens a window
    seed: int = 1234  # of the order in which documents are taken
    windows: Literal["packed", "crops"] = "packed"  # documents joined and cut up; or a crop of each that is long enough

    def check(self) -> None:
        if self.samples < 1 or self.length < 2:
            raise ValueError("'samples' must be at least 1 and 'length' at least 2.")

    def token_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Return `samples` lists of exactly `length` token ids. Raises UserError where the text does not have as many.

        packed: shuffled documents, joined by the end token, are cut up. crops: of each shuffled document with at least
        `length` tokens, one window that begins at a random place (the calibration of Kim et al. 2024, 2402.02834).
        """
        draw = random.Random(f"calibration-{self.seed}")
        documents = self.text.documents()
        draw.shuffle(documents)
        cut = self._packed if self.windows == "packed" else self._crops
        windows = list(itertools.islice(cut(documents, tokenizer, draw), self.samples))
        if len(windows) == self.samples:
            return windows
        raise UserError(
            f"The dataset '{self.text.dataset.name}', split '{self.text.split}', holds only {len(windows)} windows of"
            f" {self.length} tokens, but the calibration asks for {self.samples} samples."
        )

    def _packed(self, documents: list[str], tokenizer: PreTrainedTokenizerBase, _: random.Random) -> Iterator[list]:
        pending: list[int] = []
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        for document in documents:
            pending += tokenizer(document, add_special_tokens=False)["input_ids"] + end
            while len(pending) >= self.length:
                yield pending[: self.length]
                pending = pending[self.length :]

    def _crops(self, documents: list[str], tokenizer: PreTrainedTokenizerBase, draw: random.Random) -> Iterator[list]:
        for document in documents:
            ids = tokenizer(document, add_special_tokens=False)["input_ids"]
            if len(ids) >= self.length:
                start = draw.randrange(len(ids) - self.length + 1)
                yield ids[start : start + self.length]


def local_file(dataset: Dataset, split: str, config: str | None) -> Path:
    """Return the file that holds a split of a demo or local dataset; raises UserError where there is none."""
    folder = Path(dataset.path) / (config or "")
    file = folder / f"{split}.jsonl"
    if not file.is_file():
        raise UserError(
            f"The dataset '{dataset.name}' has no file {file}."
            + did_you_mean(split, (other.stem for other in folder.glob("*.jsonl")))
        )
    return file


def _local_rows(dataset: Dataset, split: str, config: str | None) -> list[dict]:
    file = local_file(dataset, split, config)
    rows = []
    # Only a line feed ends a line: JSON text may hold other characters at which splitlines() cuts, such as U+2028.
    for number, line in enumerate(file.read_text(encoding="utf-8").removesuffix("\n").split("\n"), 1):
        try:
            if line:
                rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {number}, is not valid JSON ({error.msg}).") from None
    return rows


def _hub_rows(dataset: Dataset, split: str, config: str | None) -> list[dict]:
    from datasets import load_dataset

    try:
        return load_dataset(dataset.id, config, split=split, revision=dataset.revision).to_list()
    except (OSError, ValueError) as error:
        raise UserError(f"The dataset '{dataset.name}' ({dataset.id}, split '{split}'): {error}") from error
