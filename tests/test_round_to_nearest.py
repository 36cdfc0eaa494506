"""Rounding, and the checkpoints of packed integers: opened here, in a fresh process, and by transformers alone."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT
from espalier import checkpoints, lowbit_loading, plugins, recipes
from espalier.errors import UserError
from espalier.models.lowbit import LowBitLinear, Scheme
from tiny import llama

W8A8 = {"bits": 8, "symmetric": True, "activations": 8}
W4A8 = {**W8A8, "bits": 4}
RECIPES = [W8A8, W4A8, {"bits": 8}, {"bits": 4, "group_size": 32}, {"bits": 3, "group_size": 16}, {"bits": 2}]
FRESH = """
import sys, torch
from espalier import checkpoints
models = [checkpoints.load(folder, device="cpu").model for folder in sys.argv[2:]]
with torch.no_grad(): torch.save([model(torch.arange(40)[None]).logits for model in models], sys.argv[1])
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def made(dense, tmp_path_factory):
    """Return a function that rounds the dense model, each recipe once."""
    root, done = tmp_path_factory.mktemp("rounded"), {}

    def make(**mapping):
        key = json.dumps(mapping)
        if key not in done:
            done[key] = root / str(len(done))
            round_model(dense, done[key], **mapping)
        return done[key]

    return make


def round_model(parent, output, **mapping):
    output.mkdir()
    module = plugins.load("quantize", "round-to-nearest")
    return module.apply(parent, output, recipes.build(module.Recipe, mapping, "recipe"), seed=0, device="cpu")


def logits(model):
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_transformers_alone_opens_what_was_written(made, recipe):
    from transformers import AutoModelForCausalLM

    folder = made(**recipe)
    ours, theirs = logits(checkpoints.load(folder, "cpu").model), logits(AutoModelForCausalLM.from_pretrained(folder))
    # It rounds activations by max / 127.5, and in floating point; without activations it is the same arithmetic.
    assert (ours - theirs).norm() / theirs.norm() < (0.05 if "activations" in recipe else 1e-6)


def test_a_fresh_process_computes_the_same(made, tmp_path):
    folders = [made(**recipe) for recipe in RECIPES]
    subprocess.run([sys.executable, "-c", FRESH, tmp_path / "logits", *folders], check=True, capture_output=True)
    for found, folder in zip(torch.load(tmp_path / "logits"), folders, strict=True):
        assert torch.equal(found, logits(checkpoints.load(folder, "cpu").model))


@pytest.mark.parametrize(("recipe", "error"), [(W8A8, 0.08), ({"bits": 8}, 0.06), (W4A8, 0.6), ({"bits": 3}, 0.9)])
def test_logits_resemble_the_parents_more_with_more_bits(dense, made, recipe, error):
    true = logits(checkpoints.load(dense, "cpu").model)
    found = logits(checkpoints.load(made(**recipe), "cpu").model)
    assert error / 5 < (found - true).norm() / true.norm() < error


def test_files_and_memory_hold_as_many_bits_as_they_say(dense, made):
    weights = sum(one.numel() for name, one in load_file(dense / "model.safetensors").items() if "proj.weight" in name)
    for recipe, bits in ((W8A8, 8), (W4A8, 4), ({"bits": 3, "group_size": 16}, 3), ({"bits": 2}, 2)):
        folder = made(**recipe)
        stored = load_file(folder / "model.safetensors")
        on_disk = sum(one.nbytes for name, one in stored.items() if name.endswith(("proj.weight", "weight_packed")))
        assert on_disk == weights * bits / 8
        layers = [one for one in checkpoints.load(folder, "cpu").model.modules() if isinstance(one, LowBitLinear)]
        in_memory = [one.weight_packed if one.scheme.packed else one.weight for one in layers]
        assert sum(one.nbytes for one in in_memory) == on_disk
        described = checkpoints.describe(folder)
        assert (described["format"], described["bits"]) == ("compressed-tensors", bits)
        assert described["arithmetic"] == ("integer" if "activations" in recipe else "unpacked")
        assert described["parameters"] == checkpoints.describe(dense)["parameters"]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_config_is_one_that_compressed_tensors_reads(made, recipe):
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((made(**recipe) / "config.json").read_text())["quantization_config"]
    read = QuantizationConfig.model_validate(config)
    assert read.config_groups["group_0"].weights.num_bits == recipe["bits"]
    assert read.ignore == ["lm_head"]
    assert read.format == ("int-quantized" if recipe == W8A8 else "pack-quantized")
    scheme = Scheme(**{"group_size": -1, "symmetric": False, "activations": None, **recipe})
    assert lowbit_loading.scheme_of(config) == scheme


@pytest.mark.parametrize("recipe", [W8A8, W4A8], ids=str)
def test_files_without_a_weight_or_with_one_too_many_are_refused(made, recipe, tmp_path):
    folder = shutil.copytree(made(**recipe), tmp_path / "copy")
    stored, name = load_file(folder / "model.safetensors"), "model.layers.1.self_attn.k_proj.weight_scale"
    save_file({key: one for key, one in stored.items() if key != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"copy cannot be loaded: its files lack weights of the model, such as {name}"):
        checkpoints.load(folder, "cpu")
    save_file({**stored, f"{name}s": stored[name].clone()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"its weights have no place in the model, such as {name}s"):
        checkpoints.load(folder, "cpu")


def test_integer_products_need_one_symmetric_scale_a_row():
    module = plugins.load("quantize", "round-to-nearest")
    for wrong in ({"symmetric": False}, {"group_size": 32}):
        with pytest.raises(UserError, match="'activations: 8' needs 'group_size: -1' and 'symmetric: true'"):
            recipes.build(module.Recipe, {**W8A8, **wrong}, "recipe")


def test_groups_must_divide_every_layer_before_weights_are_read(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "load", None)
    with pytest.raises(UserError, match=r"down_proj of .* has 64 input channels, which groups of 128"):
        round_model(dense, tmp_path / "output", bits=4, group_size=128)


def test_a_local_model_that_is_quantized_already_is_refused(made, tmp_path):
    """A pointer to it would be taken for a model of whole weights, and its codes for weights."""
    about = dict.fromkeys(("id", "revision", "dtype")) | {"task": "causal-lm", "trust_remote_code": False}
    with pytest.raises(
        UserError, match=r"is quantized already \(compressed-tensors\)\. Name the model that it was made"
    ):
        checkpoints.refer(tmp_path, {**about, "path": str(made(**W8A8))})


def test_quantized_parent_is_refused(made, tmp_path):
    with pytest.raises(UserError, match=r"is quantized already \(compressed-tensors\): round-to-nearest needs"):
        round_model(made(bits=2), tmp_path / "output", bits=4)


KILLED = """
import os, signal, sys
sys.path.insert(0, "workflow/scripts")
import quantize_model
from espalier import checkpoints
# The weights are written, the description that makes a checkpoint of them is not.
checkpoints.write_description = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
quantize_model.main(sys.argv[1:])
"""


def test_a_kill_in_the_middle_leaves_nothing_that_looks_finished_and_the_same_command_finishes(dense, tmp_path):
    arguments = ["--parent", dense, "--recipe", json.dumps({"quantize": "round-to-nearest", **W4A8})]
    arguments += ["--output", tmp_path / "model", "--step", tmp_path / "step.json", "--study", "s", "--model-name", "m"]
    arguments += ["--seed", "0", "--chain", "dense+q", "--name", "q", "--device", "cpu"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "step.json").exists()
    script = [sys.executable, "workflow/scripts/quantize_model.py"]
    subprocess.run([*script, *arguments], cwd=ROOT, check=True, capture_output=True)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "step.json"}
    assert logits(checkpoints.load(tmp_path / "model", "cpu").model).isfinite().all()
