"""Progress that can be read: a bar on a terminal, and a full line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 5.0


class progress(Generic[T]):
    """Iterate over `iterable` and show how far it is; `note("loss 1.2")` adds a remark to the next line."""

    prefix = ""  # what the process is about, so that the lines of jobs that run side by side can be told apart

    def __init__(self, iterable: Iterable[T], label: str, total: int | None = None):
        self.iterable, self.label, self.remark = iterable, self.prefix + label, ""
        self.total = total if total is not None else (len(iterable) if hasattr(iterable, "__len__") else None)

    def note(self, remark: str) -> None:
        self.remark = remark

    def __iter__(self) -> Iterator[T]:
        if sys.stderr.isatty():
            yield from self._bar()
        else:
            yield from self._lines()

    def _bar(self) -> Iterator[T]:
        from tqdm import tqdm

        with tqdm(self.iterable, desc=self.label, total=self.total, leave=False) as bar:
            for item in bar:
                yield item
                if self.remark:
                    bar.set_postfix_str(self.remark, refresh=False)

    def _lines(self) -> Iterator[T]:
        started = said = time.monotonic()
        for done, item in enumerate(self.iterable, 1):
            yield item
            now = time.monotonic()
            if now - said >= SECONDS_BETWEEN_LINES:
                said = now
                print(self._line(done, now - started), file=sys.stderr, flush=True)

    def _line(self, done: int, seconds: float) -> str:
        text = f"{self.label}: {done}"
        if self.total:
            left = seconds / done * (self.total - done)
            text += f" of {self.total} ({100 * done / self.total:.0f}%), {seconds:.0f} s, about {left:.0f} s left"
        else:
            text += f" done, {seconds:.0f} s"
        return text + (f"; {self.remark}" if self.remark else "")
