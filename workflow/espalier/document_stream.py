"""Documents of running text, read one after another, and windows of tokens packed from them: nothing is loaded whole.

The order is the dataset's own, and the end of the data is followed by its beginning. Both classes can say where they
are and go there again, so that a training that was interrupted goes on without reading what it has read before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from espalier import hub_cache
from espalier.data import Text, local_file
from espalier.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Documents:
    """The non-empty documents of `text`, once, in the dataset's order.

    A local file is read line by line and a position is the offset of its next line in bytes; a dataset of the hub is
    streamed and a position is the stream's own state.
    """

    def __init__(self, text: Text):
        self.text = text
        self.hub = text.dataset.source == "hub"
        self.file = None if self.hub else local_file(text.dataset, text.split, text.config)
        self.offset = 0
        self.stream = _hub_stream(text) if self.hub else None

    def fingerprint(self) -> str:
        """Return what changes when the documents may have: revision and files, or the file's size and time."""
        if self.hub:
            return " ".join([self.text.dataset.id, self.text.dataset.revision, *self.text.dataset.files])
        status = self.file.stat()
        return f"{status.st_size} {status.st_mtime_ns}"

    def position(self) -> int | dict:
        return self.stream.state_dict() if self.hub else self.offset

    def seek(self, position: int | dict) -> None:
        """Begin the next iteration there."""
        if self.hub:
            self.stream.load_state_dict(position)
        else:
            self.offset = position

    def __iter__(self) -> Iterator[str]:
        for row in self.stream if self.hub else self._lines():
            if self.text.column not in row:
                raise UserError(
                    f"The dataset '{self.text.dataset.name}', split '{self.text.split}', has no column"
                    f" '{self.text.column}'.{did_you_mean(self.text.column, row)}"
                )
            if row[self.text.column].strip():
                yield row[self.text.column]

    def _lines(self) -> Iterator[dict]:
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            while line := stream.readline():
                try:
                    row = json.loads(line)
                except ValueError:
                    raise UserError(f"{self.file}: the line at byte {self.offset} is not valid JSON.") from None
                self.offset = stream.tell()
                yield row


class Windows:
    """Windows of `length` token ids from documents, each followed by the end token, joined and cut; endless.

    Raises UserError when a whole pass over the documents has given no token.
    """

    def __init__(self, text: Text, tokenizer: PreTrainedTokenizerBase, length: int):
        self.text, self.tokenizer, self.length = text, tokenizer, length
        self.end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.pending: list[int] = []  # tokens of documents that were begun
        self.start = 0  # where the next window begins among them
        self.passes = 0  # ends of the data that were reached
        self._open(None)

    def _open(self, position: int | dict | None) -> None:
        self.documents = Documents(self.text)
        if position is not None:
            self.documents.seek(position)
        self.iterator = iter(self.documents)
        self.empty = position is None  # no token came of this pass yet

    def fingerprint(self) -> str:
        return self.documents.fingerprint()

    def position(self) -> dict:
        """Return where the next window begins, as plain values."""
        place = None if self.empty else self.documents.position()
        return {"documents": place, "pending": self.pending[self.start :], "passes": self.passes}

    def seek(self, position: dict) -> None:
        self.pending, self.start, self.passes = list(position["pending"]), 0, position["passes"]
        self._open(position["documents"])

    def take(self, count: int) -> list[list[int]]:
        """Return the next `count` windows."""
        return [self._next() for _ in range(count)]

    def rest(self, count: int) -> list[list[int]]:
        """Return the next windows up to the end of the data, `count` at most."""
        taken = []
        while len(taken) < count and (window := self._next(once=True)):
            taken.append(window)
        return taken

    def _next(self, once: bool = False) -> list[int]:
        while len(self.pending) - self.start < self.length:
            document = next(self.iterator, None)
            if document is not None:
                ids = self.tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + self.end
                self.empty = self.empty and not ids
                del self.pending[: self.start]  # once a document: a long one is not copied for each of its windows
                self.start = 0
                self.pending += ids
            elif once:
                return []
            elif self.empty:
                raise UserError(
                    f"The dataset '{self.text.dataset.name}', split '{self.text.split}', has no documents to train on."
                )
            else:
                self.passes += 1
                self._open(None)
        self.start += self.length
        return self.pending[self.start - self.length : self.start]


def _hub_stream(text: Text):
    dataset = text.dataset
    try:
        where = (dataset.id, text.config, text.split, dataset.revision)
        return hub_cache.open_dataset(*where, streaming=True, files=dataset.files)
    except (OSError, ValueError) as error:
        raise UserError(f"The dataset '{dataset.name}' ({dataset.id}, split '{text.split}'): {error}") from error
