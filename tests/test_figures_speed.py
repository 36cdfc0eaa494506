"""The numbers behind the charts of speed equal plain computations, gaps stay gaps, and what is absent is named."""

from __future__ import annotations

import math
import statistics

import pytest

from chart_rows import frame, row, text_of
from espalier.errors import UserError
from espalier.figures import engine_speedup, latency_throughput
from espalier.recipes import build

# --- latency_throughput


def timing(chain, batch, latency, seed=1, outcome="ok"):
    about = {"kind": "profile", "suite": "speed", "chain": chain, "seed": seed, "batch_size": batch}
    about |= {"input_tokens": 12, "output_tokens": 128, "engine": "hf", "parameters": 4.9e9, "outcome": outcome}
    rate = None if latency is None else batch * 128 / latency
    return [
        row(**about, metric="latency", value=latency, stderr=None if latency is None else 0.1, unit="s"),
        row(**about, metric="throughput", value=rate, unit="tokens/s"),
    ]


def latency_recipe(series):
    rows = [{"title": "LLaMA-7B", "model": "m", "series": series}]
    return build(latency_throughput.Recipe, {"title": "L", "workload": "speed", "rows": rows}, "figures.latency")


def test_latency_points_average_seeds_and_keep_oom_rows():
    rows = timing("ours", 1, 2.0) + timing("ours", 1, 4.0, seed=2) + timing("ours", 8, None, outcome="oom")
    points = latency_throughput.measured(latency_recipe({"Ours": "ours"}), frame(rows))
    assert list(points["batch_size"]) == [1, 8]
    first = points.iloc[0]
    assert first["latency"] == pytest.approx(3.0)
    assert first["latency_error"] == pytest.approx(math.sqrt(0.1**2 + statistics.stdev((2, 4)) ** 2 / 2))
    assert first["throughput"] == pytest.approx(statistics.mean((64, 32)))
    assert points.iloc[1]["outcome"] == "oom"
    assert math.isnan(points.iloc[1]["latency"])
    text = text_of(latency_throughput.draw(points, "Title"))
    assert "No results in this study: Original, LLM-Pruner, FLAP." in text
    assert "OOM: Ours M8" in text
    assert "Ours 4.9B" in text
    assert "12 Input Tokens, 128 Output Tokens" in text


def test_latency_refuses_two_results_for_one_point_and_unknown_series():
    rows = timing("ours", 1, 2.0) + timing("ours", 1, 3.0)
    with pytest.raises(UserError, match="two values of 'latency'"):
        latency_throughput.measured(latency_recipe({"Ours": "ours"}), frame(rows))
    with pytest.raises(UserError, match="Did you mean 'LLM-Pruner'"):
        latency_throughput.needs(latency_recipe({"LLMPruner": "x"}))


def test_a_row_may_show_another_workload_than_the_chart():
    recipe = {"title": "t", "workload": "a"}
    rows = [{"title": name, "model": "m", "series": {"Original": "dense"}} for name in ("one", "two")]
    built = build(latency_throughput.Recipe, {**recipe, "rows": [rows[0], rows[1] | {"workload": "b"}]}, "t")
    assert [need.name for need in latency_throughput.needs(built)] == ["a", "b"]
    found = [one | {"suite": name} for name, seconds in (("a", 1), ("b", 5)) for one in timing("dense", 1, seconds)]
    assert list(latency_throughput.measured(built, frame(found))["latency"]) == [1.0, 5.0]


def test_latency_lines_of_several_sizes():
    rows = timing("small", 1, 1.0) + timing("large", 1, 2.0)
    for one in rows:
        one["parameters"] = {"small": 2.0e9, "large": 5.0e9}[one["chain"]]
    points = latency_throughput.measured(latency_recipe({"Ours": ["small", "large"]}), frame(rows))
    assert dict(zip(points["chain"], points["latency"], strict=True)) == {"small": 1.0, "large": 2.0}
    drawn = latency_throughput.draw(points, "Title")
    lines = {
        line.get_xdata()[0]: line.get_alpha() for line in drawn.subfigs[0].axes[0].get_lines() if len(line.get_xdata())
    }
    assert lines[2.0] == 1.0, "the largest is the darkest"
    assert lines[1.0] < 0.8
    text = text_of(drawn)
    assert "Ours 5.0B" in text
    assert "Ours 2.0B" in text
    assert {need.chain for need in latency_throughput.needs(latency_recipe({"Ours": ["a", "b"], "FLAP": "c"}))} == set(
        "abc"
    )


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        ({"ours": "oom", "flap": "oom"}, "All points: out of memory"),
        ({"ours": "oom", "flap": "failed: its worker died."}, "Several reasons: its worker died; out of memory"),
        ({"ours": "oom", "flap": "missing"}, "Several reasons: no results; out of memory"),
        ({"ours": "unavailable: no GPU", "flap": "failed: no GPU"}, "No GPU"),
        ({"ours": "missing"}, "No results"),
    ],
)
def test_an_empty_panel_says_why(outcomes, said):
    rows = [one for chain, outcome in outcomes.items() for one in timing(chain, 1, None, outcome=outcome)]
    series = {"Ours": "ours", "FLAP": "flap"}
    recipe = latency_recipe({name: chain for name, chain in series.items() if chain in outcomes})
    drawn = latency_throughput.draw(latency_throughput.measured(recipe, frame(rows)), "Title")
    assert drawn.subfigs[0].axes[0].texts[0].get_text().replace("\n", " ") == said


def test_a_failure_breaks_a_line():
    dead = "failed: its worker ended with signal 11"
    rows = timing("ours", 1, 2.0) + timing("ours", 8, None, outcome=dead) + timing("flap", 1, None, outcome=dead)
    points = latency_throughput.measured(latency_recipe({"Ours": "ours", "FLAP": "flap"}), frame(rows))
    figure = latency_throughput.draw(points, "Title")
    text = text_of(figure)
    assert "Ours failed in part: its worker ended with signal 11." in text
    assert "FLAP failed: its worker ended with signal 11." in text
    assert [one.get_text() for one in figure.subfigs[0].legends[0].get_texts()] == ["Ours 4.9B"]


# --- engine_speedup


def decoding(workload, batch, context, rate, seed=1, outcome="ok"):
    place = {"kind": "profile", "suite": workload, "chain": "dense", "metric": "decode_throughput", "seed": seed}
    condition = {"batch_size": batch, "input_tokens": context, "engine": workload, "outcome": outcome}
    return row(**place, **condition, value=rate, stderr=None if rate is None else 0.1 * rate)


def engine_recipe(series):
    panels = [{"title": "(a) m", "model": "m", "chain": "dense", "series": series}]
    return build(engine_speedup.Recipe, {"title": "E", "panels": panels}, "figures.engines")


def test_speedup_is_the_ratio_to_hf_at_the_same_condition():
    rows = [
        decoding("hf", 1, 128, 10.0),
        decoding("hf", 2, 128, 20.0),
        decoding("hf", 2, 1024, None, outcome="oom"),
        decoding("ours", 1, 128, 25.0),
        decoding("ours", 2, 128, None, outcome="oom"),
        decoding("ours", 2, 1024, 30.0),
        decoding("trt", None, None, None, outcome="unavailable: needs an NVIDIA GPU"),
    ]
    recipe = engine_recipe({"HF": "hf", "Ours": "ours", "TensorRT-LLM": "trt"})
    points = engine_speedup.measured(recipe, frame(rows))
    found = points.dropna(subset=["batch_size"]).set_index(["series", "batch_size", "input_tokens"])
    assert found.loc[("Ours", 1, 128), "speedup"] == pytest.approx(2.5)
    assert found.loc[("Ours", 1, 128), "speedup_error"] == pytest.approx(2.5 * math.hypot(0.1, 0.1))
    assert found.loc[("HF", 2, 128), "speedup"] == 1.0
    assert found.loc[("Ours", 2, 128), "outcome"] == "oom"
    without = found.loc[("Ours", 2, 1024)]
    assert math.isnan(without["speedup"])
    assert without["throughput"] == 30.0
    assert without["outcome"] != "ok"
    text = text_of(engine_speedup.draw(points, "Title"))
    assert "No results in this study: vLLM, FlashDecoding, DeepSpeed, OpenPPL." in text
    assert "TensorRT-LLM is unavailable: needs an NVIDIA GPU." in text
    assert "batch size 2" in text
    assert "1k" in text
    with pytest.raises(UserError, match="Did you mean 'vLLM'"):
        engine_speedup.needs(engine_recipe({"VLLM": "x"}))


def test_the_compiled_baseline_is_drawn_where_it_is_and_not_missed_where_it_is_not():
    rows = [decoding("hf", 1, 128, 10.0), decoding("compiled", 1, 128, 15.0)]
    points = engine_speedup.measured(engine_recipe({"HF": "hf", "HF compiled": "compiled"}), frame(rows))
    assert dict(zip(points["series"], points["speedup"], strict=True)) == {"HF": 1.0, "HF compiled": 1.5}
    figure = engine_speedup.draw(points, "Title")
    assert "HF compiled" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert "HF compiled" not in text_of(engine_speedup.draw(points[points["series"] == "HF"], "Title"))


def test_what_failed_or_cannot_run_is_a_gap_with_its_reason_in_the_footer():
    """An engine without any number takes no place; one with some is said to lack the others."""
    dead, hung = "failed: its worker ended with signal 11", "failed: there was no answer within 9 s"
    long = "unavailable: 9000 tokens are more than the model's 4096 positions"
    rows = [decoding("hf", batch, 128, 10.0 * batch) for batch in (1, 2)]
    rows += [decoding("hf", 1, 8192, None, outcome=long)]
    rows += [decoding("ours", 1, 128, 20.0), decoding("ours", 2, 128, None, outcome=dead)]
    rows += [decoding("ours", 1, 8192, None, outcome="unavailable: something else.")]
    rows += [decoding(name, batch, 128, None, outcome=hung) for name in ("vllm", "trt") for batch in (1, 2)]
    series = {"HF": "hf", "Ours": "ours", "vLLM": "vllm", "TensorRT-LLM": "trt"}
    points = engine_speedup.measured(engine_recipe(series), frame(rows))
    gaps = points[points["speedup"].isna()]
    assert set(gaps["outcome"]) == {dead, long, hung, "unavailable: something else."}
    figure = engine_speedup.draw(points, "Title")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["HF", "Ours", "Ours (token/s)"]
    text = text_of(figure)
    assert "HF is unavailable in part: 9000 tokens are more than the model's 4096 positions." in text
    assert "Ours failed in part: its worker ended with signal 11." in text
    assert "Ours is unavailable in part: something else." in text
    assert "vLLM, TensorRT-LLM failed: there was no answer within 9 s." in text
    assert "OOM" not in text
    assert "No results in this study: FlashDecoding, DeepSpeed, OpenPPL." in text


def test_the_device_is_named_where_there_are_diamonds_and_no_bars():
    rows = [decoding("hf", 1, 128, None, outcome="failed: dead"), decoding("ours", 1, 128, 20.0)]
    points = engine_speedup.measured(engine_recipe({"HF": "hf", "Ours": "ours"}), frame(rows))
    assert "Device: CPU." in text_of(engine_speedup.draw(points, "Title"))
    failed = points[points["series"] == "HF"]
    assert "Device" not in text_of(engine_speedup.draw(failed, "Title")), "nothing was measured on it"


@pytest.mark.parametrize(("batches", "written"), [((1, 2), True), (tuple(range(1, 13)), False)])
def test_numbers_above_the_baseline_only_where_they_cover_no_other_bar(batches, written):
    rows = [decoding(name, batch, 8, 77.0) for batch in batches for name in ("hf", "ours")]
    points = engine_speedup.measured(engine_recipe({"HF": "hf", "Ours": "ours"}), frame(rows))
    text = text_of(engine_speedup.draw(points, "Title"))
    assert ("77" in text) == ("Above the bars of HF: its tokens/s." in text) == written
