"""The chart and the tables of quantized variants: their numbers, their paired tests, and what a reader is told."""

from __future__ import annotations

import json
import math
import runpy
import statistics
from pathlib import Path

import pytest

from espalier import quantization_rows, tables
from espalier.errors import UserError
from espalier.figures import quantization_tradeoff, style
from espalier.files import write_json
from espalier.recipes import build
from espalier.results import path_of
from test_bad_input import result
from test_figures import PAPERS, ROOT, TASKS, text_of


def quantization_recipe(**other):
    recipe = {"title": "Q", "model": "m", "suite": "tasks", "tasks": TASKS, "workload": "scoring"}
    return build(quantization_tradeoff.Recipe, recipe | other, "figures.quantization")


def scored(chain, right, seconds, peak, seed=1, outcome="ok", **about):
    """Raw results of one chain: `right` is the outcome of each question, the same for all tasks."""
    identity = {"study": "s", "model": "m", "seed": seed, "chain": chain}
    checkpoint = result()["checkpoint"] | about
    accuracy = {"value": statistics.mean(right), "stderr": 0.02, "n": len(right), "unit": "fraction"}
    tasks = [{"task": task, "metric": metric} | accuracy for task, metric in TASKS.items()]
    samples = {task: {"doc_ids": list(range(len(right))), metric: right} for task, metric in TASKS.items()}
    measurements = {
        "time_per_question": seconds,
        "tokens_per_second": None if seconds is None else 400 / seconds,
        "peak_allocated_per_question": peak,
    }
    profiled = [
        {"task": "t", "metric": metric, "value": value, "unit": "", "outcome": outcome}
        for metric, value in measurements.items()
    ]
    shared = {"checkpoint": checkpoint}
    return [
        result(identity=identity | {"name": "tasks"}, measurements=tasks, samples=samples, **shared),
        result(identity=identity | {"name": "scoring"}, kind="profile", measurements=profiled, **shared),
    ]


def test_quantization_values_have_the_tables_keys():
    results = scored("dense", [1, 0], 0.2, 250 * 2**20) + scored("dense+gptq", [1, 1], None, None, outcome="oom")
    recipe = quantization_recipe(rows={"GPTQ 4bit calib20": "dense+gptq", "Base Model": "dense"})
    values = quantization_rows.values(recipe, tables.frame(results))
    assert list(values) == ["Base Model", "GPTQ 4bit calib20"]
    keys = ("accuracy", "avg_time_s", "tokens_per_s", "avg_peak_vram_MB", "score_acc_over_vram")
    assert values["Base Model"] == pytest.approx(dict(zip(keys, (0.5, 0.2, 2000.0, 250.0, 2.0), strict=True)))
    assert values["GPTQ 4bit calib20"] == dict.fromkeys(keys) | {"accuracy": 1.0}
    points = quantization_tradeoff.measured(recipe, results)
    accuracy = points[(points["row"] == "Base Model") & (points["quantity"] == "accuracy")].iloc[0]
    assert accuracy["stderr"] == pytest.approx(100 * math.hypot(0.02, 0.02) / 2)
    assert accuracy["error"] == pytest.approx(1.959963984540054 * accuracy["stderr"])
    assert accuracy["high"] - accuracy["value"] == pytest.approx(accuracy["error"])
    assert accuracy["n"] == 4
    gap = points[(points["row"] == "GPTQ 4bit calib20") & (points["quantity"] == "score_acc_over_vram")].iloc[0]
    assert gap["outcome"] == "oom"
    assert math.isnan(gap["value"])
    text = text_of(quantization_tradeoff.draw(points, "Title"))
    assert "OOM" in text
    assert "No results in this study: SFT Model, BnB 4-bit Model" in text


def test_quantization_rows_are_those_of_the_table_or_extra():
    with pytest.raises(UserError, match="Did you mean 'SFT Model'"):
        quantization_tradeoff.needs(quantization_recipe(rows={"SFT-Model": "dense"}))
    with pytest.raises(UserError, match="name it under rows"):
        quantization_tradeoff.needs(quantization_recipe(rows={}, extra_rows={"SFT Model": "dense"}))
    recipe = quantization_recipe(rows={"Base Model": "dense"}, extra_rows={"Ours 3bit": "x"})
    points = quantization_tradeoff.measured(recipe, scored("dense", [1], 1, 1) + scored("x", [0], 1, 1))
    assert list(dict.fromkeys(points["row"])) == ["Base Model", "Ours 3bit"]


def test_the_checkpoint_says_its_arithmetic():
    recipe = quantization_recipe(rows={"Base Model": "dense"}, extra_rows={"RTN": "r", "GPTQ 3bit": "g"})
    results = scored("dense", [1, 0], 1, 1) + scored("g", [1, 0], 1, 1, arithmetic="unpacked")
    points = quantization_tradeoff.measured(recipe, results + scored("r", [1, 0], 1, 1, arithmetic="simulated"))
    said = {"Base Model": "float", "RTN": "simulated", "GPTQ 3bit": "unpacked"}
    assert dict(zip(points["row"], points["arithmetic"], strict=True)) == said
    drawn = quantization_tradeoff.draw(points, "Title")
    hatched = {patch.get_y() + patch.get_height() / 2 for patch in drawn.axes[1].patches if patch.get_hatch()}
    assert hatched == {1.0}, "of the rows Base Model, RTN and GPTQ 3bit the second alone"
    assert "unpacked: stored in few bits" in text_of(drawn)
    assert "products of integers" not in text_of(drawn)
    plain = quantization_tradeoff.draw(points[points["row"] != "RTN"], "Title")
    assert "simulated" not in text_of(plain)


def test_each_row_is_tested_against_the_first_and_a_star_marks_p_below_5_percent():
    base, alike, worse = [1] * 8 + [0] * 2, [1] * 5 + [0, 0, 0, 1, 0], [1] * 3 + [0] * 7
    rows = {"GPTQ 4bit calib20": "g", "Base Model": "b", "SFT Model": "s"}
    results = [
        one for chain, right in zip("bsg", (base, alike, worse), strict=True) for one in scored(chain, right, 1, 1)
    ]
    points = quantization_tradeoff.measured(quantization_recipe(rows=rows), results)
    accuracy = points[points["quantity"] == "accuracy"].set_index("row")
    assert (
        points.loc[points["quantity"] != "accuracy", ["versus", "only_this", "only_other", "p_value"]].isna().all(None)
    )
    assert accuracy.loc["Base Model", ["versus", "only_this", "only_other", "p_value"]].isna().all()
    tests = {name: tuple(accuracy.loc[name, ["versus", "only_this", "only_other"]]) for name in accuracy.index[1:]}
    # Both tasks are pooled, so each count is twice that of the lists above.
    assert tests == {"SFT Model": ("Base Model", 2, 6), "GPTQ 4bit calib20": ("Base Model", 0, 10)}
    assert accuracy["p_value"].tolist()[1:] == [2 * (1 + 8 + 28) / 2**8, 2 / 2**10]
    drawn = quantization_tradeoff.draw(points, "Title")
    written = [text.get_text() for text in drawn.axes[0].texts]
    assert [text for text in written if text[0].isdigit()] == ["80.0", "60.0", "30.0 *"]
    assert "* differs from Base Model at p < 0.05" in text_of(drawn)
    no_base = quantization_recipe(rows={"GPTQ 4bit calib20": "g", "SFT Model": "s"})
    versus = quantization_tradeoff.measured(no_base, results)["versus"].dropna()
    assert set(versus) == {"SFT Model"}


def test_a_workload_may_have_the_suites_name():
    results = scored("b", [1, 0], 1, 1) + scored("s", [0, 0], 1, 1)
    for one in results:
        one["identity"]["name"] = "tasks"
    recipe = quantization_recipe(rows={"Base Model": "b", "SFT Model": "s"}, workload="tasks")
    assert [line["only_versus"] for line in quantization_rows.pairs(recipe, results)] == [2]


def test_of_several_seeds_the_largest_p_is_told():
    recipe = quantization_recipe(rows={"Base Model": "b", "SFT Model": "s"})
    outcomes = {1: ([1] * 10, [0] * 10), 2: ([1] * 10, [1] * 9 + [0]), 3: ([1] * 10, [0] * 5 + [1] * 5)}
    results = [
        one
        for seed, pair in outcomes.items()
        for chain, right in zip("bs", pair, strict=True)
        for one in scored(chain, right, 1, 1, seed=seed)
    ]
    points = quantization_tradeoff.measured(recipe, results)
    test = points[(points["quantity"] == "accuracy") & (points["row"] == "SFT Model")].iloc[0]
    assert (test["only_this"], test["only_other"], test["p_value"]) == (0, 2, 0.5)
    lines = quantization_rows.pairs(recipe, results)
    assert [(line["seed"], line["only_versus"]) for line in lines] == [(1, 20), (2, 2), (3, 10)]


def test_the_band_is_the_interval_of_the_first_row():
    points = quantization_tradeoff.published(PAPERS)
    drawn = quantization_tradeoff.draw(points, "Title")
    half = 196 * math.sqrt((870 / 1962) * (1092 / 1962) / 1962)
    band = drawn.axes[0].patches[0].get_extents().transformed(drawn.axes[0].transData.inverted())
    assert (band.x0, band.x1) == pytest.approx((100 * 870 / 1962 - half, 100 * 870 / 1962 + half), rel=1e-4)
    assert "(n = 1962 questions)" in text_of(drawn)
    assert "cannot be told apart" in text_of(drawn)
    accuracy = points[points["quantity"] == "accuracy"].set_index("row")
    assert accuracy["p_value"].isna().all()
    calibrated = accuracy[accuracy["family"] == "GPTQ"]
    assert calibrated["low"].max() < calibrated["value"].min(), "each dot lies in each whisker"
    assert calibrated["high"].min() > calibrated["value"].max()


def test_the_script_makes_both_tables_of_quantized_variants(tmp_path):
    results = scored("b", [1, 1, 0, 0], 0.5, 2**20) + scored("s", [1, 0, 1, 1], 0.5, 2**20)
    files = []
    for one in results:
        files.append(tmp_path / path_of(Path(), kind=one["kind"], **one["identity"]))
        write_json(files[-1], one)
    recipe = {"title": "Q", "model": "m", "suite": "tasks", "tasks": TASKS, "workload": "scoring"}
    recipe |= {"figures": "quantization_tradeoff", "rows": {"Base Model": "b"}, "extra_rows": {"Mine": "s"}}
    options = ["--recipe", json.dumps(recipe), "--results", *map(str, files)]
    main = runpy.run_path(str(ROOT / "workflow" / "scripts" / "make_quantization_table.py"))["main"]
    main([*options, "--output", str(tmp_path / "q.json"), "--paired", str(tmp_path / "q.csv")])
    table = json.loads((tmp_path / "q.json").read_text())
    assert {name: values["accuracy"] for name, values in table.items()} == {"Base Model": 0.5, "Mine": 0.75}
    assert (tmp_path / "q.csv").read_text().splitlines() == [
        "row,versus,seed,n,both,only_row,only_versus,neither,p_value",
        "Mine,Base Model,1,8,2,4,2,0,0.6875",
    ]


def test_published_score_and_megabyte_fit_the_published_table():
    points = quantization_tradeoff.published(PAPERS).set_index(["row", "quantity"])
    assert list(dict.fromkeys(name for name, _ in points.index)) == list(quantization_rows.ROWS)
    for name, accuracy, score in (
        ("Base Model", 0.4434250764525994, 0.18454535780550227),
        ("GPTQ 4bit calib2000", 0.4490316004077472, 0.7546139444603261),
        ("SmoothQuant W4A8 calib200", 0.43730886850152906, 0.16429010680811856),
    ):
        assert points.loc[(name, "accuracy"), "value"] == pytest.approx(100 * accuracy, rel=1e-12)
        assert points.loc[(name, "score_acc_over_vram"), "value"] == pytest.approx(score, rel=1e-12)
        # The sum over the 1962 questions is a whole number of 512-byte blocks: an MB is 2**20 bytes.
        blocks = points.loc[(name, "avg_peak_vram_MB"), "value"] * 1962 * style.MB / 512
        assert blocks == pytest.approx(round(blocks), abs=1e-4)
    half = points.loc[("Base Model", "accuracy"), "error"]
    assert half == pytest.approx(1.959963984540054 * 100 * math.sqrt((870 / 1962) * (1092 / 1962) / 1962))


def test_a_quantized_row_is_tested_against_the_row_that_it_was_made_from_too():
    """Fine-tuning gained what quantization lost: from Base the row does not differ, from its parent it does."""
    base, tuned, worse = [0] * 8 + [1] * 2, [1] * 10, [0] * 8 + [1] * 2
    rows = {"Base Model": "dense", "SFT Model": "dense+s", "GPTQ 4bit calib20": "dense+s+g"}
    results = [
        one
        for chain, right in zip(rows.values(), (base, tuned, worse), strict=True)
        for one in scored(chain, right, 1, 1)
    ]
    points = quantization_tradeoff.measured(quantization_recipe(rows=rows), results)
    row = points[points["quantity"] == "accuracy"].set_index("row").loc["GPTQ 4bit calib20"]
    assert (row["versus"], row["p_value"]) == ("Base Model", 1.0)
    assert (row["made_from"], row["p_value_made_from"]) == ("SFT Model", 2 / 2**16)
    drawn = quantization_tradeoff.draw(points, "Title")
    written = [text.get_text() for text in drawn.axes[0].texts]
    # SFT is made from Base itself, so that one mark says both.
    assert [text for text in written if text[0].isdigit()] == ["20.0", "100 *", "20.0 †"]
    assert "* differs from Base Model, † from SFT Model, of which it was made, at p < 0.05" in text_of(drawn)
