"""One snakemake a study at a time, and what a killed one left: its lock, its processes, its jobs in Slurm's queue.

Snakemake's own lock outlives a `kill -9`, and its jobs in the queue outlive it too. Here the lock is the operating
system's (flock), which ends with the process that holds it. Whoever gets it settles what is left before any job is
planned: processes of local jobs are ended, jobs that wait in Slurm's queue are cancelled, and jobs that run there are
waited for, since they make what this run needs. So that their work counts, a job records itself what it was made with;
Snakemake leaves that to the main process, which is the one that was killed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from espalier import slurm_queue, watching
from espalier.errors import UserError
from espalier.study import Study

if TYPE_CHECKING:
    from snakemake.workflow import Workflow

MARK = "ESPALIER_RUN"  # in the environment of all processes of a run: its folder and study
SLURM_NAME = "{prefix}_[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}}"  # of a Slurm job: the prefix and a run's UUID
SECONDS_BETWEEN_LOOKS = 5
SECONDS_TO_END = 60  # that local jobs get, so that a training can save itself


class SlurmJob(NamedTuple):
    """A job in Slurm's queue."""

    number: str
    state: str


def guard(workflow: Workflow, study: Study, before: Callable[[str], None]) -> None:
    """Have `workflow`, which a Snakefile knows by this name, execute its jobs alone.

    `before` is called first, in a dry-run too. It gets the name of the executor, and may raise UserError. Inside a job
    that was submitted nothing is checked, and the job records its own metadata.
    """
    execute = workflow.execute

    def guarded(executor_plugin, executor_settings, **given):
        def go_on():
            return execute(executor_plugin=executor_plugin, executor_settings=executor_settings, **given)

        if workflow.remote_exec:
            _record_in_job(workflow)
            return go_on()
        if not workflow.is_main_process:
            return go_on()
        from snakemake.exceptions import WorkflowError

        try:
            before(executor_plugin.cli_prefix)
            if executor_plugin.common_settings.dryrun_exec:
                return go_on()
            with alone(study.root / watching.LOCK, study.name) as locked:
                # Snakemake's own lock stays where the file system has no flock.
                workflow.execution_settings.lock = not locked
                folder, prefix = Path.cwd(), slurm_prefix(study)
                end_processes(f"{folder}:{study.name}")
                settle_queue(prefix, folder)
                os.environ[MARK] = f"{folder}:{study.name}"
                if hasattr(executor_settings, "jobname_prefix"):
                    executor_settings.jobname_prefix = prefix
                watching.record(study.root / watching.EVENTS)
                return go_on()
        except UserError as error:
            sys.tracebacklimit = 0  # Snakemake prints where it was raised, which is of no use
            raise WorkflowError(str(error)) from None

    workflow.execute = guarded


def slurm_prefix(study: Study) -> str:
    """Return what the names of a study's Slurm jobs begin with."""
    return re.sub("[^A-Za-z0-9_-]", "-", study.name)[:50]


@contextlib.contextmanager
def alone(file: Path, study: str) -> Iterator[bool]:
    """Hold the lock of a study, and say whether this file system has locks. Raises UserError while another holds it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+", encoding="utf-8") as stream:
        for moments_left in range(10, -1, -1):  # who only looks whether it is held holds it for a moment
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not moments_left:
                    raise UserError(
                        f"Another snakemake is at work on the study '{study}' in this folder ({_holder(file)}). Wait"
                        " until it has ended, or end it with Ctrl-C where it runs, which cancels its jobs."
                    ) from None
                time.sleep(0.05)
            except OSError:
                yield False
                return
        stream.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        stream.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started}))
        stream.flush()
        yield True


def _holder(file: Path) -> str:
    try:
        holder = json.loads(file.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}, since {holder['started']}"
    except (ValueError, KeyError):  # it has just begun
        return f"it holds {file}"


def end_processes(mark: str) -> None:
    """End the processes of local jobs that a killed snakemake left on this machine."""
    left = processes(mark)
    if not left:
        return
    _say(f"Ending {len(left)} processes of a snakemake that was killed.")
    deadline = time.monotonic() + SECONDS_TO_END
    sent = signal.SIGTERM
    while left:
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, sent)
        while (left := processes(mark)) and time.monotonic() < deadline:
            time.sleep(0.1)
        sent, deadline = signal.SIGKILL, time.monotonic() + SECONDS_TO_END


def processes(mark: str) -> list[int]:
    """Return the processes of this machine that carry the mark, without those of Slurm jobs other than this one."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = file.read_bytes().split(b"\0")
        except OSError:  # ended meanwhile, or another user's
            continue
        job = next((value for value in variables if value.startswith(b"SLURM_JOB_ID=")), b"SLURM_JOB_ID=")
        mine = job == f"SLURM_JOB_ID={os.environ.get('SLURM_JOB_ID', '')}".encode()
        if f"{MARK}={mark}".encode() in variables and mine and int(file.parent.name) != os.getpid():
            found.append(int(file.parent.name))
    return found


def settle_queue(prefix: str, folder: Path) -> None:
    """Cancel what a killed snakemake left waiting in Slurm's queue, and wait for what runs there."""
    said: set[str] = set()
    while left := slurm_jobs(prefix, folder):
        waiting = [job.number for job in left if job.state == "PENDING"]
        if waiting:
            _say(f"Cancelling {len(waiting)} jobs that a snakemake which was killed left in the queue.")
            subprocess.run(["scancel", *waiting], check=False)
        running = {job.number for job in left} - set(waiting)
        if running - said:
            numbers = " ".join(sorted(running))
            _say(
                f"{len(running)} jobs of a snakemake that was killed still run. This run needs what they make, so it"
                f" waits for them. To give them up instead, type in another shell: scancel {numbers}"
            )
            said |= running
        time.sleep(SECONDS_BETWEEN_LOOKS)


def slurm_jobs(prefix: str, folder: Path) -> list[SlurmJob]:
    """Return this user's Slurm jobs of a study in a folder; none where there is no Slurm. Waits while it is silent."""
    command = ["squeue", "--me", "--noheader", "--format=%i|%T|%j|%Z"]
    while True:
        try:
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return []
        if answer.returncode == 0:
            break
        if slurm_queue.UNCONFIGURED in answer.stderr:
            return []
        _say(f"Slurm does not answer ({answer.stderr.strip()}); trying again.")
        time.sleep(SECONDS_BETWEEN_LOOKS)
    jobs = [line.split("|", 3) for line in answer.stdout.splitlines()]
    name = re.compile(SLURM_NAME.format(prefix=re.escape(prefix)))
    there = folder.resolve()
    return [
        SlurmJob(number, state)
        for number, state, job, place in jobs
        if name.fullmatch(job) and Path(place).resolve() == there
    ]


def _record_in_job(workflow: Workflow) -> None:
    """Have the snakemake inside a job write down what its outputs were made with, as the main process does."""
    from snakemake.persistence import PersistenceBase
    from snakemake_interface_executor_plugins.settings import ExecMode

    finished = PersistenceBase.finished

    async def recorded(self, job) -> None:
        # A view of the same, as the main process sees it: the mode is what decides whether anything is written.
        view, view.dag = copy.copy(self), copy.copy(self.dag)
        view.dag.workflow = copy.copy(workflow)
        view.dag.workflow.workflow_settings = dataclasses.replace(
            workflow.workflow_settings, exec_mode=ExecMode.DEFAULT
        )
        await finished(view, job)

    PersistenceBase.finished = recorded


def _say(sentence: str) -> None:
    from snakemake.logging import logger

    logger.warning(sentence)
