"""Wanda-sp against its formula written out naively, in float64, block after block."""

from __future__ import annotations

import pytest
import torch

from espalier import checkpoints
from espalier.models.anatomy import parts_of
from espalier.prune import wanda_sp
from width_cases import (
    ARCHITECTURES,
    LLAMAS,
    calibration,
    check_saved,
    dense,
    inputs_of,
    lowest,
    mask,
    masked,
    parent,
    prune,
    random_ids,
    windows,
)

SIZES = {"num_hidden_layers": 4, "intermediate_size": 20, "initializer_range": 0.3}


def naive_channels(weight: torch.Tensor, inputs: torch.Tensor) -> list[float]:
    """mean over rows i of |W_ij| · ‖X_j‖₂, one channel j at a time."""
    scores = []
    for j in range(weight.shape[1]):
        norm = sum(value * value for value in inputs[:, j].tolist()) ** 0.5
        scores.append(sum(abs(value) * norm for value in weight[:, j].tolist()) / weight.shape[0])
    return scores


@pytest.mark.parametrize("heads", LLAMAS)
def test_scores_and_selection_with_pruned_outputs_fed_on(heads, tmp_path):
    source, words = parent(tmp_path / "parent", **SIZES, **LLAMAS[heads]), calibration(tmp_path / "data")
    edges = {"keep_first": 1, "keep_last": 1, "batch_size": 4}
    report = prune(wanda_sp, source, tmp_path / "pruned", calibration=words, ratio=0.5, **edges)
    model, ids = dense(source), windows(source, words)
    assert [entry["block"] for entry in report] == [1, 2]
    for entry in report:
        parts = parts_of(model)[entry["block"]]
        heads_in, mlp_in = inputs_of(model, ids)[entry["block"]]  # earlier blocks are masked by now
        channels = naive_channels(parts.output.weight, heads_in)
        width = len(channels) // model.config.num_key_value_heads
        groups = [sum(channels[start : start + width]) for start in range(0, len(channels), width)]
        neurons = naive_channels(parts.down.weight, mlp_in)
        assert entry["group_scores"] == pytest.approx(groups, rel=1e-5)
        assert entry["neuron_scores"] == pytest.approx(neurons, rel=1e-5)
        assert entry["groups_removed"] == lowest(groups, len(groups) // 2)
        assert entry["neurons_removed"] == lowest(neurons, 10)
        mask(parts, entry["groups_removed"], entry["neurons_removed"])


@pytest.mark.parametrize("family", ["llama", *ARCHITECTURES])
def test_what_is_saved_is_the_model_without_these_units(family, tmp_path):
    source, words = parent(tmp_path / "parent", family), calibration(tmp_path / "data")
    recipe = {"calibration": words, "parameters": 0.65 * checkpoints.describe(source)["parameters"]}
    report = prune(wanda_sp, source, tmp_path / "pruned", **recipe)
    pruned, whole = dense(tmp_path / "pruned"), masked(dense(source), report)
    torch.testing.assert_close(pruned(random_ids()).logits, whole(random_ids()).logits, rtol=0, atol=1e-10)
    check_saved(wanda_sp, source, tmp_path / "pruned", **recipe)


def test_a_pruned_model_can_be_pruned_again(tmp_path):
    source, words = parent(tmp_path / "parent", "qwen3"), calibration(tmp_path / "data")
    prune(wanda_sp, source, tmp_path / "once", calibration=words, ratio=0.5, keep_last=2)
    report = prune(wanda_sp, tmp_path / "once", tmp_path / "twice", calibration=words, ratio=0.5, keep_first=1)
    twice, whole = dense(tmp_path / "twice"), masked(dense(tmp_path / "once"), report)
    torch.testing.assert_close(twice(random_ids()).logits, whole(random_ids()).logits, rtol=0, atol=1e-10)
    assert [(parts.groups, parts.neurons) for parts in parts_of(twice)] == [(1, 24)] * 3
