"""The engine deepspeed, against a stand-in that takes exactly its arguments.

The real one runs in tests/real_engines.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from engine_stand_ins import OUTPUT, PROMPTS, generate, install, load
from espalier import checkpoints
from espalier.engines import deepspeed
from espalier.worker import Unavailable

pytestmark = pytest.mark.usefixtures("kept_environment")


@pytest.fixture
def fake_deepspeed(monkeypatch):
    """Install a stand-in for DeepSpeed; returns its calls, and what injection does to a model."""
    import torch

    said = SimpleNamespace(calls=[], damage=lambda model: None)

    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.module, self.config = model, model.config

        def generate(self, *inputs, **options):
            return self.module.generate(*inputs, **options)

    def init_inference(model, *, dtype, replace_with_kernel_inject, max_out_tokens):
        said.calls.append((dtype, replace_with_kernel_inject, max_out_tokens))
        if replace_with_kernel_inject:
            said.damage(model)
        return Wrapper(model)

    install(monkeypatch, deepspeed={"init_inference": init_inference})
    return said


def test_deepspeed_gives_transformers_tokens_and_asks_for_no_kernels_on_a_cpu(fake_deepspeed, llama):
    import torch

    engine, log = deepspeed.Engine(), []
    engine.load(load(llama))
    assert fake_deepspeed.calls == [(torch.float32, False, 40)]
    model = checkpoints.load(llama, "cpu").model
    prompts = torch.tensor(PROMPTS)
    options = {"max_new_tokens": OUTPUT, "min_new_tokens": OUTPUT, "do_sample": False}
    expected = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)[:, 3:].tolist()
    assert generate(engine, log) == expected
    assert log == ["first token"]
    assert engine.details()["kernel_injection"] == "left out: it needs CUDA"


def broken(model):
    raise NotImplementedError("no policy for this block")


def shuffled(model):
    model.lm_head.weight.data = model.lm_head.weight.data.roll(1, 0)


@pytest.mark.parametrize(
    ("damage", "expected", "wrapped"),
    [
        (lambda model: None, "used", [True]),
        (broken, "left out: no policy for this block", [True, False]),
        (shuffled, "left out: with it the tokens are not transformers'", [True, False]),
    ],
)
def test_deepspeeds_kernels_stay_only_where_they_give_the_same_tokens(
    fake_deepspeed, llama, monkeypatch, damage, expected, wrapped
):
    fake_deepspeed.damage = damage
    usual = checkpoints.load
    monkeypatch.setattr(checkpoints, "load", lambda folder, device: usual(folder, "cpu"))
    engine = deepspeed.Engine()
    model = usual(llama, "cpu").model
    made = engine.prepare(model, load(llama, "cuda"))
    assert engine.injection == expected
    assert [inject for _, inject, _ in fake_deepspeed.calls] == wrapped
    assert (made.module is model) == (expected == "used")
    assert model.device.type == ("cpu" if expected == "used" else "meta")  # one that is not used holds no weights


def test_deepspeed_refuses_packed_weights(fake_deepspeed, llama, tmp_path):
    checkpoints.write_description(tmp_path, {**checkpoints.describe(llama), "format": "bitsandbytes"})
    with pytest.raises(Unavailable, match=r"these are packed \(bitsandbytes\)"):
        deepspeed.Engine().load(load(tmp_path))
