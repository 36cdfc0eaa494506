"""How long jobs take: what they took before, else what like jobs took, else what their model's size and recipe say.

A job that never ran is taken apart into passes through its model, each of so many tokens. A pass takes as long as its
arithmetic, 2 operations a parameter and token (Kaplan et al. 2020, arXiv 2001.08361, section 2.1), or as reading all
weights once, or as the least that a pass takes, whichever is longest. Nothing here imports torch.
"""

from __future__ import annotations

import csv
import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from espalier import needs
from espalier.config import Step
from espalier.planned_jobs import Job
from espalier.study import Study

Known = Literal["measured", "like", "assumed"]  # how a number is known, the surest first
NEAR = 10  # sizes of models whose jobs are compared differ by this factor at most
SECTIONS = {"recipe": "recipes", "suite": "suites", "workload": "workloads"}  # by wildcard
LENGTHS = ("window", "length", "cutoff", "max_length", "max_tokens")  # keys that say tokens a sample


class Assumption(NamedTuple):
    """A number that nothing has measured here."""

    number: float
    meaning: str  # opened by its unit
    scale: float = 1.0  # of the unit


class Estimate(NamedTuple):
    """A number, and how it is known."""

    value: float
    known: Known


ASSUMPTIONS = {
    "start": Assumption(15, "s until a job computes: Python, torch and transformers are loaded"),
    "other": Assumption(60, "s a job without a model"),
    "environment": Assumption(300, "s until an engine's environment, some 4 GB, is downloaded and installed"),
    "read": Assumption(1, "GB/s at which weights are read from disk, and written", 1e9),
    "download": Assumption(50, "MB/s from the hub", 1e6),
    "gpu": Assumption(100, "TFLOP/s that a GPU reaches", 1e12),
    "gpu memory": Assumption(1, "TB/s at which a GPU reads weights in its memory", 1e12),
    "core": Assumption(25, "GFLOP/s that a CPU core reaches", 1e9),
    "core memory": Assumption(5, "GB/s at which a CPU core reads weights in memory", 1e9),
    "pass": Assumption(0.02, "s a forward pass through a model at least"),
    "training": Assumption(3, "forward passes take as long as one of a training, forward and backward"),
    "rows": Assumption(50_000, "rows in a dataset that a recipe trains on for some epochs"),
    "questions": Assumption(2000, "questions a task whose suite has no 'limit'"),
    "question": Assumption(
        400, "tokens a question with all its choices, and a quarter of it each solved one before it"
    ),
    "text": Assumption(300_000, "tokens in a text whose perplexity is measured"),
    "greedy": Assumption(100, "passes through the calibration set by depth pruning"),
    "search": Assumption(40, "passes through the calibration set by AWQ"),
    "calibration": Assumption(4, "passes through the calibration set by other methods"),
}
CALIBRATING = {"depth": "greedy", "awq": "search"}  # method: which of these it takes


class Passes(NamedTuple):
    """Forward passes through a model."""

    number: float
    tokens: float  # in each


@dataclass
class Times:
    """Seconds of the jobs of one study; `used` collects the names of the assumptions that were needed."""

    study: Study
    jobs: Sequence[Job]

    def __post_init__(self) -> None:
        self.used: set[str] = set()
        device = self.study.config.device
        here = device == "cuda" or (device == "auto" and shutil.which("nvidia-smi") is not None)
        # Where no job asks for a GPU, jobs run on this machine.
        self.gpu_here = here and not any(job.gpus for job in self.jobs)
        self.past: dict[int, float] = {}  # by the number of a job
        self.alike: dict[tuple, list[tuple[float, needs.Size | None]]] = {}
        for job in self.jobs:
            seconds = measured(Path(job.benchmark)) if job.benchmark else None
            if seconds is not None:
                self.past[job.number] = seconds
                for key in self._keys(job):
                    self.alike.setdefault(key, []).append((seconds, self._size(job)))

    def seconds(self, job: Job) -> Estimate:
        """Return how long a job takes, and how that is known."""
        if job.number in self.past:
            return Estimate(self.past[job.number], "measured")
        like = self._like(job)
        return Estimate(self._assumed(job), "assumed") if like is None else Estimate(like, "like")

    def assume(self, name: str) -> float:
        self.used.add(name)
        return ASSUMPTIONS[name].number * ASSUMPTIONS[name].scale

    def _like(self, job: Job) -> float | None:
        """Return the mean over past jobs of the same rule and recipe, else rule and method, by their models' sizes."""
        size = self._size(job)
        for key in self._keys(job):
            found = []
            for past, theirs in self.alike.get(key, ()):
                ratio = size.parameters / theirs.parameters if size else 1
                if 1 / NEAR <= ratio <= NEAR:
                    start = past if ratio == 1 else min(past, self.assume("start"))
                    found.append(start + (past - start) * ratio)
            if found:
                return statistics.mean(found)
        return None

    def _keys(self, job: Job) -> list[tuple]:
        """Return what a job has in common with those that take about as long: the nearest first."""
        step = step_of(self.study, job)
        return [(job.rule, step.kind, step.name), (job.rule, step.kind, step.method, None)] if step else [(job.rule,)]

    def _assumed(self, job: Job) -> float:
        size, step = self._size(job), step_of(self.study, job)
        if size is None:
            return self.assume("environment" if "environment" in job.wildcards else "other")
        seconds = self.assume("start") + 2 * size.bytes / self.assume("read")
        if step is None:  # a model that exists already
            entry = self.study.resolved.models[job.wildcards["model"]]
            missing = entry.hub and size.source == "assumed"
            return seconds + (size.bytes / self.assume("download") if missing else 0)
        devices, kind = (self._devices(job), "gpu") if job.gpus or self.gpu_here else (job.threads, "core")
        for one in self.passes(step):
            arithmetic = 2 * size.parameters * one.tokens / (devices * self.assume(kind))
            reading = size.bytes / (devices * self.assume(f"{kind} memory"))
            seconds += one.number * max(arithmetic, reading, self.assume("pass"))
        return seconds

    def passes(self, step: Step) -> list[Passes]:
        """Return the forward passes that a recipe asks for, by its keys; none where it computes nothing."""
        recipe = step.recipe
        length = next((getattr(recipe, key) for key in LENGTHS if hasattr(recipe, key)), 0)
        batch = getattr(recipe, "batch_size", None) or getattr(recipe, "batch", 1)
        if hasattr(recipe, "steps"):
            micro = min(batch, getattr(recipe, "micro_batch", batch))
            copies = 1 + getattr(recipe, "augmentation", 0)
            steps = recipe.steps or math.ceil(recipe.epochs * copies * self.assume("rows") / batch)
            return [Passes(self.assume("training") * steps * math.ceil(batch / micro), micro * length)]
        if calibration := getattr(recipe, "calibration", None):
            sweeps = self.assume(CALIBRATING.get(step.method, "calibration"))
            batch = min(batch, calibration.samples)
            return [Passes(sweeps * math.ceil(calibration.samples / batch), batch * calibration.length)]
        if hasattr(recipe, "output_tokens"):
            runs = getattr(recipe, "warmup", 0) + getattr(recipe, "repeats", 1)
            shapes = [(i, o, b) for i in recipe.input_tokens for o in recipe.output_tokens for b in recipe.batch_sizes]
            return [one for i, o, b in shapes for one in (Passes(runs, i * b), Passes(runs * o, b))]
        if hasattr(recipe, "window"):
            return [Passes(self.assume("text") / (batch * length), batch * length)]
        if hasattr(recipe, "tasks") or hasattr(recipe, "task"):
            asked = getattr(recipe, "questions", None) or getattr(recipe, "limit", None) or self.assume("questions")
            number = asked * len(getattr(recipe, "tasks", [0]))
            tokens = length or self.assume("question") * (1 + getattr(recipe, "num_fewshot", 0) / 4)
            return [Passes(math.ceil(number / batch), batch * tokens)]
        return []

    def _size(self, job: Job) -> needs.Size | None:
        model = job.wildcards.get("model")
        return needs.size(self.study, model) if model else None

    def _devices(self, job: Job) -> int:
        recipe = job.wildcards.get("recipe")
        return self.study.processes(recipe, {"gpu": job.gpus}) if recipe else 1


def step_of(study: Study, job: Job) -> Step | None:
    """Return the step that a job takes: its recipe, suite or workload, or how its model is trained from nothing."""
    for wildcard, section in SECTIONS.items():
        if wildcard in job.wildcards:
            return study.step(section, job.wildcards[wildcard])
    return study.resolved.pretrained.get(job.wildcards.get("model"))


def measured(benchmark: Path) -> float | None:
    """Return the seconds that Snakemake wrote into a job's benchmark file; None where there is none."""
    try:
        with benchmark.open(encoding="utf-8", newline="") as stream:
            return statistics.mean(float(row["s"]) for row in csv.DictReader(stream, delimiter="\t"))
    except (OSError, ValueError, KeyError, TypeError):  # never ran, or was killed while it was written
        return None
