"""Published values beside ours: differences and verdicts worked out by hand, and every mistake of the section named."""

from __future__ import annotations

import csv
import json
import runpy

import pytest

from conftest import ROOT
from espalier import comparisons, published_rows
from espalier.errors import UserError
from espalier.files import write_json
from espalier.recipes import as_dict, build
from espalier.results import path_of
from test_bad_input import result

PAPERS = ROOT / "reference" / "papers"
A100 = {"kind": "cuda", "name": "NVIDIA A100-SXM4-80GB"}
H200 = {"kind": "cuda", "name": "NVIDIA H200"}
MiB, GB = 2**20, 2**30


def raw(name, measurements, kind="evaluate", model="m", chain="dense", seed=0, device=A100, samples=None, **checkpoint):
    """A raw result; measurements are (task, metric, value, stderr, unit, other keys)."""
    keys = ("task", "metric", "value", "stderr", "unit")
    rows = [dict(zip(keys, one, strict=False)) | (one[5] if len(one) > 5 else {}) for one in measurements]
    rows = [one if one["value"] is not None else {"outcome": "oom"} | one for one in rows]
    return result(
        kind=kind,
        identity={"study": "s", "model": model, "seed": seed, "chain": chain, "name": name},
        measurements=rows,
        samples=samples or {},
        checkpoint=result()["checkpoint"] | checkpoint,
        provenance=result()["provenance"] | {"device": device},
    )


def table(entries, results, figures=None, made=None, folder=PAPERS):
    """Return the table's lines of entries as a study's YAML has them; `made` may be those of evaluations alone."""
    made = made if made and "evaluate" in made else {"evaluate": made or {}, "profile": made or {}}
    checked = [as_dict(build(comparisons.Comparison, entry, "compare")) for entry in entries]
    content = json.loads(json.dumps({"compare": checked, "figures": figures or {}, "made": made}))
    return published_rows.lines(content, results, folder)


def verdict(line):
    return line["measured"], line["difference"], line["inside"], line["why"]


# Files of published values --------------------------------------------------------------------------------------------

PERPLEXITY = {"suite": "wiki", "metric": "perplexity", "tolerance": "1%"}
DENSE = {"model": "LLaMA-7B", "criterion": "original"}


def quality(column, name="wikitext2_ppl", row=DENSE, **keys):
    entry = {"values": "shortened_llama_quality", "columns": {name: column}, "rows": {"m": {"dense": row}}}
    return [entry | keys]


def perplexities(*values, device=A100):
    return [
        raw("wiki", [("w", "perplexity", value, 0.3, "ppl")], seed=seed, device=device)
        for seed, value in enumerate(values)
    ]


# The published value is 12.62, so that 1% of it is 0.1262.
VERDICTS = {
    "inside": (quality(PERPLEXITY), perplexities(12.70), (12.70, 0.08, "yes", None)),
    "at the bound": (quality(PERPLEXITY), perplexities(12.4938), (12.4938, -0.1262, "yes", None)),
    "at an absolute bound": (
        quality(PERPLEXITY | {"tolerance": 0.08}),  # in floating point the difference is a little more
        perplexities(12.70),
        (12.70, 0.08, "yes", None),
    ),
    "below": (quality(PERPLEXITY), perplexities(12.49), (12.49, -0.13, "no", None)),
    "above": (quality(PERPLEXITY), perplexities(12.75), (12.75, 0.13, "no", None)),
    "the mean of seeds": (quality(PERPLEXITY), perplexities(12.4, 13.0), (12.7, 0.08, "yes", None)),
    "an absolute tolerance": (
        quality(PERPLEXITY | {"tolerance": 0.05}),
        perplexities(12.70),
        (12.70, 0.08, "no", None),
    ),
    "no value": (quality(PERPLEXITY), perplexities(None), (None, None, None, "oom")),
    "no result": (quality(PERPLEXITY), [], (None, None, None, "not measured")),
    "on the GPU that is asked for": (
        quality(PERPLEXITY, device="A100|3090"),
        perplexities(12.70),
        (12.70, 0.08, "yes", None),
    ),
    "on another GPU": (
        quality(PERPLEXITY, device="A100|3090"),
        perplexities(12.70, device=H200),
        (12.70, 0.08, None, "other device: a verdict is for A100|3090"),
    ),
    "with a reason": (
        quality({"suite": "wiki", "metric": "perplexity"}, why="the source is vague"),
        perplexities(12.70),
        (12.70, 0.08, None, "the source is vague"),
    ),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_a_value_of_a_file_is_judged_by_its_tolerance(name):
    entries, results, expected = VERDICTS[name]
    (line,) = table(entries, results)
    assert verdict(line) == (pytest.approx(expected[0]), pytest.approx(expected[1]), *expected[2:])
    assert (line["file"], line["quantity"], line["condition"], line["published"], line["certainty"]) == (
        *("shortened_llama_quality.csv", "wikitext2_ppl", "LLaMA-7B / original"),
        *(12.62, "exact"),
    )


def test_a_wrong_published_value_is_found(tmp_path):
    text = (PAPERS / "shortened_llama_quality.csv").read_text()
    for published, inside in (("12.62", "yes"), ("21.62", "no")):
        (tmp_path / "shortened_llama_quality.csv").write_text(text.replace("12.62", published))
        (line,) = table(quality(PERPLEXITY), perplexities(12.70), folder=tmp_path)
        assert (line["published"], line["inside"]) == (float(published), inside)


def test_an_unreliable_published_value_has_no_verdict(tmp_path):
    text = (PAPERS / "shortened_llama_quality.csv").read_text()
    (tmp_path / "shortened_llama_quality.csv").write_text(text.replace("exact", "unreliable: it is doubted"))
    (line,) = table(quality(PERPLEXITY), perplexities(12.70), folder=tmp_path)
    assert verdict(line) == (12.70, pytest.approx(0.08), None, "unreliable: it is doubted")


def test_a_model_that_the_study_makes_reproduces_nothing():
    size = {"figure": "size_tradeoff", "tolerance": 1.0}
    lines = table(
        [*quality(PERPLEXITY), size],
        perplexities(12.62) + sized("dense", 6738416000, 12.4 * GB, 0.661),
        {"size_tradeoff": SIZES},
        made={"m": "pretrain: random-weights"},
    )
    assert len(lines) == 1 + 16
    assert {line["why"] for line in lines} == {"m is made by Espalier (pretrain: random-weights)"}
    assert {line["model"] for line in lines} == {"m"}
    empty = ("measured", "stderr", "difference", "tolerance", "inside", "device")
    assert {line[key] for line in lines for key in empty} == {None}


def test_time_and_memory_of_random_weights_count_where_accuracy_does_not():
    """A model of random weights in a published one's whole shape decodes as fast, and holds as much."""
    made = {"evaluate": {"m": "pretrain: random-weights"}, "profile": {}}
    weights = {
        "values": "shortened_llama_weights",
        "columns": {
            "weights_MiB": {"workload": "memory", "metric": "weights_allocated", "unit": "MiB", "tolerance": 1}
        },
        "rows": {"m": {"dense": {"parameters": 6738416000}}},
    }
    bytes_held = raw("memory", [(None, "weights_allocated", 12894.6 * 2**20, None, "bytes")], "profile")
    held, scored = table([weights, *quality(PERPLEXITY)], [bytes_held, *perplexities(12.62)], made=made)
    assert held["measured"] == pytest.approx(12894.6)
    assert (scored["measured"], scored["why"]) == (None, "m is made by Espalier (pretrain: random-weights)")


def test_the_error_is_over_questions_and_seeds():
    (line,) = table(quality(PERPLEXITY), perplexities(12.4, 13.0))
    # Both seeds have 0.3; their spread is 0.6 / sqrt(2), and its part sqrt(0.18 / 2) = 0.3.
    assert line["stderr"] == pytest.approx((0.3**2 + 0.3**2) ** 0.5)
    assert (line["unit"], line["tolerance"], line["device"]) == ("ppl", "1%", A100["name"])


@pytest.mark.parametrize(("second", "inside"), [(0.64, "no"), (0.62, "yes")])
def test_a_mean_of_tasks_in_percent(second, inside):
    column = {"suite": "zero", "tasks": {"a": "acc", "b": "acc_norm"}, "unit": "%", "tolerance": 1.0}
    entries = quality(column, "mean_accuracy", {"model": "LLaMA-7B", "criterion": "PPL"})
    rows = [("a", "acc", 0.63, 0.03, "fraction"), ("b", "acc_norm", second, 0.04, "fraction")]
    (line,) = table(entries, [raw("zero", [*rows, ("b", "acc", 0.1, 0.1, "fraction")])])
    mean = 50 * (0.63 + second)
    assert verdict(line) == (pytest.approx(mean), pytest.approx(mean - 61.83), inside, None)
    assert line["stderr"] == pytest.approx(100 * 0.05 / 2)
    assert line["unit"] == "%"


def test_bytes_in_the_published_unit():
    column = {"workload": "memory", "metric": "weights_allocated", "unit": "MiB", "tolerance": "1%"}
    rows = {"m": {"dense": {"parameters": 6738416000}, "dense+x": {"parameters": 5524118000}}}
    results = [
        raw("memory", [("g", "weights_allocated", size * MiB, None, "bytes")], kind="profile", chain=chain)
        for chain, size in (("dense", 12852.5), ("dense+x", 10900))
    ]
    lines = table([{"values": "shortened_llama_weights", "columns": {"weights_MiB": column}, "rows": rows}], results)
    assert [verdict(line) for line in lines] == [
        (12852.5, pytest.approx(-42.1), "yes", None),
        (10900, pytest.approx(329.4), "no", None),
    ]
    assert [line["condition"] for line in lines] == ["parameters 6738416000", "parameters 5524118000"]
    wrong = {"values": "shortened_llama_weights", "columns": {"weights_MiB": column | {"unit": "%"}}, "rows": rows}
    with pytest.raises(UserError, match=r"weights_MiB: what is measured in bytes cannot be compared .* in %"):
        table([wrong], results)


# What our step removed → places that differ from 24 26 25 10 27 13 22 14 9 29 12.
ORDERS = {
    "the first nine": ([24, 26, 25, 10, 27, 13, 22, 14, 9], 0, None),
    "more than were published": ([24, 26, 25, 10, 27, 13, 22, 14, 9, 29, 12, 0, 1], 0, "yes"),
    "all": ([24, 26, 25, 10, 27, 13, 22, 14, 9, 29, 12], 0, "yes"),
    "two exchanged": ([24, 25, 26, 10, 27, 13, 22, 14, 9, 29, 12], 2, "no"),
    "another block": ([24, 26, 25, 11, 27, 13, 22, 14, 9, 29, 12], 1, "no"),
}


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_of_removal(name):
    removed, differ, inside = ORDERS[name]
    rows = {"m": {"dense+ppl": {"model": "LLaMA-7B", "criterion": "PPL"}}}
    columns = {"first_blocks_removed": {"order": True}}
    entry = {"values": "shortened_llama_block_orders", "columns": columns, "rows": rows}
    step = raw("ppl", [], kind="step", chain="dense+ppl", samples={"removed": removed})
    same = raw("ppl", [], kind="step", chain="dense+ppl", seed=1, samples={"removed": ORDERS["all"][0]})
    other = raw("ppl", [], kind="step", chain="dense+ppl", model="other", samples={"removed": [1]})
    (line,) = table([entry], [same, step, other])
    assert (line["difference"], line["inside"], line["published"]) == (
        differ,
        inside,
        "24 26 25 10 27 13 22 14 9 29 12",
    )
    assert differ == 0 or line["measured"] == " ".join(map(str, removed))
    near = entry | {"columns": {"first_blocks_removed": {"order": True, "tolerance": 1}}}
    assert table([near], [step])[0]["inside"] == (inside and ("yes" if differ < 2 else "no"))


# Charts ---------------------------------------------------------------------------------------------------------------

SIZES = {
    "model": "m",
    "suite": "zero",
    "workload": "memory",
    "memory": {"batch_size": 1, "input_tokens": 8, "output_tokens": 16},
    "tasks": {"a": "acc"},
    "series": {"Original": ["dense"], "Ours": ["dense+x"]},
}


def sized(chain, parameters, peak, accuracy):
    at = ("g", "peak_allocated", peak, None, "bytes", SIZES["memory"])
    return [
        raw("zero", [("a", "acc", accuracy, 0.01, "fraction")], chain=chain, parameters=parameters),
        raw("memory", [at], kind="profile", chain=chain, parameters=parameters),
    ]


def by_place(lines):
    return {(line["quantity"], line["condition"]): line for line in lines}


def test_points_of_a_chart_are_compared_by_its_keys():
    results = sized("dense", 6738416000, 12.0 * GB, 0.67) + sized("dense+x", 5524118000, 12.0 * GB, 0.58)
    entry = {"figure": "size_tradeoff", "tolerance": {"memory": "10%", "accuracy": 1.5}}
    lines = by_place(table([entry], results, {"size_tradeoff": SIZES}))
    assert len(lines) == 16
    assert verdict(lines["memory", "Original / 6.7B"]) == (12.0, pytest.approx(-0.4), "yes", None)
    assert verdict(lines["memory", "Ours / 5.5B"]) == (12.0, pytest.approx(1.5), "no", None)
    accuracy = lines["accuracy", "Ours / 5.5B"]
    assert verdict(accuracy) == (pytest.approx(58.0), pytest.approx(-3.3), "no", None)
    assert (accuracy["stderr"], accuracy["unit"], accuracy["chain"]) == (pytest.approx(1.0), "%", "dense+x")
    assert verdict(lines["accuracy", "Original / 6.7B"])[2] == "yes"
    assert verdict(lines["memory", "Ours / 2.7B"]) == (None, None, None, "not measured")
    assert (lines["memory", "Ours / 2.7B"]["model"], lines["memory", "Ours / 2.7B"]["tolerance"]) == ("m", "10%")
    typing = entry | {"tolerance": {"memroy": 1.0}}
    with pytest.raises(UserError, match=r"size_tradeoff has no 'memroy'\. Did you mean 'memory'"):
        table([typing], results, {"size_tradeoff": SIZES})
    partly = entry | {"tolerance": {"memory": "10%"}}
    lines = by_place(table([partly], results, {"size_tradeoff": SIZES}))
    assert lines["accuracy", "Original / 6.7B"]["why"] == "no tolerance is stated for it"


def test_a_chart_in_other_units_is_compared_in_the_published_ones():
    results = sized("dense", 6738416000, 512 * MiB, 0.67)
    entry = {"figure": "size_tradeoff", "tolerance": 1.0}
    lines = by_place(table([entry], results, {"size_tradeoff": SIZES | {"series": {"Original": ["dense"]}}}))
    memory = lines["memory", "Original / 6.7B"]
    assert (memory["measured"], memory["unit"], memory["difference"]) == (0.5, "GB", pytest.approx(-11.9))


def test_an_unreliable_point_of_a_chart_has_no_verdict():
    results = sized("dense+q", 5524118000, 4.0 * GB, 0.613)
    recipe = SIZES | {"series": {"Ours + GPTQ": ["dense+q"]}}
    lines = by_place(table([{"figure": "size_tradeoff", "tolerance": 1.0}], results, {"size_tradeoff": recipe}))
    doubted = lines["accuracy", "Ours + GPTQ / 5.5B"]
    assert verdict(doubted) == (pytest.approx(61.3), pytest.approx(0), None, "unreliable: contradicts itself")
    assert lines["memory", "Ours + GPTQ / 5.5B"]["inside"] == "yes"


def decoding(workload, speeds, device=A100):
    """`speeds` is (batch size, context) → tokens/s; each has a standard error of 3%."""
    rows = [
        ("g", "decode_throughput", speed, speed and 0.03 * speed, "tokens/s", dict(zip(PLACE, at, strict=True)))
        for at, speed in speeds.items()
    ]
    return raw(workload, rows, kind="profile", device=device)


PLACE = ("batch_size", "input_tokens")
PANEL = "(a) Llama2-7B@A100"
ENGINES = {
    "panels": [
        {
            "title": PANEL,
            "model": "m",
            "chain": "dense",
            "series": {"HF": "hf", "vLLM": "vllm", "FlashDecoding": "fd", "DeepSpeed": "ds", "Ours": "own"},
        }
    ]
}
SPEEDS = [
    ("hf", {(1, 8): 10.0, (1, 16): 10.0, (2, 8): 20.0}),
    ("vllm", {(1, 8): 20.0, (1, 16): 25.0, (2, 8): None}),
    ("ds", {(4, 8): 1.0}),
    ("own", {(1, 8): 24.0, (1, 16): 35.0, (2, 8): 60.0}),
]


def test_averages_over_all_conditions_that_both_engines_have():
    entry = {"figure": "engine_speedup", "tolerance": "20%"}
    lines = by_place(table([entry], [decoding(*one) for one in SPEEDS], {"engine_speedup": ENGINES}))
    average = lines["speedup", "vLLM / average / all"]
    # Ours / vLLM is 24 / 20 and 35 / 25: 1.3 on average, and 1.24 ± 20% is published.
    both = "other devices: this is of A100 and RTX 3090"
    assert verdict(average) == (pytest.approx(1.3), pytest.approx(0.06), None, both)
    assert average["stderr"] == pytest.approx(0.03 * 2**0.5 * (1.2**2 + 1.4**2) ** 0.5 / 2)
    assert (average["file"], average["certainty"]) == ("engine_speedup_headlines.csv", "exact")
    largest = lines["speedup", "HF / maximum / A100 and RTX 3090"]
    assert verdict(largest) == (pytest.approx(3.5), pytest.approx(3.5 - 4.86), None, both)
    assert largest["stderr"] == pytest.approx(0.03 * 2**0.5 * 3.5)
    assert lines["speedup", "DeepSpeed / average / all"]["why"] == "missing: no condition has both Ours and DeepSpeed"
    assert lines["speedup", "FlashDecoding / average / A100"]["measured"] is None


@pytest.mark.parametrize(
    ("flash", "device", "expected"),
    [
        ({(1, 8): 20.0, (1, 16): 25.0, (2, 8): 40.0}, A100, (pytest.approx(4.1 / 3), "yes", None)),
        ({(1, 8): 10.0, (1, 16): 10.0, (2, 8): 20.0}, A100, (pytest.approx(8.9 / 3), "no", None)),
        ({(1, 8): 20.0, (1, 16): 25.0}, A100, (pytest.approx(1.3), None, "of 2 of this chart's 3 conditions")),
        (
            {(1, 8): 20.0, (1, 16): 25.0, (2, 8): 40.0},
            H200,
            (pytest.approx(4.1 / 3), None, "other devices: this is of A100"),
        ),
    ],
)
def test_an_average_counts_on_its_device_over_all_conditions(flash, device, expected):
    """Ours / FlashDecoding is 24 / 20, 35 / 25 and 60 / 40; 1.37 ± 20% is published for the A100."""
    entry = {"figure": "engine_speedup", "tolerance": "20%"}
    speeds = [*(one for one in SPEEDS if one[0] != "ds"), ("fd", flash)]
    lines = by_place(table([entry], [decoding(*one, device=device) for one in speeds], {"engine_speedup": ENGINES}))
    line = lines["speedup", "FlashDecoding / average / A100"]
    assert (line["measured"], line["inside"], line["why"]) == expected


def test_a_verdict_for_a_device_that_is_asked_for():
    asked = {"figure": "engine_speedup", "tolerance": "20%", "device": "H100"}
    speeds = [*(one for one in SPEEDS if one[0] != "ds"), ("fd", {(1, 8): 20.0, (1, 16): 25.0, (2, 8): 40.0})]
    lines = by_place(table([asked], [decoding(*one) for one in speeds], {"engine_speedup": ENGINES}))
    assert lines["speedup", "FlashDecoding / average / A100"]["why"] == "other device: a verdict is for H100"


def test_what_the_source_does_not_state_can_be_compared_with_nothing():
    results = [decoding("own", {(1, 8192): 500.0}), decoding("hf", {(1, 8192): 200.0})]
    lines = by_place(table([{"figure": "engine_speedup", "tolerance": "20%"}], results, {"engine_speedup": ENGINES}))
    for quantity in ("speedup", "throughput"):
        line = lines[quantity, f"{PANEL} / Ours / input_tokens 8192"]
        assert verdict(line) == (None, None, None, "the source does not state batch_size")
    assert ("speedup", "(b) OPT-6.7B@A100 / Ours / input_tokens 8192") not in lines, "only its tokens/s are published"


def test_rows_of_quantized_variants_with_a_reason():
    row = {"model": "m", "suite": "zero", "tasks": {"a": "acc"}, "workload": "scoring"}
    recipe = row | {"rows": {"Base Model": "dense"}}
    profiled = [("t", "time_per_question", 0.2, 0.01, "s"), ("t", "tokens_per_second", 2000.0, None, "tokens/s")]
    profiled.append(("t", "peak_allocated_per_question", 2400.0 * MiB, None, "bytes"))
    questions = {"a": {"doc_ids": [0, 1], "acc": [1, 0]}}
    results = [
        raw("zero", [("a", "acc", 0.5, 0.02, "fraction")], samples=questions),
        raw("scoring", profiled, kind="profile"),
    ]
    why = "the source names neither its model nor its questions"
    lines = by_place(
        table([{"figure": "quantization_tradeoff", "why": why}], results, {"quantization_tradeoff": recipe})
    )
    assert len(lines) == 11 * 5
    accuracy = lines["accuracy", "Base Model"]
    assert verdict(accuracy) == (50.0, pytest.approx(50 - 87000 / 1962), None, why)
    assert accuracy["stderr"] == pytest.approx(2.0), "one standard error, and not half of the chart's interval"
    assert lines["avg_peak_vram_MB", "Base Model"]["measured"] == 2400.0
    assert lines["avg_time_s", "SFT Model"]["why"] == why


def test_a_whole_number_is_the_same_in_a_column_of_fractions():
    results = [raw("glue", [("cola", "mcc", 0.575, 0.01, "fraction")], chain="dense+t+s", bits=1)]
    results.append(raw("glue", [("cola", "mcc", 0.6, 0.01, "fraction")], chain="dense+t"))
    students = {"Budget-A": {"1": {"cola": "dense+t+s"}}}
    recipe = {"model": "m", "suite": {"cola": "glue"}, "teacher": {"cola": "dense+t"}, "students": students}
    lines = table([{"figure": "glue_bits", "tolerance": {"CoLA": 1.0}}], results, {"glue_bits": recipe})
    found = {line["condition"]: verdict(line) for line in lines if line["quantity"] == "Mcc"}
    assert found["CoLA / teacher / bits 32"] == (pytest.approx(60), pytest.approx(0.2), "yes", None)
    assert found["CoLA / Budget-A / bits 1"] == (pytest.approx(57.5), pytest.approx(7.0), "no", None)
    average = next(line for line in lines if line["condition"] == "Ave. 8 Tasks / teacher / bits 32")
    assert average["why"] == "missing: mnli, mrpc, qnli, qqp, rte, sst2, stsb"


# The script -----------------------------------------------------------------------------------------------------------


def test_the_script_writes_ten_digits(tmp_path):
    paths = []
    for one in perplexities(12.70):
        paths.append(path_of(tmp_path / "results", kind="evaluate", **one["identity"]))
        write_json(paths[-1], one)
    checked = [as_dict(build(comparisons.Comparison, entry, "compare")) for entry in quality(PERPLEXITY)]
    content = json.dumps({"compare": checked, "figures": {}, "made": {"evaluate": {}, "profile": {}}})
    output = tmp_path / "published.csv"
    given = ["--comparisons", content, "--published", str(PAPERS), "--output", str(output)]
    runpy.run_path(str(ROOT / "workflow/scripts/make_published_table.py"))["main"](
        [*given, "--results", *map(str, paths)]
    )
    with output.open() as file:
        (line,) = csv.DictReader(file)
    assert tuple(line) == published_rows.COLUMNS
    assert (line["measured"], line["difference"], line["tolerance"], line["inside"]) == ("12.7", "0.08", "1%", "yes")
