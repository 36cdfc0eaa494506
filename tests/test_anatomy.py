"""Heads and neurons by architecture: what is kept computes what the masked model computes, and opens anywhere."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from espalier import checkpoints
from espalier.errors import UserError
from espalier.models import anatomy
from families import VOCABULARY, WIDTHS, tiny

IDS = torch.arange(24).reshape(2, 12) % VOCABULARY


def keep_some(model) -> list[tuple[list[int], list[int]]]:
    """Keep other groups and neurons in every block, in an order that is not theirs; return which."""
    kept = []
    for i, parts in enumerate(anatomy.parts_of(model)):
        neurons = torch.randperm(parts.neurons, generator=torch.Generator().manual_seed(i))[: 10 + 8 * i].tolist()
        kept.append(([parts.groups - 1, 0] if i == 1 else [i % parts.groups], neurons))
        anatomy.keep(parts, *kept[-1])
    anatomy.adopt(model)
    return kept


@pytest.mark.parametrize("family", WIDTHS)
def test_kept_parts_compute_what_a_mask_computes(family):
    """The oracle: the whole model, in which what was pruned is silenced where it enters the residual stream."""
    pruned, masked = tiny(family).double(), tiny(family).double()
    kept = keep_some(pruned)
    for parts, (groups, neurons) in zip(anatomy.parts_of(masked), kept, strict=True):
        channels = [channel for group in groups for channel in parts.group_channels(group)]
        for layer, stay in ((parts.output, channels), (parts.down, neurons)):
            gone = sorted(set(range(layer.in_features)) - set(stay))
            layer.weight.data[:, gone] = 0
    torch.testing.assert_close(pruned(IDS).logits, masked(IDS).logits, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(pruned(IDS).logits, tiny(family).double()(IDS).logits)


@pytest.mark.parametrize("family", WIDTHS)
def test_keeping_everything_changes_nothing(family):
    model, whole = tiny(family), tiny(family)
    for parts in anatomy.parts_of(model):
        anatomy.keep(parts, range(parts.groups), range(parts.neurons))
    anatomy.adopt(model)
    assert torch.equal(model(IDS).logits, whole(IDS).logits)
    assert checkpoints.logical_parameters(model) == checkpoints.logical_parameters(whole)


OPEN_ANYWHERE = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "espalier" not in sys.modules
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids, expected = torch.load(folder + "/expected.pt")
    assert torch.equal(model(ids).logits, expected), folder
    dynamic = model.generate(ids, max_new_tokens=8, do_sample=False)
    static = model.generate(
        ids, max_new_tokens=8, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(dynamic, static), folder
    assert torch.equal(dynamic, model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)), folder
    print(type(model).__module__.split(".")[0], type(model).__name__)
"""


def test_width_pruned_checkpoints_open_with_plain_transformers(tmp_path):
    """In a process that knows nothing of Espalier: bit-exact logits, and the same text with every kind of cache."""
    for family in WIDTHS:
        model = tiny(family)
        keep_some(model)
        anatomy.remove_blocks(model, [1])
        model.save_pretrained(tmp_path / family)
        torch.save((IDS, model(IDS).logits), tmp_path / family / "expected.pt")
    command = [sys.executable, "-c", OPEN_ANYWHERE, *(str(tmp_path / family) for family in WIDTHS)]
    environment = {"PATH": "/usr/bin", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [
        f"transformers_modules {type(model_class).__name__}"
        for model_class in (AutoModelForCausalLM.from_pretrained(tmp_path / family) for family in WIDTHS)
    ]


@pytest.mark.parametrize("family", WIDTHS)
def test_width_pruned_checkpoints_open_with_espalier(family, tmp_path):
    """Without trust in code of the checkpoint: the class is Espalier's own. And a skeleton has the same shapes."""
    model = tiny(family)
    keep_some(model)
    model.save_pretrained(tmp_path)
    parameters = checkpoints.logical_parameters(model)
    checkpoints.write_description(tmp_path, {"task": "causal-lm", "parameters": parameters})
    skeleton = checkpoints.skeleton(tmp_path)
    assert {one.device.type for one in skeleton.parameters()} == {"meta"}
    assert checkpoints.logical_parameters(skeleton) == parameters
    shapes = {name: tuple(one.shape) for name, one in model.named_parameters()}
    assert {name: tuple(one.shape) for name, one in skeleton.named_parameters()} == shapes
    (tmp_path / "pruned.py").write_text("raise SystemExit('code of the checkpoint was run')")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded).__module__ == "espalier.models.pruned"
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_pruned_again_after_loading(tmp_path):
    """Sizes are read off the modules: a second pruning of width and depth finds what the first one left."""
    model = tiny("llama")
    keep_some(model)
    before = [parts.neurons for parts in anatomy.parts_of(model)]
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for parts in anatomy.parts_of(model):
        anatomy.keep(parts, range(parts.groups), range(parts.neurons - 1))
    anatomy.remove_blocks(model, [0])
    anatomy.adopt(model)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert [parts.neurons for parts in anatomy.parts_of(again)] == [width - 1 for width in before[1:]]
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.config.model_type == "pruned_llama"
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == ["PrunedLlamaForCausalLM"]


def test_grouped_queries_go_together():
    model = tiny("llama")  # four query heads of size 8 read two key/value heads
    parts = anatomy.parts_of(model)[0]
    assert (parts.heads, parts.groups, parts.head_dim, parts.neurons) == (4, 2, 8, 48)
    assert parts.group_channels(1) == range(16, 32)
    query, key = parts.query.weight.clone(), parts.key.weight.clone()
    anatomy.keep(parts, [1], range(48))
    assert torch.equal(parts.query.weight, query[16:32])
    assert torch.equal(parts.key.weight, key[8:16])
    assert (parts.heads, parts.groups) == (2, 1)


def test_unsupported_architectures_are_refused_with_the_list():
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=2, vocab_size=11)
    with pytest.raises(UserError, match=r"A 'gpt2' model cannot be pruned; supported are llama, .*, opt, gpt_neox\."):
        anatomy.blocks_of(AutoModelForCausalLM.from_config(config))
    with pytest.raises(UserError, match=r"'gpt_neox' model cannot be pruned, only whole blocks; .*: llama, .*, opt\."):
        anatomy.parts_of(tiny("gpt_neox"))


def test_a_block_cannot_be_emptied():
    with pytest.raises(ValueError, match="at least one"):
        anatomy.keep(anatomy.parts_of(tiny("llama"))[0], [], [1])


def test_a_head_count_that_key_value_heads_do_not_divide():
    model = tiny("llama", num_key_value_heads=3)
    for find in (anatomy.blocks_of, anatomy.parts_of):
        with pytest.raises(UserError, match="4 query heads cannot be shared out evenly over 3 key/value heads"):
            find(model)
