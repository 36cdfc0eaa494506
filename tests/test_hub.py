"""A model of the hub: fetched at its pinned revision from a small hub on loopback that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from hub_server import Hub, serve

NAME = "someone/tiny-llama"
TOKEN = "hf_Heron"
SOME_COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    folder = tmp_path_factory.mktemp("hub") / "model"
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(folder)
    return folder


@pytest.fixture
def hub():
    with serve() as server:
        yield server


def fetch(name: str, revision: str, endpoint: str, tmp_path: Path, offline: str = "0") -> subprocess.CompletedProcess:
    reference = {"path": None, "id": name, "revision": revision, "task": "causal-lm", "dtype": "auto"}
    command = [sys.executable, str(ROOT / "workflow/scripts/fetch_model.py")]
    command += ["--reference", json.dumps({**reference, "trust_remote_code": False})]
    command += ["--output", str(tmp_path / "model"), "--step", str(tmp_path / "step.json")]
    command += ["--study", "s", "--model-name", "m", "--seed", "0", "--chain", "dense", "--name", "dense"]
    # GPTQModel, imported by another test of this process, sets the cache in the environment.
    cache = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_CACHE": str(tmp_path / "cache" / "hub")}
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": offline, **cache}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_model_of_the_hub_is_fetched_and_pointed_to(hub: Hub, model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    revision = hub.add("models", NAME, model, TOKEN)
    run = fetch(NAME, revision, hub.endpoint, tmp_path)
    assert run.returncode == 0, run.stderr
    written = [file.read_text(errors="ignore") for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(TOKEN in text for text in (run.stdout, run.stderr, *written))
    info = json.loads((tmp_path / "model/espalier.json").read_text())
    assert (info["id"], info["revision"], info["format"]) == (NAME, revision, "reference")
    assert info["parameters"] == 2 * 16 * 8 + 4 * 8 * 8 + 3 * 8 * 8 + 3 * 8
    step = json.loads((tmp_path / "step.json").read_text())
    weights = (model / "model.safetensors").read_bytes()
    assert step["samples"]["sha256"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    assert f"/{NAME}/resolve/{revision}/model.safetensors" in [path for _, path, _ in hub.asked]
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["espalier.json"], "a pointer, not a copy"


def test_a_model_that_the_hub_does_not_have_is_named(hub: Hub, tmp_path):
    run = fetch("someone/tiny-lama", SOME_COMMIT, hub.endpoint, tmp_path)
    assert run.returncode == 1
    assert f"error: The model someone/tiny-lama, revision {SOME_COMMIT}, cannot be downloaded" in run.stderr
    assert not (tmp_path / "model").exists()


def test_a_hub_that_cannot_be_reached_is_named(tmp_path):
    run = fetch(NAME, SOME_COMMIT, "http://127.0.0.1:9", tmp_path)
    assert run.returncode == 1
    assert f"error: The model {NAME}, revision {SOME_COMMIT}, cannot be downloaded" in run.stderr
    assert not (tmp_path / "step.json").exists()


def test_a_model_that_is_not_in_the_cache_is_not_asked_for_with_the_hub_switched_off(hub: Hub, model, tmp_path):
    revision = hub.add("models", NAME, model)
    run = fetch(NAME, revision, hub.endpoint, tmp_path, offline="1")
    assert run.returncode == 1
    assert "Run `snakemake prefetch` where there is internet." in run.stderr
    assert hub.asked == []
