"""One snakemake a study at a time; what a killed one left is ended, cancelled or waited for."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import ROOT, copy_project, environment, snakemake
from espalier import takeover
from espalier.errors import UserError

UUID = "0a1b2c3d-0a1b-0a1b-0a1b-0a1b2c3d4e5f"


def test_a_second_one_is_refused_and_told_who_holds_the_lock(tmp_path):
    file = tmp_path / "study" / "snakemake.lock"
    with takeover.alone(file, "demo") as locked:
        assert locked
        holder = json.loads(file.read_text())
        assert holder["pid"] == os.getpid()
        with (
            pytest.raises(UserError, match=rf"study 'demo'.*process {os.getpid()} on .*Ctrl-C"),
            takeover.alone(file, "demo"),
        ):
            pass
    with takeover.alone(file, "demo") as locked:
        assert locked, "the first has let go"


def test_a_lock_ends_with_its_process_even_by_sigkill(tmp_path):
    file = tmp_path / "snakemake.lock"
    hold = f"""
import pathlib, time
from espalier.takeover import alone
with alone(pathlib.Path({str(file)!r}), "demo"):
    print("held", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    process.stdout.readline()
    with pytest.raises(UserError), takeover.alone(file, "demo"):
        pass
    process.kill()
    process.wait()
    with takeover.alone(file, "demo") as locked:
        assert locked


def test_a_file_system_without_locks_leaves_it_to_snakemake(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(takeover.fcntl, "flock", refuse)
    with takeover.alone(tmp_path / "snakemake.lock", "demo") as locked:
        assert not locked


def test_processes_of_a_killed_run_are_ended_and_no_others(tmp_path):
    def process(**marks: str) -> subprocess.Popen:
        return subprocess.Popen(["sleep", "60"], env={**os.environ, **marks})

    mine = process(**{takeover.MARK: f"{tmp_path}:demo"})
    others = [
        process(**{takeover.MARK: f"{tmp_path}:other"}),
        process(**{takeover.MARK: f"{tmp_path}:demo", "SLURM_JOB_ID": "7"}),  # a job of this cluster, on this node
        process(),
    ]
    try:
        takeover.end_processes(f"{tmp_path}:demo")
        assert mine.wait(5) == -signal.SIGTERM
        assert all(other.poll() is None for other in others)
    finally:
        for one in (mine, *others):
            one.kill()
            one.wait()


def test_a_process_that_ignores_sigterm_is_killed(monkeypatch):
    monkeypatch.setattr(takeover, "SECONDS_TO_END", 0.5)
    stubborn = subprocess.Popen(
        ["bash", "-c", "trap '' TERM; echo; exec sleep 60"],
        env={**os.environ, takeover.MARK: "x:y"},
        stdout=subprocess.PIPE,
    )
    stubborn.stdout.readline()
    takeover.end_processes("x:y")
    assert stubborn.wait(5) == -signal.SIGKILL


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """A stand-in of squeue and scancel: the queue is a file of lines, and each look takes the first line's job away."""
    commands = tmp_path / "bin"
    commands.mkdir()
    file, cancelled = tmp_path / "queue", tmp_path / "cancelled"
    (commands / "squeue").write_text(f'#!/bin/sh\ncat {file}\nsed -i "/RUNNING/d" {file}\n')
    (commands / "scancel").write_text(f'#!/bin/sh\necho "$@" >> {cancelled}\nsed -i "/PENDING/d; /SPECIAL/d" {file}\n')
    for command in commands.iterdir():
        command.chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    monkeypatch.setattr(takeover, "SECONDS_BETWEEN_LOOKS", 0.01)
    cancelled.touch()
    return file, cancelled


def test_waiting_jobs_are_cancelled_and_running_ones_waited_for(queue, tmp_path):
    file, cancelled = queue
    jobs = [
        f"11|PENDING|demo_{UUID}|{tmp_path}",
        f"12|RUNNING|demo_{UUID}|{tmp_path}",
        f"14|SPECIAL_EXIT|demo_{UUID}|{tmp_path}",  # held for its owner: it will never run
        f"13_2|PENDING|demo_{UUID}|{tmp_path}",
    ]
    file.write_text("\n".join(jobs) + "\n")
    assert takeover.settle_queue("demo", tmp_path), "one was waited for"
    assert cancelled.read_text().split() == ["11", "14", "13_2"]
    assert file.read_text() == "", "it returned when none was left"


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        (f"demo_2_{UUID}", "."),  # of the study demo_2
        (f"other_{UUID}", "."),
        ("demo_mine", "."),  # no job of snakemake
        (f"demo_{UUID}", "elsewhere"),  # of another clone
    ],
)
def test_jobs_of_others_are_left_alone(queue, tmp_path, name, folder):
    file, cancelled = queue
    file.write_text(f"11|PENDING|{name}|{tmp_path / folder}\n")
    assert not takeover.settle_queue("demo", tmp_path)
    assert cancelled.read_text() == ""


def test_a_slurm_that_does_not_answer_is_an_error_at_first_and_waited_for_later(queue, tmp_path):
    file, _ = queue
    squeue = tmp_path / "bin/squeue"
    works = squeue.read_text()
    squeue.write_text("#!/bin/sh\necho slurm_load_jobs error: Unable to contact slurm controller >&2\nexit 1\n")
    with pytest.raises(
        UserError, match=r"does not answer here \(.*Unable to contact slurm controller\).*where and when"
    ):
        takeover.settle_queue("demo", tmp_path)
    # It answers, says nothing twice, and answers again.
    count = tmp_path / "count"
    count.write_text("")
    file.write_text(f"12|RUNNING|demo_{UUID}|{tmp_path}\n")
    body = works.split("\n", 1)[1]
    squeue.write_text(f"#!/bin/sh\necho >> {count}\n[ $(wc -l < {count}) = 2 ] && exit 1\n{body}")
    assert takeover.settle_queue("demo", tmp_path)
    assert len(count.read_text()) == 3


def test_no_two_studies_have_one_name_in_slurm():
    names = ["a.b", "a-b", "a" * 50, "a" * 51, "a" * 60]
    prefixes = [takeover.slurm_prefix(name) for name in names]
    assert len(set(prefixes)) == len(names)
    assert all(re.fullmatch("[A-Za-z0-9_-]{1,50}", prefix) for prefix in prefixes)


def test_without_flock_nothing_is_ended_while_snakemake_holds_its_own_lock(tmp_path, monkeypatch):
    """Where the file system has no flock, another snakemake may be at work: Snakemake itself refuses."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(takeover.preflight, "check", lambda *_: None)
    monkeypatch.setattr(takeover.watching, "record", lambda _: None)
    monkeypatch.setattr(takeover.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(38, "no locks")))
    settled = []
    monkeypatch.setattr(takeover, "_settle", lambda *_: settled.append(True))
    study = SimpleNamespace(root=tmp_path / "results/demo", name="demo")
    plugin = SimpleNamespace(cli_prefix="local", common_settings=SimpleNamespace(dryrun_exec=False))
    for held in (True, False):
        workflow = SimpleNamespace(
            execute=lambda **_: None,
            remote_exec=False,
            is_main_process=True,
            execution_settings=SimpleNamespace(lock=True),
            dag_settings=SimpleNamespace(targets=set()),
        )
        lock = tmp_path / ".snakemake/locks/0.input.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
        if not held:
            lock.unlink()
        takeover.guard(workflow, study)
        workflow.execute(executor_plugin=plugin, executor_settings=None)
        assert workflow.execution_settings.lock, "Snakemake's own lock stays in use"
        assert settled == ([] if held else [True])


def test_a_study_runs_again_after_snakemake_was_killed(tmp_path):
    project = copy_project(tmp_path / "project")
    study = (ROOT / "tests/smoke.yaml").read_text().replace("layers: 3, steps: 4", "layers: 3, steps: 4000")
    (project / "smoke.yaml").write_text(study)
    target = "results/smoke/runs/tiny-llama/s3/dense/model"
    arguments = ("--configfile", "smoke.yaml", "--cores", "1", "--", target)
    command = [sys.executable, "-m", "snakemake", *arguments]
    first = subprocess.Popen(
        command, cwd=project, env=environment(project), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    mark = f"{project}:smoke"
    wait_for(lambda: any("pretrain_model" in command_line(process) for process in takeover.processes(mark)))
    refused = snakemake(project, *arguments)
    assert refused.returncode == 1
    assert f"Another snakemake is at work on the study 'smoke' in this folder (process {first.pid}" in refused.stderr
    first.kill()
    first.wait()
    left = takeover.processes(mark)
    assert left, "the job outlives the snakemake that was killed"
    (project / "smoke.yaml").write_text((ROOT / "tests/smoke.yaml").read_text())
    again = snakemake(project, *arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "of a snakemake that was killed" in again.stderr
    assert not takeover.processes(mark)
    assert (project / target).is_dir()


def command_line(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
