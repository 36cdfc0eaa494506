"""The numbers behind each chart equal plain computations, gaps stay gaps, and absent series are named."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from chart_rows import frame, row, text_of
from espalier.errors import UserError
from espalier.figures import (
    Need,
    block_importance,
    engine_speedup,
    glue_bits,
    latency_throughput,
    quantization_tradeoff,
    size_tradeoff,
    style,
)
from espalier.recipes import build

ROOT = Path(__file__).resolve().parents[1]
PAPERS = ROOT / "reference" / "papers"
CHARTS = (size_tradeoff, latency_throughput, quantization_tradeoff, engine_speedup, glue_bits, block_importance)


# --- size_tradeoff
TASKS = {"boolq": "acc", "hellaswag": "acc_norm"}


def size_recipe(series, **other):
    recipe = {"title": "Size", "model": "m", "suite": "tasks", "workload": "memory", "tasks": TASKS, "series": series}
    recipe["memory"] = {"batch_size": 1, "input_tokens": 8, "output_tokens": 16}
    return build(size_tradeoff.Recipe, recipe | other, "figures.size")


def variant(chain, parameters, accuracies, peak, outcome="ok"):
    """Rows of one chain: accuracies is {seed: (boolq, hellaswag)}; one distracting row at another batch size."""
    rows = []
    for seed, values in accuracies.items():
        about = {"chain": chain, "seed": seed, "parameters": parameters}
        for (task, metric), value, stderr in zip(TASKS.items(), values, (0.03, 0.04), strict=True):
            scored = about | {"kind": "evaluate", "suite": "tasks", "task": task, "n": 100}
            rows.append(row(**scored, metric=metric, value=value, stderr=stderr))
            rows.append(row(**scored, metric="other", value=0.0))
        memory = about | {"kind": "profile", "suite": "memory", "input_tokens": 8, "output_tokens": 16, "unit": "bytes"}
        rows.append(row(**memory, metric="peak_allocated", value=peak, batch_size=1, outcome=outcome))
        rows.append(row(**memory, metric="peak_allocated", value=9e9, batch_size=64))
    return rows


def test_size_points_are_the_mean_of_tasks_and_seeds():
    rows = variant("dense", 652_000, {1: (0.5, 0.7), 2: (0.6, 0.9)}, 3 * 2**20)
    rows += variant("dense+cut", 471_000, {1: (0.4, 0.5)}, 2 * 2**20)
    points = size_tradeoff.measured(size_recipe({"Original": ["dense"], "Ours": ["dense+cut"]}), frame(rows))
    dense = points[(points["panel"] == "accuracy") & (points["chain"] == "dense")].iloc[0]
    means = [statistics.mean((0.5, 0.7)), statistics.mean((0.6, 0.9))]
    assert dense["value"] == pytest.approx(100 * statistics.mean(means))
    assert dense["stderr"] == pytest.approx(100 * math.sqrt(0.03**2 + 0.04**2) / 2)
    assert dense["spread"] == pytest.approx(100 * statistics.stdev(means))
    assert dense["error"] == pytest.approx(math.sqrt(dense["stderr"] ** 2 + dense["spread"] ** 2 / 2))
    assert (dense["seeds"], dense["size"], dense["n"]) == (2, "652K", 200)
    cut = points[(points["panel"] == "accuracy") & (points["chain"] == "dense+cut")].iloc[0]
    assert cut["error"] == pytest.approx(2.5)
    assert math.isnan(cut["spread"])
    memory = points[points["panel"] == "memory"].set_index("chain")
    assert memory["value"].to_dict() == {"dense": 3.0, "dense+cut": 2.0}
    assert set(memory["unit"]) == {"MB"}


def test_sizes_that_nearly_agree_stand_side_by_side():
    sizes = {"dense+cut": 471_000, "dense+width": 473_000, "dense+flap": 520_000}
    rows = [one for chain, size in sizes.items() for one in variant(chain, size, {1: (0.4, 0.5)}, 2 * 2**20)]
    series = {"Ours": ["dense+cut"], "LLM-Pruner": ["dense+width"], "FLAP": ["dense+flap"]}
    points = size_tradeoff.measured(size_recipe(series), frame(rows))
    assert set(points["parameters"]) == set(sizes.values()), "the CSV keeps the exact sizes"
    labels = [label.get_text() for label in size_tradeoff.draw(points, "Title").axes[1].get_xticklabels()]
    assert labels == ["≈ 472K", "520K"]


def test_size_chart_keeps_an_oom_as_an_empty_value_and_names_absent_series():
    rows = variant("dense", 652_000, {1: (0.5, 0.7)}, None, outcome="oom")
    rows += variant("dense+cut", 471_000, {1: (0.4, 0.5)}, 2 * 2**20)
    points = size_tradeoff.measured(size_recipe({"Original": ["dense"], "Ours": ["dense+cut"]}), frame(rows))
    gap = points[(points["panel"] == "memory") & (points["series"] == "Original")].iloc[0]
    assert gap["outcome"] == "oom"
    assert math.isnan(gap["value"])
    text = text_of(size_tradeoff.draw(points, "Title"))
    absent = "LLM-Pruner, FLAP, Ours without retraining, Ours + GPTQ, Original + GPTQ"
    assert f"No results in this study: {absent}." in text
    assert "OOM" in text
    assert "Peak memory (MB)" in text


def test_size_chart_takes_no_row_of_another_or_an_unsaid_shape():
    rows = [one | {"batch_size": None} for one in variant("dense", 652_000, {1: (0.5, 0.7)}, 3 * 2**20)]
    with pytest.raises(UserError, match="workload 'memory' has no row with batch_size 1, input_tokens 8"):
        size_tradeoff.measured(size_recipe({"Original": ["dense"]}), frame(rows))


def test_size_config_mistakes_are_named():
    needed = [Need("m", "a", "evaluate", "tasks"), Need("m", "a", "profile", "memory")]
    assert size_tradeoff.needs(size_recipe({"Ours": ["a"]})) == needed
    with pytest.raises(UserError, match="Did you mean 'Ours'"):
        size_tradeoff.needs(size_recipe({"Our": ["dense"]}))
    rows = variant("a", 652_000, {1: (0.5, 0.7)}, 1.0) + variant("b", 652_100, {1: (0.5, 0.7)}, 1.0)
    with pytest.raises(UserError, match="both 652K"):
        size_tradeoff.measured(size_recipe({"Ours": ["a", "b"]}), frame(rows))
    with pytest.raises(UserError, match="Did you mean 'boolq'"):
        size_tradeoff.measured(size_recipe({"Ours": ["a"]}, tasks={"boolqq": "acc"}), frame(rows))


def test_a_failure_is_no_bar_of_a_size():
    dead = "failed: its worker ended with signal 11"
    rows = variant("dense", 652_000, {1: (0.5, 0.7)}, None, outcome=dead)
    rows += variant("cut", 471_000, {1: (0.4, 0.5)}, 2 * 2**20)
    points = size_tradeoff.measured(size_recipe({"Original": ["dense"], "Ours": ["cut"]}), frame(rows))
    text = text_of(size_tradeoff.draw(points, "Title"))
    assert "Original failed in part: its worker ended with signal 11." in text
    assert "OOM" not in text


# --- glue_bits
GLUE = {
    "cola": {("cola", "mcc"): 0.5},
    "mnli": {("mnli", "accuracy"): 0.8, ("mnli_mismatched", "accuracy"): 0.9},
    "mrpc": {("mrpc", "accuracy"): 0.8, ("mrpc", "f1"): 0.7},
    "qnli": {("qnli", "accuracy"): 0.6},
    "qqp": {("qqp", "accuracy"): 0.9, ("qqp", "f1"): 0.5},
    "rte": {("rte", "accuracy"): 0.65},
    "sst2": {("sst2", "accuracy"): 0.95},
    "stsb": {("stsb", "pearson"): 0.85, ("stsb", "spearman"): 0.75},
}


def glue_rows(chain, tasks, shift=0.0, seed=1):
    return [
        row(kind="evaluate", chain=f"{chain}-{task}", suite=f"glue-{task}", seed=seed, task=name, metric=metric)
        | {"value": value + shift, "stderr": 0.02, "n": 300}
        for task in tasks
        for (name, metric), value in GLUE[task].items()
    ]


def glue_recipe(tasks, students=None):
    recipe = {"title": "G", "model": "m", "suite": {task: f"glue-{task}" for task in tasks}}
    recipe["teacher"] = {task: f"t-{task}" for task in tasks}
    return build(glue_bits.Recipe, recipe | {"students": students or {}}, "figures.glue")


def test_glue_average_counts_each_of_eight_tasks_once():
    students = {"Budget-A": {2: {task: f"a-{task}" for task in GLUE}}}
    rows = glue_rows("t", GLUE) + glue_rows("a", GLUE, -0.1) + glue_rows("a", GLUE, -0.2, seed=2)
    points = glue_bits.measured(glue_recipe(GLUE, students), frame(rows)).set_index(["panel", "series", "bits"])
    scores = [statistics.mean(parts.values()) for parts in GLUE.values()]
    average = points.loc[("Ave. 8 Tasks", "teacher", 32)]
    assert average["value"] == pytest.approx(100 * statistics.mean(scores))
    assert average["stderr"] == pytest.approx(100 * 0.02 / math.sqrt(8))
    student = points.loc[("Ave. 8 Tasks", "Budget-A", 2)]
    assert student["value"] == pytest.approx(100 * (statistics.mean(scores) - 0.15))
    assert student["spread"] == pytest.approx(100 * statistics.stdev((0.1, 0.2)))
    assert student["seeds"] == 2
    assert points.loc[("STS-B", "teacher", 32), "value"] == pytest.approx(85.0)
    assert points.loc[("MNLI", "Budget-A", 2), "value"] == pytest.approx(65.0)


def test_glue_says_which_tasks_are_missing():
    points = glue_bits.measured(glue_recipe(["cola", "stsb"]), frame(glue_rows("t", ["cola", "stsb"])))
    average = points[points["panel"] == "Ave. 8 Tasks"].iloc[0]
    assert math.isnan(average["value"])
    assert average["outcome"] == "missing: mnli, mrpc, qnli, qqp, rte, sst2"
    text = text_of(glue_bits.draw(points, "Title"))
    assert "No results: MNLI" in text
    assert "No average without" in text
    assert "No results in this study: Budget-A, Budget-C." in text


def test_each_glue_task_may_have_a_model_of_its_own():
    recipe = build(
        glue_bits.Recipe,
        {
            "title": "G",
            "model": {"cola": "one", "rte": "two"},
            "suite": {"cola": "glue-cola", "rte": "glue-rte"},
            "teacher": {"cola": "dense", "rte": "dense"},
        },
        "figures.glue",
    )
    assert {(need.model, need.name) for need in glue_bits.needs(recipe)} == {("one", "glue-cola"), ("two", "glue-rte")}
    rows = [one | {"chain": "dense", "model": "one"} for one in glue_rows("t", ["cola"])]
    points = glue_bits.measured(recipe, frame(rows)).set_index("panel")
    assert points.loc["CoLA", "value"] == pytest.approx(50.0)
    with pytest.raises(UserError, match="without an entry under model"):
        glue_bits.needs(dataclasses.replace(recipe, model={"cola": "one"}))


def test_glue_config_mistakes_are_named():
    with pytest.raises(UserError, match="Did you mean 'Budget-A'"):
        glue_bits.needs(glue_recipe(["cola"], {"BudgetA": {2: {"cola": "x"}}}))
    with pytest.raises(UserError, match="Did you mean 'cola'"):
        glue_bits.needs(glue_recipe(["cola"], {"Budget-A": {2: {"colla": "x"}}}))
    with pytest.raises(UserError, match="'2-bit' is not a number of bits, such as 2"):
        glue_bits.needs(glue_recipe(["cola"], {"Budget-A": {"2-bit": {"cola": "x"}}}))
    rows = [one | {"bits": 1} for one in glue_rows("a", ["cola"])]
    with pytest.raises(UserError, match="'a-cola' has weights of 1 bits, not 2"):
        glue_bits.measured(glue_recipe(["cola"], {"Budget-A": {2: {"cola": "a-cola"}}}), frame(rows))
    assert glue_bits.needs(glue_recipe(["cola"], {"Budget-C": {"1": {"cola": "x"}}})) == [
        Need("m", "t-cola", "evaluate", "glue-cola"),
        Need("m", "x", "evaluate", "glue-cola"),
    ]


# --- published values, files, imports


def test_published_points_are_those_of_the_papers():
    size = size_tradeoff.published(PAPERS).set_index(["panel", "series", "size"])["value"]
    assert size[("memory", "Original", "6.7B")] == 12.4
    assert [size[("memory", "Ours", at)] for at in ("2.7B", "3.7B", "5.5B")] == [5.2, 7.1, 10.5]
    assert [size[("accuracy", "Ours", at)] for at in ("2.7B", "3.7B", "5.5B")] == [55.0, 57.3, 61.3]
    assert ("memory", "Original", "2.7B") not in size.index
    glue = glue_bits.published(PAPERS).set_index(["panel", "series", "bits"])["value"]
    assert glue[("CoLA", "Budget-A", 1)] == 50.5
    best = glue.unstack("series")
    assert (best["Budget-C"] >= best["Budget-A"]).all()
    latency = latency_throughput.published(PAPERS)
    assert len(latency.groupby(["row", "output_tokens", "input_tokens"])) == 8
    assert latency["certainty"].str.startswith("unreliable").all()
    headlines = pd.read_csv(PAPERS / "engine_speedup_headlines.csv")
    assert headlines.set_index(["against", "hardware"])["speedup"][("vLLM", "all")] == 1.24


@pytest.mark.parametrize("file", sorted(PAPERS.glob("*.csv")), ids=lambda file: file.stem)
def test_each_published_row_says_its_source_and_certainty(file):
    table = pd.read_csv(file)
    known = ("exact", "read off a chart", "derived", "from memory", "unreliable")
    assert table["source"].notna().all()
    assert table["certainty"].str.startswith(known).all()
    assert file.name in (PAPERS / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.__name__.rpartition(".")[2])
def test_charts_draw_published_and_no_points(chart, tmp_path):
    points = chart.published(PAPERS)
    assert list(points.columns) == list(chart.COLUMNS)
    for name in ("once", "twice"):
        files = style.save(chart.draw(points, "Title", "A note."), tmp_path / name)
    assert {file.suffix for file in files} == {".pdf", ".svg", ".png"}
    assert len(list(tmp_path.iterdir())) == 6
    for kind in ("pdf", "svg", "png"):
        assert (tmp_path / f"once.{kind}").read_bytes() == (tmp_path / f"twice.{kind}").read_bytes()
    assert "No results in this study" in text_of(chart.draw(points.iloc[:0], "Title"))


def test_labels():
    counts = {"652K": 652_000, "1.4M": 1_400_000, "110M": 110e6, "1.0M": 999_600, "4.9B": 4.917e9}
    assert {label: style.parameters_label(count) for label, count in counts.items()} == {key: key for key in counts}
    assert [style.length_label(n) for n in (128, 1000, 1024, 32768, 1500)] == ["128", "1k", "1k", "32k", "1500"]
    assert style.memory_unit(2**30) == ("GB", 2**30)
    assert style.memory_unit(2**30 - 1) == ("MB", 2**20)
    assert style.memory_label(["NVIDIA H200"], "GB") == "VRAM Usage (GB)"


def test_importing_charts_loads_no_heavy_library():
    code = (
        "import sys\n"
        f"for name in {[chart.__name__ for chart in CHARTS]!r}: __import__(name)\n"
        "print(sorted({'torch', 'matplotlib', 'pandas', 'numpy'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "workflow")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"
