"""Two processes against one: the same losses and weights up to rounding, whatever the division into micro-batches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

import tiny
from espalier import parallel
from espalier.errors import UserError
from espalier.study import Study
from training_runs import arguments, data, recipe, report, run, weights

# A batch of one row leaves a process without any; one of five does not divide evenly.
# With the larger norm some gradients are cut only if their size is wrong, to which AdamW alone is blind.
CASES = {
    "lora": ("lora", {"dropout": 0.0}, {"micro_batch": 1}),
    "sft": (
        "sft",
        {"weight_decay": 0.1, "max_gradient_norm": 20.0},
        {"micro_batch": 3, "gradient_checkpointing": True},
    ),
    "one row": ("sft", {"batch_size": 1, "steps": 3}, {}),
}


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("parent") / "model", hidden=32)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> dict:
    return data(tmp_path_factory.mktemp("data"))


def same(one: Path, other: Path) -> None:
    found, expected = report(one), report(other)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5, abs=1e-5)
    assert [round_["step"] for round_ in found["validation"]] == [round_["step"] for round_ in expected["validation"]]
    for left, right in zip(found["validation"], expected["validation"], strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
    found, expected = (load_file(folder / "model/model.safetensors") for folder in (one, other))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


@pytest.mark.parametrize("case", CASES)
def test_two_processes_do_what_one_does(parent, dataset, tmp_path, case):
    method, options, divided = CASES[case]
    for processes, more in ((1, {}), (2, divided)):
        words = arguments(parent, recipe(method, dataset, **options, **more), tmp_path / str(processes))
        code, said = run([*words, "--processes", str(processes)], tmp_path / f"log{processes}", processes)
        assert code == 0, said
    same(tmp_path / "2", tmp_path / "1")


@pytest.mark.parametrize("processes", [(2, 1), (1, 2)])
def test_a_state_goes_on_with_another_number_of_processes(parent, dataset, tmp_path, processes):
    words = arguments(parent, recipe("sft", dataset), tmp_path / "whole")
    code, said = run(words, tmp_path / "log")
    assert code == 0, said
    words = arguments(parent, recipe("sft", dataset), tmp_path / "divided", "--save-every", "0")
    code, said = run(words, tmp_path / "log", processes[0], kill=("after", 5))
    assert code == -signal.SIGKILL, said
    code, said = run(words, tmp_path / "log", processes[1])
    assert code == 0, said
    assert "going on after step 5," in said
    same(tmp_path / "divided", tmp_path / "whole")


def test_two_processes_go_on_bit_for_bit(parent, dataset, tmp_path):
    """Each has random numbers of its own for dropout, and each goes on with its own."""
    whole = arguments(parent, recipe("lora", dataset), tmp_path / "whole")
    code, said = run(whole, tmp_path / "log", 2)
    assert code == 0, said
    words = arguments(parent, recipe("lora", dataset), tmp_path / "again", "--save-every", "0")
    code, said = run(words, tmp_path / "log", 2, kill=("after", 5))
    assert code == -signal.SIGKILL, said
    code, said = run(words, tmp_path / "log", 2)
    assert code == 0, said
    assert "going on after step 5," in said
    assert weights(tmp_path / "again") == weights(tmp_path / "whole")
    found, expected = report(tmp_path / "again"), report(tmp_path / "whole")
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}


def test_what_needs_one_process_says_so(parent, dataset, tmp_path):
    words = arguments(parent, recipe("lora", dataset, base="nf4"), tmp_path)
    code, said = run(words, tmp_path / "log", 2)
    assert code == 1
    reason = "LoRA on weights in NF4 (QLoRA) runs in one process: leave --processes at 1"
    assert said.count(f"error: {reason}") == said.count(f"error in process 1: {reason}") == 1


def test_a_mistake_in_another_process_ends_that_one(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    joined = []
    monkeypatch.setattr(parallel, "_end_with_parent", lambda: None)
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *words, **more: joined.append((words, more)))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: joined.append("left"))
    with pytest.raises(SystemExit, match=r"^error in process 1: No data\.$"), parallel.group("cpu"):
        raise UserError("No data.")
    assert joined == [(("gloo",), {"timeout": timedelta(hours=4)}), "left"]


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({}, 1),
        ({"gpu": 0}, 1),
        ({"gpu": 4}, 4),
        ({"gres": "gpu"}, 1),
        ({"gres": "gpu:4"}, 4),
        ({"gres": "gpu:a100"}, 1),
        ({"gres": "gpu:a100:4"}, 4),
        ({"gres": "shard:8,gpu:h100:2"}, 2),
    ],
)
def test_a_job_has_a_process_for_each_gpu_where_its_method_can_divide_the_training(demo_config, resources, expected):
    lora = demo_config["recipes"]["lora"]
    demo_config["recipes"]["in-4-bits"] = {**lora, "base": "nf4"}
    study = Study(demo_config)
    found = {name: study.processes(name, resources) for name in ("lora", "sft", "in-4-bits", "cola")}
    assert found == {"lora": expected, "sft": expected, "in-4-bits": 1, "cola": 1}


# The launcher, with processes that import nothing ---------------------------------------------------------------------


def python(text: str) -> list[str]:
    return [sys.executable, "-c", f"import os, signal, sys, time; from pathlib import Path; {text}"]


def test_launched_processes_know_their_places(tmp_path):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = ", ".join(f"os.environ['{name}']" for name in names)
    text = f"Path(r'{tmp_path}', os.environ['RANK']).write_text(' '.join([{values}]))"
    assert parallel.launch(3, python(text)) == 0
    found = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [one[:3] for one in found] == [[str(rank), str(rank), "3"] for rank in range(3)]
    assert len({tuple(one[3:]) for one in found}) == 1
    assert not parallel.launched()


def test_one_that_fails_ends_the_others(monkeypatch):
    monkeypatch.setattr(parallel, "SECONDS_TO_END", 0.2)
    started = time.monotonic()
    assert parallel.launch(2, python("sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)")) == 3
    assert time.monotonic() - started < 30


def test_sigterm_reaches_all_processes(tmp_path):
    text = (
        "here = Path(r'FOLDER', os.environ['RANK']);"
        " signal.signal(signal.SIGTERM, lambda *_: (here.write_text('told'), sys.exit(1)));"
        " here.touch(); time.sleep(60)"
    ).replace("FOLDER", str(tmp_path))

    def tell() -> None:
        deadline = time.monotonic() + 30
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=tell).start()
    assert parallel.launch(2, python(text)) == 1
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["told", "told"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_launched_processes_die_with_the_launcher(tmp_path):
    worker = python(
        "from espalier import parallel; parallel._end_with_parent();"
        f" Path(r'{tmp_path}', os.environ['RANK']).write_text(str(os.getpid())); time.sleep(60)"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", f"from espalier import parallel; parallel.launch(2, {worker!r})"]
    )
    deadline = time.monotonic() + 30
    while sum(file.read_text() != "" for file in tmp_path.iterdir()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [psutil.Process(int(file.read_text())) for file in tmp_path.iterdir()]
    launcher.kill()
    launcher.wait()
    gone, alive = psutil.wait_procs(workers, timeout=10)
    assert (len(gone), alive) == (2, [])


def test_one_process_needs_no_group():
    with parallel.group("cpu"):
        assert (parallel.size(), parallel.rank(), parallel.loading_device("cuda")) == (1, 0, "cuda")
        assert not torch.distributed.is_initialized()
    assert parallel.total([1.5, True]) == [1.5, True]
    assert parallel.from_all("here") == ["here"]
