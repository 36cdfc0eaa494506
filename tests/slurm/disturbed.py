"""A study on the cluster, in a folder of its own: its jobs are watched and held, and what comes out is compared."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from cluster import Cluster
from conftest import environment

WITNESS = Path(__file__).with_name("witness")
STUDY = "tests/slurm/study.yaml"
RUN = "results/slurm/runs/tiny-llama/s3"
METRICS = "results/slurm/tables/metrics.csv"
PRUNE, TUNE = "prune_model dense+magnitude-1", "tune_model dense+lora"
EVALUATE, EVALUATE_TUNED = "evaluate_model dense", "evaluate_model dense+lora"
OUTPUTS = {
    PRUNE: f"{RUN}/dense+magnitude-1",
    TUNE: f"{RUN}/dense+lora",
    EVALUATE: f"{RUN}/dense/evaluate/heldout.json",
    EVALUATE_TUNED: f"{RUN}/dense+lora/evaluate/heldout.json",
}
# As many threads as the machine of a test has cores to spare.
SMALL = ("--set-threads", *(f"{rule}_model=1" for rule in ("pretrain", "prune", "tune", "quantize", "evaluate")))
PATIENCE = 240  # seconds for anything to happen, on a machine with other work


class Study:
    """A folder with a copy of the project, which runs a study with the shipped Slurm profile."""

    def __init__(self, folder: Path, cluster: Cluster, config: str = STUDY):
        self.folder, self.cluster, self.config = folder, cluster, config
        self.notes = folder.with_name(f"{folder.name}-notes")
        self.notes.mkdir()
        self.runs = 0

    def copy(self, folder: Path, *forgotten: str) -> Study:
        """Return a copy in which some jobs, and so what follows from them, are still to be done."""
        shutil.copytree(self.folder, folder, symlinks=True, dirs_exist_ok=True)  # times are kept
        for job in forgotten:
            path = folder / OUTPUTS[job]
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (folder / METRICS).unlink()
        shutil.rmtree(folder / "figures")
        return Study(folder, self.cluster)

    def start(self, *arguments: str) -> Run:
        """Start snakemake as a person types it, on this study."""
        self.runs += 1
        return Run(self, [*SMALL, "--configfile", self.config, *arguments], self.notes / f"snakemake-{self.runs}.log")

    def snakemake(self, *arguments: str) -> str:
        """Run snakemake to its good end and return what it prints."""
        return self.start(*arguments).ends(0)

    def environment(self) -> dict[str, str]:
        """Return the environment of snakemake and of its jobs."""
        variables = {**self.cluster.environment(), "ESPALIER_WITNESS": str(self.notes)}
        return {**variables, "PYTHONPATH": environment(self.folder, [WITNESS])["PYTHONPATH"]}

    def hold(self, *jobs: str, at: str = "its start") -> None:
        """Have jobs wait: at their start, where they have written a file, or where they have set a signal's handler.

        `at` is a part of the file's path, or "handler of signal" and its number.
        """
        for job in jobs:
            (self.notes / f"{job} waits").write_text(at)

    def held(self) -> dict[str, int]:
        """Return the jobs that wait, and the process of each."""
        there = " is there"
        files = [path for path in self.notes.glob(f"*{there}") if path.read_text().endswith(" ")]
        return {path.name.removesuffix(there): int(path.read_text()) for path in files}

    def release(self, job: str) -> None:
        """Have a job go on."""
        (self.notes / f"{job} waits").unlink()

    def starts(self) -> dict[str, int]:
        """Return how often the script of each job was started here."""
        return dict(Counter(start["job"] for start in self.started()))

    def started(self) -> list[dict]:
        """Return every start of a job's script: the job, its Slurm job and the GPUs that this gave it."""
        return [json.loads(line) for line in (self.notes / "starts.jsonl").read_text().splitlines()]

    def jobs(self, job: str = "") -> list[dict[str, str]]:
        """Return this folder's jobs as Slurm knows them, oldest first; only those of one rule if it is given."""
        rule = f"rule_{job.partition(' ')[0]}"
        return [one for one in self.cluster.jobs() if one["WorkDir"] == str(self.folder) and rule in one["Comment"]]

    def states(self, job: str) -> list[str]:
        """Return the states of the Slurm jobs of a rule, oldest first."""
        return [one["JobState"] for one in self.jobs(job)]

    def results(self) -> dict[str, object]:
        """Return what must not depend on how the study came to its end: charts, tables and weights."""
        files = [path for suffix in ("csv", "png") for path in self.folder.glob(f"figures/slurm/*.{suffix}")]
        files += self.folder.glob("results/slurm/runs/**/*.safetensors")
        with (self.folder / METRICS).open(newline="") as stream:
            table = [row for row in csv.DictReader(stream) if row["metric"] != "seconds"]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in files} | {"metrics": table}

    def check(self, undisturbed: Study, starts: dict[str, int]) -> None:
        """Assert that all came out as in an undisturbed run, and how often each job was started."""
        assert self.results() == undisturbed.results()
        charts_and_tables = {"draw_figure": 1, "make_metrics": 1}
        assert {**charts_and_tables, **starts} == self.starts()
        assert not list(self.folder.glob("results/**/.*partial*")), "nothing half-written is left"
        said = self.snakemake("-n")
        assert "Nothing to be done" in said
        assert "missing provenance" not in said, "of every job it is known what it was made with"


class Run:
    """A snakemake that runs."""

    def __init__(self, study: Study, arguments: list[str], log: Path):
        self.study, self.log = study, log
        command = [sys.executable, "-m", "snakemake", "--profile", "slurm", *arguments]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=study.folder, env=study.environment(), stdout=output, stderr=output
            )

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def ends(self, status: int, seconds: float = PATIENCE) -> str:
        """Wait for its end, assert its exit status and return what it printed."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
        assert self.process.wait() == status, self.text()[-5000:]
        return self.text()

    def until(self, true: Callable[[], object]) -> None:
        """Wait until something is true while snakemake runs; end it if that never is."""
        try:
            wait_until(lambda: true() or self.process.poll() is not None)
            assert true(), self.text()[-5000:]
        except AssertionError:
            self.process.kill()
            raise

    def holds(self, job: str) -> int:
        """Wait until a job waits; return its process."""
        self.until(lambda: job in self.study.held())
        return self.study.held()[job]


def wait_until(true: Callable[[], object]) -> None:
    """Wait until something is true."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def ended(process: int) -> bool:
    """Return whether a process has ended."""
    return not os.path.exists(f"/proc/{process}")
