"""The folders that a run writes to, tried before it starts: a full home directory would end each job in its own way.

Snakemake itself writes to the cache in the home directory before it reads the Snakefile, and ends in a traceback where
it cannot. So `profiles/default`, which is read earlier, calls `check_cache`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from espalier.errors import UserError

PROBE = b"\0" * 2**20  # a quota that is nearly used up shows only when bytes are written


class Folder(NamedTuple):
    """A folder that is written to."""

    path: Path
    name: str  # what lies there
    advice: str  # what to do if it cannot be written to


def check(results: Path, caches: Iterable[Path] = ()) -> None:
    """Raise UserError, one line a folder, where a run that puts its results into `results` cannot write.

    `caches`: folders of the hub's cache that its jobs write to.
    """
    link = "make room there, or move it to a larger file system and leave a symbolic link in its place."
    folders = (
        Folder(Path.cwd(), "the project", "make room there, or work in a clone on a larger file system."),
        Folder(Path(".snakemake"), "Snakemake's records", link),
        Folder(results, "the results", link),
        Folder(cache_home(), "the cache of Snakemake and others", _variable("XDG_CACHE_HOME")),
        *map(_of_hub, caches),
        Folder(Path(os.environ.get("TMPDIR") or "/tmp"), "temporary files", _variable("TMPDIR")),
    )
    _check(folders)


def check_caches(caches: Iterable[Path]) -> None:
    """Raise UserError, one line a folder, for folders of the hub's cache that cannot be written."""
    _check(map(_of_hub, caches))


def check_cache() -> None:
    """End this process with one sentence if Snakemake could not write its cache."""
    mistake = _mistake(Folder(cache_home(), "the cache of Snakemake and others", _variable("XDG_CACHE_HOME")))
    if mistake:
        sys.exit(mistake)


def cache_home() -> Path:
    """Return the folder of this user's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def _of_hub(path: Path) -> Folder:
    own = (name for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE") if os.environ.get(name) == str(path))
    return Folder(path, "the hub's cache", _variable(next(own, "HF_HOME")))


def _check(folders: Iterable[Folder]) -> None:
    mistakes = list(filter(None, map(_mistake, folders)))
    if mistakes:
        raise UserError("\n".join(mistakes))


def _variable(name: str) -> str:
    where = "with room" if name == "TMPDIR" else "with room that all nodes share"
    return f"make room there, or set the environment variable {name} to a folder {where}."


def _mistake(folder: Folder) -> str | None:
    """Return a sentence if `folder`, or where it is to be made, cannot be written to."""
    place = Path(os.path.realpath(folder.path))  # of a link whose target is gone, the target
    try:
        while not place.exists():
            place = place.parent
        descriptor, probe = tempfile.mkstemp(prefix=".espalier-", dir=place)
        try:
            with open(descriptor, "wb") as file:
                file.write(PROBE)
                file.flush()
                os.fsync(descriptor)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(probe)
    except OSError as error:
        return f"{folder.path} ({folder.name}) cannot be written to: {_reason(error, place)}; {folder.advice}"
    return None


def _reason(error: OSError, place: Path) -> str:
    """Return why nothing could be written at `place`."""
    if error.errno == errno.EDQUOT:
        return "your quota there is used up"
    if error.errno == errno.ENOSPC:
        left = os.statvfs(place)
        if left.f_files and not left.f_favail:
            return "it may hold no more files (0 inodes are free)"
        return f"the file system is full ({left.f_bavail * left.f_frsize / 1e6:.1f} MB are free)"
    return f"{error.strerror or error}"
