"""Writes down every start of a script of the workflow, and has it wait where a test asks it to; and hurries snakemake.

Python runs a module of this name before any script, so a test puts its folder on PYTHONPATH.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

if len(sys.orig_argv) > 1 and sys.orig_argv[1].startswith("workflow/scripts/"):
    given = dict(zip(sys.orig_argv[2:], sys.orig_argv[3:], strict=False))
    job = " ".join(filter(None, (Path(sys.orig_argv[1]).stem, given.get("--chain"))))
    folder = Path(os.environ["ESPALIER_WITNESS"])
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    with (folder / "starts.jsonl").open("a") as stream:
        stream.write(json.dumps({"job": job, "slurm": os.environ.get("SLURM_JOB_ID"), "gpus": gpus}) + "\n")

    def wait_at(place: str) -> None:
        wanted = folder / f"{job} waits"
        if wanted.exists() and wanted.read_text() in place:
            (folder / f"{job} is there").write_text(f"{os.getpid()} ")
            while wanted.exists():
                time.sleep(0.1)

    def fsync(descriptor: int, fsync=os.fsync) -> None:
        wait_at(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def set_handler(number: int, handler: object, set_handler=signal.signal) -> object:
        previous = set_handler(number, handler)
        wait_at(f"handler of signal {number:d}")
        return previous

    wait_at("its start")
    os.fsync, signal.signal = fsync, set_handler

elif "--profile" in sys.orig_argv:
    from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

    # Slurm would be asked at longer and longer intervals, of up to three minutes, about jobs that take seconds here.
    RemoteExecutor.next_seconds_between_status_checks = property(lambda self: 2, lambda self, seconds: None)
