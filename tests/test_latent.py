"""Straight-through gradients against finite differences of the surrogate, and training's layers against packed ones."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch

from encoder_cases import FAMILIES, classifier
from espalier.models import latent, packed
from espalier.models.latent import LatentEmbedding, LatentLinear
from espalier.models.packed import PackedEmbedding, PackedLinear, Scheme

SCHEMES = [
    Scheme(bits, *shared, activations)
    for bits, shared, activations in itertools.product((1, 2), (("tensor", -1), ("row", -1), ("group", 4)), (8, None))
]
STEP = 1e-6  # of the finite differences, in float64


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_scheme(layer: torch.nn.Module, scheme: Scheme) -> torch.nn.Module:
    layer.scheme = scheme
    return layer


def linear_layer(scheme: Scheme, bias: bool = True, inputs: int = 8, outputs: int = 5) -> LatentLinear:
    torch.manual_seed(0)
    return with_scheme(LatentLinear(inputs, outputs, bias), scheme)


def embedding(scheme: Scheme, padding: int | None = None) -> LatentEmbedding:
    torch.manual_seed(0)
    return with_scheme(LatentEmbedding(6, 8, padding), scheme)


def scalar(outputs: torch.Tensor) -> torch.Tensor:
    """Return one number of outputs, of which none has the same gradient twice."""
    return (outputs.sin() * random(*outputs.shape, seed=9).to(outputs)).sum()


def differences(function: Callable, at: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a function of a tensor of float64 by central differences."""
    found = torch.zeros_like(at)
    for place in range(at.numel()):
        step = torch.zeros_like(at)
        step.view(-1)[place] = STEP
        found.view(-1)[place] = (function(at + step) - function(at - step)) / (2 * STEP)
    return found


def assert_near(found: torch.Tensor, expected: torch.Tensor, share: float = 1e-5) -> None:
    assert (found.double() - expected).norm() <= share * expected.norm()
    assert expected.norm() > 0.1


def values(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    return packed.values(packed.quantized(weight.detach(), scheme)).double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gradients_of_a_linear_layer_are_those_of_the_surrogate(scheme, bias):
    """The surrogate is linear where rounding is not: y(dx, dW) = (x̂ + dx) · (Ŵ + dW)ᵀ + b, at dx = 0 and dW = 0."""
    layer, inputs = linear_layer(scheme, bias), random(2, 3, 8, seed=1).requires_grad_()
    scalar(layer(inputs)).backward()
    near = inputs.detach().double()
    if scheme.activations:
        step = near.abs().amax(-1, keepdim=True) / 127
        near = (near / step).round() * step
    weight = values(layer.weight, scheme)
    offsets = layer.bias.detach().double() if bias else torch.zeros(5, dtype=torch.float64)
    assert_near(inputs.grad, differences(lambda x: scalar(x @ weight.T + offsets), near))
    assert_near(layer.weight.grad, differences(lambda w: scalar(near @ w.T + offsets), weight))
    if bias:
        assert_near(layer.bias.grad, differences(lambda b: scalar(near @ weight.T + b), offsets))


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("scheme", SCHEMES[::2], ids=str)
def test_gradients_of_an_embedding_are_those_of_its_values(scheme, padding):
    layer, ids = embedding(scheme, padding), torch.tensor([[0, 2, 5], [5, 3, 2]])
    scalar(layer(ids)).backward()
    expected = differences(lambda table: scalar(table[ids]), values(layer.weight, scheme))
    assert expected[2].norm() > 0.1
    if padding is not None:
        expected[padding] = 0.0
    assert_near(layer.weight.grad, expected)
    assert layer.weight.grad[[1, 4, *([] if padding is None else [padding])]].eq(0).all(), "was not looked up"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", [one for one in SCHEMES if one.activations], ids=str)
def test_under_autocast_products_are_exact_and_gradients_near(scheme, dtype):
    layer, inputs = linear_layer(scheme, inputs=64, outputs=48), random(40, 64, seed=1).to(dtype).requires_grad_()
    expected = layer(inputs.float())
    scalar(expected).backward()
    exact = [one.grad for one in (inputs, layer.weight, layer.bias)]
    for one in (inputs, layer.weight, layer.bias):
        one.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(inputs)
        loss = scalar(found)
    loss.backward()
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    for one, gradient in zip((inputs, layer.weight, layer.bias), exact, strict=True):
        assert one.grad.dtype == one.dtype
        assert_near(one.grad, gradient.double(), 1e-2)
    assert not torch.equal(layer.weight.grad, exact[1]), "these products were to be in bfloat16"


# Packing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_layers_give_what_packed_ones_give_bit_for_bit(scheme):
    linear, table = linear_layer(scheme, inputs=64, outputs=40), embedding(scheme)
    holder = torch.nn.ModuleDict({"linear": linear, "table": table})
    inputs, ids = random(2, 7, 64, seed=1), torch.tensor([[0, 3, 5]])
    inputs[0, 2] = 0.0
    before = linear(inputs), table(ids)
    latent.pack_latent(holder)
    assert isinstance(holder["linear"], PackedLinear)
    assert isinstance(holder["table"], PackedEmbedding)
    assert torch.equal(holder["linear"](inputs), before[0])
    assert torch.equal(holder["table"](ids), before[1])


@pytest.mark.parametrize("scheme", SCHEMES[::5], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_models_give_what_packed_ones_give_bit_for_bit(family, scheme):
    model = classifier(family)
    plain = copy.deepcopy(model)
    latent.make_latent(model, scheme)
    inputs = {"input_ids": torch.randint(5, 100, (3, 9), generator=torch.Generator().manual_seed(0))}
    inputs["input_ids"][1, 6:] = 0
    inputs["attention_mask"] = inputs["input_ids"].ne(0).long()
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, expected), "weights are kept as they are"
    with torch.no_grad():
        before, other = model(**inputs).logits, plain(**inputs).logits
        latent.pack_latent(model)
        assert torch.equal(model(**inputs).logits, before)
    assert not torch.allclose(before, other, atol=1e-2)


def test_what_of_bert_is_quantized():
    model = classifier("bert", layers=2)
    latent.make_latent(model, Scheme(1))
    latent.pack_latent(model)
    found = {name for name, part in model.named_modules() if isinstance(part, PackedLinear | PackedEmbedding)}
    parts = [*(f"attention.self.{one}" for one in ("query", "key", "value")), "attention.output.dense"]
    inside = [*parts, "intermediate.dense", "output.dense"]
    layers = {f"bert.encoder.layer.{number}.{part}" for number in (0, 1) for part in inside}
    assert found == layers | {"bert.embeddings.word_embeddings"}
