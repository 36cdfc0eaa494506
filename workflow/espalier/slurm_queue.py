"""Slurm's queue, in words: which jobs run and where, which wait and for what, and how one ended."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

SECONDS_TO_ANSWER = 10  # that squeue gets

UNCONFIGURED = "configuration source"  # its commands say so where they are installed and no cluster is

# Slurm's reasons for a job to wait: https://slurm.schedmd.com/job_reason_codes.html
REASONS = {
    "None": "Slurm has not looked at it yet",
    "Priority": "jobs of higher priority come first",
    "Resources": "what it asks for is not free",
    "ReqNodeNotAvail": "a node that it needs is down, drained or reserved",
    "BeginTime": "it was put back into the queue, and may start again in a few minutes",
    "Dependency": "it waits for another job",
    "JobArrayTaskLimit": "as many tasks of its array run as may run at once",
    "JobHeldUser": "it is held: scontrol release lets it go",
    "JobHeldAdmin": "it is held by an administrator",
    "Licenses": "a licence that it asks for is not free",
    "Reservation": "its reservation has not begun",
    "NodeDown": "a node that it needs is down",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition starts no jobs",
    "PartitionNodeLimit": "it asks for more nodes than its partition gives to a job, and will never start",
    "PartitionTimeLimit": "its runtime is longer than its partition allows, and it will never start",
    "PartitionConfig": "it asks for what its partition does not give, and will never start",
    "BadConstraints": "no node has what it asks for, and it will never start",
    "InvalidAccount": "its account is not valid, and it will never start",
    "InvalidQOS": "its quality of service is not valid, and it will never start",
}
LIMITS = {"QOS": "a limit of its quality of service is reached", "Assoc": "a limit of its account is reached"}

# Slurm's states of a job that has begun and not ended.
RUN = ("CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "COMPLETING")

# Its states of a job that has failed.
ENDS = {
    "OUT_OF_MEMORY": "out of memory; it had mem_mb={mem_mb}",
    "TIMEOUT": "past its time limit; it had runtime={runtime} minutes",
    "CANCELLED": "cancelled in Slurm",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not start",
    "DEADLINE": "past its deadline",
    "PREEMPTED": "preempted",
}


class Queued(NamedTuple):
    """A job in Slurm, as squeue tells it."""

    state: str
    reason: str
    node: str
    elapsed: str  # such as 1-02:03:04
    start: str  # when it is expected to start, or N/A


class Left(NamedTuple):
    """A job that has not ended."""

    number: str
    state: str


def queue(numbers: Iterable[str]) -> dict[str, Queued]:
    """Return what Slurm knows of these jobs, by number; raises OSError, with its words, if it does not answer."""
    lines = _squeue("--array", "--states=all", "--format=%i|%T|%r|%N|%M|%S", f"--jobs={','.join(numbers)}")
    rows = (line.split("|") for line in lines)
    return {row[0]: Queued(*row[1:]) for row in rows if len(row) == 6}


def left(name: re.Pattern, folder: Path) -> list[Left]:
    """Return this user's jobs with a name like this in a folder, those of hidden partitions too; raises as `queue`."""
    rows = (line.split("|", 3) for line in _squeue("--me", "--all", "--format=%i|%T|%j|%Z"))
    here = folder.resolve()
    return [Left(*row[:2]) for row in rows if name.fullmatch(row[2]) and Path(row[3]).resolve() == here]


def _squeue(*arguments: str) -> list[str]:
    try:
        command = ["squeue", "--noheader", *arguments]
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS_TO_ANSWER)
    except FileNotFoundError:
        raise OSError("this machine has no command squeue") from None
    except subprocess.TimeoutExpired:
        raise OSError(f"squeue has not answered in {SECONDS_TO_ANSWER} seconds") from None
    if answer.returncode and "Invalid job id" not in answer.stderr:  # which is said of a job that ended long ago
        raise OSError(" ".join(answer.stderr.split()) or f"squeue ended with exit status {answer.returncode}")
    return answer.stdout.splitlines()


def notice_cancelled() -> None:
    """Have Snakemake's Slurm plugin notice jobs that were cancelled, for which it would wait for ever.

    sacct says who did it, "CANCELLED by 1000", and the plugin (2.8.0) knows no state of that name.
    """
    import snakemake_executor_plugin_slurm as plugin

    ask = plugin.query_job_status

    async def query(command, logger):
        states, seconds = await ask(command, logger)
        return states and {job: state.split()[0] for job, state in states.items()}, seconds

    plugin.query_job_status = query


def in_words(reason: str) -> str:
    """Return why a job waits, with Slurm's own word for it."""
    word = reason.split(",")[0].strip("()")
    limit = next((text for start, text in LIMITS.items() if word.startswith(start)), None)
    said = REASONS.get(word) or limit
    return f"{said} ({reason.strip('()')})" if said else reason.strip("()")
