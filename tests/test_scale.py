"""A study of 1,000 jobs, all finished: what an edit runs again is known exactly, and within seconds.

Every job was run and recorded by snakemake itself, in bash, where a stand-in for `python` makes empty outputs: it takes
milliseconds and computes nothing.
"""

from __future__ import annotations

import copy
import resource
from pathlib import Path

import pytest
import yaml

import tiny
from conftest import copy_project, snakemake
from test_reruns import jobs

SECONDS = 10.0  # in which a finished study is found to be finished, on an otherwise idle machine
SEEDS = range(5)
REMOVED = range(1, 7)
TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "openbookqa")
CHAINS = ("dense", *(f"dense+depth-{n}{rest}" for n in REMOVED for rest in ("", "+lora", "+lora+w4", "+lora+w2")))
RESULTS = ("model", "evaluate/heldout.json", *(f"evaluate/{task}.json" for task in TASKS), "profile/memory.json")
RUNS = "results/scale/runs/tiny"
TABLE = "results/scale/tables/metrics.csv"
WORLD = {"dataset": "world"}
STUDY = {
    "study": "scale",
    "device": "cpu",
    "datasets": {"world": {"generate": "demo"}},
    "models": {
        "tiny": {"pretrain": "demo-decoder", "text": {**WORLD, "split": "pretrain"}, "seeds": list(SEEDS)},
        "far": {"hub": "someone/model", "revision": 40 * "0", "shape": "llama-7b"},
    },
    "calibrations": {"few": {"text": {**WORLD, "split": "calibration"}, "samples": 10, "length": 64}},
    "recipes": {
        **{f"depth-{n}": {"prune": "depth", "blocks": n, "calibration": "few"} for n in REMOVED},
        "lora": {"tune": "lora", **WORLD, "split": "instruct", "steps": 60, "batch_size": 32, "micro_batch": 32},
        "w4": {"quantize": "round-to-nearest", "bits": 4, "group_size": 64},
        "w2": {"quantize": "round-to-nearest", "bits": 2, "group_size": 64},
    },
    "suites": {
        "heldout": {"evaluate": "perplexity", "text": {**WORLD, "split": "heldout"}, "window": 64},
        **{task: {"evaluate": "harness", **WORLD, "tasks": [task]} for task in TASKS},
    },
    "workloads": {
        "memory": {"profile": "memory", "engine": "hf", "input_tokens": [12], "output_tokens": [24], "batch_sizes": [1]}
    },
    "measure": [
        {"model": "tiny", "chains": list(CHAINS), "suites": ["heldout", *TASKS], "workloads": ["memory"]},
        {"model": "far", "chains": ["dense"], "workloads": ["memory"]},
    ],
    "figures": {},
}

# bash reads it before each command: outputs are made, and no Python is started.
STAND_IN = """
python() {
  while [ $# -gt 0 ]; do
    case $1 in
      --output | --step) case $2 in *.json | *.csv) : > "$2" ;; *) mkdir "$2" ;; esac ;;
    esac
    shift
  done
}
"""


def outputs(chains=CHAINS, seeds=SEEDS) -> set[str]:
    """Return the first output of each job that makes or measures one of the chains."""
    return {f"{RUNS}/s{seed}/{chain}/{result}" for seed in seeds for chain in chains for result in RESULTS}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    project = copy_project(tmp_path_factory.mktemp("scale"))
    (project / "scale.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    stand_in = tmp_path_factory.mktemp("stand-in") / "python.bash"
    stand_in.write_text(STAND_IN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASH_ENV", str(stand_in))
        patch.setenv("HF_HUB_CACHE", str(far := tmp_path_factory.mktemp("hub")))  # nobody is asked for what it holds
        tiny.llama(far / "models--someone--model" / "snapshots" / (40 * "0"))
        run = snakemake(project, "--cores", "8", "--configfile", "scale.yaml")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert len(outputs()) == 1000
    assert not [path for path in outputs() if not (project / path).exists()]
    return project


def processor_seconds() -> float:
    """Return the processor's time that this process's children have taken which it has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def jobs_of(project: Path, study: dict) -> set[str]:
    """Return the first output of each job that `snakemake -n` would run for the study."""
    file = project / "edited.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    return jobs(project, "--configfile", file.name)


def test_a_finished_study_is_found_finished_within_seconds(finished):
    """Judged by the processor's time, which other processes of a busy machine lengthen less than the clock's."""
    before = processor_seconds()
    assert jobs_of(finished, STUDY) == set()
    took = processor_seconds() - before
    print(f"snakemake -n of 1,000 finished jobs: {took:.1f} s of the processor")
    assert took <= SECONDS


@pytest.mark.parametrize(
    ("recipe", "change", "variants"),
    [
        ("depth-4", {"schedule": "greedy"}, 4),  # itself, and three chains that go on from it
        ("w2", {"group_size": 32}, 6),
    ],
)
def test_an_edit_to_one_recipe_lists_exactly_its_jobs(finished, recipe, change, variants):
    study = copy.deepcopy(STUDY)
    study["recipes"][recipe].update(change)
    chains = [chain for chain in CHAINS if recipe in chain.split("+")]
    assert len(chains) == variants
    assert jobs_of(finished, study) == outputs(chains) | {TABLE}


def test_a_new_seed_adds_its_own_jobs_and_no_other(finished):
    """And another shape adds none: what it stood for is there by now."""
    study = copy.deepcopy(STUDY)
    study["models"]["tiny"]["seeds"].append(5)
    study["models"]["far"]["shape"] = "llama-13b"
    assert jobs_of(finished, study) == outputs(seeds=[5]) | {TABLE}
