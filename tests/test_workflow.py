"""The whole workflow, for real: a study of every stage is run by snakemake, and what it left is examined."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from conftest import copy_project, environment, snakemake

CHARTS = ("size_tradeoff", "latency_throughput", "quantization_tradeoff", "engine_speedup", "glue_bits")
STUDY = ("--configfile", "tests/smoke.yaml")
NO_TORCH = "raise ImportError('torch must not be imported here')\n"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    """A copy of the project in which the study of tests/smoke.yaml was run."""
    project = copy_project(tmp_path_factory.mktemp("smoke"))
    run = snakemake(project, "--cores", "2", *STUDY)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return project


@pytest.fixture
def without_torch(tmp_path) -> Path:
    (tmp_path / "torch.py").write_text(NO_TORCH)
    return tmp_path


def rows(path: Path) -> list[dict]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_chart_is_there_in_every_format(smoke):
    for name in CHARTS:
        for suffix in ("pdf", "svg", "png", "csv"):
            assert (smoke / f"figures/smoke/{name}.{suffix}").stat().st_size > 100


def test_metrics_are_the_raw_results(smoke):
    """Each row of the table is a measurement of one raw result, found by another way than the table's own code."""
    table = rows(smoke / "results/smoke/tables/metrics.csv")
    raw = [
        json.loads(path.read_text())
        for path in (smoke / "results/smoke/runs").rglob("*.json")
        if "model" not in path.parent.name
    ]
    expected = {}
    for result in raw:
        for one in result["measurements"]:
            identity = [result["identity"][key] for key in ("model", "chain", "name")]
            condition = [str(one.get(key) or "") for key in ("batch_size", "output_tokens")]
            expected[*identity, one["task"], one["metric"], *condition] = one["value"]
    keys = ("model", "chain", "suite", "task", "metric", "batch_size", "output_tokens")
    found = {tuple(row[key] for key in keys): float(row["value"]) if row["value"] else None for row in table}
    assert found == {key: None if value is None else pytest.approx(value) for key, value in expected.items()}
    assert len(found) == len(table)
    assert {row["kind"] for row in table} == {"step", "evaluate", "profile"}
    assert {row["study"] for row in table} == {"smoke"}
    assert {row["seed"] for row in table} == {"3"}


def test_accuracies_are_their_samples(smoke):
    result = json.loads((smoke / "results/smoke/runs/tiny-llama/s3/dense/evaluate/zero-shot.json").read_text())
    values = {(one["task"], one["metric"]): one for one in result["measurements"]}
    for task in ("boolq", "hellaswag", "arc_easy"):
        outcomes = result["samples"][task]["acc"]
        assert len(outcomes) == values[task, "acc"]["n"] == 12
        assert values[task, "acc"]["value"] == pytest.approx(sum(outcomes) / 12)


def test_pruning_and_quantizing_show_in_the_numbers(smoke):
    table = rows(smoke / "results/smoke/tables/metrics.csv")
    size = {row["chain"]: int(row["parameters"]) for row in table if row["model"] == "tiny-llama"}
    assert (
        size["dense+gptq-w4"]
        == size["dense+bnb-nf4"]
        == size["dense"]
        > size["dense+depth-1"]
        == size["dense+depth-1+lora"]
    )
    memory = {row["chain"]: float(row["value"]) for row in table if row["metric"] == "weights_allocated"}
    assert memory["dense+bnb-nf4"] < memory["dense"]
    assert memory["dense+gptq-w4"] < memory["dense"]
    encoder = {(row["chain"], row["metric"]): row for row in table if row["model"] == "tiny-bert"}
    teacher, student = (encoder[chain, "weights_on_disk"] for chain in ("dense+cola", "dense+cola+cola-1bit"))
    assert student["parameters"] == teacher["parameters"]
    assert (float(teacher["bits"]), float(student["bits"])) == (32, 1)
    assert float(student["value"]) < float(teacher["value"]) / 10


def test_quantization_table_has_the_published_names_and_keys(smoke):
    table = json.loads((smoke / "results/smoke/tables/quantization.json").read_text())
    assert list(table) == ["Base Model", "BnB 4-bit Model", "GPTQ 4bit calib20"]
    for values in table.values():
        assert list(values) == ["accuracy", "avg_time_s", "tokens_per_s", "avg_peak_vram_MB", "score_acc_over_vram"]
        assert values["score_acc_over_vram"] == pytest.approx(1000 * values["accuracy"] / values["avg_peak_vram_MB"])


def test_every_two_rows_of_the_quantization_table_are_compared(smoke):
    pairs = rows(smoke / "results/smoke/tables/quantization_paired.csv")
    assert [(pair["row"], pair["versus"], pair["seed"], pair["n"]) for pair in pairs] == [
        ("BnB 4-bit Model", "Base Model", "3", "24"),
        ("GPTQ 4bit calib20", "Base Model", "3", "24"),
        ("GPTQ 4bit calib20", "BnB 4-bit Model", "3", "24"),
    ]
    accuracy = {
        name: values["accuracy"]
        for name, values in json.loads((smoke / "results/smoke/tables/quantization.json").read_text()).items()
    }
    for pair in pairs:
        difference = (int(pair["only_row"]) - int(pair["only_versus"])) / 24
        assert difference == pytest.approx(accuracy[pair["row"]] - accuracy[pair["versus"]])


def test_results_say_what_made_them(smoke):
    for path in (smoke / "results/smoke/runs").rglob("evaluate/*.json"):
        origin = json.loads(path.read_text())["provenance"]
        assert origin["packages"]["torch"]
        assert origin["seconds"] > 0
        assert len(origin["code"]) == 16


def test_a_second_run_has_nothing_to_do(smoke):
    run = snakemake(smoke, "--cores", "2", *STUDY)
    assert run.returncode == 0
    assert "Nothing to be done" in run.stdout + run.stderr


def test_more_gpus_are_more_processes_of_a_training_and_no_reason_to_train_again(smoke):
    study = yaml.safe_load((smoke / "tests/smoke.yaml").read_text())
    recipes = study["recipes"]
    added = {"lora-2": recipes["lora"], "qlora": {**recipes["lora"], "base": "nf4"}, "cola-2": recipes["cola"]}
    recipes.update(added)
    study["measure"] += [
        {"model": "tiny-llama", "chains": ["dense+lora-2", "dense+qlora"], "suites": ["heldout"]},
        {"model": "tiny-bert", "chains": ["dense+cola-2"], "suites": ["glue-cola"]},
    ]
    (smoke / "more.yaml").write_text(yaml.safe_dump(study))
    run = snakemake(smoke, "-n", "-p", "--configfile", "more.yaml", "--set-resources", "tune_model:gpu=2")
    assert run.returncode == 0, run.stdout + run.stderr
    commands = [line.strip() for line in run.stdout.splitlines() if "scripts/tune_model.py" in line]
    assert all(": trap '' TERM; python " in one for one in commands)
    found = {tuple(re.search(r"--processes (\d+) .*--name (\S+)", one).groups()) for one in commands}
    assert found == {("2", "lora-2"), ("1", "qlora"), ("1", "cola-2")}


def test_tables_and_charts_are_redrawn_identically_without_torch(smoke, without_torch):
    places = [smoke / "figures", smoke / "results/smoke/tables"]
    before = {
        path: path.read_bytes()
        for place in places
        for path in place.rglob("*")
        if path.suffix in (".csv", ".json", ".svg")
    }
    for place in places:
        shutil.rmtree(place)
    run = snakemake(smoke, "--cores", "2", *STUDY, python_path=[without_torch])
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "evaluate_model" not in run.stdout
    assert {path: path.read_bytes() for path in before} == before


def test_reference_figures_need_no_torch_and_no_result(smoke, without_torch):
    run = snakemake(smoke, "--cores", "2", *STUDY, "--", "reference_figures", python_path=[without_torch])
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    for name in CHARTS:
        points = rows(smoke / f"figures/reference/{name}.csv")
        assert points
        assert {row["certainty"] for row in points}.isdisjoint({"measured", ""})


def test_a_truncated_result_is_named_and_the_old_table_stays(smoke):
    result = smoke / "results/smoke/runs/tiny-llama/s3/dense/evaluate/zero-shot.json"
    whole, table = result.read_bytes(), smoke / "results/smoke/tables/metrics.csv"
    before = table.read_bytes()
    result.write_bytes(whole[: len(whole) // 2])
    command = [sys.executable, "workflow/scripts/make_metrics.py", "--results", str(result), "--output", str(table)]
    run = subprocess.run(command, cwd=smoke, env=environment(smoke), capture_output=True, text=True, check=False)
    result.write_bytes(whole)
    assert run.returncode == 1
    assert run.stderr.startswith(f"error: {result} is not valid JSON")
    assert table.read_bytes() == before


def test_the_report_is_written(smoke):
    run = snakemake(smoke, "--cores", "2", *STUDY, "--", "all", "report")
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    text = (smoke / "results/smoke/report.html").read_text()
    for name in CHARTS:
        assert f'<h3 id="chart-{name}">' in text
        picture = base64.b64encode((smoke / f"figures/smoke/{name}.svg").read_bytes()).decode()
        assert picture in text
    assert "Quantized variants" in text
    assert "Nothing: every result that the study asks for is there" in text
    page = smoke / "docs/metrics.md"
    for end, again in (("", set()), ("\nA word more.\n", {"write_report"})):
        page.write_text(page.read_text() + end)
        run = snakemake(smoke, "-n", *STUDY, "--", "all", "report")
        jobs = set(re.findall(r"^(?:local)?rule (\w+):", run.stdout, flags=re.M))
        assert jobs - {"all", "report"} == again, run.stdout


def test_a_killed_job_leaves_nothing_half_made_and_the_same_command_finishes(smoke):
    """The job is killed while it writes; snakemake is interrupted with it."""
    chain = smoke / "results/smoke/runs/tiny-llama/s3/dense+depth-1"
    shutil.rmtree(chain)
    arguments = ["--cores", "1", *STUDY, "--", str((chain / "step.json").relative_to(smoke))]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = [sys.executable, "-m", "snakemake", *arguments]
    process = subprocess.Popen(command, cwd=smoke, env=environment(smoke), start_new_session=True, **silent)
    deadline = time.monotonic() + 60
    while not list(chain.glob(".model.partial-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert list(chain.glob(".model.partial-*")), "the job never began to write"
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert not (chain / "model").exists()
    assert not (chain / "step.json").exists()
    run = snakemake(smoke, *arguments)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert json.loads((chain / "step.json").read_text())["samples"]["removed"]
    assert sorted(file.name for file in chain.iterdir() if "partial" in file.name) == []


def test_a_model_and_a_dataset_of_local_folders(smoke):
    """A model of one's own: pruned and quantized from where it lies, and measured as the one that was trained here."""
    (smoke / "mine.yaml").write_text(
        """
study: mine
device: cpu
datasets:
  text: {path: results/smoke/data/world}
models:
  mine: {path: results/smoke/runs/tiny-llama/s3/dense/model}
calibrations:
  few: {text: {dataset: text, split: calibration}, samples: 4, length: 32}
recipes:
  depth-1: {prune: depth, blocks: 1, calibration: few}
  bnb-nf4: {quantize: bitsandbytes, bits: 4}
suites:
  heldout: {evaluate: perplexity, text: {dataset: text, split: heldout}, window: 64}
measure:
  - {model: mine, chains: [dense, dense+depth-1+bnb-nf4], suites: [heldout]}
figures: {}
"""
    )
    run = snakemake(smoke, "--cores", "2", "--configfile", "mine.yaml")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    table = {(row["chain"], row["metric"]): row for row in rows(smoke / "results/mine/tables/metrics.csv")}
    trained = smoke / "results/smoke/runs/tiny-llama/s3"
    same = [json.loads((trained / "dense/step.json").read_text())["checkpoint"]["parameters"]]
    assert [int(float(table["dense", "parameters"]["value"]))] == same
    assert table["dense+depth-1+bnb-nf4", "perplexity"]["bits"] == "4.0"
    assert float(table["dense+depth-1+bnb-nf4", "parameters"]["value"]) < same[0]
    assert float(table["dense", "perplexity"]["value"]) > 1
    assert not (smoke / "results/mine/runs/mine/s0/dense/model/model.safetensors").exists(), "a pointer, not a copy"
    heldout = smoke / "results/smoke/data/world/heldout.jsonl"
    text = heldout.read_text()
    heldout.write_text(text + json.dumps({"text": "one more document"}) + "\n")
    run = snakemake(smoke, "-n", "--configfile", "mine.yaml")
    heldout.write_text(text)
    assert "rule evaluate_model" in run.stdout, "an edit to a local dataset reruns what reads it"
