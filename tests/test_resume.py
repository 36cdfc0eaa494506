"""A training that was killed goes on from its last saved state and ends with the same weights, bit for bit."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

import tiny
from espalier import provenance, training_state
from espalier.training_state import Saving
from training_runs import METHODS, SCRIPT, arguments, data, recipe, report, run, start, weights

ALWAYS = ("--save-every", "0")


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("parent") / "model", hidden=32)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> dict:
    return data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, parent, dataset) -> dict[str, Path]:
    """Folders in which each method was run from its beginning to its end, without a state."""
    folders = {method: tmp_path_factory.mktemp(method) for method in METHODS}
    for method, folder in folders.items():
        code, said = run(arguments(parent, recipe(method, dataset), folder, "--save-every", "1e9"), folder / "log")
        assert code == 0, said
    return folders


@pytest.mark.parametrize(
    ("method", "kill"),
    [
        ("lora", ("after", 3)),
        ("lora", ("during", 6)),
        ("sft", ("during", 4)),
        ("continued-pretraining", ("after", 5)),
    ],
)
def test_killed_and_started_again(parent, dataset, uninterrupted, tmp_path, method, kill):
    words = arguments(parent, recipe(method, dataset), tmp_path, *ALWAYS)
    code, said = run(words, tmp_path / "log", kill=kill)
    assert code == -signal.SIGKILL, said
    assert (tmp_path / "state/state.pt").exists()
    assert not (tmp_path / "model").exists()
    code, said = run(words, tmp_path / "log")
    assert code == 0, said
    assert f"going on after step {kill[1] - (kill[0] == 'during')}," in said
    assert weights(tmp_path) == weights(uninterrupted[method])
    found, expected = report(tmp_path), report(uninterrupted[method])
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    assert not (tmp_path / "state").exists()


def test_sigterm_ends_it_after_a_step_with_a_state(parent, dataset, tmp_path):
    words = arguments(parent, recipe("sft", dataset, steps=5000, validate_every=5000), tmp_path)
    process = start([*words, "--save-every", "0"], tmp_path / "log")
    deadline = time.monotonic() + 60
    while not (tmp_path / "state/state.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 1
    assert "error: Stopped by SIGTERM after step" in said
    state = torch.load(tmp_path / "state/state.pt", weights_only=True)
    assert f"after step {len(state['losses'])} of 5000" in said


def test_sigterm_to_all_processes_of_a_job_ends_in_a_state_and_a_farewell(parent, dataset, tmp_path):
    """As a cluster sends it: to the rule's shell, tee, the launcher and two processes that train."""
    words = arguments(parent, recipe("sft", dataset, steps=5000, validate_every=5000), tmp_path, *ALWAYS)
    command = shlex.join([sys.executable, str(SCRIPT), *words, "--processes", "2"])
    shell = ["bash", "-c", f"set -euo pipefail; trap '' TERM; {command} 2>&1 | tee {tmp_path / 'log'}"]
    job = subprocess.Popen(shell, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 90
    while not (tmp_path / "state/state.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGTERM)
    assert job.wait(60) == 1
    said = (tmp_path / "log").read_text()
    steps = len(torch.load(tmp_path / "state/state.pt", weights_only=True)["losses"])
    for who in ("error", "error in process 1"):
        assert f"{who}: Stopped by SIGTERM after step {steps} of 5000; the state is saved" in said


def test_a_state_of_another_seed_is_not_resumed(parent, dataset, tmp_path):
    code, _ = run(arguments(parent, recipe("sft", dataset), tmp_path, *ALWAYS), tmp_path / "log", kill=("after", 2))
    assert code == -signal.SIGKILL
    again, anew = tmp_path, tmp_path / "anew"
    for folder in (again, anew):
        words = arguments(parent, recipe("sft", dataset), folder, *ALWAYS)
        words[words.index("--seed") + 1] = "1"
        code, said = run(words, folder / "log")
        assert code == 0, said
        assert ("is of another training (seed, data changed): starting from the beginning" in said) is (folder == again)
    assert weights(again) == weights(anew)


KEY = {"recipe": "r", "seed": "0", "code": "c", "parent": "p", "packages": "v", "device": "cpu"}
STATE = {"losses": [3.0, 2.5], "weights": {"w": torch.arange(4096.0)}}


@pytest.fixture
def saving(tmp_path) -> Saving:
    saving = Saving(tmp_path / "state", 600, KEY)
    saving.write("d", STATE)
    return saving


def test_what_else_lies_in_the_folder_stays(saving):
    (saving.file.parent / "mine").touch()
    (saving.file.parent / ".state.pt.partial-7").touch()
    saving.remove()
    assert [file.name for file in saving.file.parent.iterdir()] == ["mine"]


def test_a_state_is_read_as_it_was_written(saving):
    found = saving.read("d")
    assert found["losses"] == STATE["losses"]
    assert torch.equal(found["weights"]["w"], STATE["weights"]["w"])
    saving.remove()
    assert saving.read("d") is None
    assert not saving.file.parent.exists()


@pytest.mark.parametrize("changed", [*KEY, "data"])
def test_any_other_key_discards_it(saving, capsys, changed):
    saving.key = {**KEY, changed: "other"} if changed in KEY else KEY
    assert saving.read("other" if changed == "data" else "d") is None
    assert f"({changed} changed): starting from the beginning" in capsys.readouterr().err
    assert not saving.file.exists()


def of_another_kind(content: bytes) -> bytes:
    """Return a state's archive in which a pickle names what is never loaded."""
    old, new = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    with zipfile.ZipFile(new, "w") as archive:
        for name in old.namelist():
            archive.writestr(name, pickle.dumps(Path(), protocol=2) if name.endswith("data.pkl") else old.read(name))
    return new.getvalue()


DAMAGES = {
    "a flipped bit": lambda content: content[: len(content) // 2] + b"?" + content[len(content) // 2 + 1 :],
    "truncation": lambda content: content[: len(content) // 2],
    "nothing": lambda content: b"",
    "another file": lambda content: b"not a state",
    "another pickle": of_another_kind,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_discarded(saving, capsys, damage):
    saving.file.write_bytes(DAMAGES[damage](saving.file.read_bytes()))
    assert saving.read("d") is None
    assert "is damaged: starting from the beginning" in capsys.readouterr().err
    assert not saving.file.exists()


@pytest.mark.parametrize(
    ("every", "took", "since", "due"),
    [(600, 2, 599, False), (600, 2, 601, True), (600, 90, 899, False), (600, 90, 901, True), (0, 90, 1, True)],
)
def test_saving_takes_a_tenth_of_the_time_at_most(tmp_path, monkeypatch, every, took, since, due):
    now = [1000.0]
    monkeypatch.setattr(training_state.time, "monotonic", lambda: now[0])
    saving = Saving(tmp_path / "state", every, KEY)
    monkeypatch.setattr(saving, "write", lambda *_: now.__setitem__(0, now[0] + took))
    training_state.save(saving, "d", {}, {}, None)
    now[0] += since
    assert saving.asked() == (False, due)


EDITS = {
    "recipe": lambda given, patch: given.recipe.update(learning_rate=1.0e-3),
    "seed": lambda given, patch: setattr(given, "seed", 1),
    "code": lambda given, patch: given.recipe.update(tune="lora"),
    "parent": lambda given, patch: os.utime(given.parent / "model.safetensors", (1, 1)),
    "packages": lambda given, patch: patch.setattr(provenance, "PACKAGES", ("torch",)),
    "device": lambda given, patch: setattr(given, "device", "cuda"),
}


def test_what_a_training_follows_from_is_in_its_key(dataset, tmp_path, monkeypatch):
    parent = tiny.llama(tmp_path / "parent", hidden=32, layers=1)
    for name, edit in EDITS.items():
        given = argparse.Namespace(parent=parent, recipe=recipe("sft", dataset), seed=0, state=tmp_path, save_every=1)
        given.device = "cpu"
        before, again = (training_state.of_job("tune", given, SCRIPT).key for _ in range(2))
        assert before == again
        edit(given, monkeypatch)
        after = training_state.of_job("tune", given, SCRIPT).key
        assert {one for one in KEY if before[one] != after[one]} == ({"code", "recipe"} if name == "code" else {name})
