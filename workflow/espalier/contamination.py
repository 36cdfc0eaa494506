"""Evaluated text in the documents of a calibration set: contamination, which makes a score worth less than it says.

Text is compared as words: lower case, without punctuation. A passage is what an evaluation scores as one: a document,
or a question with one of its choices. It is found where a calibration document holds it word for word, or, of a passage
of more than `RUN` words, any `RUN` consecutive words of it: the rule of Lee et al. 2022 (2107.06499, exact substrings)
for copied text, counted in words. The 13 words of Brown et al. 2020 (2005.14165, appendix C) are for removing text: as
a reason to stop they are too few, because question forms and fixed phrases share them. Passages of fewer than
`SHORTEST` words, the least that Brown et al. take, occur by chance, and are counted but not looked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from espalier.data import Calibration, Text
from espalier.errors import UserError
from espalier.progress import progress

RUN, SHORTEST = 50, 8  # words


def words(text: str) -> list[str]:
    """Return the words of a text, in lower case: letters, digits and underscores between anything else."""
    return re.findall(r"\w+", text.lower())


def runs(passage: str) -> Iterator[tuple[str, ...]]:
    """Yield the runs of words of which one is enough to find a passage; none of a passage that is too short."""
    found = words(passage)
    length = min(RUN, len(found))
    if length >= SHORTEST:
        yield from (tuple(found[i : i + length]) for i in range(len(found) - length + 1))


def found_in(documents: Iterable[str], passages: Iterable[str]) -> set[int]:
    """Return the hashes of the passages' runs that lie in a document.

    The passages' runs are held, as hashes; the documents are read once, one by one, at the cost of a look-up a word.
    """
    starts: set[int] = set()
    wanted: dict[int, set[int]] = {}  # length → hashes of runs
    for run in chain.from_iterable(map(runs, passages)):
        starts.add(hash(run[:SHORTEST]))
        wanted.setdefault(len(run), set()).add(hash(run))
    found = set()
    for document in documents:
        text = words(document)
        for i in range(len(text) - SHORTEST + 1):
            if hash(tuple(text[i : i + SHORTEST])) in starts:
                here = {length: hash(tuple(text[i : i + length])) for length in wanted if i + length <= len(text)}
                found |= {value for length, value in here.items() if value in wanted[length]}
    return found


@dataclass(frozen=True)
class Suite:
    """What a suite evaluates: its passages, or the reason why they are not known."""

    passages: list[str]
    unknown: str | None = None

    def compared(self) -> int:
        return sum(len(words(passage)) >= SHORTEST for passage in self.passages)

    def summary(self) -> dict:
        if self.unknown is not None:
            return {"not_checked": self.unknown}
        return {"passages": self.compared(), "too_short": len(self.passages) - self.compared()}


def report(calibrations: Mapping[str, Calibration], suites: Mapping[str, Suite]) -> dict:
    """Return how many passages of each suite were looked for in the text of each calibration set, as plain JSON.

    Raises UserError with the first passage that is found.
    """
    documents = {}
    for name, calibration in calibrations.items():
        if calibration.text not in documents:
            documents[calibration.text] = _compare(name, calibration.text, suites)
    return {
        "rule": {"words": RUN, "fewest_words": SHORTEST},
        "suites": {name: suite.summary() for name, suite in suites.items()},
        "calibrations": {
            name: _about(calibration, documents[calibration.text], suites) for name, calibration in calibrations.items()
        },
    }


def _compare(name: str, text: Text, suites: Mapping[str, Suite]) -> int:
    """Return the number of documents of a calibration set's text; raises UserError where one holds a passage."""
    read = 0

    def documents() -> Iterator[str]:
        nonlocal read
        for _, document in progress(text.numbered(), f"{name}, calibration documents"):
            read += 1
            yield document

    found = found_in(documents(), chain.from_iterable(suite.passages for suite in suites.values()))
    for suite, evaluated in suites.items():
        leaked = [passage for passage in evaluated.passages if any(hash(run) in found for run in runs(passage))]
        if leaked:
            raise UserError(
                f"The calibration set '{name}' (dataset '{text.dataset.name}', split '{text.split}') holds"
                f" {len(leaked)} of the {evaluated.compared()} passages that the suite '{suite}' evaluates, such as"
                f" '{' '.join(leaked[0].split())[:300]}'. Calibrate on other text."
            )
    return read


def _about(calibration: Calibration, documents: int, suites: Mapping[str, Suite]) -> dict:
    text = calibration.text
    return {
        "dataset": text.dataset.name,
        "config": text.config,
        "split": text.split,
        "documents": documents,
        "samples": calibration.samples,
        "length": calibration.length,
        "seed": calibration.seed,
        "found": {name: 0 for name, suite in suites.items() if suite.unknown is None},
    }
