"""Text and rows for training, calibration and evaluation: a generated folder, a local folder, or the hub.

A dataset is a mapping from the study's config, resolved: {"name", "source", ...}. `demo` and `local` are folders that
hold `{config}/{split}.jsonl` (a config is a subset, such as a GLUE task, and may be absent); `hub` is a data set of the
Hugging Face hub with a pinned revision.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from espalier import hub_cache
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
    files: tuple[str, ...] = ()  # of hub: the only files that are read, all as the split train; none: the config's own

    def rows(self, split: str, config: str | None = None) -> list[dict]:
        """Return all rows of a split. Raises UserError for a split or config that does not exist."""
        return list(self.each(split, config))

    def each(self, split: str, config: str | None = None) -> Iterator[dict]:
        """Yield the rows of a split one by one, and hold none. Raises the errors of `rows`."""
        yield from _hub_rows(self, split, config) if self.source == "hub" else _local_rows(self, split, config)

    def check_part(self, split: str, config: str | None) -> None:
        """Raise ValueError for a split or config that a dataset which names its files cannot have."""
        splits = {one.partition("[")[0].strip() for one in split.split("+")}
        if self.files and (config is not None or splits != {"train"}):
            raise ValueError(
                f"the dataset '{self.name}' names its files, which together are the split 'train' without a config, and"
                f" not split '{split}'{f' of config {config!r}' if config else ''}."
            )


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

    def check(self) -> None:
        self.dataset.check_part(self.split, self.config)

    def documents(self) -> list[str]:
        """Return the non-empty documents, in the dataset's order."""
        return [document for _, document in self.numbered()]

    def numbered(self) -> Iterator[tuple[int, str]]:
        """Yield the non-empty documents one by one, each with the number of its row in the split, from 0."""
        return ((number, document) for number, document in enumerate(self.each()) if document.strip())

    def each(self) -> Iterator[str]:
        """Yield the documents one by one, empty ones too. Raises UserError for a column that does not exist."""
        for row in self.dataset.each(self.split, self.config):
            if self.column not in row:
                raise UserError(
                    f"The dataset '{self.dataset.name}', split '{self.split}', has no column '{self.column}'."
                    + did_you_mean(self.column, row)
                )
            yield row[self.column]

    def overlaps(self, other: Text) -> bool:
        """Return whether both name rows of the same split, whatever their column, revision and dataset's name.

        Two slices of a split of the hub, such as train[:10%] and train[10%:], are taken to be different rows, and so
        are files of a data set of the hub that are named, and its splits.
        """
        if self.dataset.source != "hub" or other.dataset.source != "hub":
            return _place(self) == _place(other)
        if (self.dataset.id, self.config) != (other.dataset.id, other.config):
            return False
        if not _share_files(self.dataset.files, other.dataset.files):
            return False
        pairs = itertools.product(self.split.split("+"), other.split.split("+"))
        return any(
            one.split("[")[0] == two.split("[")[0] and (one == two or "[" not in one or "[" not in two)
            for one, two in pairs
        )


def _share_files(some: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether a name or pattern of one list is, or matches, one of the other; without names in both, True."""
    if not some or not others:
        return not some and not others
    pairs = itertools.product(some, others)
    return any(fnmatch.fnmatchcase(one, two) or fnmatch.fnmatchcase(two, one) for one, two in pairs)


def _place(text: Text) -> tuple:
    """Return what is the same for two texts of the same rows, unless both are of the hub."""
    dataset = text.dataset
    folder = None if dataset.path is None else Path(dataset.path, text.config or "").resolve()
    return folder, dataset.id, text.split


class Drawn(NamedTuple):
    """The windows of a calibration set, and what a result records of them."""

    token_ids: list[list[int]]  # windows, each of the same length
    record: dict  # plain JSON


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
        """Return `samples` lists of exactly `length` token ids, those of `draw`."""
        return self.draw(tokenizer).token_ids

    def draw(self, tokenizer: PreTrainedTokenizerBase) -> Drawn:
        """Return `samples` windows of exactly `length` token ids. Raises UserError where the text has fewer.

        packed: shuffled documents, joined by the end token, are cut up. crops: of each shuffled document with at least
        `length` tokens, one window that begins at a random place (the calibration of Kim et al. 2024, 2402.02834).

        The record's `documents` say where each window comes from. packed: the rows of the split in which its first and
        its last token stand; between them lie those that the shuffle put there. crops: its row, and the number of its
        first token in that document.
        """
        chance = random.Random(f"calibration-{self.seed}")
        documents = list(self.text.numbered())
        chance.shuffle(documents)
        rows = ((row, tokenizer(document, add_special_tokens=False)["input_ids"]) for row, document in documents)
        windows = self._packed(rows, tokenizer.eos_token_id) if self.windows == "packed" else self._crops(rows, chance)
        drawn = list(itertools.islice(windows, self.samples))
        text = self.text
        if len(drawn) < self.samples:
            raise UserError(
                f"The dataset '{text.dataset.name}', split '{text.split}', holds only {len(drawn)} windows of"
                f" {self.length} tokens, but the calibration asks for {self.samples} samples."
            )
        record = {"dataset": text.dataset.name, "config": text.config, "split": text.split, "seed": self.seed}
        record |= {"windows": self.windows, "samples": self.samples, "length": self.length}
        record |= {"tokens": self.samples * self.length, "documents": [place for _, place in drawn]}
        return Drawn([ids for ids, _ in drawn], record)

    def _packed(self, rows: Iterable[tuple[int, list[int]]], end: int | None) -> Iterator[tuple[list[int], list[int]]]:
        """Yield windows, each with the rows of its first and its last token."""
        pending: list[int] = []
        owners: list[int] = []  # the row of each pending token
        for row, ids in rows:
            pending += ids if end is None else [*ids, end]
            owners += [row] * (len(pending) - len(owners))
            while len(pending) >= self.length:
                yield pending[: self.length], [owners[0], owners[self.length - 1]]
                pending, owners = pending[self.length :], owners[self.length :]

    def _crops(
        self, rows: Iterable[tuple[int, list[int]]], chance: random.Random
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Yield windows, each with its row and the place of its first token."""
        for row, ids in rows:
            if len(ids) >= self.length:
                start = chance.randrange(len(ids) - self.length + 1)
                yield ids[start : start + self.length], [row, start]


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


def _local_rows(dataset: Dataset, split: str, config: str | None) -> Iterator[dict]:
    file = local_file(dataset, split, config)
    # Only a line feed ends a line: JSON text may hold other characters that end one elsewhere, such as U+2028.
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.rstrip(b"\n"):
                    yield json.loads(line.decode())
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                why = getattr(error, "msg", error)
                raise UserError(f"{file}, line {number}, is not valid JSON ({why}).") from None


def _hub_rows(dataset: Dataset, split: str, config: str | None) -> Iterable[dict]:
    try:
        dataset.check_part(split, config)
        return hub_cache.open_dataset(dataset.id, config, split, dataset.revision, files=dataset.files)
    except (OSError, ValueError) as error:
        raise UserError(f"The dataset '{dataset.name}' ({dataset.id}, split '{split}'): {error}") from error
