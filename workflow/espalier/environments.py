"""Environments of engines whose pins conflict with the main one: built from their lock, where they are needed, once.

An engine names its locks by device: `ENVIRONMENTS = {"cpu": "vllm-cpu"}` is envs/vllm-cpu.lock. What is built of it,
results/environments/vllm-cpu/venv-{digest of the lock}-{version of Python}, is shared by all studies of the folder, and
a lock of the operating system (flock) keeps two jobs from building it at once. After an edit to a lock another one is
built beside it, for jobs may run in the old one. A marker in it, written last, says that it is whole and what is in it:
one without a marker is what a killed job left, and is built anew. A study's own file results/{study}/environments/
{name}.json says where its Python is, or why there is none; a build that failed is tried again by the next run.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from espalier import plugins
from espalier.errors import UserError
from espalier.files import read_json, write_json

LOCKS = Path(__file__).parents[2] / "envs"
MARKER = "espalier.json"  # in a venv that is whole: what it was built of, and the packages in it
COMMENT = re.compile(r"(^|\s+)#.*$")  # as pip reads a file of requirements
NETWORK = re.compile(r"connection broken by '\w+\((.*)\)'")
VERSIONS = re.compile(r" \(from versions: .*\)$")
WITHOUT_REASON = ("No matching distribution found", "Ignored the following")  # errors of pip that repeat, or list
TORCH_BUILD = re.compile(r"\btorch==[\w.]+\+(\w+)")  # torch==2.13.0+cpu
OPTIONS = ("--no-input", "--disable-pip-version-check", "--progress-bar", "off")


class _Failed(Exception):
    """Pip has failed; the text is the reason, a clause without a full stop."""


# What a study asks ----------------------------------------------------------------------------------------------------


def of_engine(engine: str) -> dict[str, str]:
    """Return device (cpu, cuda) → environment of an engine; empty where it runs in the main one."""
    return getattr(plugins.load("engines", engine, "engine"), "ENVIRONMENTS", {})


def lock_file(name: str) -> Path:
    """Return the lock of an environment, as a path from this folder where that is shorter."""
    file = LOCKS / f"{name}.lock"
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file


def digest(lock: Path) -> str:
    """Return 16 hex digits of what a lock asks for: comments, empty lines and spaces at a line's ends do not count."""
    return hashlib.sha256("\n".join(_lines(lock)).encode()).hexdigest()[:16]


def python_version() -> str:
    """Return the version of Python that an environment gets, which is this one's: 3.11."""
    return ".".join(platform.python_version_tuple()[:2])


@functools.cache  # a build changes it, and the job that builds is to be recorded as it was planned
def trial(file: Path) -> int:
    """Return which trial of an environment a run makes, or has made, by a study's file about it: 1, 2, …

    It is a parameter of the job, and one more than before where the last trial failed, or what it made is gone: so that
    is tried again, and what followed from it.
    """
    if not file.is_file():
        return 1
    last = read_json(file)
    return last["trial"] + (last["outcome"] != "ok" or not Path(last["python"]).exists())


# What the job does ----------------------------------------------------------------------------------------------------


def build(lock: Path, folder: Path) -> dict:
    """Have `folder` hold the environment of a lock, whole, and return outcome ("ok"), python and packages (versions).

    If it cannot be installed, nothing of it is left, python is None, and the outcome is "unavailable: " and the reason.
    Another job that builds it is waited for. Raises UserError where `folder` cannot be written to.
    """
    place = venv_folder(lock, folder)
    python = place / "bin" / "python"
    made_of = {"lock": digest(lock), "python": python_version()}
    with _alone(folder) as held:
        if not _is_whole(place, made_of):
            try:
                _remove(place)
                venv.EnvBuilder(symlinks=True).create(place)  # without pip: this environment's own serves it
                _install(lock, python, held)
                write_json(place / MARKER, {**made_of, "packages": _packages(place)})
            except (OSError, UserError, _Failed) as error:
                with contextlib.suppress(OSError):
                    _remove(place)  # gigabytes, perhaps on a disk that is full
                reason = getattr(error, "strerror", None) or str(error).rstrip(".")
                return {
                    "outcome": f"unavailable: the environment {lock.stem} could not be installed: {reason}",
                    "python": None,
                    "packages": {},
                }
        return {"outcome": "ok", "python": str(python), "packages": read_json(place / MARKER)["packages"]}


def venv_folder(lock: Path, folder: Path) -> Path:
    """Return where in an environment's folder that of a lock is: another lock, or another Python, has another place."""
    return folder / f"venv-{digest(lock)}-{python_version()}"


def reason(said: Iterable[str]) -> str:
    """Return why pip failed, from the lines that it printed, as one line without a full stop."""
    lines = [line.strip() for line in said if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    # Pip says that there is no such version where it could not ask for one.
    if "from versions: none" in " ".join(errors) and (broken := [one for one in map(NETWORK.search, lines) if one]):
        what = re.sub(r"^.* object at \w+>: |^['\"]|['\"]$", "", broken[-1][1])
        return f"the index of packages cannot be reached ({what})"
    errors = [VERSIONS.sub("", error) for error in errors if not error.startswith(WITHOUT_REASON)] or errors
    if build := TORCH_BUILD.search(" ".join(errors)):
        errors.append(f"an index that has it: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/{build[1]}")
    return "; ".join(error.rstrip(".") for error in errors or lines[-1:]) or "pip says nothing"


def _install(lock: Path, python: Path, held: int) -> None:
    """Install a lock, which is complete: torch first and alone, unless the lock says checksums, which bind everything.

    Torch's own requirements bring the CPU or the CUDA build, as for the main environment.
    """
    lines = _lines(lock)
    if not any("--hash" in line for line in lines):
        for torch in (line for line in lines if line.startswith("torch==")):
            _pip(python, [torch], held)
    _pip(python, ["--no-deps", "--requirement", str(lock)], held)


def _pip(python: Path, arguments: list[str], held: int) -> None:
    """Run this environment's pip for another Python, and pass on what it says; raises _Failed.

    It holds the lock, too: if this process is killed, whoever comes next waits until pip has ended.
    """
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", *OPTIONS, *arguments]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with subprocess.Popen(command, env=variables, pass_fds=(held,), **settings) as process:
        said = []
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line)
    if process.returncode:
        raise _Failed(reason(said))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Hold the lock of an environment's folder, once nobody else does; yields the open file that is the lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / "lock").open("a")
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error.strerror}.") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another job builds {folder}; waiting for it.", flush=True)
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: two studies must not build at once there
            print(f"The file system of {folder} has no locks: nothing else may build it now.", flush=True)
        yield stream.fileno()


def _is_whole(place: Path, made_of: dict) -> bool:
    """Return whether a venv was built to its end, of this, and its Python is still there."""
    marker = place / MARKER
    if not marker.is_file() or not (place / "bin" / "python").exists():
        return False
    found = read_json(marker)
    return {name: found.get(name) for name in made_of} == made_of


def _remove(place: Path) -> None:
    """Delete a venv, the marker first: half of one must never be taken for whole."""
    (place / MARKER).unlink(missing_ok=True)
    if place.exists():
        shutil.rmtree(place)


def _packages(place: Path) -> dict[str, str]:
    (folder,) = place.glob("lib/python*/site-packages")
    return {one.name: one.version for one in sorted(metadata.distributions(path=[str(folder)]), key=lambda d: d.name)}


def _lines(lock: Path) -> list[str]:
    """Return the lines of a lock that ask for something; raises UserError if it cannot be read."""
    try:
        text = lock.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"The lock {lock} cannot be read: {error.strerror}.") from None
    return list(filter(None, (COMMENT.sub("", line).strip() for line in text.splitlines())))
