"""The benchmark of quantized models: ratios and claims by hand, and a run on a tiny model with bytes by arithmetic."""

from __future__ import annotations

import json

import pytest

from benchmarks import quantize
from espalier import plugins, recipes
from espalier.errors import UserError


def test_ratios_are_taken_round_by_round():
    found = quantize.paired([2.0, 9.0, 5.0, 1.0, 4.0], [1.0, 3.0, 5.0, 2.0, 1.0])  # 2, 3, 1, 0.5, 4
    assert found == {"low": 1.0, "median": 2.0, "high": 3.0}


def test_every_recipe_is_one():
    for label, recipe in quantize.RECIPES.items():
        content = {key: value for key, value in recipe.items() if key not in ("quantize", "calibration")}
        if "calibration" in recipe:
            text = {"dataset": {"name": "text", "source": "local", "path": "text"}, "split": "calibration"}
            content["calibration"] = {"text": text, "samples": 1, "length": 8}
        assert recipes.build(plugins.load("quantize", recipe["quantize"]).Recipe, content, label)


@pytest.mark.parametrize(("slow", "code"), [(0.9, 0), (1.1, 1)])
def test_a_claim_that_does_not_hold_is_a_failure(slow, code, monkeypatch, capsys):
    labels = {label for label, _, _ in quantize.CLAIMS}
    good = {base: {"prefill": {"median": 0.5}, "peak": 0.5} for base in quantize.BASES}
    lines = [{"variant": label, "ratios": good} for label in labels - {"W8A8 float32"}]
    ratios = {**good, "bfloat16": {"prefill": {"median": slow}, "peak": 0.5}}
    monkeypatch.setattr(quantize, "RECIPES", {})
    monkeypatch.setattr(quantize, "table", lambda _: "")
    monkeypatch.setattr(
        quantize,
        "claims",
        lambda _, original=quantize.claims: original([*lines, {"variant": "W8A8 float32", "ratios": ratios}]),
    )
    if code:
        with pytest.raises(UserError, match=r"must be below 1: prefill of W8A8 float32 / bfloat16: 1\.10\.$"):
            quantize.main([])
    else:
        quantize.main([])
    assert capsys.readouterr().out.count("FALSE") == code


def test_quick_benchmark_of_a_tiny_model(tmp_path, monkeypatch, capsys):
    few = ("W8A8", "W4A8")
    monkeypatch.setattr(quantize, "RECIPES", {label: quantize.RECIPES[label] for label in few})
    output = tmp_path / "quantize.jsonl"
    quantize.main(["--quick", "--device", "cpu", "--output", str(output)])
    lines = {line["variant"]: line for line in map(json.loads, output.read_text().splitlines())}
    assert list(lines) == [*quantize.BASES, *(f"{label} {dtype}" for label in few for dtype in quantize.BASES)]
    hidden, mlp = 128, 256
    shapes = [(hidden, hidden)] * 4 + [(hidden, mlp)] * 2 + [(mlp, hidden)]  # inputs, outputs
    codes, outputs = sum(one * other for one, other in shapes), sum(other for _, other in shapes)
    other = 2 * 1024 * hidden + 3 * hidden  # embeddings, output head and norms
    frequencies = 2 * 4 * 32  # of the rotary embedding, in float32
    expected = {"float32": 4 * (other + codes), "bfloat16": 2 * (other + codes)}
    for size, dtype in ((4, "float32"), (2, "bfloat16")):
        expected[f"W8A8 {dtype}"] = size * other + codes + 4 * outputs
        expected[f"W4A8 {dtype}"] = size * other + codes // 2 + 4 * outputs + 16 * len(shapes)  # and their shapes
    for label, size in expected.items():
        assert lines[label]["bytes"]["loaded"] == size + frequencies, label
        assert lines[label]["bytes"]["after_forward"] == size + frequencies, label
    for line in lines.values():
        assert line["bytes"]["on_disk"] > 0
        assert line["bytes"]["peak"] > line["bytes"]["after_forward"] + 32 * mlp * 2
        for base in quantize.BASES:
            ratios, at = line["ratios"][base], lines[base]
            assert ratios["peak"] == line["bytes"]["peak"] / at["bytes"]["peak"]
            for work in ("prefill", "decode"):
                assert len(line["all_seconds"][work]) == 2
                assert ratios[work] == quantize.paired(line["all_seconds"][work], at["all_seconds"][work])
    said = capsys.readouterr().out
    assert said.count("holds") + said.count("FALSE") == len(quantize.CLAIMS)
    assert all(line["variant"] in said for line in lines.values())
