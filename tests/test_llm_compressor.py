"""llm-compressor as Espalier runs it: quiet, without traces, and with codes that mean what its own layers compute."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from espalier import llm_compressor
from espalier.errors import UserError
from espalier.models import lowbit
from espalier.models.lowbit import LowBitLinear, Scheme
from families import tiny

SCHEMES = [Scheme(bits, activations=8) for bits in (8, 4)]
QUIETLY = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from espalier import progress
from test_llm_compressor import SCHEMES, gptq, tiny
progress.SECONDS_BETWEEN_LINES = 0
model = tiny("llama")  # transformers says this and that when it is imported
print("before", flush=True)
print("before", file=sys.stderr, flush=True)
codes = gptq(model, SCHEMES[1])
print("after", json.dumps([one.tolist() for one in codes.values()]))
"""


def samples(count: int = 6, length: int = 12) -> list[list[int]]:
    return torch.randint(3, 90, (count, length), generator=torch.Generator().manual_seed(0)).tolist()


def gptq(model, scheme: Scheme, damp: float = 0.01, count: int = 6, batch_size: int = 4) -> dict[str, torch.Tensor]:
    """Quantize a model and return the codes of its layers."""
    llm_compressor.gptq(model, samples(count), scheme, damp, batch_size, "cpu")
    return {name: one.codes().codes for name, one in model.named_modules() if isinstance(one, LowBitLinear)}


def inputs_of(model, name: str, ids: torch.Tensor) -> torch.Tensor:
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, -2)))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen[0].double()


def naive_gptq(weight: torch.Tensor, inputs: torch.Tensor, bits: int, damp: float) -> torch.Tensor:
    """Return the codes of one layer: column by column, largest Hessian diagonal first, by the inverse taken anew."""
    hessian = inputs.T @ inputs
    hessian += damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.double)
    weight, scale = weight.double().clone(), weight.double().abs().amax(1) / ((2**bits - 1) / 2)
    codes, left = torch.zeros_like(weight), hessian.diagonal().argsort(descending=True).tolist()
    while left:
        inverse = torch.linalg.inv(hessian[left][:, left])
        column = left[0]
        codes[:, column] = (weight[:, column] / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        error = (weight[:, column] - codes[:, column] * scale) / inverse[0, 0]
        weight[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return codes


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gptq_is_the_papers_algorithm(scheme):
    model = tiny("llama")
    true, name = copy.deepcopy(model), "model.layers.0.self_attn.q_proj"
    found = gptq(model, scheme)
    inputs = inputs_of(true, name, torch.tensor(samples()))
    naive = naive_gptq(true.get_submodule(name).weight.data, inputs, scheme.bits, 0.01)
    # A code that lies halfway may fall to either side, and those after it follow.
    assert (found[name] != naive).float().mean() < 0.02
    nearest = lowbit.rounded(
        true.get_submodule(name).weight.data, model.get_submodule(name).weight_scale, None, scheme
    ).codes
    assert (found[name] != nearest).float().mean() > 0.1


@pytest.mark.parametrize("family", ["llama", "opt", "glm4"])
def test_all_layers_but_the_head_are_packed_and_nothing_else_is_left(family):
    model, plain = tiny(family), tiny(family)
    found = gptq(model, SCHEMES[0])
    assert set(found) == set(lowbit.linear_layers(plain))
    assert {name: one.dtype for name, one in model.named_parameters()} == {
        name: one.dtype
        for name, one in plain.named_parameters()
        if name.rpartition(".")[0] not in found or "bias" in name
    }
    for name, before in plain.named_modules():
        if name not in found:
            after = model.get_submodule(name)
            assert set(vars(after)) - set(vars(before)) == {"quantization_enabled"}
            assert all(not hooks for key, hooks in vars(after).items() if key.endswith("_hooks"))


def test_a_call_shows_progress_alone_leaves_no_file_and_a_second_one_gives_the_same(tmp_path):
    command = [sys.executable, "-W", "always", "-c", QUIETLY, str(Path(__file__).parent)]
    fresh = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    lines = fresh.stderr.rpartition("before\n")[2].splitlines()
    assert [line.partition(" (")[0] for line in lines] == [f"gptq, blocks: {done} of 3" for done in (1, 2, 3)]
    printed = fresh.stdout.rpartition("before\n")[2]
    assert printed.startswith("after ")
    assert not list(tmp_path.iterdir())
    gptq(tiny("opt"), SCHEMES[0], batch_size=3)  # whatever this leaves behind
    again = [one.tolist() for one in gptq(tiny("llama"), SCHEMES[1]).values()]
    assert again == json.loads(printed.removeprefix("after "))


def test_a_failure_prints_what_was_said(capfd):
    with pytest.raises(ZeroDivisionError), llm_compressor.quiet():
        print("the last words")
        raise ZeroDivisionError
    assert "the last words" in capfd.readouterr().err


def test_16_bit_models_get_the_codes_of_32_bits():
    model = tiny("llama").to(torch.bfloat16)
    single = copy.deepcopy(model).float()
    found, expected = gptq(model, SCHEMES[0]), gptq(single, SCHEMES[0])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}


def test_a_hessian_that_cannot_be_inverted_is_an_error():
    with pytest.raises(UserError, match=r"cannot invert the Hessian of model\.layers\..*raise 'damp'"):
        gptq(tiny("llama"), SCHEMES[0], damp=1e-30, count=1)
