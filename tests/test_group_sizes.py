"""Group sizes are compared with a model's widths wherever the config tells them."""

from __future__ import annotations

import json

import pytest

from espalier import group_sizes, plugins, recipes
from espalier.config import Model, Step
from espalier.errors import UserError


def step(kind: str, method: str, **keys) -> Step:
    module = plugins.load(kind, method)
    return Step("mine", kind, method, recipes.build(module.Recipe, keys, "recipe"), {}, [])


ROUND = step("quantize", "round-to-nearest", bits=4, group_size=128)
SHORTEN = step("prune", "depth", blocks=2, criterion="magnitude")


def pretrained(**sizes) -> dict:
    return group_sizes.sizes_of(Model(pretrain="random-weights"), step("pretrain", "random-weights", **sizes))


@pytest.mark.parametrize(
    ("removed", "most"),
    [
        ([{"blocks": 3}], None),
        ([{"blocks": 4}], "of the model's 4 at most 3"),
        ([{"blocks": 2}, {"blocks": 1}], None),
        ([{"blocks": 2}, {"blocks": 2}], "of the model's 2 at most 1"),
        ([{"blocks": 1, "keep_first": 2, "keep_last": 1}], None),
        ([{"blocks": 2, "keep_first": 2, "keep_last": 1}], "of the model's 4 at most 1"),
        ([{"blocks": 1, "keep_first": 3, "keep_last": 2}], "of the model's 4 at most 0"),
        ([{"ratio": 0.9}], None),  # its job knows the sizes
    ],
)
def test_blocks_that_a_model_has_not(removed, most):
    steps = [step("prune", "depth", criterion="magnitude", **keys) for keys in removed]
    if most is None:
        group_sizes.check({"num_hidden_layers": 4}, steps, "study")
        group_sizes.check({}, steps, "study")
        return
    with pytest.raises(UserError, match=most):
        group_sizes.check({"num_hidden_layers": 4}, steps, "study")


@pytest.mark.parametrize("shape", ["llama-7b", "opt-6.7b", "chatglm2-6b"])
def test_published_shapes_take_groups_of_128(shape):
    sizes = pretrained(shape=shape)
    assert set(sizes) & {"intermediate_size", "ffn_dim"}
    group_sizes.check(sizes, [SHORTEN, ROUND], "study")


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"hidden_size": 192, "intermediate_size": 256}, "hidden_size of 192"),
        ({"hidden_size": 256, "intermediate_size": 192}, "intermediate_size of 192"),
        ({"hidden_size": 256, "ffn_dim": 64}, "ffn_dim of 64"),
    ],
)
def test_groups_that_do_not_divide_a_width_are_named(config, key):
    sizes = pretrained(config={"model_type": "llama", **config})
    with pytest.raises(UserError, match=f"study: 'mine' makes groups of 128 .*'group_size'.* do not divide .*{key}"):
        group_sizes.check(sizes, [SHORTEN, ROUND], "study")


def test_layers_that_the_model_has_not_are_named():
    glue = {"task": "cola", "dataset": {"name": "words", "source": "local", "path": "words"}, "bits": 1, "steps": 1}
    sizes = group_sizes.sizes_of(
        Model(pretrain="demo-encoder"), step("pretrain", "demo-encoder", dataset=glue["dataset"], layers=2)
    )
    group_sizes.check(sizes, [step("quantize", "xtc", layers=[1], **glue)], "study")
    with pytest.raises(UserError, match=r"study: 'mine' keeps layer 5 \(the key 'layers'\), .* has layers 0 to 1"):
        group_sizes.check(sizes, [step("quantize", "xtc", layers=[0, 5], **glue)], "study")


def test_behind_a_change_of_widths_nothing_is_known():
    words = {"name": "words", "source": "local", "path": "words"}
    samples = {"text": {"dataset": words, "split": "calibration"}, "samples": 4, "length": 8}
    narrow = step("prune", "flap", ratio=0.2, calibration=samples)
    group_sizes.check({"hidden_size": 192}, [narrow, ROUND], "study")


def test_a_local_model_says_its_sizes_itself_and_one_of_the_hub_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 192}))
    with pytest.raises(UserError, match="hidden_size of 192"):
        group_sizes.check(group_sizes.sizes_of(Model(path=str(tmp_path)), None), [ROUND], "study")
    # Of a width-pruned one these are the sizes before it was pruned.
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 192, "block_shapes": []}))
    group_sizes.check(group_sizes.sizes_of(Model(path=str(tmp_path)), None), [ROUND], "study")
    group_sizes.check(group_sizes.sizes_of(Model(hub="some/model", revision="0" * 40), None), [ROUND], "study")


def test_a_model_of_the_hub_has_the_sizes_of_its_shape_until_its_own_are_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = Model(hub="some/model", revision="0" * 40, shape="llama-7b")
    deep = step("quantize", "round-to-nearest", bits=4, group_size=512)
    with pytest.raises(UserError, match=r"do not divide the model's intermediate_size of 11008\."):
        group_sizes.check(group_sizes.sizes_of(model, None), [deep], "study")
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"intermediate_size": 1024}))
    group_sizes.check(group_sizes.sizes_of(model, None), [deep], "study")
