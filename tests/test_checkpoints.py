"""Checkpoints that are saved are those that can be opened again."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from espalier import checkpoints
from espalier.errors import UserError
from tiny import llama


def test_a_model_that_sets_a_temperature_and_does_not_say_that_it_samples_can_be_saved(tmp_path):
    """As some published models do; transformers refuses to save such settings."""
    checkpoint = checkpoints.load(llama(tmp_path / "parent"), "cpu")
    checkpoint.model.generation_config.update(temperature=0.9, top_p=0.6)
    (tmp_path / "child").mkdir()
    checkpoints.save(checkpoint.model, checkpoint.tokenizer, tmp_path / "child", checkpoint.info)
    saved = GenerationConfig.from_pretrained(tmp_path / "child")
    assert (saved.temperature, saved.top_p, saved.do_sample) == (0.9, 0.6, True)


def test_settings_that_are_valid_stay_as_they_are(tmp_path):
    checkpoint = checkpoints.load(llama(tmp_path / "parent"), "cpu")
    (tmp_path / "child").mkdir()
    checkpoints.save(checkpoint.model, checkpoint.tokenizer, tmp_path / "child", checkpoint.info)
    assert not GenerationConfig.from_pretrained(tmp_path / "child").do_sample


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path):
    """transformers would fill the gap with random numbers and say so in its log alone."""
    folder = llama(tmp_path / "model")
    stored, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    save_file({key: one for key, one in stored.items() if key != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"model cannot be loaded: its files lack weights of the model, such as {name}"):
        checkpoints.load(folder, "cpu")


BUFFERS = {
    "truth values": torch.ones(8, 8, dtype=torch.bool),
    "numbers of positions": torch.arange(8)[None],
    "frequencies in 32 bits": torch.ones(8),
}


@pytest.mark.parametrize("buffer", BUFFERS)
def test_buffers_do_not_change_the_bits_of_a_weight(tmp_path, buffer):
    """Old versions of transformers saved them: masks, position ids and rotary frequencies."""
    source = llama(tmp_path / "model")
    stored = {key: one.to(torch.bfloat16) for key, one in load_file(source / "model.safetensors").items()}
    save_file({**stored, "model.buffer": BUFFERS[buffer]}, source / "model.safetensors", {"format": "pt"})
    (tmp_path / "pointer").mkdir()
    reference = {"path": str(source), "id": None, "revision": None, "task": "causal-lm", "dtype": "auto"}
    checkpoints.refer(tmp_path / "pointer", {**reference, "trust_remote_code": False})
    assert checkpoints.describe(tmp_path / "pointer")["bits"] == 16
    save_file({"model.buffer": torch.arange(8)}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="model holds no matrices of floating-point numbers"):
        checkpoints.refer(tmp_path / "pointer", {**reference, "trust_remote_code": False})
