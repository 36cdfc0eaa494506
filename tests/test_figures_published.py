"""Published values beside measured ones: unchanged, each in its panel, told apart, and only of real weights."""

from __future__ import annotations

import csv
import math
import os
import time

import pandas as pd
import pytest
import yaml

from chart_rows import frame, text_of
from conftest import copy_project
from espalier import drawing, tables
from espalier.errors import UserError
from espalier.figures import engine_speedup, glue_bits, latency_throughput, quantization_tradeoff, size_tradeoff
from espalier.published_points import LABEL, apart, joined
from espalier.study import Study
from test_figures import GLUE, PAPERS, glue_rows, variant
from test_figures import TASKS as QUESTIONS
from test_figures_speed import decoding, timing
from test_quantization_tradeoff import scored
from test_reruns import jobs

GIB = 2**30
TITLE = "(a) Llama2-7B@A100"
# Chart → its recipe without title, and what was measured: rows of metrics, or raw results.
CASES = {
    "size_tradeoff": (
        {"model": "m", "suite": "tasks", "workload": "memory", "tasks": QUESTIONS}
        | {"memory": {"batch_size": 1, "input_tokens": 8, "output_tokens": 16}}
        | {"series": {"Original": ["dense"], "Ours": ["cut"]}},
        variant("dense", 6_738_415_616, {1: (0.6, 0.7)}, 13 * GIB)
        + variant("cut", 3_702_670_000, {1: (0.5, 0.6)}, None, outcome="oom"),
    ),
    "latency_throughput": (
        {"workload": "speed", "rows": [{"title": "LLaMA-7B", "model": "m", "series": {"Ours": "ours"}}]},
        timing("ours", 1, 2.0) + timing("ours", 8, 3.0),
    ),
    "quantization_tradeoff": (
        {"model": "m", "suite": "tasks", "tasks": QUESTIONS, "workload": "scoring", "rows": {"Base Model": "dense"}},
        scored("dense", [1, 0], 0.2, 250 * 2**20),
    ),
    "engine_speedup": (
        {"panels": [{"title": TITLE, "model": "m", "chain": "dense", "series": {"HF": "hf", "Ours": "ours"}}]},
        [decoding("hf", 8, 8192, 10.0), decoding("ours", 8, 8192, 30.0)],
    ),
    "glue_bits": (
        {
            "model": "m",
            "suite": {task: f"glue-{task}" for task in GLUE},
            "teacher": {task: f"t-{task}" for task in GLUE},
        },
        glue_rows("t", GLUE),
    ),
}
CHARTS = {
    "size_tradeoff": size_tradeoff,
    "latency_throughput": latency_throughput,
    "quantization_tradeoff": quantization_tradeoff,
    "engine_speedup": engine_speedup,
    "glue_bits": glue_bits,
}


def points_of(chart, monkeypatch, published=True):
    recipe, results = CASES[chart]
    if not hasattr(CHARTS[chart], "SAMPLES"):
        monkeypatch.setattr(tables, "frame", frame)
    return drawing.measured(chart, recipe | {"figures": chart, "title": "T", "published": published}, results, PAPERS)[
        0
    ]


def marks(axes, shape="D"):
    """Return the places of the published values of a panel: of its white markers."""
    white = [line for line in axes.get_lines() if line.get_markerfacecolor() == "white" and line.get_marker() == shape]
    return [(float(x), float(y)) for line in white for x, y in zip(*line.get_data(), strict=True)]


def number(text):
    try:
        return float(text)
    except ValueError:
        return text


@pytest.mark.parametrize("chart", CASES)
def test_the_csv_holds_measured_points_and_published_ones_as_they_were(chart, monkeypatch):
    alone, both = points_of(chart, monkeypatch, published=False), points_of(chart, monkeypatch)
    written, own = (points.to_csv(index=False).splitlines() for points in (both, alone))
    assert written[: len(own)] == own, "no digit of a measured point changes"
    found = [row for row in csv.DictReader(written) if row["certainty"] != "measured"]
    with (PAPERS / f"{chart}.csv").open(encoding="utf-8") as file:
        printed = list(csv.DictReader(file))
    if chart == "quantization_tradeoff":
        values = {(row["row"], row["quantity"]): float(row["value"]) for row in found}
        for row in printed:
            assert values[row["row"], "accuracy"] == pytest.approx(100 * int(row["correct"]) / 1962, rel=1e-15)
            names = ("avg_time_s", "tokens_per_s", "avg_peak_vram_MB")
            assert [values[row["row"], name] for name in names] == [float(row[name]) for name in names]
        return
    assert len(found) == len(printed)
    for row, original in zip(found, printed, strict=True):
        assert {key: number(row[key]) for key in original} == {key: number(text) for key, text in original.items()} | (
            {} if original.get("outcome", "ok") else {"outcome": "ok"}
        )


def test_size_chart_has_published_values_beside_the_bars_of_their_series_and_at_their_own_sizes(monkeypatch):
    figure = size_tradeoff.draw(points_of("size_tradeoff", monkeypatch), "Title")
    memory, accuracy = figure.axes
    assert [label.get_text() for label in memory.get_xticklabels()] == ["2.7B", "3.7B", "5.5B", "6.7B"]
    assert sorted(y for _, y in marks(memory)) == [2.6, 3.1, 4.1, 4.8, 5.2, 7.1, 10.5, 12.4]
    assert sorted(y for _, y in marks(accuracy)) == [54.7, 55.0, 57.2, 57.3, 61.3, 63.5, 66.1], "one is unreliable"
    bar = memory.patches[0]
    assert bar.get_height() == pytest.approx(13.0)
    (beside,) = [x for x, y in marks(memory) if y == 12.4]
    assert 0 < beside - (bar.get_x() + bar.get_width()) < bar.get_width()
    assert [patch.get_height() for patch in accuracy.patches] == pytest.approx([55.0, 65.0])
    text = text_of(figure)
    assert "Published, not measured here: Shortened LLaMA (Kim et al. 2024, arXiv 2402.02834), bar charts" in text
    assert "read off a chart, approximate" in text
    assert "Not drawn: 1 published value of Shortened LLaMA" in text
    assert "unreliable: contradicts itself." in text
    assert "No results in this study: LLM-Pruner, FLAP, Ours without retraining, Ours + GPTQ, Original + GPTQ." in text
    assert figure.legends[0].get_texts()[-1].get_text() == LABEL


def test_memory_beside_published_values_has_their_unit(monkeypatch):
    recipe, _ = CASES["size_tradeoff"]
    small = variant("dense", 6e9, {1: (0.6, 0.7)}, GIB // 2) + variant("cut", 3e9, {1: (0.5, 0.6)}, GIB // 4)
    monkeypatch.setattr(tables, "frame", frame)
    for published, expected in ((False, ["MB", 512.0, 256.0]), (True, ["GB", 0.5, 0.25])):
        points, _ = drawing.measured("size_tradeoff", recipe | {"title": "T", "published": published}, small, PAPERS)
        mine = points[(points["panel"] == "memory") & (points["certainty"] == "measured")]
        assert [*mine["unit"].unique(), *mine["value"]] == expected


def test_glue_chart_has_published_values_in_their_panels_without_a_line(monkeypatch):
    figure = glue_bits.draw(points_of("glue_bits", monkeypatch), "Title")
    cola = figure.axes[0]
    assert sorted(y for _, y in marks(cola)) == [50.5, 57.5, 58.0, *[59.8] * 4]
    for x, y in marks(cola):
        place = {59.8: {0, 1}, 58.0: {1}}.get(y, {2})
        assert math.floor(x) in place, "to the right of its own bits"
        assert x > math.floor(x)
    drawn = [line for line in cola.get_lines() if line.get_marker() == "s"]
    assert [float(y) for line in drawn for y in line.get_ydata()] == [50.0], "the teacher's own score"
    stsb = figure.axes[list(glue_bits.PANELS).index("STS-B")]
    assert {y for _, y in marks(stsb)} == {89.6, 88.8, 89.0}
    assert "Published, not measured here: XTC (Wu et al. 2022" in text_of(figure)
    some = points_of("glue_bits", monkeypatch)
    some = some[(some["panel"] == "CoLA") | (some["certainty"] != "measured")]
    figure = glue_bits.draw(some, "Title")
    assert {y for _, y in marks(figure.axes[1])} == {84.8, 84.5, 83.9, 84.7, 84.2}
    assert "No result: teacher" in text_of(figure), "a panel that is published and not measured"


def test_quantization_chart_has_both_in_a_row_and_far_values_at_the_edge(monkeypatch):
    points = points_of("quantization_tradeoff", monkeypatch)
    figure = quantization_tradeoff.draw(points, "Title")
    accuracy, time = figure.axes[:2]
    assert sorted(x for x, _ in marks(accuracy)) == pytest.approx(
        sorted(100 * n / 1962 for n in (870, 919, 849, 928, 875, 860, 881, 918, 921, 922, 858))
    )
    assert [label.get_text() for label in accuracy.get_yticklabels()] == list(quantization_tradeoff.ROWS)
    near, far = marks(time), marks(time, ">")
    # 0.2 s is measured: what is beyond 2.5 times as much stands at the edge, with its number.
    assert len(near) == 6
    assert max(x for x, _ in near) == pytest.approx(0.2458888299842237)
    assert {x for x, _ in far} == {time.get_xlim()[1]}
    written = [text.get_text() for text in time.texts]
    assert written == ["0.200", "0.503", "0.709", "0.711", "0.712", "2.73"]
    (bar,) = time.patches
    assert bar.get_y() + bar.get_height() < min(y for _, y in near), "the bar ends above the row's published value"
    text = text_of(figure)
    assert "Published, not measured here: raw JSON of a small-LLM quantization comparison; exact." in text
    assert "Simulated arithmetic in the published table: SmoothQuant W8A8 calib20, " in text


def test_engine_chart_has_published_values_where_they_belong(monkeypatch):
    figure = engine_speedup.draw(points_of("engine_speedup", monkeypatch), "Title")
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(panels) == list(dict.fromkeys(engine_speedup.published(PAPERS)["panel"])), "one is measured, too"
    here = panels[TITLE]
    assert [y for _, y in marks(here, "o")] == [2.5, 2.5]
    assert [bar.get_height() for bar in here.patches] == [1.0, 3.0]
    assert max(x for x, _ in marks(here, "o")) < min(bar.get_x() for bar in here.patches), "batch size: not stated"
    assert "not stated" in [text.get_text() for text in here.texts]
    rights = [axes for axes in figure.axes if axes.get_ylabel() == "Throughput (tokens/s)"]
    assert sorted(y for axes in rights for _, y in marks(axes)) == [400.0] * 4 + [500.0] * 2
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[-2:] == ["published speedup", "published token/s"]


def test_unreliable_values_are_not_drawn_over_measured_ones(monkeypatch):
    points = points_of("latency_throughput", monkeypatch)
    assert [value for value in points["batch_size"] if value == value] == [1, 8]
    assert all(isinstance(value, int) for value in points["batch_size"][:2]), "8 in the CSV, not 8.0"
    figure = latency_throughput.draw(points, "Title")
    assert len(figure.subfigs) == 1, "no row for a model whose published values are unreliable"
    assert not [place for part in figure.subfigs for axes in part.axes for place in marks(axes)]
    assert "Not drawn: 32 published values of Shortened LLaMA" in text_of(figure)
    points["certainty"] = points["certainty"].where(points["certainty"] == "measured", "exact")
    figure = latency_throughput.draw(points, "Title")
    assert {y for _, y in marks(figure.subfigs[0].axes[0])} == {32, 64, 128, 256, 1024, 2048, 4096}
    assert len(figure.subfigs) == 2


@pytest.mark.parametrize("chart", CASES)
def test_points_of_one_kind_are_drawn_as_if_there_were_no_other(chart, monkeypatch):
    alone, printed = points_of(chart, monkeypatch, published=False), CHARTS[chart].published(PAPERS)
    for points in (alone, printed, alone.iloc[:0]):
        measured, others, said = apart(points)
        assert measured is points
        assert (len(others), said) == (0, [])
    assert "ublished" not in text_of(CHARTS[chart].draw(alone, "Title")).replace("No published values", "")


def test_joined_points_keep_every_number():
    mine = pd.DataFrame({"a": [1, 2], "b": [0.5, None], "c": ["x", None]})
    theirs = pd.DataFrame({"a": [None, 3.5], "b": [7, 8], "c": [None, None]})
    assert joined(mine, theirs).to_csv(index=False) == "a,b,c\n1,0.5,x\n2,,\n,7,\n3.5,8,\n"


def test_published_values_are_refused_beside_a_model_that_the_study_makes(demo_config):
    demo_config["figures"]["glue_bits"]["published"] = True
    with pytest.raises(UserError) as refused:
        Study(demo_config)
    assert str(refused.value) == (
        "config.yaml: figures.glue_bits.published: published values are of real weights, and 'tiny-bert' is made by"
        " Espalier: leave this key out, or say false."
    )
    demo_config["figures"]["glue_bits"]["published"] = False
    Study(demo_config)


def test_an_edited_published_value_redraws_the_charts_that_show_it_and_no_other(tmp_path, monkeypatch):
    """Of two finished charts one shows published values: after edits of both charts' values that one is redrawn."""
    speed = {"profile": "generation", "engine": "hf", "input_tokens": [1], "output_tokens": [2], "batch_sizes": [1]}
    row = {"title": "d", "model": "d", "series": {"Original": "dense"}}
    glue = {"title": "G", "model": "m", "suite": {"rte": "glue-rte"}, "teacher": {"rte": "dense"}}
    config = {
        "study": "p",
        "datasets": {"world": {"generate": "demo"}},
        "models": {"m": {"path": "m", "task": "sequence-classification"}, "d": {"path": "d"}},
        "suites": {"glue-rte": {"evaluate": "glue", "task": "rte", "dataset": "world"}},
        "workloads": {"speed": speed},
        "figures": {
            "glue_bits": glue | {"published": True},
            "latency_throughput": {"title": "L", "workload": "speed", "rows": [row]},
        },
    }
    project = copy_project(tmp_path)
    (project / "study.yaml").write_text(yaml.safe_dump(config))
    for model in config["models"]:
        (project / model).mkdir()
        (project / model / "config.json").write_text("{}")
    monkeypatch.chdir(project)
    study = Study(config)
    made = [path for figure in config["figures"] for path in study.figure_results(figure)]
    made += [f"{study.figures}/{figure}{suffix}" for figure in config["figures"] for suffix in drawing.SUFFIXES]
    now = time.time()
    for age, name in zip(range(len(made), 0, -1), made, strict=True):
        file = project / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
        os.utime(file, (now - 10 * age, now - 10 * age))
    for name, old in (("glue_bits", "50.5"), ("latency_throughput", "4096")):
        file = project / "reference" / "papers" / f"{name}.csv"
        text = file.read_text(encoding="utf-8")
        assert old in text
        file.write_text(text.replace(old, "1"), encoding="utf-8")
    assert jobs(project, "figures", "--configfile", "study.yaml") == {"figures/p/glue_bits.pdf"}
