"""What a study will cost: the jobs that Snakemake would run, their times and disk, and the chain that bounds time."""

from __future__ import annotations

import csv
import dataclasses
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

import tiny
from conftest import ROOT, copy_project, environment, snakemake
from espalier import checkpoints, needs
from espalier.job_times import ASSUMPTIONS, Estimate, Passes, Times, measured
from espalier.planned_jobs import Job, planned
from espalier.planning import Cost, checkpoint_bytes, costs, critical_path
from espalier.pretrain import random_weights
from espalier.study import Study

SCRIPT = "workflow/scripts/plan_study.py"
CONFIG = {"model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 192}
CONFIG |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return copy_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def inside(project, monkeypatch):
    monkeypatch.chdir(project)


def job(number: int, parents: tuple = (), runs: bool = True, rule: str = "rule", **wildcards: str) -> Job:
    benchmark = f"benchmarks/{number}.tsv"
    return Job(number, rule, wildcards, [f"out/{number}"], benchmark, runs, "", 1, 0, False, list(parents))


def took(number: int, *seconds: float) -> None:
    Path("benchmarks").mkdir(exist_ok=True)
    lines = "".join(f"{one}\t0:00:00\t1.0\n" for one in seconds)
    Path(f"benchmarks/{number}.tsv").write_text(f"s\th:m:s\tmax_rss\n{lines}", encoding="utf-8")


def listed(*arguments: str, project: Path) -> Counter:
    """Return how many jobs of each rule `snakemake -n` says that it would run, from its own table."""
    run = snakemake(project, "-n", "--quiet", "rules", *arguments)
    assert run.returncode == 0, run.stdout + run.stderr
    pairs = re.findall(r"^(\w+) +(\d+)$", run.stdout, re.MULTILINE)
    targets = ("total", "all", "tables", "figures")
    return Counter({rule: int(count) for rule, count in pairs if rule not in targets})


# The jobs ---------------------------------------------------------------------------------------------------------


def test_jobs_are_those_that_snakemake_lists(project, inside):
    profile = {"set-resources": {"tune_model": {"gres": "gpu:a100:2"}}, "set-threads": {"tune_model": 8}}
    Path("site").mkdir()
    Path("site/config.yaml").write_text(yaml.safe_dump(profile), encoding="utf-8")
    jobs = planned(Path("tests/smoke.yaml"), "site")
    assert all(one.runs for one in jobs)
    assert {(one.rule, one.gpus, one.threads) for one in jobs if one.gpus} == {("tune_model", 2, 8)}
    assert [one.number for one in jobs] == list(range(len(jobs)))
    assert all(parent < one.number for one in jobs for parent in one.parents)
    by_output = {output: one for one in jobs for output in one.outputs}
    runs = "results/smoke/runs/tiny-llama/s3"
    lora = by_output[f"{runs}/dense+depth-1+lora/step.json"]
    assert {jobs[parent].outputs[0] for parent in lora.parents} == {
        "results/smoke/data/world",
        f"{runs}/dense+depth-1/model",
    }
    on_device = ("pretrain", "prune", "tune", "quantize", "distill", "evaluate", "profile")
    assert {one.rule for one in jobs if one.on_device} == {f"{step}_model" for step in on_device}

    for output in by_output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).mkdir() if output.endswith(("/model", "/world")) else Path(output).write_text("x")
    run = snakemake(project, "--touch", "--cores", "1", "--configfile", "tests/smoke.yaml")
    assert run.returncode == 0, run.stdout + run.stderr
    Path(f"{runs}/dense/evaluate/zero-shot.json").unlink()
    Path("results/smoke/tables/metrics.csv").unlink()  # what nothing lacks is not made again
    jobs = planned(Path("tests/smoke.yaml"))
    again = {"evaluate_model": 1, "make_metrics": 1, "make_quantization_table": 1, "draw_figure": 2}
    assert Counter(one.rule for one in jobs if one.runs) == again
    assert listed("--configfile", "tests/smoke.yaml", project=project) == again
    (evaluation,) = (one for one in jobs if one.runs and one.rule == "evaluate_model")
    assert "Missing output files" in evaluation.reason
    assert len(jobs) == len({one.outputs[0] for one in by_output.values()})


def test_what_snakemake_refuses_is_said_in_its_words(project, inside):
    command = [sys.executable, SCRIPT, "tests/smoke.yaml", "--profile", "nowhere"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(project))
    assert run.returncode == 1
    assert re.match(r"error: Snakemake cannot plan the study tests/smoke.yaml: .*nowhere", run.stderr)


# Critical path ----------------------------------------------------------------------------------------------------


def chain(jobs: list[Job], seconds: list[float]) -> list[int]:
    nothing = Estimate(0, "assumed")
    found = [Cost(one, Estimate(time, "assumed"), nothing) for one, time in zip(jobs, seconds, strict=True)]
    return [cost.job.number for cost in critical_path(found)]


def test_critical_path_is_the_longest_chain():
    jobs = [job(0), job(1), job(2, (0,)), job(3, (0, 1)), job(4, (2, 3)), job(5, (1,))]
    assert chain(jobs, [5, 9, 1, 1, 2, 4]) == [1, 5]  # 13; 1, 3, 4 takes 12
    assert chain(jobs, [5, 9, 1, 3, 2, 4]) == [1, 3, 4]  # 14
    assert chain(jobs, [5, 1, 9, 3, 2, 4]) == [0, 2, 4]  # 16
    assert chain([], []) == []


def test_finished_jobs_take_no_more_time():
    jobs = [job(0, runs=False), job(1), job(2, (0,)), job(3, (1,))]
    assert chain(jobs, [1000, 3, 4, 2]) == [1, 3]


# Times ------------------------------------------------------------------------------------------------------------


def random_model(shape: str, layers: int) -> dict:
    return {"pretrain": "random-weights", "shape": shape, "layers": layers}


@pytest.fixture
def study(tmp_path, monkeypatch) -> Study:
    """Two models of which one has twice the blocks, and one a hundred times as large."""
    monkeypatch.chdir(tmp_path)
    tiny.calibration(tmp_path / "words")
    small = {**CONFIG, "tie_word_embeddings": True}
    words = {"dataset": "words", "split": "calibration"}
    few = {"text": words, "samples": 100, "length": 32}
    mapping = {
        "study": "costs",
        "device": "cpu",
        "figures": {},
        "models": {
            "one": {"pretrain": "random-weights", "config": small, "weights_dtype": "float32"},
            "two": {"pretrain": "random-weights", "config": {**small, "num_hidden_layers": 4}, "seeds": [0, 1]},
            "big": {"pretrain": "random-weights", "shape": "llama-7b"},
            "decoder": {"pretrain": "demo-decoder", "text": words, "steps": 100, "batch": 16, "window": 64},
        },
        "datasets": {"words": {"path": str(tmp_path / "words")}},
        "calibrations": {"few": few},
        "recipes": {
            "lora": {"tune": "lora", "steps": 10, "batch_size": 64, "micro_batch": 4, "cutoff": 256, **words},
            "long": {"tune": "sft", "epochs": 2, "batch_size": 100, "micro_batch": 100, "cutoff": 128, **words},
            "depth-1": {"prune": "depth", "blocks": 1, "calibration": "few", "batch_size": 32},
            "depth-2": {"prune": "depth", "blocks": 2, "calibration": "few", "batch_size": 32},
            "magnitude-1": {"prune": "depth", "blocks": 1, "criterion": "magnitude"},
            "gptq-w4": {"quantize": "gptq", "bits": 4, "group_size": 32, "calibration": "few", "batch_size": 200},
            "rtn-w4": {"quantize": "round-to-nearest", "bits": 4, "group_size": 32},
        },
        "suites": {
            "zero-shot": {"evaluate": "harness", "tasks": ["piqa", "boolq"], "limit": 100, "batch_size": 8},
            "five": {"evaluate": "harness", "tasks": ["piqa"], "num_fewshot": 5, "batch_size": 10},
            "heldout": {"evaluate": "perplexity", "text": {**words, "split": "x"}, "window": 100, "batch_size": 10},
        },
        "workloads": {
            "generation": {
                "profile": "generation",
                "input_tokens": [12],
                "output_tokens": [128],
                "batch_sizes": [1, 4],
                "warmup": 1,
                "repeats": 2,
            },
            "scoring": {"profile": "scoring", "tasks": ["piqa", "boolq"], "questions": 50},
        },
    }
    return Study(mapping)


@pytest.mark.parametrize(
    ("section", "name", "expected"),
    [
        ("recipes", "lora", [(3 * 10 * 16, 4 * 256)]),
        ("recipes", "long", [(3 * 1000, 100 * 128)]),  # 2 · 50,000 rows of 100 a step
        ("recipes", "depth-1", [(100 * 4, 32 * 32)]),  # 100 windows are four batches
        ("recipes", "magnitude-1", []),
        ("recipes", "gptq-w4", [(4, 100 * 32)]),
        ("recipes", "rtn-w4", []),
        ("suites", "zero-shot", [(25, 8 * 400)]),
        ("suites", "five", [(200, 10 * 900)]),
        ("suites", "heldout", [(300, 1000)]),
        ("workloads", "generation", [(3, 12), (3 * 128, 1), (3, 48), (3 * 128, 4)]),
        ("workloads", "scoring", [(100, 400)]),
        ("pretrained", "decoder", [(300, 16 * 64)]),
        ("pretrained", "big", []),
    ],
)
def test_a_recipe_asks_for_so_many_passes(study, section, name, expected):
    assert Times(study, []).passes(study.step(section, name)) == [Passes(*one) for one in expected]


def evaluation(number: int, model: str, suite: str = "zero-shot", seed: int = 0, **changes) -> Job:
    found = job(number, rule="evaluate_model", model=model, seed=str(seed), chain="dense", suite=suite)
    return dataclasses.replace(found, **changes)


def test_what_a_job_took_is_what_it_takes(study):
    jobs = [evaluation(0, "two"), evaluation(1, "two", seed=1), job(2, figure="size_tradeoff")]
    took(0, 40.0, 44.0)
    took(2, 3.5)
    times = Times(study, jobs)
    assert times.seconds(jobs[0]) == (42.0, "measured")
    assert times.seconds(jobs[1]) == (42.0, "like")
    assert times.seconds(jobs[2]) == (3.5, "measured")
    assert not times.used


def test_of_finished_jobs_nothing_is_assumed(study):
    jobs = [evaluation(0, "two", runs=False), evaluation(1, "two", seed=1, runs=False)]
    took(0, 40.0)
    times = Times(study, jobs)
    assert [cost.seconds for cost in costs(times)] == [(40.0, "measured"), (0.0, "assumed")]
    assert not times.used


def test_the_same_recipe_is_nearer_than_the_same_method(study):
    jobs = [evaluation(0, "two"), evaluation(1, "two", "five"), evaluation(2, "two", "five", seed=1)]
    took(0, 10.0)
    took(1, 30.0)
    assert Times(study, jobs).seconds(jobs[2]) == (30.0, "like")
    Path("benchmarks/1.tsv").unlink()
    assert Times(study, jobs).seconds(jobs[2]) == (10.0, "like")


def test_what_is_beyond_the_start_grows_with_the_model(study):
    jobs = [evaluation(0, "one"), evaluation(1, "two"), evaluation(2, "big")]
    took(0, 115.0)
    ratio = needs.size(study, "two").parameters / needs.size(study, "one").parameters
    times = Times(study, jobs)
    assert 1 < ratio < 2
    assert times.seconds(jobs[1]) == (pytest.approx(15 + 100 * ratio), "like")
    assert times.seconds(jobs[2]).known == "assumed"  # a tiny model says nothing of one that is 50,000 times as large


@pytest.mark.parametrize("content", ["", "s\th:m:s\n", "s\th:m:s\nNA\tNA\n", "h:m:s\n0:00:01\n"])
def test_a_damaged_benchmark_is_none(tmp_path, content):
    (tmp_path / "damaged.tsv").write_text(content)
    assert measured(tmp_path / "damaged.tsv") is None
    assert measured(tmp_path / "missing.tsv") is None


def test_assumed_times_follow_the_arithmetic(study):
    """25 passes of 3,200 tokens: on a GPU 2 · P · tokens / 100 TFLOP/s each, on four cores / 100 GFLOP/s."""
    count, held = 6_738_415_616, 13_476_831_232
    big = evaluation(0, "big")
    jobs = [dataclasses.replace(big, gpus=1), evaluation(1, "big", threads=4), evaluation(2, "one", "heldout"), job(3)]
    times = Times(study, jobs)
    start = 15 + 2 * held / 1e9
    assert times.seconds(jobs[0]) == (pytest.approx(start + 25 * 2 * count * 3200 / 100e12), "assumed")
    assert times.seconds(jobs[1]) == (pytest.approx(start + 25 * 2 * count * 3200 / 100e9), "assumed")
    assert times.seconds(jobs[2]).value == pytest.approx(15 + 300 * 0.02, abs=0.01)  # as long as a pass takes at least
    assert times.seconds(jobs[3]) == (60, "assumed")
    assert times.used == {
        "start",
        "read",
        "gpu",
        "gpu memory",
        "core",
        "core memory",
        "pass",
        "question",
        "text",
        "other",
    }
    assert times.used < ASSUMPTIONS.keys()


def test_a_new_token_takes_as_long_as_reading_all_weights(study):
    decode = job(0, rule="profile_model", model="big", seed="0", chain="dense", workload="generation")
    decode = dataclasses.replace(decode, gpus=1)
    count, held = 6_738_415_616, 13_476_831_232
    start = 15 + 2 * held / 1e9
    passes = 2 * (3 + 3 * 128)  # two batch sizes, each run three times: a prompt and 128 tokens
    assert Times(study, [decode]).seconds(decode).value == pytest.approx(start + passes * 0.02)  # reading: 13 ms
    on_core = dataclasses.replace(decode, gpus=0)
    prompts = 3 * 2 * count * (12 + 48) / 25e9
    expected = start + prompts + 2 * 3 * 128 * held / 5e9
    assert Times(study, [on_core]).seconds(on_core).value == pytest.approx(expected)


# Disk -------------------------------------------------------------------------------------------------------------


def stored(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_disk_of_a_checkpoint_is_what_it_takes(study, tmp_path):
    from espalier.quantize import round_to_nearest

    step = study.resolved.pretrained["one"]
    for name in ("dense", "packed"):
        (tmp_path / name).mkdir()
    random_weights.apply(None, tmp_path / "dense", step.recipe, seed=0, device="cpu")
    count = checkpoints.describe(tmp_path / "dense")["parameters"]
    assert checkpoint_bytes(study, "one", "dense") == 4 * count
    assert stored(tmp_path / "dense") == pytest.approx(4 * count, rel=0.02)  # and a header
    recipe = study.step("recipes", "rtn-w4").recipe
    round_to_nearest.apply(tmp_path / "dense", tmp_path / "packed", recipe, seed=0, device="cpu")
    assert checkpoint_bytes(study, "one", "dense+rtn-w4") == pytest.approx(stored(tmp_path / "packed"), rel=0.1)
    assert checkpoint_bytes(study, "one", "dense+rtn-w4") < 2 * count
    smoke = Study(yaml.safe_load((ROOT / "tests/smoke.yaml").read_text(encoding="utf-8")), "smoke.yaml")
    encoder = needs.size(smoke, "tiny-bert").parameters
    assert checkpoint_bytes(smoke, "tiny-bert", "dense+cola") == 4 * encoder
    assert checkpoint_bytes(smoke, "tiny-bert", "dense+cola+cola-1bit") == round(encoder / 8), "its embeddings, too"
    assert checkpoint_bytes(study, "big", "dense+lora") == 4 * 6_738_415_616  # lora's `dtype` is float32


def test_disk_of_what_stands_is_measured(study):
    model = job(0, rule="pretrain_model", model="one", seed="0")
    model = dataclasses.replace(model, outputs=["runs/model", "runs/step.json"])
    assert costs(Times(study, [model]))[0].bytes == (4 * needs.size(study, "one").parameters, "assumed")
    Path("runs/model").mkdir(parents=True)
    Path("runs/model/weights").write_bytes(b"x" * 700)
    Path("runs/step.json").write_bytes(b"x" * 50)
    assert costs(Times(study, [model]))[0].bytes == (750, "measured")


def test_an_environment_takes_minutes_and_gigabytes(study):
    build = job(0, rule="build_environment", environment="vllm-cpu")
    build = dataclasses.replace(build, outputs=["found.json"])
    times = Times(study, [build])
    assert costs(times) == [Cost(build, Estimate(300, "assumed"), Estimate(4e9, "assumed"))]
    assert times.used == {"environment"}
    finished = dataclasses.replace(build, runs=False)
    Path("found.json").write_bytes(b"x" * 50)
    Path("results/environments/vllm-cpu/venv").mkdir(parents=True)
    Path("results/environments/vllm-cpu/venv/package").write_bytes(b"x" * 700)
    assert costs(Times(study, [finished]))[0].bytes == (750, "measured")


# The script -------------------------------------------------------------------------------------------------------


def test_the_plan_is_printed_and_written(project, inside, monkeypatch, capsys, tmp_path):
    mapping = yaml.safe_load((ROOT / "docs" / "examples" / "full-size.yaml").read_text(encoding="utf-8"))
    mapping["models"]["far"] = {"hub": "someone/model", "revision": 40 * "0"}
    mapping["measure"].append({"model": "far", "chains": ["dense"], "workloads": ["memory"]})
    Path("own.yaml").write_text(yaml.safe_dump(mapping), encoding="utf-8")
    monkeypatch.syspath_prepend(str(project / "workflow" / "scripts"))
    main = runpy.run_path(str(project / SCRIPT))["main"]
    main(["own.yaml", "--csv", str(tmp_path / "plan.csv")])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    for part in (
        "llama-7b: 6,738,415,616 parameters, 13.5 GB, counted from its shape",
        "far: 8,000,000,000 parameters, 16 GB, ASSUMED",
        "36 by assumptions",
        "GFLOP/s that a CPU core reaches",
    ):
        assert part in printed
    with (tmp_path / "plan.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    lines = dict(re.findall(r"^(\w+) +(\d+)", printed.split("\n\n")[0], re.MULTILINE))
    assert lines.pop("sum") == str(len(rows)) == "36"
    assert Counter(row["rule"] for row in rows) == {rule: int(count) for rule, count in lines.items()}
    bound = sum(float(row["seconds"]) for row in rows if row["critical"] == "1") / 3600
    assert f"they take {bound:.2f} hours" in " ".join(printed.split())


def test_a_mistake_in_the_study_is_one_sentence(project, inside):
    text = Path("tests/smoke.yaml").read_text(encoding="utf-8")
    Path("typo.yaml").write_text(text.replace("quantize: gptq", "quantize: gptqq"), encoding="utf-8")
    command = [sys.executable, SCRIPT, "typo.yaml"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(project))
    assert (run.returncode, run.stdout) == (1, "")
    assert re.fullmatch(r"error: typo.yaml: recipes.gptq-w4.quantize: .* Did you mean 'gptq'\?\n", run.stderr)
