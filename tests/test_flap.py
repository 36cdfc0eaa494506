"""FLAP against its formulas written out naively, in float64, and its compensation where it must be exact."""

from __future__ import annotations

import itertools
import json
import statistics

import pytest
import torch

from espalier import checkpoints
from espalier.data import Calibration, Dataset, Text
from espalier.models import widths
from espalier.models.anatomy import parts_of
from espalier.prune import flap
from width_cases import (
    ARCHITECTURES,
    LLAMAS,
    calibration,
    check_saved,
    dense,
    inputs_of,
    lowest,
    masked,
    parent,
    prune,
    random_ids,
    windows,
)

SIZES = {"num_hidden_layers": 4, "intermediate_size": 20, "initializer_range": 0.3}
MANUAL = ("UL-MM", "AL-MM")


def naive_channels(weight: torch.Tensor, inputs: torch.Tensor, metric: str) -> list[float]:
    scores = []
    for j in range(weight.shape[1]):
        column, values = weight[:, j].tolist(), inputs[:, j].tolist()
        if metric == "WIFN":
            norm = sum(value**2 for value in values) ** 0.5
            scores.append(sum(abs(w) * norm for w in column) / len(column))
        else:
            weighted = sum(w**2 for w in column) if metric == "WIFV" else 1.0
            scores.append(statistics.variance(values) * weighted)
    return scores


def standard(scores: list[float]) -> list[float]:
    return [(score - statistics.mean(scores)) / statistics.stdev(scores) for score in scores]


def naive(model, ids, metric: str, structure: str) -> list[tuple[list[float], list[float]]]:
    """Return the scores of groups and neurons of each block of a Llama."""
    result = []
    for parts, (heads_in, mlp_in) in zip(parts_of(model), inputs_of(model, ids), strict=True):
        channels = [score**2 for score in naive_channels(parts.output.weight, heads_in, metric)]
        neurons = naive_channels(parts.down.weight, mlp_in, metric)
        adaptive = structure in ("AL-MM", "AL-AM")
        if adaptive:
            channels, neurons = standard(channels), standard(neurons)
        width = len(channels) // model.config.num_key_value_heads
        groups = [sum(channels[i : i + width]) for i in range(0, len(channels), width)]
        result.append(([group / width for group in groups] if adaptive else groups, neurons))
    return result


def nearest_prefix(pool: list[tuple], amount: float) -> set[tuple]:
    """Units (score, block, kind, unit, cost), the lowest first, until their cost is nearest `amount`."""
    pool = sorted(pool)
    spent = [0, *itertools.accumulate(cost for *_, cost in pool)]
    return {one[1:4] for one in pool[: min(range(len(spent)), key=lambda i: abs(spent[i] - amount))]}


def naive_selection(model, scores, structure: str, ratio: float, attention_ratio: float | None) -> set[tuple]:
    """Return (block, 0 for groups or 1 for neurons, unit) of what goes."""
    config = model.config
    cost = 2 * (config.num_attention_heads // config.num_key_value_heads + 1) * config.head_dim / 3  # in neurons
    groups, neurons = config.num_key_value_heads, config.intermediate_size
    missing = ratio * (groups * cost + neurons) - int((attention_ratio or 0) * groups) * cost
    if structure in ("UL-UM", "UL-MM"):
        shares = {"UL-UM": (int(ratio * groups), int(ratio * neurons))}
        shares["UL-MM"] = (int((attention_ratio or 0) * groups), int(missing))
        return {
            (block, kind, unit)
            for block, both in enumerate(scores)
            for kind in (0, 1)
            for unit in lowest(both[kind], shares[structure][kind])
        }
    pool = [
        (score, block, kind, unit, (cost, 1)[kind])
        for block, both in enumerate(scores)
        for kind in (0, 1)
        for unit, score in enumerate(both[kind])
        if score < max(both[kind])  # the best of each layer stays
    ]
    total = ratio * len(scores) * (groups * cost + neurons)
    if structure == "AL-AM":
        return nearest_prefix(pool, total)
    gone = nearest_prefix([one for one in pool if one[2] == 0], int(attention_ratio * groups * len(scores)) * cost)
    return gone | nearest_prefix([one for one in pool if one[2] == 1], total - len(gone) * cost)


@pytest.mark.parametrize("heads", LLAMAS)
@pytest.mark.parametrize("structure", flap.STRUCTURES)
@pytest.mark.parametrize("metric", flap.METRICS)
def test_scores_and_selection(metric, structure, heads, tmp_path):
    source, words = parent(tmp_path / "parent", **SIZES, **LLAMAS[heads]), calibration(tmp_path / "data")
    share = 0.5 if structure in MANUAL else None
    recipe = {"ratio": 0.55, "metric": metric, "structure": structure, "attention_ratio": share, "batch_size": 4}
    report = prune(flap, source, tmp_path / "pruned", calibration=words, **recipe)
    model = dense(source)
    scores = naive(model, windows(source, words), metric, structure)
    for entry, (groups, neurons) in zip(report, scores, strict=True):
        assert entry["group_scores"] == pytest.approx(groups, rel=1e-5, abs=1e-5 if structure[0] == "A" else 0)
        assert entry["neuron_scores"] == pytest.approx(neurons, rel=1e-5, abs=1e-5 if structure[0] == "A" else 0)
    found = {(one["block"], 0, unit) for one in report for unit in one["groups_removed"]}
    found |= {(one["block"], 1, unit) for one in report for unit in one["neurons_removed"]}
    assert found == naive_selection(model, scores, structure, 0.55, share)
    assert len({kind for _, kind, _ in found}) == 2


@pytest.mark.parametrize("family", ["llama", *ARCHITECTURES])
def test_what_is_saved_is_the_model_without_these_units_and_with_their_mean(family, tmp_path):
    source, words = parent(tmp_path / "parent", family), calibration(tmp_path / "data")
    recipe = {"calibration": words, "parameters": 0.8 * checkpoints.describe(source)["parameters"], "keep_last": 1}
    report = prune(flap, source, tmp_path / "pruned", **recipe)
    pruned, original = dense(tmp_path / "pruned"), dense(source)
    whole = masked(original, report)
    inputs = inputs_of(original, windows(source, words))  # of the dense model, in every block
    for entry in report:
        old, new = parts_of(original)[entry["block"]], parts_of(whole)[entry["block"]]
        channels = [channel for group in entry["groups_removed"] for channel in old.group_channels(group)]
        for name, gone, values in zip(
            ("output", "down"), (channels, entry["neurons_removed"]), inputs[entry["block"]], strict=True
        ):
            layer, weight = getattr(new, name), getattr(old, name).weight.detach()
            bias = torch.zeros(layer.out_features, dtype=torch.float64) if layer.bias is None else layer.bias.detach()
            for channel in gone:
                bias = bias + weight[:, channel] * values[:, channel].mean()
            layer.bias = torch.nn.Parameter(bias)
    torch.testing.assert_close(pruned(random_ids()).logits, whole(random_ids()).logits, rtol=1e-5, atol=1e-5)
    assert parts_of(pruned)[-1].neurons == 48
    group = widths.widths_of(original, flap.Recipe(**recipe))[0].group_parameters
    assert abs(checkpoints.logical_parameters(pruned) - recipe["parameters"]) <= group / 2
    check_saved(flap, source, tmp_path / "pruned", exact=False, **recipe)


@pytest.mark.parametrize("structure", flap.STRUCTURES)
def test_a_plan_that_calls_itself_exact_is(structure, tmp_path):
    source, words = parent(tmp_path / "parent", "opt"), calibration(tmp_path / "data")
    share = 0.5 if structure in MANUAL else None
    recipe = {"calibration": words, "ratio": 0.5, "structure": structure, "attention_ratio": share}
    prune(flap, source, tmp_path / "pruned", **recipe)
    check_saved(flap, source, tmp_path / "pruned", exact=structure in ("UL-UM", "UL-MM"), **recipe)


@pytest.mark.parametrize(("family", "ratio"), [("opt", 0.25), ("qwen2", 0.5)])
def test_constant_channels_go_first_and_are_made_up_for_exactly(family, ratio, tmp_path):
    """A head whose values, and neurons whose activations, never change: W mean(X) is all that they ever gave."""
    source, words = parent(tmp_path / "parent", family), calibration(tmp_path / "data")
    model = checkpoints.load(source, device="cpu").model
    constant = {}
    with torch.no_grad():
        for block, parts in enumerate(parts_of(model)):
            group = block % parts.groups
            rows = range(group * parts.head_dim, (group + 1) * parts.head_dim)
            parts.value.weight[rows] = 0
            parts.value.bias[rows] = torch.linspace(-2, 3, len(rows))
            neurons = list(range(block % round(1 / ratio), 48, round(1 / ratio)))
            for layer in parts.up:
                layer.weight[neurons] = 0
                if layer.bias is not None:  # all neurons of OPT are active now and then, the constant ones always
                    layer.bias += 2
                    layer.bias[neurons] = torch.linspace(0.5, 2, len(neurons))
            constant[block] = ([group], neurons)
    model.save_pretrained(source)
    report = prune(flap, source, tmp_path / "pruned", calibration=words, ratio=ratio, structure="UL-UM")
    assert {one["block"]: (one["groups_removed"], one["neurons_removed"]) for one in report} == constant
    before, after = model(random_ids()).logits, checkpoints.load(tmp_path / "pruned", device="cpu").model
    torch.testing.assert_close(after(random_ids()).logits, before, rtol=1e-5, atol=1e-5)
    for parts in parts_of(after):
        torch.nn.init.zeros_(parts.output.bias)
    assert (after(random_ids()).logits - before).abs().max() > 0.01, "the bias must matter for this to be a test"


@pytest.mark.parametrize("structure", ["AL-AM", "UL-UM"])
def test_on_text_of_one_token_nothing_fluctuates_and_nothing_is_lost(structure, tmp_path):
    source = parent(tmp_path / "parent", num_hidden_layers=4)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "text.jsonl").write_text(json.dumps({"text": "a" * 400}) + "\n")
    text = Text(Dataset("letters", "local", path=str(tmp_path / "data")), "text")
    recipe = {"calibration": Calibration(text, samples=4, length=16), "ratio": 0.5, "structure": structure}
    prune(flap, source, tmp_path / "pruned", **recipe)
    ids = windows(source, recipe["calibration"])
    assert len(ids.unique()) == 1
    before, after = (
        checkpoints.load(folder, device="cpu").model(ids).logits for folder in (source, tmp_path / "pruned")
    )
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_where_no_channel_differs_none_is_better():
    groups, neurons = flap.STRUCTURES["AL-AM"].scores(torch.full((6,), 0.7), torch.zeros(3), 2)
    assert (groups.tolist(), neurons.tolist()) == ([0, 0], [0, 0, 0])


def test_no_layer_is_emptied(tmp_path):
    source, words = parent(tmp_path / "parent", **SIZES, **LLAMAS["mha"]), calibration(tmp_path / "data")
    report = prune(flap, source, tmp_path / "pruned", calibration=words, ratio=0.78)
    cost = 32 / 3  # of a group, in neurons
    pool = [(score, one["block"], 0, unit, cost) for one in report for unit, score in enumerate(one["group_scores"])]
    pool += [(score, one["block"], 1, unit, 1) for one in report for unit, score in enumerate(one["neuron_scores"])]
    lost = [block for block, kind, _ in nearest_prefix(pool, 0.78 * 4 * (4 * cost + 20)) if kind == 0]
    assert max(lost.count(block) for block in range(4)) == 4, "by scores alone, a block would lose all of its heads"
    assert min(one["groups_kept"] for one in report) == 1
    assert min(one["neurons_kept"] for one in report) >= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_weights(dtype, tmp_path):
    source, words = parent(tmp_path / "parent", dtype=dtype, **SIZES), calibration(tmp_path / "data")
    recipe = {"ratio": 0.5, "structure": "UL-UM", "round_to": 8}
    report = prune(flap, source, tmp_path / "pruned", calibration=words, **recipe)
    model = checkpoints.load(tmp_path / "pruned", device="cpu").model
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert [parts.neurons for parts in parts_of(model)] == [8] * 4
    for entry, (groups, _) in zip(report, naive(dense(source), windows(source, words), "WIFV", "UL-UM"), strict=True):
        assert entry["group_scores"] == pytest.approx(groups, rel=0.2)  # the activations have 16 bits too
