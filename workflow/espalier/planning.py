"""What a study will cost, before anything is submitted: hours and disk by job, and the chain that bounds the time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from espalier import chains, needs, plugins
from espalier.job_times import Estimate, Times, step_of
from espalier.planned_jobs import Job
from espalier.study import Study

RESULT_BYTES = 1_000_000  # assumed of an output that is no model
ENVIRONMENT_BYTES = 4_000_000_000  # assumed of an engine's environment


@dataclass(frozen=True)
class Cost:
    """What one job costs."""

    job: Job
    seconds: Estimate
    bytes: Estimate  # that its outputs take on disk


def costs(times: Times) -> list[Cost]:
    """Return the costs of all jobs, in their order; of a finished one, what it took, or 0 where that is not known."""
    return [
        Cost(
            job,
            times.seconds(job) if job.runs or job.number in times.past else Estimate(0.0, "assumed"),
            disk(times.study, job),
        )
        for job in times.jobs
    ]


def critical_path(found: Sequence[Cost]) -> list[Cost]:
    """Return the chain of jobs to run, each waiting for the one before, that takes longest: the least time of all.

    With any number of nodes, a study takes as long as this chain, and the time in the queue. `found` must have parents
    before children.
    """
    ends: list[float] = []
    before: list[int | None] = []
    for cost in found:
        last = max(cost.job.parents, key=lambda parent: ends[parent], default=None)
        own = cost.seconds.value if cost.job.runs else 0.0
        ends.append(own + (ends[last] if last is not None else 0.0))
        before.append(last)
    chain = []
    place = max(range(len(found)), key=lambda number: ends[number], default=None)
    while place is not None:
        if found[place].job.runs:
            chain.append(found[place])
        place = before[place]
    return chain[::-1]


def disk(study: Study, job: Job) -> Estimate:
    """Return the bytes of a job's outputs: those on disk, else of a checkpoint by its bits and parameters.

    A pruned checkpoint is taken to be as large as the dense one. An engine's environment counts, too, though studies
    share it.
    """
    outputs = [Path(output) for output in job.outputs]
    if environment := job.wildcards.get("environment"):
        if job.runs:
            return Estimate(ENVIRONMENT_BYTES, "assumed")
        outputs.append(study.environment_folder(environment))
    if all(output.exists() for output in outputs):
        return Estimate(sum(map(_bytes, outputs)), "measured")
    model, step = job.wildcards.get("model"), step_of(study, job)
    if model is None or not any(output.name == "model" for output in outputs):
        return Estimate(RESULT_BYTES, "assumed")
    if step is None:  # a pointer to a model that exists, or its converted weights; the hub's go into the hub's cache
        size, entry = needs.size(study, model), study.resolved.models[model]
        copies = (entry.hub is not None and size.source != "weight files") + entry.convert
        return Estimate(copies * size.bytes or RESULT_BYTES, "assumed")
    return Estimate(checkpoint_bytes(study, model, chain_of(job)), "assumed")


def checkpoint_bytes(study: Study, model: str, chain: str) -> int:
    """Return the bytes of a variant's weights: embeddings in the last dtype of the chain, blocks in its bits.

    Of a method that says `PACKS_EMBEDDINGS` they have those bits, too. Each group of quantized weights has 32 bits
    more, for its scale and zero point.
    """
    size = needs.size(study, model)
    embedded = _embeddings(study, model)
    width = bits = 8 * size.bytes / size.parameters
    for token in chain.split("+")[1:]:
        step = study.step("recipes", token)
        recipe = step.recipe
        if dtype := getattr(recipe, "dtype", None):
            width = bits = int(re.search(r"\d+", dtype)[0])
        if stored := getattr(recipe, "bits", None):
            group = getattr(recipe, "group_size", -1)
            bits = stored + (32 / group if group > 0 else 0)
            if getattr(plugins.load(step.kind, step.method), "PACKS_EMBEDDINGS", False):
                width = bits
    return round((embedded * width + (size.parameters - embedded) * bits) / 8)


def chain_of(job: Job) -> str:
    """Return the chain of the variant that a job is about."""
    named = job.wildcards
    return f"{named['parent']}+{named['recipe']}" if "recipe" in named else named.get("chain", chains.DENSE)


def _embeddings(study: Study, model: str) -> int:
    """Return the parameters of a model that no quantizer touches: tokens in, and tokens out; 0 where unknown."""
    try:
        config = needs.config_of(study, model)
    except LookupError:
        return 0
    once = config.get("vocab_size", 0) * config.get("hidden_size", 0)
    return once if config.get("tie_word_embeddings") else 2 * once


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
