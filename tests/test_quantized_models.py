"""Every quantizer on models that were pruned before: saved, opened in a fresh process, and like the parent."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from transformers import dynamic_module_utils

from espalier import checkpoints, gptq_loading, plugins, recipes
from espalier.models.anatomy import adopt, keep, parts_of, remove_blocks
from tiny import calibration, llama

CALIBRATED = ("gptq", "smoothquant", "awq")
# Name → method, recipe, and the most that logits may differ from the parent's, as a share of their norm.
QUANTIZERS = {
    "gptq, 8 bits": ("gptq", {"bits": 8, "group_size": 32}, 0.05),
    "gptq, 4 bits": ("gptq", {"bits": 4, "group_size": 32}, 0.6),
    "bitsandbytes, 8 bits": ("bitsandbytes", {"bits": 8}, 0.05),
    "bitsandbytes, nf4": ("bitsandbytes", {"bits": 4}, 0.6),
    "bitsandbytes, fp4": ("bitsandbytes", {"bits": 4, "type": "fp4"}, 0.6),
    "round to nearest, W8A8": ("round-to-nearest", {"bits": 8, "symmetric": True, "activations": 8}, 0.08),
    "round to nearest, 4 bits": ("round-to-nearest", {"bits": 4, "group_size": 32}, 0.6),
    "smoothquant, W8A8": ("smoothquant", {"bits": 8}, 0.08),
    "smoothquant, W4A8": ("smoothquant", {"bits": 4}, 0.8),
    "smoothquant, W4A8 by gptq": ("smoothquant", {"bits": 4, "rounding": "gptq"}, 0.8),
    "awq, 8 bits": ("awq", {"bits": 8, "group_size": 32}, 0.05),
    "awq, 4 bits": ("awq", {"bits": 4, "group_size": 32}, 0.6),
}
IN_INTEGERS = [name for name in QUANTIZERS if name == "bitsandbytes, 8 bits" or "A8" in name]
FRESH = """
import sys, torch
from espalier import checkpoints
models = [checkpoints.load(folder, device="cpu").model for folder in sys.argv[2:]]
with torch.no_grad(): torch.save([model(torch.arange(40)[None]).logits for model in models], sys.argv[1])
"""


def shorten(model) -> None:
    remove_blocks(model, [1])


def narrow(model) -> None:
    """Make the widths of heads and neurons differ by block."""
    for parts, groups, neurons in zip(parts_of(model), ([0, 2], [0, 1, 2, 3], [3, 1]), (64, 128, 128), strict=True):
        keep(parts, groups, range(neurons))
    adopt(model)


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """Return name → a pruned parent's folder."""
    root = tmp_path_factory.mktemp("parents")
    whole, found = llama(root / "dense", layers=3, mlp=128), {}
    for prune in (shorten, narrow):
        checkpoint = checkpoints.load(whole, device="cpu")
        prune(checkpoint.model)
        found[prune.__name__] = root / prune.__name__
        info = {**checkpoint.info, "parameters": checkpoints.logical_parameters(checkpoint.model)}
        checkpoints.save(checkpoint.model, checkpoint.tokenizer, found[prune.__name__], info)
    return found


@pytest.fixture(scope="module")
def made(parents, tmp_path_factory):
    """Return (quantizer, parent) → the folder of the quantized model."""
    root = tmp_path_factory.mktemp("quantized")
    samples, found = calibration(root / "words"), {}
    for parent in parents:
        for name, (method, mapping, _) in QUANTIZERS.items():
            module = plugins.load("quantize", method)
            mapping = mapping | ({"calibration": samples} if method in CALIBRATED else {})
            found[name, parent] = folder = root / f"{len(found)}"
            folder.mkdir()
            module.apply(parents[parent], folder, recipes.build(module.Recipe, mapping, "recipe"), seed=0, device="cpu")
    return found


@pytest.fixture(scope="module")
def fresh(made, tmp_path_factory):
    """Return (quantizer, parent) → logits that a process computes which has not seen any of this."""
    file = tmp_path_factory.mktemp("logits") / "logits"
    command = [sys.executable, "-c", FRESH, file, *made.values()]
    said = subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL).stdout
    assert b"custom code" not in said, "nobody is asked whether the class carried in a pruned checkpoint may run"
    return dict(zip(made, torch.load(file), strict=True))


def logits(folder) -> torch.Tensor:
    with torch.no_grad():
        return checkpoints.load(folder, device="cpu").model(torch.arange(40)[None]).logits


@pytest.mark.parametrize("parent", ["shorten", "narrow"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_pruned_model_is_quantized_saved_and_opened_elsewhere(parents, made, fresh, name, parent):
    true, found = logits(parents[parent]), fresh[name, parent]
    assert torch.equal(found, logits(made[name, parent]))
    most = QUANTIZERS[name][2]
    assert most / 50 < (found - true).norm() / true.norm() < most


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if "8" in name])
def test_no_quantizer_runs_the_code_that_a_checkpoint_carries(parents, name, tmp_path):
    """The class of a width-pruned model is Espalier's own, when it is quantized and when the result is opened."""
    parent, folder = tmp_path / "parent", tmp_path / "quantized"
    shutil.copytree(parents["narrow"], parent)
    folder.mkdir()
    (parent / "pruned.py").write_text("raise SystemExit('code of the parent was run')")
    method, mapping, _ = QUANTIZERS[name]
    module = plugins.load("quantize", method)
    mapping = mapping | ({"calibration": calibration(tmp_path / "words")} if method in CALIBRATED else {})
    module.apply(parent, folder, recipes.build(module.Recipe, mapping, "recipe"), seed=0, device="cpu")
    (folder / "pruned.py").write_text("raise SystemExit('code of the quantized checkpoint was run')")
    assert type(checkpoints.load(folder, device="cpu").model).__module__ == "espalier.models.pruned"
    assert type(checkpoints.load(parent, device="cpu").model).__module__ == "espalier.models.pruned"


def test_gptqmodel_may_import_code_only_of_a_checkpoint_that_is_trusted(monkeypatch):
    def fetch(*_, **__):
        raise LookupError("the code would be imported")

    monkeypatch.setattr(dynamic_module_utils, "get_cached_module_file", fetch)
    for trusted, error in ((True, LookupError), (False, ValueError)):
        with gptq_loading.no_carried_code(trusted), pytest.raises(error, match="code"):
            dynamic_module_utils.get_class_from_dynamic_module("own.Model", "folder")
        assert dynamic_module_utils.get_cached_module_file is fetch


@pytest.mark.parametrize("name", QUANTIZERS)
def test_what_is_written_says_what_it_is_and_is_smaller(parents, made, name):
    for parent, folder in parents.items():
        described, before = checkpoints.describe(made[name, parent]), checkpoints.describe(folder)
        assert described["parameters"] == before["parameters"]
        assert described["bits"] == QUANTIZERS[name][1]["bits"]
        assert described["arithmetic"] == ("integer" if name in IN_INTEGERS else "unpacked")
        assert checkpoints.weight_bytes(made[name, parent]) < 0.65 * checkpoints.weight_bytes(folder)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", QUANTIZERS)
def test_models_are_quantized_and_run_on_cuda(parents, name, tmp_path):
    method, mapping, most = QUANTIZERS[name]
    module = plugins.load("quantize", method)
    mapping = mapping | ({"calibration": calibration(tmp_path / "words")} if method in CALIBRATED else {})
    recipe = recipes.build(module.Recipe, mapping, "recipe")
    (tmp_path / "model").mkdir()
    module.apply(parents["shorten"], tmp_path / "model", recipe, seed=0, device="cuda")
    true = logits(parents["shorten"])
    with torch.no_grad():
        found = checkpoints.load(tmp_path / "model", device="cuda").model(torch.arange(40, device="cuda")[None]).logits
    assert (found.float().cpu() - true).norm() / true.norm() < most


def test_every_quantizer_of_decoders_is_in_the_table():
    quantizers = {name for name in plugins.names("quantize") if "causal-lm" in plugins.load("quantize", name).TAKES}
    assert {method for method, _, _ in QUANTIZERS.values()} == quantizers
