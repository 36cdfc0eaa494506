"""Weights of 1 and 2 bits against their formulas in plain loops, their bytes, and the layers against float64."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from espalier.models import latent, packed
from espalier.models.packed import PackedEmbedding, PackedLinear, Scheme

SHARED = (("tensor", -1), ("row", -1), ("group", 3))  # what shares a scale, and a group's size
SCHEMES = [Scheme(bits, *shared) for bits, shared in itertools.product((1, 2), SHARED)]
BITS = (1, 2)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The mean is 10, of whatever shares a scale, so 7 is exactly at the threshold; the last row has a number just above it.
TIES = [7.0, -13.0, 10.0, -7.0, 13.0, 10.0]
JUST_ABOVE = 7.0000005
WEIGHTS = {
    "random": random(5, 12),
    "odd": random(7, 9),
    "one row": random(1, 6),
    "one group a row": random(4, 3),
    "zeros": torch.zeros(3, 6),
    "a row of zeros, and single ones": torch.cat([torch.zeros(1, 6), random(2, 6)]).index_fill(1, torch.tensor([4]), 0),
    "all equal": torch.full((3, 6), 0.3),
    "all equal, negative": torch.full((3, 6), -0.3),
    "ties": torch.tensor([TIES, TIES[::-1], [JUST_ABOVE, *TIES[1:]]]),
    "large and small": random(4, 6) * torch.tensor([[1e-30], [1e30], [1.0], [1e-3]]),
}


def with_scale(weight: torch.Tensor, row: int, column: int, scheme: Scheme) -> list[float]:
    """Return all weights that share their scale with one of them, as numbers of 64 bits."""
    first = column // scheme.group_size * scheme.group_size
    group = weight[row, first : first + scheme.group_size]
    return {"tensor": weight.flatten(), "row": weight[row], "group": group}[scheme.scales].tolist()


def by_formula(value: float, sharing: list[float], bits: int) -> tuple[int, float]:
    """Return a weight's code and scale (Rastegari et al. 2016, equation 6; Li et al. 2016, equations 5 and 6)."""
    mean = math.fsum(map(abs, sharing)) / len(sharing)
    if bits == 1:
        return (-1 if value < 0 else 1), mean
    kept = [abs(one) for one in sharing if abs(one) > 0.7 * mean]
    code = 0 if abs(value) <= 0.7 * mean else 1 if value > 0 else -1
    return code, (math.fsum(kept) / len(kept) if kept else 0.0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_codes_and_scales_are_those_of_the_formulas(name, scheme):
    weight = WEIGHTS[name]
    codes, scale = packed.quantized(weight, scheme)
    rows, columns = weight.shape
    groups = columns // 3 if scheme.scales == "group" else 1
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.shape == (1 if scheme.scales == "tensor" else rows, groups)
    found = packed.values(packed.Codes(codes, scale))
    for i, j in itertools.product(range(rows), range(columns)):
        code, size = by_formula(weight[i, j].item(), with_scale(weight, i, j, scheme), scheme.bits)
        assert codes[i, j] == code
        assert scale.expand(rows, -1)[i, j // (columns // groups)].item() == pytest.approx(size, rel=1e-6)
        assert found[i, j].item() == pytest.approx(code * size, rel=1e-6)


@pytest.mark.parametrize("scales", ["tensor", "row"])
@pytest.mark.parametrize(("bits", "value"), [(1, 0.25), (1, -0.25), (1, 0.0), (2, 0.25), (2, -0.25), (2, 0.0)])
def test_a_single_value_is_its_own_quantized_value(bits, value, scales):
    codes, scale = packed.quantized(torch.tensor([[value]]), Scheme(bits, scales))
    assert (codes.item(), scale.item()) == (-1 if value < 0 else 1 if value > 0 or bits == 1 else 0, abs(value))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_averaged_in_32(dtype):
    weight = random(40, 300).to(dtype)
    for scheme in SCHEMES:
        (codes, scale), (expected, exact) = (packed.quantized(one, scheme) for one in (weight, weight.float()))
        assert torch.equal(codes, expected)
        assert torch.equal(scale, exact)


# Bytes ----------------------------------------------------------------------------------------------------------------

# Codes, and the bytes that they are, written as bits: the first code is the last one written.
BINARY = [[1, -1, -1, 1, 1, -1, 1, 1, -1, 1], [0b11011001, 0b10]]
TERNARY = [[-1, 0, 1, 0, 1, 1, -1, -1, 0], [0b01100100, 0b00001010, 0b01]]


@pytest.mark.parametrize(("bits", "codes", "expected"), [(1, *BINARY), (2, *TERNARY)])
def test_bytes_of_a_row_written_by_hand(bits, codes, expected):
    found = packed.pack(torch.tensor([codes], dtype=torch.int8), bits)
    assert found.dtype == torch.uint8
    assert found.tolist() == [expected]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 3, 4, 5, 7, 8, 9, 16, 33])
def test_unpacking_gives_what_was_packed(bits, columns):
    codes = packed.quantized(random(6, columns), Scheme(bits)).codes
    found = packed.pack(codes, bits)
    assert found.shape == (6, math.ceil(columns * bits / 8))
    assert packed.unpack(found, bits, columns).dtype == torch.int8
    assert torch.equal(packed.unpack(found, bits, columns), codes)


# Layers ---------------------------------------------------------------------------------------------------------------


def linear_layer(scheme: Scheme, bias: bool = True, outputs: int = 11, inputs: int = 21) -> PackedLinear:
    layer = PackedLinear(inputs, outputs, bias, scheme)
    weight = packed.quantized(random(outputs, inputs), scheme)
    packed.fill(layer, weight, random(outputs, seed=1) if bias else None)
    return layer


def rounded(token: list[float]) -> list[float]:
    """Return a token's inputs as numbers of 8 bits: whole multiples of its largest magnitude / 127."""
    step = max(map(abs, token)) / 127
    return [round(one / step) * step if step else 0.0 for one in token]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activations", [8, None])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_linear_layer_is_a_product_with_the_values_that_its_codes_stand_for(scheme, activations, bias):
    scheme = Scheme(scheme.bits, scheme.scales, scheme.group_size, activations)
    layer, weight, inputs = linear_layer(scheme, bias), random(11, 21), 10 * random(2, 4, 21, seed=2)
    inputs[1, 2] = 0.0
    found = layer(inputs)
    assert found.shape == (2, 4, 11)
    values = [
        [math.prod(by_formula(one, with_scale(weight, i, j, scheme), scheme.bits)) for j, one in enumerate(row)]
        for i, row in enumerate(weight.tolist())
    ]
    for token, outputs in zip(inputs.flatten(0, 1).tolist(), found.flatten(0, 1).tolist(), strict=True):
        token = rounded(token) if activations else token
        for i, output in enumerate(outputs):
            expected = math.fsum(x * w for x, w in zip(token, values[i], strict=True))
            offset = layer.bias[i].item() if bias else 0.0
            assert output == pytest.approx(expected + offset, rel=1e-5, abs=1e-5 * max(map(abs, token)))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_output_channels_computed_some_at_a_time_are_the_same_bit_for_bit(scheme, monkeypatch):
    layer, inputs = linear_layer(scheme, outputs=2500), random(3, 21, seed=2)
    calls, product = [], packed.product
    monkeypatch.setattr(packed, "product", lambda *given: calls.append(product(*given)) or calls[-1])
    found = layer(inputs)
    assert [part.shape[1] for part in calls] == [1024, 1024, 452]
    monkeypatch.setattr(packed, "ROWS", 10**6)
    assert torch.equal(layer(inputs), found)
    assert torch.equal(packed.values(layer.codes(slice(1030, 1040))), packed.values(layer.codes())[1030:1040])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_sums_of_integers_are_exact_at_any_width(scheme):
    """Largest codes of equal signs: every partial sum is as large as it gets, 127 a channel."""
    columns = 3 * 3000
    tokens, codes = torch.full((2, columns), 127, dtype=torch.int8), torch.ones(1, columns, dtype=torch.int8)
    groups = 3000 if scheme.scales == "group" else 1
    found = packed.product(tokens, torch.ones(2, 1), packed.Codes(codes, torch.ones(1, groups)))
    assert found.tolist() == [[127.0 * columns]] * 2


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_an_embedding_is_a_row_of_values(scheme):
    weight, ids = random(9, 21), torch.tensor([[0, 8, 3], [3, 3, 5]])
    layer = PackedEmbedding(9, 21, scheme)
    packed.fill(layer, packed.quantized(weight, scheme))
    found = layer(ids)
    assert found.shape == (2, 3, 21)
    for place, row in zip(found.flatten(0, 1).tolist(), ids.flatten().tolist(), strict=True):
        for column, value in enumerate(place):
            sharing = with_scale(weight, row, column, scheme)
            expected = math.prod(by_formula(weight[row, column].item(), sharing, scheme.bits))
            assert value == pytest.approx(expected, rel=1e-6)


# Size -----------------------------------------------------------------------------------------------------------------


def held(model: torch.nn.Module) -> int:
    """Return the bytes of all weights and buffers that are saved."""
    return sum(one.nbytes for one in model.state_dict().values())


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        # Rows of 21 codes take 3 bytes at 1 bit and 6 at 2; 11 rows of them. A scale takes 4, and so does a bias.
        (Scheme(1), 11 * 3 + 4 + 44),
        (Scheme(2), 11 * 6 + 4 + 44),
        (Scheme(1, "row"), 11 * 3 + 11 * 4 + 44),
        (Scheme(2, "group", 3), 11 * 6 + 11 * 7 * 4 + 44),
    ],
    ids=str,
)
def test_bytes_of_a_layer_also_after_it_was_used(scheme, expected):
    layer = linear_layer(scheme)
    assert held(layer) == held(PackedLinear(21, 11, True, scheme)) == expected
    layer(random(4, 21))
    assert held(layer) == expected


@pytest.fixture(scope="module")
def bert_base() -> BertForSequenceClassification:
    with torch.device("meta"):
        return BertForSequenceClassification(BertConfig(num_labels=2))


WORDS = 30522 * 768  # 23,440,896 weights
LAYERS = 12 * (4 * 768 * 768 + 2 * 768 * 3072)  # 84,934,656
# Positions, two segments, a norm; biases of a layer and its two norms; pooler and classifier: 1,108,226 in float32.
REST = (512 + 2 + 2) * 768 + 12 * (4 * 768 + 3072 + 768 + 4 * 768) + 769 * 768 + 769 * 2
ROWS = 30522 + 12 * (4 * 768 + 3072 + 768)  # 113,466


@pytest.mark.parametrize(
    ("scheme", "expected", "times"),
    [
        # 73 matrices: 13,546,944 bytes of codes + 292 of scales + 4,432,904 of what stays = 17,980,140
        (Scheme(1), (WORDS + LAYERS) // 8 + 73 * 4 + REST * 4, 24.3),
        (Scheme(2), (WORDS + LAYERS) // 4 + 73 * 4 + REST * 4, 13.8),
        (Scheme(1, "row"), (WORDS + LAYERS) // 8 + ROWS * 4 + REST * 4, 23.7),
        (Scheme(1, "group", 64), (WORDS + LAYERS) // 8 + (WORDS + LAYERS) // 64 * 4 + REST * 4, 17.6),
    ],
    ids=str,
)
def test_bytes_of_bert_base(bert_base, scheme, expected, times):
    full = 4 * (WORDS + LAYERS + REST)
    assert held(bert_base) == full == 437_935_112
    model = copy.deepcopy(bert_base)
    latent.make_latent(model, scheme)
    latent.pack_latent(model)
    assert held(model) == expected
    assert full / expected > times
    if scheme == Scheme(1):
        assert expected == 17_980_140
        assert full / expected > 20
