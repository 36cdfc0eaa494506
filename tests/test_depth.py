"""Depth pruning: exact sizes, checkpoints that open with transformers alone, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch

import tiny
from depth_cases import (
    CALIBRATED,
    llama,
    naive_perplexities,
    prune,
    save,
    windows_of,
    without,
    words,
)
from espalier import checkpoints, recipes
from espalier.data import Calibration
from espalier.errors import UserError
from espalier.models import anatomy
from espalier.models.block_scores import CRITERIA
from espalier.prune import depth
from families import tiny as model_of


@pytest.fixture
def parent(tmp_path):
    """A random Llama of four blocks, saved."""
    return save(llama(), tmp_path / "parent")


@pytest.fixture
def calibration(tmp_path):
    return words(tmp_path / "data")


def narrow(model, blocks):
    """Take a group of heads and some neurons from blocks."""
    for parts in [anatomy.parts_of(model)[block] for block in blocks]:
        anatomy.keep(parts, [1], range(10, 40))
    anatomy.adopt(model)
    return model


def seven_billion():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig())


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "glm"])
def test_pruned_checkpoints_open_with_transformers_alone(family, calibration, tmp_path):
    from transformers import AutoModelForCausalLM

    parent = save(model_of(family, vocab_size=tiny.VOCABULARY, num_hidden_layers=4), tmp_path / "parent")
    output, report = prune(parent, tmp_path, blocks=2, calibration=calibration)
    whole = checkpoints.load(parent, device="cpu").model
    expected = naive_perplexities(whole.double(), windows_of(parent, calibration))
    assert report["scores"] == [pytest.approx(expected, rel=1e-5)]
    whole = without(checkpoints.load(parent, device="cpu").model, report["removed"])
    plain = AutoModelForCausalLM.from_pretrained(output).eval()
    ids = torch.arange(40, 52)[None]
    assert torch.equal(plain(ids).logits, whole(ids, use_cache=False).logits)
    again = tmp_path / "again"
    plain.save_pretrained(again)
    states = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (output, again)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    uncached = plain.generate(ids, use_cache=False, **settings)
    assert torch.equal(plain.generate(ids, **settings), uncached)
    static = plain.generate(ids, cache_implementation="static", disable_compile=True, **settings)
    assert torch.equal(static, uncached)


def test_a_pruned_model_of_a_local_folder_is_the_pruned_one(parent, calibration, tmp_path):
    """The parent is a pointer; what is saved must not point there too."""
    pointer = tmp_path / "pointer"
    pointer.mkdir()
    reference = {"path": str(parent), "id": None, "revision": None, "task": "causal-lm", "dtype": "bfloat16"}
    checkpoints.refer(pointer, {**reference, "trust_remote_code": False})
    output, report = prune(pointer, tmp_path, blocks=2, calibration=calibration)
    loaded = checkpoints.load(output, device="cpu")
    assert len(loaded.model.model.layers) == report["blocks"] - 2 == 2
    info = checkpoints.describe(output)
    assert (info["format"], info["bits"]) == ("transformers", 16)
    assert info["parameters"] == checkpoints.logical_parameters(loaded.model)


def test_blocks_of_a_width_pruned_model(calibration, tmp_path):
    model = narrow(llama(), [1, 3])
    parent = save(model, tmp_path / "parent")
    output, report = prune(parent, tmp_path, blocks=2, calibration=calibration)
    expected = naive_perplexities(copy.deepcopy(model).double(), windows_of(parent, calibration))
    assert report["scores"] == [pytest.approx(expected, rel=1e-5)]
    ids = torch.arange(40, 52)[None]
    pruned = checkpoints.load(output, device="cpu").model
    assert torch.equal(pruned(ids).logits, without(model, report["removed"])(ids, use_cache=False).logits)
    assert checkpoints.describe(output)["parameters"] == checkpoints.logical_parameters(pruned)


@pytest.mark.parametrize(
    ("target", "blocks"),
    [
        *(({"blocks": blocks}, blocks) for blocks in (6, 9, 15, 20)),
        ({"parameters": 5.5e9}, 6),
        ({"parameters": 4.9e9}, 9),
        ({"parameters": 3.7e9}, 15),
        ({"parameters": 2.7e9}, 20),
        ({"ratio": 0.2}, 7),  # 6.66
        ({"ratio": 0.27}, 9),  # 8.99
        ({"ratio": 0.016}, 1),  # 0.53
    ],
)
def test_targets_of_llama_7b(target, blocks):
    model = seven_billion()
    assert checkpoints.logical_parameters(model) == 6_738_415_616
    assert depth.plan(model, depth.Recipe(criterion="magnitude", **target)) is True
    assert checkpoints.logical_parameters(model) == 6_738_415_616 - blocks * 202_383_360
    assert model.config.num_hidden_layers == len(model.model.layers) == 32 - blocks


def test_a_size_is_met_and_planned(parent, tmp_path):
    skeleton = checkpoints.skeleton(parent)
    dense = checkpoints.logical_parameters(skeleton)
    recipe = {"criterion": "magnitude", "parameters": 0.6 * dense}
    assert depth.plan(skeleton, depth.Recipe(**recipe))
    output, _ = prune(parent, tmp_path, **recipe)
    assert checkpoints.describe(output)["parameters"] == checkpoints.logical_parameters(skeleton) < dense


@pytest.mark.parametrize(("edges", "exact"), [({}, False), ({"keep_first": 2}, True)])
def test_a_plan_is_exact_where_blocks_that_may_go_are_alike(edges, exact):
    model = narrow(llama(), [0])
    whole, dense = sum(one.numel() for one in model.model.layers[3].parameters()), checkpoints.logical_parameters(model)
    assert depth.plan(model, depth.Recipe(criterion="random", blocks=1, **edges)) is exact
    assert checkpoints.logical_parameters(model) == dense - whole  # three of four blocks are of this size


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"blocks": 4}, "'blocks: 4' cannot be met: the model has 4 blocks and .* at most 3 blocks may be removed"),
        ({"blocks": 2, "keep_first": 2, "keep_last": 1}, "at most 1 blocks may be removed"),
        ({"blocks": 1, "keep_first": 2, "keep_last": 2}, "'keep_first: 2' and 'keep_last: 2' leave none of them"),
        ({"parameters": 1.0e12}, "'parameters: 1,000,000,000,000' cannot be met"),
        ({"parameters": 10.0}, "'parameters: 10' cannot be met"),
        ({"ratio": 0.9}, "'ratio: 0.9' cannot be met"),
        ({"ratio": 0.001}, "'ratio: 0.001' cannot be met"),
    ],
)
def test_a_target_that_cannot_be_met_is_refused_before_weights_are_read(target, message, parent, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "load", None)
    with pytest.raises(UserError, match=message):
        prune(parent, tmp_path, criterion="random", **target)


def test_text_that_is_too_short_is_refused_before_weights_are_read(parent, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "load", None)
    mapping = {**tiny.calibration(tmp_path / "data", samples=1), "samples": 100}
    sets = recipes.build(Calibration, mapping, "calibration")
    with pytest.raises(UserError, match=r"holds only \d+ windows of 32 tokens, but the calibration asks for 100"):
        prune(parent, tmp_path, blocks=1, calibration=sets)


def test_an_architecture_that_is_not_supported(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    parent = save(
        GPT2LMHeadModel(GPT2Config(vocab_size=tiny.VOCABULARY, n_embd=32, n_layer=2, n_head=2)), tmp_path / "parent"
    )
    with pytest.raises(UserError, match=r"A 'gpt2' model cannot be pruned; supported are llama, .*, gpt_neox\."):
        prune(parent, tmp_path, blocks=1, criterion="magnitude")


@pytest.mark.parametrize("criterion", CRITERIA)
def test_weights_that_are_not_numbers(criterion, calibration, tmp_path):
    model = llama(blocks=2)
    model.model.layers[1].mlp.up_proj.weight.data[3, 2] = float("nan")
    sets = {"calibration": calibration} if criterion in CALIBRATED else {}
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight of the model holds NaN"):
        prune(save(model, tmp_path / "parent"), tmp_path, blocks=1, criterion=criterion, **sets)


def test_a_model_that_overflows(calibration, tmp_path):
    model = llama(blocks=2)
    model.model.layers[1].mlp.up_proj.weight.data *= 1e38
    with pytest.raises(UserError, match="The score of block 0 is not a finite number: the model overflows"):
        prune(save(model, tmp_path / "parent"), tmp_path, blocks=1, calibration=calibration)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({}, "exactly one of 'blocks', 'ratio' and 'parameters'"),
        ({"blocks": 1, "ratio": 0.2}, "exactly one of 'blocks', 'ratio' and 'parameters'"),
        ({"blocks": 0}, "'blocks' must be at least 1"),
        ({"ratio": 1.0}, "'ratio' must lie between 0 and 1"),
        ({"ratio": 0.0}, "'ratio' must lie between 0 and 1"),
        ({"parameters": 0.0}, "'parameters' must be positive"),
        ({"blocks": 1, "keep_last": -1}, "must not be negative"),
        ({"blocks": 1, "batch_size": 0}, "'batch_size' must be at least 1"),
        *(
            ({"blocks": 1, "criterion": name}, f"the criterion '{name}' needs the key 'calibration'")
            for name in CALIBRATED
        ),
        *(
            ({"blocks": 1, "criterion": name, "calibration": ...}, f"the criterion '{name}' does not use the key")
            for name in ("magnitude", "random")
        ),
    ],
)
def test_recipes_that_make_no_sense(recipe, message, calibration):
    if "calibration" in recipe:
        recipe = {**recipe, "calibration": calibration}
    elif "criterion" not in recipe:
        recipe = {"criterion": "random", **recipe}
    with pytest.raises(ValueError, match=message):
        depth.Recipe(**recipe).check()
