"""Packed integers against bits and formulas written out naively, and layers against the same arithmetic in float64."""

from __future__ import annotations

import pytest
import torch

from espalier.errors import UserError
from espalier.models import lowbit
from espalier.models.lowbit import Codes, LowBitLinear, Scheme

SCHEMES = [
    Scheme(8, activations=8),
    Scheme(4, activations=8),
    Scheme(8),
    Scheme(4, group_size=16, symmetric=False),
    Scheme(3, group_size=16),
    Scheme(3, group_size=-1, symmetric=False),
    Scheme(2, group_size=16, symmetric=False),
]


def random_layer(scheme: Scheme, inputs: int = 48, outputs: int = 20, bias: bool = True, dtype=torch.float32):
    """Return a layer and its codes."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=draw)
    offsets = torch.randn(outputs, generator=draw).to(dtype) if bias else None
    codes = lowbit.rounded(weight, *lowbit.grid(weight, scheme), scheme)
    return LowBitLinear.of(codes, offsets, scheme), codes


def naive_words(codes: list[int], bits: int) -> list[int]:
    """Return the bits of all codes, lowest first, as signed words of 32."""
    stream = sum((code + 2 ** (bits - 1)) << (bits * place) for place, code in enumerate(codes))
    words = [(stream >> (32 * place)) % 2**32 for place in range(-(-len(codes) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [1, 5, 32, 48, 77])
def test_words_hold_the_codes_bit_by_bit_as_compressed_tensors_packs_them(bits, columns):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (7, columns), dtype=torch.int8)
    words = lowbit.pack(codes, bits)
    assert words.tolist() == [naive_words(row, bits) for row in codes.tolist()]
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(lowbit.unpack(words, bits, columns), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [-1, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_is_the_formula_of_each_group(bits, group, symmetric):
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(bits))
    weight[1] = 0.0  # a dead row
    weight[2] = weight[2].abs()  # zero is not among its values
    scheme = Scheme(bits, group, symmetric)
    codes, scale, zero = lowbit.rounded(weight, *lowbit.grid(weight, scheme), scheme)
    found = lowbit.dequantized(Codes(codes, scale, zero))
    size, most = (8 if group < 0 else group), 2 ** (bits - 1)
    for row in range(3):
        for column in range(8):
            values = weight[row, column // size * size :][:size].double().tolist()
            if symmetric:
                step, offset = max(map(abs, values)) / (most - 1) or 1.0, 0
            else:
                low, high = min(*values, 0.0), max(*values, 0.0)
                step = (high - low) / (2**bits - 1) or 1.0
                offset = round(-low / step) - most
            code = round(weight[row, column].item() / step) + offset
            assert codes[row, column] == max(-most + symmetric, min(most - 1, code))
            assert found[row, column].item() == pytest.approx((codes[row, column].item() - offset) * step, rel=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_layers_hold_what_was_put_in(scheme):
    layer, codes = random_layer(scheme)
    for found, put_in in zip(layer.codes(), codes, strict=True):
        assert found is put_in is None or torch.equal(found, put_in)
    some = layer.codes(slice(5, 11))
    assert torch.equal(lowbit.dequantized(some), lowbit.dequantized(codes)[5:11])


@pytest.mark.parametrize("scheme", [one for one in SCHEMES if one.activations], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_integer_products_equal_the_simulated_ones_bit_for_bit_and_the_outputs_to_1e_5(scheme, bias, monkeypatch):
    layer, codes = random_layer(scheme, bias=bias)
    inputs = 10 * torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(1))
    inputs[0, 3] = 0.0
    products, whole = [], lowbit.integer_product
    monkeypatch.setattr(lowbit, "integer_product", lambda *both: products.append(whole(*both)) or products[-1])
    found = layer(inputs)

    tokens = inputs.double().flatten(0, 1)
    step = tokens.abs().amax(1, keepdim=True) / 127
    rounded = torch.where(step > 0, (tokens / step).round(), 0.0)
    simulated = rounded @ codes.codes.double().T
    assert products[0].dtype == torch.int32
    assert torch.equal(products[0].double(), simulated)
    expected = simulated * step * codes.scale[:, 0].double() + (layer.bias.double() if bias else 0.0)
    assert found.shape == (2, 9, 20)
    assert torch.allclose(found.double(), expected.view(2, 9, 20), rtol=1e-5, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("scheme", [one for one in SCHEMES if not one.activations], ids=str)
def test_unpacked_products_equal_those_with_the_dense_weight(scheme):
    layer, codes = random_layer(scheme)
    inputs = torch.randn(2, 9, 48)
    expected = inputs @ lowbit.dequantized(codes).T + layer.bias
    assert torch.allclose(layer(inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rows_computed_some_at_a_time_are_the_same(scheme, monkeypatch):
    layer, _ = random_layer(scheme)
    inputs = torch.randn(5, 48)
    whole = layer(inputs)
    monkeypatch.setattr(lowbit, "ROWS", 7)
    assert torch.allclose(layer(inputs), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_compute_in_the_dtype_of_their_inputs(scheme, dtype):
    layer, codes = random_layer(scheme, dtype=dtype)
    inputs = torch.randn(5, 48).to(dtype)
    found = layer(inputs)
    assert found.dtype == dtype
    expected = inputs.float() @ lowbit.dequantized(codes).T + layer.bias.float()
    assert (found - expected).norm() / expected.norm() < 0.02


def test_shapes_that_cuda_refuses_are_padded_and_the_product_is_exact(monkeypatch):
    """`torch._int_mm` on CUDA wants more than 16 rows, and multiples of 8; here a strict one stands for it."""
    real = torch._int_mm

    def strict(left, right):
        assert len(left) > 16
        assert left.shape[1] % 8 == right.shape[1] % 8 == 0
        return real(left, right)

    monkeypatch.setattr(torch, "_int_mm", strict)
    monkeypatch.setattr(lowbit, "_refuses_odd_shapes", lambda tensor: True)
    for rows, inner, columns in ((1, 48, 20), (16, 8, 8), (17, 13, 5), (40, 20, 24)):
        left = torch.randint(-127, 128, (rows, inner), dtype=torch.int8)
        right = torch.randint(-127, 128, (columns, inner), dtype=torch.int8)
        found = lowbit.integer_product(left, right)
        assert found.tolist() == (left.long() @ right.long().T).tolist()


@pytest.mark.parametrize("rows", [1, 4, 17])
@pytest.mark.parametrize("inner", [1, 2, 8, 13, 33])
@pytest.mark.parametrize("columns", [1, 7, 20])
def test_products_of_every_shape_are_exact(rows, inner, columns):
    """A pruned block may keep a single neuron, and torch's product of matrices with one column is zero on some CPUs."""
    left = torch.randint(-127, 128, (rows, inner), dtype=torch.int8)
    right = torch.randint(-127, 128, (columns, inner), dtype=torch.int8)
    assert lowbit.integer_product(left, right).tolist() == (left.long() @ right.long().T).tolist()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1, 16, 17, 40])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_layers_compute_on_cuda_what_they_compute_on_a_cpu(scheme, tokens):
    layer, _ = random_layer(scheme)
    inputs = torch.randn(tokens, 48)
    expected = layer(inputs)
    assert torch.allclose(layer.cuda()(inputs.cuda()).cpu(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_layers_take_the_bytes_that_their_bits_need_also_after_a_forward_pass(scheme):
    layer, codes = random_layer(scheme, inputs=64, outputs=32)

    def held() -> int:
        return sum(one.nbytes for one in layer.buffers())

    shape = 16 if scheme.packed else 0  # weight_shape: two numbers of 64 bits
    zeros = 0 if scheme.symmetric else codes.scale.numel() * scheme.bits / 8
    assert held() == 64 * 32 * scheme.bits / 8 + 4 * codes.scale.numel() + zeros + shape
    before = held()
    layer(torch.randn(3, 64))
    assert held() == before


@pytest.mark.parametrize("scheme", [Scheme(8, activations=8), Scheme(4)], ids=str)
def test_numbers_that_are_none_stay_visible(scheme):
    layer, _ = random_layer(scheme)
    inputs = torch.randn(3, 48)
    inputs[1, 7] = torch.nan
    found = layer(inputs)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_groups_that_do_not_divide_a_layer_are_refused():
    layers = {"model.layers.3.mlp.down_proj": torch.nn.Linear(48, 64)}
    with pytest.raises(UserError, match=r"down_proj of my/model has 48 input channels, .* groups of 32 .*'group_size'"):
        lowbit.check_widths(layers, Scheme(4, 32), "my/model")
    lowbit.check_widths(layers, Scheme(4, 16), "my/model")
    lowbit.check_widths(layers, Scheme(4), "my/model")
