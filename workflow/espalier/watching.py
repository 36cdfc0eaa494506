"""What the jobs of a run do: written down by the snakemake that runs them, and read by whoever watches it.

The snakemake at work appends one line of JSON an event to results/{study}/events.jsonl, anew in each run: which run it
is, how many jobs it has, and of each job that it was started, submitted, done, failed, or is to be tried again. A
reader takes no lock that anybody waits for, writes nothing, and asks Slurm only about jobs that have not ended.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from espalier.slurm_queue import ENDS

EVENTS = "events.jsonl"
LOCK = "snakemake.lock"

# What Snakemake and its Slurm plugin say in words only.
SUBMITTED = re.compile(r"Job (\S+) has been submitted with SLURM jobid (\S+)")
SUBMITTED_ARRAY = re.compile(r"Snakemake IDs ([\d,]+) and SLURM job ID (\S+)\. The individual task IDs are (\d+)-")
TO_BE_RESTARTED = re.compile(r"Trying to restart job (\d+)\.")
OUTPUT_MISSING = re.compile(r"Job (\d+) +completed successfully, but some output files are missing")
STATUS = re.compile(r"SLURM status is: '(\w+)")
REFUSED = re.compile(r"The error message was '(.*?)'\.?\n", re.S)
EXIT = re.compile(r"returned non-zero exit status (\d+)|died with <Signals\.(\w+)")

# Written by the snakemake at work -------------------------------------------------------------------------------------


def record(file: Path) -> None:
    """Write what happens to the jobs of this snakemake into `file` from now on.

    To be called where a run executes its jobs, not in a dry-run, nor in a job.
    """
    logging.getLogger("snakemake.logging").addHandler(_Recorder(file))


class _Recorder(logging.Handler):
    """Turns Snakemake's log records into events. Snakemake closes it at the end of the run."""

    def __init__(self, file: Path):
        super().__init__()
        self.file, self.errors, self.groups = file, {}, {}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self.stream = file.open("w", encoding="utf-8")
        except OSError as error:
            self._give_up(error)
        self.write({"event": "run", "time": time.time(), "pid": os.getpid(), "host": socket.gethostname()})

    def emit(self, said: logging.LogRecord) -> None:
        try:
            for event in self._events(said):
                self.write({"event": event.pop("event"), "time": said.created, **event})
        except Exception:  # a run goes on, also where another version of Snakemake says something else
            self.handleError(said)

    def close(self) -> None:
        if self.stream:
            self.stream.close()
            self.stream = None
        super().close()

    def write(self, event: dict) -> None:
        if self.stream is None:
            return
        try:
            self.stream.write(json.dumps(event) + "\n")
            self.stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Say it once and go on: a run is not worth ending because nobody can watch it."""
        self.stream = None
        print(
            f"warning: {self.file} cannot be written ({error.strerror}): this run cannot be watched.", file=sys.stderr
        )

    def _events(self, said: logging.LogRecord) -> Iterator[dict]:
        kind, text = getattr(said, "event", None), said.getMessage()
        if kind == "job_info":
            # `resources` may also hold values that are known only when the job runs.
            asked = {name: str(value) for name, value in said.resources.items() if name in ("mem_mb", "runtime")}
            yield {
                "event": "started",
                "job": said.jobid,
                "rule": said.rule_name,
                "log": next(iter(said.log), None),
                "asked": asked,
                "local": bool(said.local),
            }
        elif kind == "run_info":
            yield {"event": "planned", "total": said.stats["total"]}
        elif text.startswith("Nothing to be done"):
            yield {"event": "planned", "total": 0}
        elif kind == "group_info":
            # The group's own name is that of one of its jobs, which one is Snakemake's choice.
            self.groups |= {job.uuid(): [job.jobid for job in said.jobs] for job in said.jobs}
        elif kind == "job_finished":
            yield {"event": "done", "job": said.job_id}
        elif kind == "error":
            self.errors[said.thread] = text
            if missing := OUTPUT_MISSING.search(text):
                yield {"event": "failed", "job": int(missing[1]), "message": text}
        elif kind == "job_error":
            # A local job's error was printed just before, by the thread that ran it.
            message = said.rule_msg or self.errors.pop(said.thread, "")
            slurm_log = said.log[-1] if "external_jobid" in said.aux and said.log else None
            failed = {"message": message, "command": said.shellcmd, "slurm_log": slurm_log}
            yield {"event": "failed", "job": said.jobid, **failed}
        elif one := SUBMITTED.search(text):
            for job in self.groups.get(one[1]) or [int(one[1])]:
                yield {"event": "submitted", "job": job, "slurm": one[2]}
        elif many := SUBMITTED_ARRAY.search(text):
            for task, job in enumerate(many[1].split(","), int(many[3])):
                yield {"event": "submitted", "job": int(job), "slurm": f"{many[2]}_{task}"}
        elif again := TO_BE_RESTARTED.search(text):
            yield {"event": "again", "job": int(again[1])}


# Read by whoever watches it -------------------------------------------------------------------------------------------


@dataclass
class Job:
    """A job that was started in a run, with what is known of it from the run's events."""

    rule: str  # its rule
    log: Path | None  # the file that its rule logs to
    asked: dict  # mem_mb and runtime, where it was given them
    local: bool  # whether it runs beside snakemake in any case
    since: float  # when it was started last, in seconds since 1970
    attempt: int = 1  # how many times it was started
    state: str = (
        "started"  # started (it runs, or waits in Slurm's queue), done, failed, or again: failed, and to be tried again
    )
    slurm: str | None = None  # its number in Slurm
    slurm_log: Path | None = None  # what Slurm wrote, of a job that failed there
    message: str = ""  # what was said when it failed last
    command: str = ""  # the command of its rule, if it has failed

    @property
    def name(self) -> str:
        """What it is about, without its rule: the name of its log."""
        return self.log.stem if self.log else ""

    def tail(self, count: int) -> list[str]:
        """Return the last lines of its log; none if what lies there is of an earlier attempt or run."""
        return last_lines(self.log, count, since=self.since) if self.log else []

    def why(self) -> str:
        """Return in a few words why it failed."""
        status, refused = STATUS.search(self.message), REFUSED.search(self.message)
        if status and status[1] in ENDS:
            asked = {"mem_mb": "(unknown)", "runtime": "(unknown)", **self.asked}
            return ENDS[status[1]].format(**asked)
        if refused:
            return f"refused by Slurm: {refused[1]}"
        if OUTPUT_MISSING.search(self.message):
            return "its command succeeded, but its outputs cannot be seen here; the file system may lag (latency-wait)"
        told = "\n".join([self.message, *(last_lines(self.slurm_log, 200) if self.slurm_log else [])])
        found = list(EXIT.finditer(told))
        return ended(*found[-1].groups()) if found else "its command failed"


@dataclass
class Run:
    """One run of snakemake."""

    pid: int  # of its main process
    host: str  # where that runs
    started: float  # in seconds since 1970
    last: float  # when its last event was, in seconds since 1970
    total: int | None = None  # number of jobs to run, Snakemake's own "all" included; None until they are planned
    jobs: dict[int, Job] = field(default_factory=dict)  # those that were started, by Snakemake's number

    def of(self, *states: str) -> list[Job]:
        return [job for job in self.jobs.values() if job.state in states]


def read(file: Path) -> Run | None:
    """Return the run whose events are in `file`, None if there is none. A line that is not yet whole is left out."""
    run = None
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        kind, at = event.pop("event"), event.pop("time")
        if kind == "run":
            run = Run(started=at, last=at, **event)
        elif run and kind == "planned":
            run.last, run.total = at, event["total"]
        elif run:
            run.last = at
            _happened(run.jobs, event.pop("job"), kind, at, event)
    return run


def _happened(jobs: dict[int, Job], number: int, kind: str, at: float, event: dict) -> None:
    old = jobs.get(number)
    if kind == "started":
        log = Path(event.pop("log")) if event["log"] else event.pop("log")
        jobs[number] = Job(log=log, since=at, attempt=old.attempt + 1 if old else 1, **event)
    elif old is None:
        return
    elif kind == "submitted":
        old.slurm = event["slurm"]
    elif kind == "again":
        old.state = kind
    else:  # done or failed
        old.state = kind
        old.message, old.command = event.get("message", ""), event.get("command") or ""
        old.slurm_log = Path(event["slurm_log"]) if event.get("slurm_log") else None


def at_work(lock: Path, run: Run | None) -> dict | None:
    """Return pid, host and start of the snakemake that holds a study's lock, None if there is none.

    The lock is tried as a shared one for an instant, so that two who watch do not take each other for a snakemake.
    Where the file system has no locks, the process itself is looked for, if it is on this machine.
    """
    try:
        with lock.open(encoding="utf-8") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return holder(stream.read())
            except OSError:
                return _process(run)
    except FileNotFoundError:
        pass
    return None


def holder(text: str) -> dict:
    """Return pid, host and start of the snakemake that holds a lock, from the lock's text; {} if it has just begun."""
    try:
        return json.loads(text)
    except ValueError:
        return {}


def _process(run: Run | None) -> dict | None:
    if run is None or run.host != socket.gethostname() or not Path(f"/proc/{run.pid}").exists():
        return None
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.started))
    return {"pid": run.pid, "host": run.host, "started": started}


def ended(code: str | None, by: str | None) -> str:
    """Return how a command ended, by its shell's exit status or by the name of the signal that ended the shell."""
    number = int(code or 0) - 128  # this is how a shell tells of a signal
    if by is None and number not in set(signal.Signals):
        return f"exit status {code}"
    name = by or signal.Signals(number).name
    usual = {"SIGKILL": ", most often for want of memory", "SIGINT": ", which is Ctrl-C"}
    return f"ended by {name}{usual.get(name, '')}"


def last_lines(file: Path, count: int, since: float = 0.0) -> list[str]:
    """Return the last lines of a text file that are not blank, none if it is missing or was last written before."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if os.fstat(stream.fileno()).st_mtime < since:
                return []
            stream.seek(max(0, size - 500 * count))
            text = stream.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    # A bar writes its states one after another into the same line.
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    return [line for line in lines if line][-count:]
