"""A folder that cannot be written to is named before a run starts, with what to do."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import ROOT
from espalier import folders
from espalier.errors import UserError

NOWHERE = "/proc/espalier"  # no file can be made in /proc, not even by root


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project with all that it writes to below one folder."""
    for variable in ("XDG_CACHE_HOME", "TMPDIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    for variable in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, number: int, **left: int) -> None:
    """Have `name` of the module os fail, on a file system with so much left."""

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folders.os, name, fail)
    monkeypatch.setattr(folders.os, "statvfs", lambda _: SimpleNamespace(f_frsize=512, **left))


def test_nothing_is_left_of_a_try(project):
    folders.check(Path("results/study"), [project / "hub"])
    folders.check_cache()
    folders.check_caches([project / "hub"])
    assert list(project.iterdir()) == []


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "TMPDIR"])
def test_a_folder_of_the_environment(project, monkeypatch, variable):
    monkeypatch.setenv(variable, NOWHERE)
    with pytest.raises(UserError) as caught:
        folders.check(Path("results"))
    (line,) = str(caught.value).splitlines()
    assert re.match(rf"{NOWHERE} \(.*\) cannot be written to: .*set the environment variable {variable} to", line)


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE"])
def test_a_folder_of_the_hubs_cache(project, monkeypatch, variable):
    monkeypatch.setenv(variable, NOWHERE)
    for check in (folders.check_caches, lambda caches: folders.check(Path("results"), caches)):
        with pytest.raises(UserError) as caught:
            check([Path(NOWHERE), project])
        (line,) = str(caught.value).splitlines()
        assert re.match(rf"{NOWHERE} \(the hub's cache\) cannot be .*set the environment variable {variable} to", line)
    folders.check(Path("results"))  # of a study that needs nothing of the hub


def test_a_folder_inside_one_that_may_not_be_entered(project, monkeypatch):
    def fail(_: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "exists", fail)
    with pytest.raises(UserError, match=r"hub \(the hub's cache\) cannot be written to: Permission denied; make room"):
        folders.check_caches([project / "hub"])


@pytest.mark.parametrize("name", [".snakemake", "results"])
def test_a_link_is_followed_also_to_what_is_gone(project, name):
    (project / name).symlink_to(NOWHERE)
    with pytest.raises(UserError, match=rf"^{name}/?\S* \(.*\) cannot be written to: .*; make room there, or move it"):
        folders.check(Path("results/study"))


FULL = {
    "a quota": (errno.EDQUOT, {}, "your quota there is used up"),
    "no bytes": (
        errno.ENOSPC,
        {"f_files": 99, "f_favail": 9, "f_bavail": 1000},
        "the file system is full (0.5 MB are free)",
    ),
    "no inodes": (errno.ENOSPC, {"f_files": 99, "f_favail": 0}, "it may hold no more files (0 inodes are free)"),
    "inodes that nobody counts": (
        errno.ENOSPC,
        {"f_files": 0, "f_favail": 0, "f_bavail": 0},
        "the file system is full (0.0 MB are free)",
    ),
    "read-only": (errno.EROFS, {}, "Read-only file system"),
}


@pytest.mark.parametrize(("number", "left", "words"), FULL.values(), ids=FULL)
def test_why_nothing_can_be_written(project, monkeypatch, number, left, words):
    refuse(monkeypatch, "fsync", number, **left)  # where a quota on a network's file system shows at the latest
    with pytest.raises(UserError) as caught:
        folders.check(Path("results"), [project / "hub"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert all(f" cannot be written to: {words}; make room there, or " in line for line in lines)
    assert list(project.iterdir()) == []


def test_a_full_cache_ends_the_process_in_one_sentence(project, monkeypatch):
    refuse(monkeypatch, "fsync", errno.EDQUOT)
    with pytest.raises(SystemExit, match=r"HOME \(the cache of Snakemake and others\) .*set the environment variable"):
        folders.check_cache()


def test_snakemake_says_so_itself_before_it_fails():
    """It writes to its cache before it reads the Snakefile, so the profile must be what looks."""
    command = [sys.executable, "-m", "snakemake", "-n", "--quiet", "rules"]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "XDG_CACHE_HOME": NOWHERE}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(f"{NOWHERE} (the cache of Snakemake and others) cannot be written to")
