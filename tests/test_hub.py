"""A model of the hub: fetched at its pinned revision from a small server on loopback that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from conftest import ROOT

REVISION = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/tiny-llama"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    folder = tmp_path_factory.mktemp("hub") / "model"
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(folder)
    return folder


@pytest.fixture
def hub(model):
    """The address of a hub that holds one model at one revision, and the paths that it was asked for."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            if path == f"/api/models/{NAME}/tree/{REVISION}":
                files = [(file.name, file.stat().st_size) for file in sorted(model.iterdir())]
                found = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in files]
                self.reply(json.dumps(found).encode(), body)
            elif path.startswith(f"/{NAME}/resolve/{REVISION}/"):
                self.reply((model / path.rsplit("/", 1)[1]).read_bytes(), body)
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def reply(self, content: bytes, body: bool) -> None:
            self.send_response(200)
            self.send_header("X-Repo-Commit", REVISION)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def fetch(name: str, endpoint: str, tmp_path: Path) -> subprocess.CompletedProcess:
    reference = {"path": None, "id": name, "revision": REVISION, "task": "causal-lm", "dtype": "auto"}
    command = [sys.executable, str(ROOT / "workflow/scripts/fetch_model.py")]
    command += ["--reference", json.dumps({**reference, "trust_remote_code": False})]
    command += ["--output", str(tmp_path / "model"), "--step", str(tmp_path / "step.json")]
    command += ["--study", "s", "--model-name", "m", "--seed", "0", "--chain", "dense", "--name", "dense"]
    # GPTQModel, imported by another test of this process, sets the cache in the environment.
    cache = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_CACHE": str(tmp_path / "cache" / "hub")}
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", **cache}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_model_of_the_hub_is_fetched_and_pointed_to(hub, model, tmp_path):
    endpoint, asked = hub
    run = fetch(NAME, endpoint, tmp_path)
    assert run.returncode == 0, run.stderr
    info = json.loads((tmp_path / "model/espalier.json").read_text())
    assert (info["id"], info["revision"], info["format"]) == (NAME, REVISION, "reference")
    assert info["parameters"] == 2 * 16 * 8 + 4 * 8 * 8 + 3 * 8 * 8 + 3 * 8
    step = json.loads((tmp_path / "step.json").read_text())
    weights = (model / "model.safetensors").read_bytes()
    assert step["samples"]["sha256"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    assert f"/{NAME}/resolve/{REVISION}/model.safetensors" in asked
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["espalier.json"], "a pointer, not a copy"


def test_a_model_that_the_hub_does_not_have_is_named(hub, tmp_path):
    run = fetch("someone/tiny-lama", hub[0], tmp_path)
    assert run.returncode == 1
    assert f"error: The model someone/tiny-lama, revision {REVISION}, cannot be downloaded" in run.stderr
    assert not (tmp_path / "model").exists()


def test_a_hub_that_cannot_be_reached_is_named(tmp_path):
    run = fetch(NAME, "http://127.0.0.1:9", tmp_path)
    assert run.returncode == 1
    assert f"error: The model {NAME}, revision {REVISION}, cannot be downloaded" in run.stderr
    assert not (tmp_path / "step.json").exists()
