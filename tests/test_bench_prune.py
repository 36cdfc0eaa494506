"""The benchmark of pruning runs on a tiny model and covers every method."""

from __future__ import annotations

import json

import pytest

from benchmarks import prune
from espalier import plugins


def test_every_method_has_settings():
    assert prune.SETTINGS.keys() == set(plugins.names("prune"))


def test_quick_benchmark_of_a_short_model(tmp_path, capsys):
    output = tmp_path / "prune.jsonl"
    prune.main(
        ["--quick", "--layers", "3", "--samples", "2", "--length", "8", "--device", "cpu", "--output", str(output)]
    )
    lines = {line["work"]: line for line in map(json.loads, output.read_text().splitlines())}
    labels = {label for settings in prune.SETTINGS.values() for label in settings}
    assert lines.keys() == labels | {prune.FORWARD, prune.NAIVE}
    block = 4 * 128**2 + 3 * 128 * 344 + 2 * 128
    forward = lines[prune.FORWARD]
    assert forward["parameters"] == 2 * 1000 * 128 + 3 * block + 128
    assert forward["peak_bytes"] > 4 * forward["parameters"]
    assert forward["seconds_ratio"] == forward["peak_ratio"] == 1
    for line in lines.values():
        assert line["seconds"] > 0
        assert line["seconds_ratio"] == pytest.approx(line["seconds"] / forward["seconds"])
        assert line["peak_ratio"] == pytest.approx(line["peak_bytes"] / forward["peak_bytes"])
        assert (line["said_bytes"] is None) == (line["recipe"] is None)
    shared = lines[prune.SHARED]["seconds"] / lines[prune.NAIVE]["seconds"]
    assert f"shared perplexity scan / naive one: {shared:.2f} of the time" in capsys.readouterr().out


def test_naive_scan_leaves_the_model_as_it_was():
    import torch

    from families import tiny

    model, windows = tiny("llama"), torch.arange(3, 27).view(2, 12)
    before = prune.forward(model, windows, 1)
    dense, *without = prune.naive_scan(model, windows, 2)
    assert dense == pytest.approx(before)
    assert dense == pytest.approx(model(input_ids=windows, labels=windows).loss.item())
    assert len(set(without)) == len(model.model.layers) == 3
    assert prune.forward(model, windows, 1) == before
