"""Slurm's queue, in words: which jobs run and where, which wait and for what, and how one ended."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
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


def queue(numbers: Iterable[str]) -> dict[str, Queued]:
    """Return what Slurm knows of these jobs, by number; raises OSError, with its words, if it does not answer."""
    fields = "%i|%T|%r|%N|%M|%S"
    command = ["squeue", "--noheader", "--array", "--states=all", f"--format={fields}", f"--jobs={','.join(numbers)}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS_TO_ANSWER)
    except FileNotFoundError:
        raise OSError("this machine has no command squeue") from None
    except subprocess.TimeoutExpired:
        raise OSError(f"squeue has not answered in {SECONDS_TO_ANSWER} seconds") from None
    if answer.returncode and "Invalid job id" not in answer.stderr:  # which is said of a job that ended long ago
        raise OSError(" ".join(answer.stderr.split()) or f"squeue ended with exit status {answer.returncode}")
    rows = (line.split("|") for line in answer.stdout.splitlines())
    return {row[0]: Queued(*row[1:]) for row in rows if len(row) == 6}


def in_words(reason: str) -> str:
    """Return why a job waits, with Slurm's own word for it."""
    word = reason.split(",")[0].strip("()")
    limit = next((text for start, text in LIMITS.items() if word.startswith(start)), None)
    said = REASONS.get(word) or limit
    return f"{said} ({reason.strip('()')})" if said else reason.strip("()")
