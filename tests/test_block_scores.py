"""Every criterion of depth pruning against its formula written out naively, and what a scan costs."""

from __future__ import annotations

import typing
from random import Random

import pytest
import torch

import tiny
from depth_cases import (
    CALIBRATED,
    NAIVE,
    llama,
    matrices,
    naive_perplexity,
    naive_taylor,
    prune,
    save,
    windows_of,
    without,
    words,
)
from espalier import checkpoints
from espalier.models.block_scores import CRITERIA
from espalier.models.streaming import BlockStream
from espalier.prune import depth

LLAMAS = {"mha": {"num_key_value_heads": 4}, "gqa": {"num_key_value_heads": 2}}


@pytest.fixture
def parent(tmp_path):
    return save(llama(), tmp_path / "parent")


@pytest.fixture
def calibration(tmp_path):
    return words(tmp_path / "data")


@pytest.mark.parametrize("heads", LLAMAS)
@pytest.mark.parametrize("criterion", NAIVE)
def test_scores_and_order_are_those_of_the_formula(criterion, heads, calibration, tmp_path):
    model = llama(**LLAMAS[heads])
    for (_, weights), factor in zip(matrices(model), (1.1, 0.9, 1.2, 0.8), strict=True):
        for weight in weights:
            weight.data *= factor
    parent = save(model, tmp_path / "parent")
    windows = windows_of(parent, calibration)
    sets = {"calibration": calibration, "batch_size": 2} if criterion in CALIBRATED else {}
    _, report = prune(parent, tmp_path, blocks=3, criterion=criterion, **sets)
    whole = checkpoints.load(parent, device="cpu").model.double()
    expected = NAIVE[criterion](whole, windows)
    assert report["scores"] == [pytest.approx(expected, rel=1e-5)]
    assert report["removed"] == sorted(expected, key=expected.get)[:3]
    assert report["removed"] != [0, 1, 2]
    if criterion == "perplexity":
        assert report["original_perplexity"] == pytest.approx(naive_perplexity(whole, windows), rel=1e-5)
    else:
        assert report["original_perplexity"] is None
    assert (report["criterion"], report["blocks"]) == (criterion, 4)


def test_every_name_of_a_criterion_is_in_the_table_and_tested():
    assert set(typing.get_args(depth.Ranking)) == set(CRITERIA) == {*NAIVE, "random"}


def test_gradients_of_16_bit_weights_are_taken_in_32(calibration, tmp_path):
    parent = save(llama().bfloat16(), tmp_path / "parent")
    output, report = prune(parent, tmp_path, blocks=1, criterion="taylor", calibration=calibration)
    whole = checkpoints.load(parent, device="cpu").model
    weights = without(whole, report["removed"]).state_dict()
    expected = naive_taylor(whole.double(), windows_of(parent, calibration))
    assert report["scores"] == [pytest.approx(expected, rel=1e-5)]
    pruned = checkpoints.load(output, device="cpu").model
    assert pruned.dtype == torch.bfloat16
    assert all(torch.equal(weight, pruned.state_dict()[name]) for name, weight in weights.items())


def test_random_blocks_are_drawn_by_the_seed(parent, tmp_path):
    orders = [
        prune(parent, tmp_path, seed, blocks=3, criterion="random")[1]["removed"] for seed in (0, 0, *range(1, 20))
    ]
    assert orders[0] == orders[1]
    assert {order[0] for order in orders} == {0, 1, 2, 3}


@pytest.mark.parametrize("criterion", ["perplexity", "block-influence"])
def test_greedy_scores_again_what_is_left(criterion, parent, calibration, tmp_path):
    recipe = {"criterion": criterion, "calibration": calibration, "schedule": "greedy", "keep_first": 1}
    _, report = prune(parent, tmp_path, blocks=2, **recipe)
    whole = checkpoints.load(parent, device="cpu").model.double()
    windows, there = windows_of(parent, calibration), [0, 1, 2, 3]
    assert len(report["scores"]) == len(report["removed"]) == 2
    if criterion == "perplexity":
        assert report["original_perplexity"] == pytest.approx(naive_perplexity(whole, windows), rel=1e-5)
    for scan, gone in zip(report["scores"], report["removed"], strict=True):
        shorter = without(whole, set(range(4)) - set(there))
        scores = NAIVE[criterion](shorter, windows)
        expected = {there[place]: score for place, score in scores.items() if there[place] != 0}
        assert scan == pytest.approx(expected, rel=1e-5)  # under the numbers that blocks have in the parent
        assert gone == min(expected, key=expected.get)
        there.remove(gone)


def test_greedy_taylor_takes_gradients_of_what_is_left(parent, calibration, tmp_path):
    recipe = {"criterion": "taylor", "calibration": calibration, "schedule": "greedy"}
    _, report = prune(parent, tmp_path, blocks=2, **recipe)
    gone = report["removed"][0]
    there = [block for block in range(4) if block != gone]
    shorter = without(checkpoints.load(parent, device="cpu").model.double(), [gone])
    scores = naive_taylor(shorter, windows_of(parent, calibration))
    assert report["scores"][1] == pytest.approx({there[place]: score for place, score in scores.items()}, rel=1e-5)


@pytest.mark.parametrize(
    ("candidates", "evaluations"),
    [
        (range(6), 6 + 5 + 4 + 3 + 2 + 1 + 0),  # one model after another would take 6 + 6 * 5
        (range(1, 4), 6 + 4 + 3 + 2),
    ],
)
def test_the_perplexity_scan_shares_the_hidden_states_before_a_block(candidates, evaluations):
    model = llama(blocks=6)
    windows = torch.randint(0, 256, (5, 12), generator=torch.Generator().manual_seed(1))
    moves = []

    class Counted(BlockStream):
        def resident(self, index):
            moves.append(index)
            return super().resident(index)

    stream = Counted(model, windows, "cpu", batch_size=2)
    scan = CRITERIA["perplexity"].score(stream, candidates, Random(0))
    expected = {block: naive_perplexity(model, windows.tolist(), [block]) for block in candidates}
    assert scan.scores == pytest.approx(expected, rel=1e-6)
    assert scan.perplexity == pytest.approx(naive_perplexity(model, windows.tolist()), rel=1e-6)
    assert stream.evaluations == evaluations
    assert moves == list(range(6))


@pytest.mark.parametrize("schedule", ["one-shot", "greedy"])
@pytest.mark.parametrize("criterion", ["perplexity", "block-influence"])
def test_blocks_that_do_nothing_go_and_change_nothing(criterion, schedule, calibration, tmp_path):
    """The other blocks are trained on the calibration text, or the loss would not miss them."""
    model = llama(blocks=6)
    for block in (1, 4):
        for layer in (model.model.layers[block].self_attn.o_proj, model.model.layers[block].mlp.down_proj):
            torch.nn.init.zeros_(layer.weight.requires_grad_(False))
    ids = torch.tensor(calibration.token_ids(tiny.tokenizer()))
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    recipe = {"criterion": criterion, "calibration": calibration, "schedule": schedule}
    output, report = prune(save(model, tmp_path / "parent"), tmp_path, blocks=2, **recipe)
    assert sorted(report["removed"]) == [1, 4]
    assert torch.equal(checkpoints.load(output, device="cpu").model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_kept_blocks_stay(criterion, calibration, tmp_path):
    parent = save(llama(blocks=5), tmp_path / "parent")
    sets = {"calibration": calibration} if criterion in CALIBRATED else {}
    _, report = prune(parent, tmp_path, blocks=2, criterion=criterion, keep_first=1, keep_last=1, **sets)
    scan = report["scores"][0]
    assert set(scan) == {1, 2, 3}
    assert report["removed"] == sorted(scan, key=scan.get)[:2]


def test_peaks(calibration):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig()).bfloat16()
    sets = {name: {"calibration": calibration} if name in CALIBRATED else {} for name in CRITERIA}
    peaks = {name: depth.peak_bytes(model, depth.Recipe(blocks=1, criterion=name, **sets[name])) for name in CRITERIA}
    block = 202_383_360
    assert peaks["magnitude"] == peaks["random"] == 2 * block
    assert 2 * block < peaks["block-influence"] < peaks["perplexity"] < 4 * block  # embeddings and head are larger
    # Weights, two means and a sample's gradients, in 32 bits.
    assert 4 * 4 * block < peaks["taylor"] < 4.2 * 4 * block
