"""Studies that are written as another study with changes: `base: other.yaml`, and only what differs.

Mappings are merged key by key, at any depth; any other value replaces that of the base, a list whole; null takes a key
of the base away. The names of axes are filled in before, so that one entry of those that an axis stands for can be
changed. The path of the base is relative to the file that names it. A base may have a base itself.
"""

from __future__ import annotations

import os
from pathlib import Path

from espalier.errors import UserError

KEY, AXES = "base", "axes"


def merged(mapping: dict, file: str) -> tuple[dict, str]:
    """Return a study's mapping with its bases below it, and how messages name it: with the bases' files.

    Raises UserError for a base that cannot be read, or that is its own base.
    """
    from espalier.config import expand

    names, parts = [file], [dict(mapping)]
    while (base := parts[-1].pop(KEY, None)) is not None:
        if not isinstance(base, str):
            raise UserError(f"{names[-1]}: {KEY}: expected the path of another study, found {base!r}.")
        path = os.path.normpath(Path(names[-1]).parent / base)
        if path in map(os.path.normpath, names):
            raise UserError(f"{names[-1]}: {KEY}: {path} would be its own base.")
        parts.append(_read(path, f"{names[-1]}: {KEY}"))
        names.append(path)
    if not names[1:]:
        return parts[0], file
    # From the deepest base upwards: what a file takes away, none below it brings back.
    axes: dict = {}
    for part in reversed(parts):
        axes = _over({AXES: part.pop(AXES)}, axes) if AXES in part else axes
    whole: dict = {}
    for part, name in reversed([*zip(parts, names, strict=True)]):
        whole = _over(expand(part | axes, name), whole)
    return whole, f"{file} (base {', '.join(names[1:])})"


def _read(path: str, where: str) -> dict:
    from espalier.config import read

    try:
        return read(Path(path))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _over(upper: dict, lower: dict) -> dict:
    """Return `lower` with the keys of `upper` put over it."""
    whole = dict(lower)
    for key, value in upper.items():
        if value is None and key in lower:
            del whole[key]
        elif isinstance(value, dict) and isinstance(lower.get(key), dict):
            whole[key] = _over(value, lower[key])
        else:
            whole[key] = value
    return whole
