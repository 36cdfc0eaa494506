"""One snakemake a study at a time, and what a killed one left: its lock, its processes, its jobs in Slurm's queue.

Snakemake's own lock outlives a `kill -9`, and its jobs in the queue outlive it too. Here the lock is the operating
system's (flock), which ends with the process that holds it. Whoever gets it settles what is left before any job is
planned: processes of local jobs are ended, jobs that wait in Slurm's queue are cancelled, and jobs that run there are
waited for, since they make what this run needs. So that their work counts, a job records itself what it was made with;
Snakemake leaves that to the main process, which is the one that was killed.

A run some of whose jobs failed ends with early charts and an early report, of the results that are there.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from espalier import preflight, slurm_queue, watching
from espalier.errors import UserError
from espalier.neighbours import MARK
from espalier.study import SCRIPTS, Study

if TYPE_CHECKING:
    from snakemake.workflow import Workflow

SLURM_NAME = "{prefix}_[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}}"  # of a Slurm job: the prefix and a run's UUID
SECONDS_BETWEEN_LOOKS = 5
SECONDS_TO_END = 60  # that local jobs get, so that a training can save itself


def guard(workflow: Workflow, study: Study) -> None:
    """Have `workflow`, which a Snakefile knows by this name, check what it needs before its jobs, and run them alone.

    A dry-run is checked too. Inside a job that was submitted nothing is, and the job records its own metadata.
    """
    execute = workflow.execute

    def guarded(executor_plugin, executor_settings, **given):
        def go_on():
            return execute(executor_plugin=executor_plugin, executor_settings=executor_settings, **given)

        if workflow.remote_exec:
            _record_in_job(workflow)
            return go_on()
        if not workflow.is_main_process or preflight.prefetches(workflow):
            return go_on()
        from snakemake.exceptions import WorkflowError

        try:
            preflight.check(workflow, study, executor_plugin.cli_prefix, executor_settings)
            if executor_plugin.common_settings.dryrun_exec:
                return go_on()
            with alone(study.root / watching.LOCK, study.name) as locked:
                # Snakemake's own lock stays in use where the file system has no flock. If it is there, another may be
                # at work, and Snakemake refuses to go on.
                workflow.execution_settings.lock = not locked
                slurm = executor_plugin.cli_prefix == "slurm"
                if locked or not any(Path(".snakemake/locks").glob("*.lock")):
                    _settle(workflow, study, slurm)
                if slurm:
                    executor_settings.jobname_prefix = slurm_prefix(study.name)
                    slurm_queue.notice_cancelled()
                watching.record(study.root / watching.EVENTS)
                try:
                    return go_on()
                except WorkflowError:
                    if workflow.scheduler and workflow.scheduler.failed and not workflow.touch:
                        _draw_early(study)
                    raise
        except UserError as error:
            sys.tracebacklimit = 0  # Snakemake prints where it was raised, which is of no use
            raise WorkflowError(str(error)) from None

    workflow.execute = guarded


def slurm_prefix(study: str) -> str:
    """Return what the names of a study's Slurm jobs begin with; no two studies' do alike."""
    name = study.replace(".", "_")  # which no study's name holds
    return name if len(name) <= 50 else f"{name[:41]}_{hashlib.sha256(study.encode()).hexdigest()[:8]}"


def _settle(workflow: Workflow, study: Study, slurm: bool) -> None:
    """End, cancel or wait for what a killed snakemake left; mark this one's processes."""
    mark = f"{Path.cwd()}:{study.name}"
    end_processes(mark)
    os.environ[MARK] = mark
    last = watching.read(study.root / watching.EVENTS)
    left = last is not None and any(job.slurm for job in last.of("started"))
    if (slurm or left) and settle_queue(slurm_prefix(study.name), Path.cwd()):
        time.sleep(workflow.execution_settings.latency_wait)  # until what those jobs wrote is seen here


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
                    holder = watching.holder(file.read_text(encoding="utf-8"))
                    who = "process {pid} on {host}, since {started}".format(**holder) if holder else "it has just begun"
                    raise UserError(
                        f"Another snakemake is at work on the study '{study}' in this folder ({who}). Wait until it"
                        " has ended, or end it with Ctrl-C where it runs, which cancels its jobs."
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


def settle_queue(prefix: str, folder: Path) -> bool:
    """Cancel what a killed snakemake left waiting in Slurm's queue, wait for what runs there, and say whether any did.

    Raises UserError where Slurm does not answer.
    """
    name = re.compile(SLURM_NAME.format(prefix=re.escape(prefix)))
    said: set[str] = set()
    while True:
        try:
            left = slurm_queue.left(name, folder)
        except OSError as error:
            if not said:
                raise UserError(
                    f"Jobs of the last run may still be in Slurm's queue, and Slurm does not answer here ({error})."
                    " Type the same command again where and when `squeue` answers."
                ) from None
            left = []
            _say(f"Slurm does not answer ({error}); asking again.")
        else:
            if not left:
                return bool(said)
        running = {job.number for job in left if job.state in slurm_queue.RUN}
        if waiting := [job.number for job in left if job.number not in running]:
            _say(f"Cancelling {len(waiting)} jobs that a snakemake which was killed left in the queue.")
            subprocess.run(["scancel", *waiting], check=False)
        if running - said:
            _say(
                f"{len(running)} jobs of a snakemake that was killed still run. This run needs what they make, so it"
                f" waits for them. To give them up instead, type in another shell: scancel {' '.join(sorted(running))}"
            )
            said |= running
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _draw_early(study: Study) -> None:
    """Draw the charts that lack results, write a report of what is there, and say so. What goes wrong is only told.

    In processes of their own: neither pandas and matplotlib nor an error of a chart belongs into this one.
    """
    results = (result for figure in study.resolved.figures for result in study.figure_results(figure))
    if not any(map(os.path.exists, results)):
        return
    given = json.dumps(study.mapping, default=str)
    lines = []
    try:
        for script in ("draw_early_figures.py", "write_report.py"):
            command = [sys.executable, str(SCRIPTS / script), "--configfile", "-"]
            run = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
            errors = [line for line in run.stderr.splitlines() if line.strip()][-1:] if run.returncode else []
            lines += [*run.stdout.splitlines(), *errors]
    except (OSError, KeyboardInterrupt) as error:
        lines.append(f"Not all early charts were drawn, or no report was written: {error or 'interrupted'}.")
    for line in dict.fromkeys(lines):
        _say(line)


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
