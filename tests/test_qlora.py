"""QLoRA: the model that is saved is the model that was trained and validated on weights in NF4."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from espalier import checkpoints, nf4, training
from espalier.errors import UserError
from espalier.models.anatomy import adopt, keep, parts_of
from espalier.recipes import build
from espalier.tune import lora
from training_runs import data
from training_runs import recipe as recipe_of


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> dict:
    return data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("parent") / "model", hidden=64, mlp=128)


def narrowed(parent: Path, folder: Path, widths: tuple[int, int]) -> Path:
    """Save the parent with so many neurons in its first and second block into `folder`."""
    checkpoint = checkpoints.load(parent, "cpu")
    for block, width in zip(parts_of(checkpoint.model), widths, strict=True):
        keep(block, range(block.groups), range(width))
    adopt(checkpoint.model)
    folder.mkdir()
    parameters = checkpoints.logical_parameters(checkpoint.model)
    checkpoints.save(checkpoint.model, checkpoint.tokenizer, folder, {**checkpoint.info, "parameters": parameters})
    return folder


def recipe(dataset: dict, **options) -> lora.Recipe:
    values = {key: value for key, value in recipe_of("lora", dataset).items() if key != "tune"}
    return build(lora.Recipe, {**values, "base": "nf4", "targets": None, **options}, "recipe")


def trained(monkeypatch, parent: Path, output: Path, chosen: lora.Recipe):
    """Run the method; return its report and the model that it trained, as it was when training ended."""
    kept, fit = [], training.fit

    def watched(model, *arguments, **options):
        kept.append(model)
        return fit(model, *arguments, **options)

    monkeypatch.setattr(training, "fit", watched)
    output.mkdir()
    return lora.apply(parent, output, chosen, seed=0, device="cpu"), kept[0]


@pytest.mark.parametrize("widths", [None, (128, 64)])
def test_what_is_saved_is_what_was_validated(monkeypatch, parent, dataset, tmp_path, widths):
    if widths:
        parent = narrowed(parent, tmp_path / "narrow", widths)
    report, model = trained(monkeypatch, parent, tmp_path / "out", recipe(dataset))
    assert [one["step"] for one in report["validation"]] == [2, 4, 6, 8]
    packed = [part for part in model.modules() if isinstance(part, bitsandbytes.nn.Linear4bit)]
    assert len(packed) == 14, "every linear layer of both blocks is held in four bits"
    ids = torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(0))
    saved = checkpoints.load(tmp_path / "out", "cpu").model
    with torch.no_grad():
        expected, found = (one(input_ids=ids).logits for one in (model.eval(), saved))
        before = checkpoints.load(parent, "cpu").model(input_ids=ids).logits
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 1e-4 * scale
    assert (before - expected).abs().max() > 0.05 * scale
    assert checkpoints.describe(tmp_path / "out")["bits"] == 32
    assert checkpoints.describe(tmp_path / "out")["parameters"] == checkpoints.describe(parent)["parameters"]


# Dettmers et al. 2023, Appendix E.
CODES = [-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
CODES += [0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0]


def test_weights_that_are_merged_are_nf4_codes_times_scales(parent):
    model = checkpoints.load(parent, "cpu").model
    weight = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    head = model.lm_head.weight.detach().clone()
    nf4.round_weights(model, "cpu")
    blocks, found = (one.detach().double().view(-1, 64) for one in (weight, model.model.layers[1].mlp.down_proj.weight))
    scales = blocks.abs().amax(1, keepdim=True)
    codes = torch.tensor(CODES, dtype=torch.float64)
    nearest = codes[(blocks[:, :, None] / scales[:, :, None] - codes).abs().argmin(-1)]
    # The scales are quantized to 8 bits: each block's values are its codes times one number close to its scale.
    ratio = found.abs().amax(1, keepdim=True) / scales
    assert (ratio - 1).abs().max() < 0.05
    assert not torch.equal(ratio, torch.ones_like(ratio))
    torch.testing.assert_close(found, nearest * scales * ratio, rtol=1e-4, atol=1e-6)
    assert torch.equal(model.lm_head.weight, head)


def test_the_unpacked_model_is_made_in_main_memory_whatever_the_device(monkeypatch, parent, dataset):
    loaded, rounded, load = [], [], checkpoints.load

    def watched(folder, device, **options):
        loaded.append(device)
        return load(folder, "cpu", **options)

    monkeypatch.setattr(checkpoints, "load", watched)
    monkeypatch.setattr(nf4, "round_weights", lambda model, device: rounded.append(device))
    lora.load(parent, recipe(dataset), "cuda", whole=True)
    assert (loaded, rounded) == (["cpu"], ["cuda"])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_layers_are_rounded_on_the_device_and_come_back(parent):
    models = {device: checkpoints.load(parent, "cpu").model for device in ("cpu", "cuda")}
    for device, model in models.items():
        nf4.round_weights(model, device)
    for one, other in zip(models["cpu"].parameters(), models["cuda"].parameters(), strict=True):
        assert other.device.type == "cpu"
        torch.testing.assert_close(other, one)


def test_bfloat16_result(monkeypatch, parent, dataset, tmp_path):
    _, model = trained(monkeypatch, parent, tmp_path / "out", recipe(dataset, dtype="bfloat16", autocast=True))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert saved.dtype is torch.bfloat16
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected, found = (one(input_ids=ids).logits.float() for one in (model.eval(), saved))
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_width_that_cannot_be_packed_is_refused_before_training(monkeypatch, parent, dataset, tmp_path):
    narrow = narrowed(parent, tmp_path / "narrow", (64, 96))
    monkeypatch.setattr(training, "fit", None)
    with pytest.raises(
        UserError, match=r"layers\.1\.mlp\.down_proj of .* has 96 input features; 4 bits need a multiple of 64"
    ):
        lora.apply(narrow, tmp_path, recipe(dataset), seed=0, device="cpu")
