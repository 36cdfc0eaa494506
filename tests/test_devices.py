"""GPUs of one machine among processes: each has its own, for as long as it lives. nvidia-smi is a fake of two GPUs."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from espalier import devices
from espalier.errors import UserError

SECONDS = 20  # in which a job has its GPUs, if they are free
NVIDIA_SMI = "#!/bin/sh\necho '0, GPU-a'\necho '1, GPU-b'\n"

# What workflow/scripts/hold_gpus.py does, with another folder of locks.
HOLD = """
import pathlib, sys
from espalier import devices
devices.LOCKS = pathlib.Path(sys.argv[1])
devices.SECONDS_BETWEEN_LOOKS = 0.01
devices.run(int(sys.argv[2]), sys.argv[3:])
"""

# A job says which GPUs it sees, and uses them until its input ends.
JOB = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); sys.stdin.read()"

# It fails if another job uses a GPU that it sees: a file that exists cannot be made.
HURRIED_JOB = """
import os, pathlib, time
mine = [pathlib.Path("in-use-" + name) for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
for file in mine:
    file.touch(exist_ok=False)
time.sleep(0.05)
for file in mine:
    file.unlink()
"""


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch) -> Path:
    """A machine of two GPUs; returns the folder of its locks."""
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text(NVIDIA_SMI)
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "locks"


@pytest.fixture
def start(machine) -> Iterator:
    """A function that starts a job which asks for a number of GPUs."""
    started = []

    def one(gpus: int, job: str = JOB, **environment: str) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(machine), str(gpus), sys.executable, "-c", job]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=machine.parent, env={**os.environ, **environment}, **pipes))
        return started[-1]

    with contextlib.ExitStack() as ends:
        yield one
        for job in started:
            job.kill()
            ends.push(job)


def said(job: subprocess.Popen) -> str:
    """Return the next line that a job says about its waiting."""
    assert select.select([job.stderr], [], [], SECONDS)[0], "it says nothing"
    return job.stderr.readline().rstrip()


def taken(job: subprocess.Popen) -> list[str]:
    """Return the GPUs that a job sees, once it has them."""
    assert select.select([job.stdout], [], [], SECONDS)[0], "it waits still"
    return job.stdout.readline().strip().split(",")


def test_jobs_at_once_have_different_gpus_and_one_too_many_waits_for_the_first_that_ends(start):
    first, second = start(1), start(1)
    mine = taken(first)
    assert sorted(mine + taken(second)) == ["0", "1"]
    third = start(1)
    assert said(third) == "waiting for GPUs: 1 of 0, 1"
    assert third.poll() is None
    first.stdin.close()
    assert taken(third) == mine
    assert second.poll() is None


def test_what_a_killed_job_held_is_free(start):
    first, second = start(1), start(1)
    mine = taken(first)
    taken(second)
    first.kill()
    assert taken(start(1)) == mine


def test_a_job_of_two_has_two_and_is_not_overtaken(start):
    one = start(1)
    taken(one)
    two = start(2)
    assert said(two) == "waiting for GPUs: 2 of 0, 1"
    late = [start(1) for _ in range(4)]
    time.sleep(0.5)  # all of them wait
    one.stdin.close()
    assert sorted(taken(two)) == ["0", "1"]
    two.stdin.close()
    assert select.select([job.stdout for job in late], [], [], SECONDS)[0]


def test_a_job_that_waits_ends_on_sigterm_and_one_that_runs_decides_itself(start):
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as the shell of a training has it
    try:
        runs = start(2)
        taken(runs)
        waits = start(1)
    finally:
        signal.signal(signal.SIGTERM, previous)
    said(waits)
    for job in (runs, waits):
        job.terminate()
    assert waits.wait(SECONDS) == -signal.SIGTERM
    assert runs.poll() is None


def test_many_jobs_never_meet_on_a_gpu(start):
    many = [start(gpus, HURRIED_JOB) for gpus in (1, 2, 1, 1, 2, 1, 1, 2)]
    assert [(job.wait(60), job.stderr.read()[-300:]) for job in many if job.wait(60)] == []


def test_gpus_that_the_user_hides_are_not_taken_and_have_one_lock_under_either_name(start):
    by_number = start(1, CUDA_VISIBLE_DEVICES="1")
    assert taken(by_number) == ["1"]
    by_uuid = start(1, CUDA_VISIBLE_DEVICES="GPU-b")
    assert said(by_uuid) == "waiting for GPUs: 1 of GPU-b"
    by_number.stdin.close()
    assert taken(by_uuid) == ["GPU-b"]


def test_a_part_of_a_gpu_is_taken_under_its_name(start):
    """The older form of such a name has slashes in it."""
    part = "MIG-GPU-a/1/0"
    assert taken(start(1, CUDA_VISIBLE_DEVICES=part)) == [part]
    assert said(start(1, CUDA_VISIBLE_DEVICES=part)) == f"waiting for GPUs: 1 of {part}"


def test_every_user_can_lock_a_gpu_and_none_can_delete_the_lock_of_another(start, machine):
    """Whatever their umasks are; a job keeps its own."""
    usual = os.umask(0o077)
    try:
        assert taken(start(1, "import os; print(oct(os.umask(0)))")) == ["0o77"]
    finally:
        os.umask(usual)
    assert stat.filemode(machine.stat().st_mode) == "drwxrwxrwt"
    assert {file.name: stat.filemode(file.stat().st_mode) for file in machine.iterdir()} == {
        "GPU-a": "-rw-r--r--",
        "turn": "-rw-r--r--",
    }


@pytest.mark.parametrize("target", ["private", "missing", None])
def test_a_folder_of_locks_that_is_none_is_refused_and_not_followed(machine, monkeypatch, target):
    monkeypatch.setattr(devices, "LOCKS", machine)
    if target:
        machine.symlink_to(target)
    else:
        machine.touch()
    private = machine.parent / "private"
    private.mkdir(0o700)
    with pytest.raises(UserError, match=f"^{machine} is not a folder, but locks .* delete it\\.$"):
        devices.take(1)
    assert stat.filemode(private.stat().st_mode) == "drwx------"
    assert list(private.iterdir()) == []
    assert not (machine.parent / "missing").exists()


def test_a_lock_that_is_a_link_is_refused_and_not_followed(machine, monkeypatch):
    monkeypatch.setattr(devices, "LOCKS", machine)
    machine.mkdir()
    (machine / "turn").symlink_to("elsewhere")
    with pytest.raises(UserError, match=f"^{machine}/turn, the lock of a GPU, cannot be opened: .*\\.$"):
        devices.take(1)
    assert not (machine / "elsewhere").exists()


@pytest.mark.parametrize(
    ("hidden", "found"),
    [
        ({}, "are 0, 1"),
        ({"CUDA_VISIBLE_DEVICES": "1"}, "are 1"),
        ({"CUDA_VISIBLE_DEVICES": "1,-1,0"}, "are 1"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "nvidia-smi finds none"),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, "nvidia-smi finds none"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "nvidia-smi finds none"),
        ({"PATH": "/nowhere"}, "nvidia-smi finds none"),
    ],
)
def test_more_gpus_than_there_are_is_an_error(monkeypatch, hidden, found):
    for name, value in hidden.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"'gpu' of this job is 3, .*{found}( |\\.$)"):
        devices.take(3)
