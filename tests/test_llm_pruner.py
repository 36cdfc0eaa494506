"""LLM-Pruner against its formula written out naively, in float64, weight by weight."""

from __future__ import annotations

import itertools

import pytest
import torch

from espalier import checkpoints
from espalier.errors import UserError
from espalier.models.anatomy import blocks_of, parts_of
from espalier.prune import llm_pruner
from width_cases import (
    ARCHITECTURES,
    LLAMAS,
    calibration,
    check_saved,
    dense,
    lowest,
    masked,
    parent,
    prune,
    random_ids,
    windows,
)

EDGES = {"keep_first": 1, "keep_last": 1}  # of four blocks, 1 and 2 are pruned
SIZES = {"num_hidden_layers": 4, "intermediate_size": 20, "initializer_range": 0.3}


def slopes(model, ids) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return, for every weight, the mean gradient and the mean squared gradient over samples."""
    every: dict[str, list] = {}
    for window in ids:
        model.zero_grad()
        model(input_ids=window[None], labels=window[None], use_cache=False).loss.backward()
        for name, weight in model.named_parameters():
            every.setdefault(name, []).append(weight.grad.clone())
    return {name: (sum(g) / len(g), sum(one * one for one in g) / len(g)) for name, g in every.items()}


def channel(terms: list[float], grouping: str) -> float:
    return sum(abs(term) for term in terms) if grouping == "element" else abs(sum(terms))


def naive(model, ids, block: int, grouping: str, order: str) -> tuple[list[float], list[float]]:
    """The importance of each group and neuron of a Llama's block, looping over heads and channels."""
    found, layer = slopes(model, ids), blocks_of(model)[block]
    term = {
        "first": lambda w, g, h: w * g,
        "second": lambda w, g, h: w**2 * h,
        "mixed": lambda w, g, h: w * g - 0.5 * w**2 * h,
    }[order]
    terms = {}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
        terms[name[10]] = term(layer.get_submodule(name).weight.detach(), *found[f"model.layers.{block}.{name}.weight"])
    for name in ("gate", "up", "down"):
        full = f"mlp.{name}_proj"
        terms[name] = term(layer.get_submodule(full).weight.detach(), *found[f"model.layers.{block}.{full}.weight"])
    size = model.config.head_dim
    shared = model.config.num_key_value_heads
    readers = model.config.num_attention_heads // shared
    groups = []
    for group in range(shared):
        total = 0.0
        for head in range(group * readers, (group + 1) * readers):
            for i in range(head * size, (head + 1) * size):
                total += channel(terms["q"][i, :].tolist(), grouping) + channel(terms["o"][:, i].tolist(), grouping)
        for i in range(group * size, (group + 1) * size):
            total += channel(terms["k"][i, :].tolist(), grouping) + channel(terms["v"][i, :].tolist(), grouping)
        groups.append(total)
    neurons = [
        channel(terms["gate"][i, :].tolist(), grouping)
        + channel(terms["up"][i, :].tolist(), grouping)
        + channel(terms["down"][:, i].tolist(), grouping)
        for i in range(model.config.intermediate_size)
    ]
    return groups, neurons


@pytest.mark.parametrize("heads", LLAMAS)
@pytest.mark.parametrize("order", llm_pruner.TERMS)
@pytest.mark.parametrize("grouping", llm_pruner.GROUPINGS)
def test_scores_and_selection(grouping, order, heads, tmp_path):
    source = parent(tmp_path / "parent", dtype=torch.float64, **SIZES, **LLAMAS[heads])
    words = calibration(tmp_path / "data")
    kind = {"grouping": grouping, "order": order}
    report = prune(llm_pruner, source, tmp_path / "pruned", calibration=words, ratio=0.5, **kind, **EDGES)
    assert [entry["block"] for entry in report] == [1, 2]
    for entry in report:
        groups, neurons = naive(dense(source), windows(source, words), entry["block"], **kind)
        assert entry["group_scores"] == pytest.approx(groups, rel=1e-5)
        assert entry["neuron_scores"] == pytest.approx(neurons, rel=1e-5)
        assert entry["groups_removed"] == lowest(groups, len(groups) // 2)
        assert entry["neurons_removed"] == lowest(neurons, 10)


def test_gate_and_up_in_one_matrix(tmp_path):
    source, words = parent(tmp_path / "parent", "glm", dtype=torch.float64), calibration(tmp_path / "data")
    (entry,) = prune(llm_pruner, source, tmp_path / "pruned", calibration=words, ratio=0.5, **EDGES)
    model = dense(source)
    found = slopes(model, windows(source, words))
    terms = {}
    for name in ("gate_up_proj", "down_proj"):
        weight = blocks_of(model)[1].get_submodule(f"mlp.{name}").weight.detach()
        terms[name] = (weight * found[f"model.layers.1.mlp.{name}.weight"][0]).abs()
    both, down = terms["gate_up_proj"], terms["down_proj"]
    neurons = [float(both[i].sum() + both[48 + i].sum() + down[:, i].sum()) for i in range(48)]
    assert entry["neuron_scores"] == pytest.approx(neurons, rel=1e-5)


def test_the_kinds_of_importance_differ(tmp_path):
    """Otherwise the table above would not tell them apart."""
    source, words = parent(tmp_path / "parent", **SIZES), calibration(tmp_path / "data")
    kinds = itertools.product(llm_pruner.GROUPINGS, llm_pruner.TERMS)
    scores = {naive(dense(source), windows(source, words), 1, *kind)[1][0] for kind in kinds}
    assert len({f"{score:.4g}" for score in scores}) == 5  # second order: all terms are positive, element is vector


@pytest.mark.parametrize("heads", LLAMAS)
def test_global_scope_takes_the_lowest_of_all_pruned_blocks(heads, tmp_path):
    source = parent(tmp_path / "parent", **SIZES, **LLAMAS[heads])
    words = calibration(tmp_path / "data")
    report = prune(llm_pruner, source, tmp_path / "pruned", calibration=words, ratio=0.3, scope="global", **EDGES)
    model = dense(source)
    readers, size, width = 4 // model.config.num_key_value_heads, model.config.head_dim, model.config.hidden_size
    group_cost, neuron_cost = (2 * readers + 2) * size * width, 3 * width
    pool, prunable = [], 0
    for block in (1, 2):
        for kind, scores in enumerate(naive(model, windows(source, words), block, "element", "first")):
            cost = (group_cost, neuron_cost)[kind]
            prunable += cost * len(scores)
            pool += [(score, block, kind, unit, cost) for unit, score in enumerate(scores) if score < max(scores)]
    pool.sort()
    spent = [0, *itertools.accumulate(cost for *_, cost in pool)]
    end = min(range(len(spent)), key=lambda i: abs(spent[i] - 0.3 * prunable))
    gone = {(block, kind, unit) for _, block, kind, unit, _ in pool[:end]}
    found = {(one["block"], 0, unit) for one in report for unit in one["groups_removed"]}
    found |= {(one["block"], 1, unit) for one in report for unit in one["neurons_removed"]}
    assert found == gone
    check_saved(
        llm_pruner, source, tmp_path / "pruned", exact=False, calibration=words, ratio=0.3, scope="global", **EDGES
    )


@pytest.mark.parametrize("family", ["llama", *ARCHITECTURES])
def test_what_is_saved_is_the_model_without_these_units(family, tmp_path):
    options = LLAMAS["mha"] if family == "llama" else {}
    source, words = parent(tmp_path / "parent", family, **options), calibration(tmp_path / "data")
    recipe = {"calibration": words, "ratio": 0.5, "keep_first": 1, "keep_last": 0, "round_to": 16}
    report = prune(llm_pruner, source, tmp_path / "pruned", **recipe)
    pruned, whole = dense(tmp_path / "pruned"), masked(dense(source), report)
    torch.testing.assert_close(pruned(random_ids()).logits, whole(random_ids()).logits, rtol=0, atol=1e-10)
    widths = [(parts.groups, parts.neurons) for parts in parts_of(pruned)]
    first = parts_of(dense(source))[0]
    assert widths == [(first.groups, 48), *[(first.groups // 2, 32)] * 2]  # 24 neurons are as near 16 as 32
    assert [(entry["groups_kept"], entry["neurons_kept"]) for entry in report] == widths[1:]
    check_saved(llm_pruner, source, tmp_path / "pruned", **recipe)


def test_sixteen_bit_weights_are_scored_in_thirty_two(tmp_path):
    words = calibration(tmp_path / "data")
    reports = []
    for dtype in (torch.bfloat16, torch.float32):
        source = parent(tmp_path / str(dtype), dtype=torch.bfloat16, **SIZES)
        if dtype is torch.float32:
            model = checkpoints.load(source, device="cpu").model.float()
            model.save_pretrained(source)
        output = tmp_path / f"{dtype}-pruned"
        reports.append(prune(llm_pruner, source, output, calibration=words, ratio=0.5, order="second", **EDGES))
        assert checkpoints.load(output, device="cpu").model.dtype is dtype
    assert reports[0] == reports[1]


def test_weights_that_are_not_numbers_are_named(tmp_path):
    source, words = parent(tmp_path / "parent", **SIZES), calibration(tmp_path / "data")
    model = checkpoints.load(source, device="cpu").model
    with torch.no_grad():
        parts_of(model)[1].down.weight[0, 0] = float("nan")
    model.save_pretrained(source)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        prune(llm_pruner, source, tmp_path / "pruned", calibration=words, ratio=0.5, **EDGES)
