"""What the tests of prefetch share: repositories for the small hub, a study that needs them, and who asks for them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from huggingface_hub import constants

import tiny
from espalier import hub, hub_download
from espalier.study import Study
from hub_server import Hub

TOKEN = "-".join(("hf", "Albatross", "Bassoon"))  # in pieces, so that this file does not hold it
DEAD = "http://127.0.0.1:9"
CARD = """---
configs:
- config_name: one
  data_files: [{split: train, path: one/train.jsonl}, {split: test, path: one/test.jsonl}]
- config_name: two
  data_files: [{split: train, path: two/train.jsonl}]
---
"""


def model_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a tiny model, by name; `folder` is where it is made."""
    tiny.llama(folder, layers=1, hidden=16, mlp=16)
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "espalier.json"}


def lines(*rows: dict) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def words(start: int) -> dict[str, bytes]:
    """A data set of two configs whose rows are numbered from `start`."""
    rows = [{"text": f"row {number}"} for number in range(start, start + 6)]
    parts = {"one/train": rows[:3], "one/test": rows[3:5], "two/train": rows[5:]}
    return {"README.md": CARD.encode(), **{f"{part}.jsonl": lines(*some) for part, some in parts.items()}}


def study(tmp_path: Path, commits: dict[str, str], **sections) -> Study:
    """A study of a model of the hub that is measured on a text of the hub; `sections` replace entries."""
    mapping = {
        "study": "s",
        "models": {"m": {"hub": "someone/tiny", "revision": commits["tiny"]}},
        "datasets": {"words": {"hub": "someone/words", "revision": commits["words"]}},
        "suites": {"held": {"evaluate": "perplexity", "text": {"dataset": "words", "config": "one", "split": "test"}}},
        "figures": {},
        "measure": [{"model": "m", "chains": ["dense"], "suites": ["held"]}],
    }
    return Study({**mapping, **sections}, file="s.yaml", results=str(tmp_path / "results"))


def use_hub(monkeypatch, server: Hub, cache: Path) -> None:
    """Have this process's own huggingface_hub talk to `server`, with a cache of its own; it does not sleep."""
    address = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what came of a part of this size is kept
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    use_cache(monkeypatch, cache)


def use_cache(monkeypatch, folder: Path) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)


def of_cache(folder: Path, endpoint: str) -> dict[str, str]:
    """Return the environment of a process of its own with that cache and that hub."""
    cache = {"HF_HOME": str(folder), "HF_HUB_CACHE": str(folder / "hub"), "HF_DATASETS_CACHE": str(folder / "datasets")}
    return {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", **cache}


def fetch(file: Path, name: str, revision: str) -> dict:
    return hub_download.prefetch("s", [hub.Item("model", name, None, revision, (), ("models.m",))], file)


def leaks(folder: Path) -> list[Path]:
    """Return the files below a folder that hold the token."""
    return [file for file in folder.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]
