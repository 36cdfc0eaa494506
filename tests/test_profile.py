"""Formulas of the timings with times that are set by hand, and generation by a tiny model."""

from __future__ import annotations

import json
import math
import statistics

import pytest

import fake_worker
from espalier import checkpoints, neighbours, recipes
from espalier.errors import UserError
from espalier.profile import generation
from espalier.profile import memory as memory_workload
from espalier.prompts import prompt
from espalier.tables import COLUMNS
from espalier.worker import Unavailable
from fake_worker import Workers
from tiny import llama


@pytest.fixture
def folder(tmp_path):
    return fake_worker.checkpoint(tmp_path / "model")


def run(folder, workers, module=generation, device="cpu", **mapping):
    """Return rows by metric and shape, and the whole result, of a workload with workers that are none."""
    recipe = recipes.build(module.Recipe, mapping, "recipe")
    measured = module.measure(folder, recipe, seed=0, device=device, environment=None, start=workers)
    json.dumps(measured)
    assert all(set(row) <= set(COLUMNS) | {"unit"} for row in measured.measurements)
    keys = ("metric", "input_tokens", "output_tokens", "batch_size")
    rows = {tuple(row[key] for key in keys): row for row in measured.measurements}
    assert len(rows) == len(measured.measurements)
    return rows, measured


TEN = {"input_tokens": [5], "output_tokens": [11], "batch_sizes": [4]}


def test_prefill_and_decode_are_parts_of_the_same_calls(folder):
    rows, measured = run(folder, Workers(), **TEN | {"batch_sizes": [1, 4]}, repeats=3)
    expected = {
        "latency": 2.0,
        "latency_median": 2.0,
        "latency_iqr": 0.0,
        "time_to_first_token": 1.0,
        "throughput": 4 * 11 / 2.0,
        "decode_throughput": 4 * 10 / 1.0,
        "cpu_time": 1.0,
        "peak_allocated": 4000,
    }
    assert {key[0]: row["value"] for key, row in rows.items() if key[1:] == (5, 11, 4)} == pytest.approx(expected)
    assert rows["throughput", 5, 11, 1]["value"] == pytest.approx(11 / 2.0)
    whole = {key[0]: row["value"] for key, row in rows.items() if key[1:] == (None, None, None)}
    shared = whole.pop("cpu_of_others")
    assert whole == {"weights_allocated": 900, "weights_allocated_after_forward": 500, "weights_on_disk": 7}
    assert shared is None or 0 <= shared <= 1
    assert {row["unit"] for row in rows.values()} == {"s", "tokens/s", "bytes", "fraction"}
    assert {row["engine"] for row in rows.values()} == {"hf"}
    assert {row["n"] for row in rows.values()} == {3, None}
    timing = {one["batch_size"]: one for one in measured.samples["timings"]}
    assert timing[4]["seconds"] == pytest.approx([2.0] * 3)
    assert timing[4]["first_token_seconds"] == pytest.approx([1.0] * 3)
    assert timing[4]["cpu_seconds"] == pytest.approx([1.0] * 3)
    assert measured.samples["engine"] == {"calls": 9}  # one to begin with; of each batch one untimed and three timed
    assert measured.made_with == fake_worker.MADE_WITH
    assert measured.checkpoint["arithmetic"] == "float"


def test_tokens_that_early_rows_have_decoded_before_the_last_one_was_read_do_not_count(folder):
    """An engine that reads prompts in parts decodes the first rows meanwhile."""
    workers = Workers()
    workers.known = 4 + 7
    rows, measured = run(folder, workers, **TEN)
    assert rows["decode_throughput", 5, 11, 4]["value"] == pytest.approx((4 * 11 - 11) / 1.0)
    assert measured.samples["timings"][0]["first_tokens"] == [11] * 5


def test_standard_errors_are_those_of_repeated_calls(folder):
    """With 1 s for the prompt and 1 s for ten tokens, `prompt` and `tokens` are what each timed call took longer."""
    prompt, tokens = [0.2, 0.0, 0.7, 0.1], [0.0, 0.5, 0.1, 0.6]
    workers = Workers()
    workers.jitter = iter([(0, 0), (9, 9), (9, 9), *zip(prompt, tokens, strict=True)])
    rows, measured = run(folder, workers, **TEN, warmup=2, repeats=4)
    wall = [2 + one + other for one, other in zip(prompt, tokens, strict=True)]
    decoding = [1 + one for one in tokens]

    def error(values):
        return statistics.stdev(values) / math.sqrt(4)

    expected = {
        "latency": (statistics.mean(wall), error(wall)),
        "time_to_first_token": (1 + statistics.mean(prompt), error(prompt)),
        "throughput": (44 / statistics.mean(wall), 44 / statistics.mean(wall) ** 2 * error(wall)),
        # Of the differences within each call: the two times of a call move together.
        "decode_throughput": (40 / statistics.mean(decoding), 40 / statistics.mean(decoding) ** 2 * error(decoding)),
        "cpu_time": (statistics.mean(wall) / 2, error(wall) / 2),
    }
    for name, (value, stderr) in expected.items():
        found = rows[name, 5, 11, 4]
        assert (found["value"], found["stderr"], found["n"]) == (pytest.approx(value), pytest.approx(stderr), 4)
    assert measured.samples["timings"][0]["seconds"] == pytest.approx(wall)


@pytest.mark.parametrize(
    ("extra", "median", "iqr"),
    [
        ([0.1, 0.4, 0.2, 9.0, 0.3], 0.3, 0.4 - 0.2),  # one call among five that something held up
        ([0.0, 0.4, 0.1, 0.2], (0.1 + 0.2) / 2, (0.2 + 0.25 * 0.2) - (0.0 + 0.75 * 0.1)),
    ],
)
def test_median_and_the_middle_half_are_blind_to_an_outlier(folder, extra, median, iqr):
    workers = Workers()
    workers.jitter = iter([(0, 0), (0, 0), *((one, 0) for one in extra)])
    rows, _ = run(folder, workers, **TEN, repeats=len(extra))
    assert rows["latency_median", 5, 11, 4]["value"] == pytest.approx(2 + median)
    assert rows["latency_iqr", 5, 11, 4]["value"] == pytest.approx(iqr)


def test_one_call_has_no_spread_and_one_token_no_decoding(folder):
    rows, _ = run(folder, Workers(), **TEN | {"output_tokens": [1]}, repeats=1)
    assert rows["latency", 5, 1, 4]["stderr"] is None
    assert rows["latency_iqr", 5, 1, 4]["outcome"] == "undefined: one call has no spread"
    assert ("decode_throughput", 5, 1, 4) not in rows
    assert rows["time_to_first_token", 5, 1, 4]["value"] == rows["latency", 5, 1, 4]["value"] == 1.0


def test_an_engine_that_does_not_tell_its_first_token_has_no_prefill_or_decode(folder):
    workers = Workers()
    workers.first_token = False
    rows, _ = run(folder, workers, **TEN)
    assert rows["throughput", 5, 11, 4]["value"] == pytest.approx(22)
    for name in ("time_to_first_token", "decode_throughput"):
        assert rows[name, 5, 11, 4]["value"] is None
        assert rows[name, 5, 11, 4]["outcome"].startswith("unavailable: this engine does not tell")


def test_decoding_that_takes_no_time_is_no_number(folder):
    workers = Workers()
    workers.jitter = iter([(0, -1.0)] * 10)
    rows, _ = run(folder, workers, **TEN)
    assert rows["decode_throughput", 5, 11, 4]["outcome"].startswith("undefined: ")


def test_energy_is_a_row_where_the_device_counts_it(folder):
    rows, measured = run(folder, Workers(joules=22.0), **TEN, repeats=2)
    found = rows["energy_per_token", 5, 11, 4]
    assert (found["value"], found["stderr"], found["unit"]) == (pytest.approx(22 / 44), 0, "J/token")
    assert measured.samples["timings"][0]["joules"] == [22.0, 22.0]
    assert not [key for key in run(folder, Workers(), **TEN)[0] if key[0] == "energy_per_token"]


def test_what_goes_wrong_is_the_outcome_of_every_row_of_the_shape(folder):
    """Memory runs out, a worker dies, the context ends: the names of the rows are those of a shape that is good."""
    workers = Workers(room=100, deadly=[(20, 11, 2)], context=40)
    rows, measured = run(folder, workers, input_tokens=[5, 20, 30], output_tokens=[11], batch_sizes=[1, 2, 16])
    outcomes = {}
    for (name, *shape), row in rows.items():
        if shape != [None, None, None]:
            assert (row["value"] is None) == (row["outcome"] != "ok"), name
            outcomes.setdefault(tuple(shape), {})[name] = row["outcome"]
    assert len({tuple(sorted(names)) for names in outcomes.values()}) == 1
    dead = "failed: its worker ended with signal 11"
    beyond = "unavailable: 41 tokens are more than the model's 40 positions"
    expected = {(5, 11, 1): "ok", (5, 11, 2): "ok", (5, 11, 16): "oom"}
    expected |= {(20, 11, 1): "ok", (20, 11, 2): dead, (20, 11, 16): "oom"}
    expected |= {(30, 11, 1): beyond, (30, 11, 2): beyond, (30, 11, 16): "oom"}
    assert {shape: set(names.values()) for shape, names in outcomes.items()} == {
        shape: {outcome} for shape, outcome in expected.items()
    }
    samples = {(one["input_tokens"], one["batch_size"]): one for one in measured.samples["timings"]}
    assert samples[20, 2]["outcome"] == dead
    assert "seconds" not in samples[20, 2]


def test_an_engine_that_is_not_there_has_rows_for_all_that_a_chart_asks_for(folder):
    good, _ = run(folder, Workers(), **TEN)
    rows, measured = run(folder, Workers(refuses=Unavailable("the package vllm is missing")), **TEN)
    assert rows.keys() == good.keys() - {("cpu_of_others", None, None, None)}
    assert rows["weights_on_disk", None, None, None]["value"] == 7
    reason = "unavailable: the package vllm is missing"
    assert {row["outcome"] for key, row in rows.items() if key[0] != "weights_on_disk"} == {reason}
    assert measured.checkpoint["parameters"] == 3
    assert measured.made_with["packages"] == {}


def test_wrong_lengths_are_a_failure_and_not_a_number(folder):
    rows, _ = run(folder, Workers(extra=1), **TEN)
    reason = "failed: it did not generate 11 tokens for each of 4 prompts"
    assert {row["outcome"] for key, row in rows.items() if key[1]} == {reason}


def test_generation_on_cuda_reports_what_is_reserved(folder):
    shapes = {"input_tokens": [5], "output_tokens": [8], "batch_sizes": [2, 16]}
    timed, _ = run(folder, Workers(50, device="cuda"), device="auto", **shapes)
    untimed, measured = run(folder, Workers(50, device="cuda"), memory_workload, device="auto", **shapes)
    assert {key[0] for key in untimed} == set(memory_workload.METRICS)
    for rows in (timed, untimed):
        held = [rows[name, None, None, None]["value"] for name in memory_workload.METRICS if name.startswith("weights")]
        assert held == [900, 500, 7]
        found = [rows[f"peak_{kind}", 5, 8, batch] for batch in (2, 16) for kind in ("allocated", "reserved")]
        assert [row["value"] for row in found] == [2000, 2048, None, None]
        assert [row["outcome"] for row in found] == ["ok", "ok", "oom", "oom"]
    assert len(measured.samples["peaks"]) == 4


def test_work_of_the_same_run_beside_a_timing_is_told(folder, monkeypatch, capsys):
    monkeypatch.setattr(neighbours, "_jobs", lambda _: frozenset({"process 7: python prune_model.py"}))
    _, measured = run(folder, Workers(), **TEN)
    assert measured.samples["shared_with"] == ["process 7: python prune_model.py"]
    assert "warning: these times are not to be trusted: the same run was also at work on process 7" in (
        capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoints.load(llama(tmp_path_factory.mktemp("models") / "dense"), device="cpu")


def test_generation_measures_a_model(checkpoint):
    """A real worker; beyond the weights there are at the very least the keys and values of both layers."""
    shapes = {"input_tokens": [4], "output_tokens": [3], "batch_sizes": [1, 8], "repeats": 2}
    recipe = recipes.build(generation.Recipe, shapes, "")
    measured = generation.measure(checkpoint.folder, recipe, seed=0, device="cpu", environment=None)
    json.dumps(measured)
    found = {(row["metric"], row["batch_size"]): row["value"] for row in measured.measurements}
    assert found["weights_on_disk", None] == (checkpoint.folder / "model.safetensors").stat().st_size
    assert found["weights_allocated", None] >= 4 * checkpoint.info["parameters"]
    cache = 2 * 2 * 6 * 128 * 4
    assert found["peak_allocated", 1] >= found["weights_allocated", None] + cache
    assert found["peak_allocated", 8] >= found["peak_allocated", 1] + 7 * cache
    assert found["throughput", 8] > found["throughput", 1] > 0
    assert 0 < found["time_to_first_token", 1] < found["latency", 1]
    assert measured.made_with["device"]["kind"] == "cpu"
    assert "torch" in measured.made_with["packages"]


def test_prompt_is_fixed_and_ordinary(checkpoint, folder):
    tokens = prompt(checkpoint.folder, 5000, 0)
    assert tokens[:1000] == prompt(checkpoint.folder, 1000, 0) != prompt(checkpoint.folder, 1000, 1)
    assert set(tokens) == set(range(257)) - set(checkpoint.tokenizer.all_special_ids)
    # End tokens stand in config.json, marked ones in the tokenizer's two files.
    assert set(prompt(folder, 1000, 0)) == set(range(40)) - {0, 1, 2, 4}
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="lacks the key 'vocab_size'"):
        prompt(folder, 5, 0)
