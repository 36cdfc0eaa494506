"""Fixtures: the demo's config, a tiny model, a hub, and a copy of the project to edit."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import yaml

import tiny

ROOT = Path(__file__).parents[1]

gc.disable()  # until all tests are imported: Python's garbage collector would look through that again and again


def pytest_collection_finish() -> None:
    """Keep the garbage collector away from what was imported: a look through that takes 0.5 s."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def demo_config() -> dict:
    """The demo study's config, as a fresh mapping to change."""
    return yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def kept_environment():
    """Take back the settings that an engine makes for its library."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A checkpoint of a tiny Llama, to be left as it is."""
    return tiny.llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def client(monkeypatch, tmp_path):
    """A hub on loopback, which this process's own huggingface_hub and datasets ask."""
    import datasets

    from hub_server import serve
    from hub_study import use_hub

    with serve() as server:
        use_hub(monkeypatch, server, tmp_path / "cache")
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.endpoint)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache/datasets")
        yield server


def copy_project(target: Path) -> Path:
    """Copy every file that git tracks, or would, into `target`."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        source, copy = ROOT / name, target / name
        if source.is_file() or source.is_symlink():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)
    return target


def environment(project: Path, python_path: Sequence[Path] = ()) -> dict[str, str]:
    """Return the environment in which `project`'s own espalier is imported, and not the one that is installed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*python_path, project / "workflow"]))}


def snakemake(project: Path, *arguments: str, python_path: Sequence[Path] = ()) -> subprocess.CompletedProcess:
    """Run snakemake in `project`, with the espalier of that folder."""
    command = [sys.executable, "-m", "snakemake", *arguments]
    settings = {"cwd": project, "env": environment(project, python_path), "capture_output": True, "text": True}
    return subprocess.run(command, check=False, **settings)
