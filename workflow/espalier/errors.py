"""The one error that a user of Espalier is meant to read, and what such messages are made of."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend: its message is one full sentence that names the file and the key."""


def did_you_mean(word: object, names: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the name nearest to `word`, or the list of names if none is near."""
    known = sorted(map(str, names))
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    if near:
        return f" Did you mean '{near[0]}'?"
    return f" Known: {', '.join(known)}." if known else ""


def first_line(error: BaseException) -> str:
    """Return a library's error as one line without a full stop, and without the queries of addresses.

    Such a query may hold a signature.
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"\?[^\s'\"]+", "", line).rstrip(".")
