"""The Triton kernels against plain PyTorch in float64. tests/test_kernels.py runs this file in a process of its own.

With TRITON_INTERPRET=1 the kernels run on a CPU; Triton reads that variable where it is imported. Its interpreter
multiplies bfloat16 tiles as if they were integers, and cuts digits off where a GPU rounds: so here no bfloat16 goes
through tl.dot, and two units in the last place are allowed.
"""

from __future__ import annotations

import math
import os

import pytest
import torch

from espalier.trellis import attention_kernels, kernels
from test_attention import HIGH, LOW, written_out

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
BLOCK, SPLITS, CAPACITY = 16, 2, 53
ERRORS = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},
    torch.float16: {"rtol": 2**-9, "atol": 1e-4},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-4},
}
# Batch, query heads and heads of the cache. Heads alone are multiplied and added; shared ones go through tl.dot.
ALONE, SHARED = (1, 2, 2), (1, 4, 2)
KINDS = [
    (ALONE, 80, torch.float32),
    (ALONE, 128, torch.bfloat16),
    (SHARED, 80, torch.float16),
    (SHARED, 128, torch.float32),
    ((3, 2, 2), 16, torch.float16),
    ((3, 3, 1), 16, torch.float32),
    ((1, 20, 1), 16, torch.float32),  # more heads in a group than the smallest tile has rows
]
# A block's edges, and those of two splits: 17 … 32 positions are a block for each, 33 … 53 are two for the first.
LENGTHS = [1, 15, 16, 17, 31, 32, 33, 48, 49, CAPACITY]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the overflow that is provoked


def attended(heads, width, dtype, length, centre, **settings):
    """Return the kernels' attention, the same in float64, and how many rows were computed again."""
    batch, query_heads, kv_heads = heads
    draw = torch.Generator().manual_seed(length)
    query = torch.randn(batch, 2 * query_heads, width, generator=draw)[:, ::2]  # not contiguous
    keys, values = torch.randn(2, batch, kv_heads, CAPACITY, width, generator=draw)
    keys[:, :, length:] = values[:, :, length:] = math.nan  # what is not live is not read
    tensors = [tensor.to(DEVICE, dtype) for tensor in (query, keys, values)]
    recomputed = torch.zeros((), dtype=torch.int64, device=DEVICE)
    output = attention_kernels.decode_attention(
        *tensors, torch.tensor(length, device=DEVICE), centre,
        scale=width**-0.5, low=LOW, high=HIGH, recomputed=recomputed, **settings,
    )  # fmt: skip
    assert output.dtype == dtype
    return output.double().cpu(), written_out(*(tensor.cpu() for tensor in tensors), length), recomputed.item()


CASES = [(heads, 16, torch.float32, length) for heads in (ALONE, SHARED) for length in LENGTHS]


@pytest.mark.parametrize(("heads", "width", "dtype", "length"), CASES + [(*kind, 49) for kind in KINDS])
def test_attention_at_the_edges_of_blocks_and_splits(heads, width, dtype, length):
    output, expected, recomputed = attended(heads, width, dtype, length, 0.5, block=BLOCK, splits=SPLITS)
    torch.testing.assert_close(output, expected, **ERRORS[dtype])
    assert recomputed == 0


@pytest.mark.parametrize(("heads", "width", "dtype"), KINDS[:6])
@pytest.mark.parametrize("centre", [1000.0, -1000.0])
def test_rows_out_of_range_are_computed_again(heads, width, dtype, centre):
    output, expected, recomputed = attended(heads, width, dtype, 33, centre, block=BLOCK, splits=SPLITS)
    torch.testing.assert_close(output, expected, **ERRORS[dtype])
    assert recomputed == heads[0] * heads[1]


def test_without_being_computed_again_such_rows_are_wrong(monkeypatch):
    monkeypatch.setitem(globals(), "LOW", -math.inf)
    monkeypatch.setitem(globals(), "HIGH", math.inf)
    output, _, recomputed = attended(ALONE, 16, torch.float32, 49, -1000.0, block=BLOCK, splits=SPLITS)
    assert recomputed == 0
    assert output.isnan().all()


def test_attention_with_the_blocks_and_splits_that_are_chosen_from_shapes():
    for heads in (ALONE, SHARED):
        output, expected, _ = attended(heads, 128, torch.float32, CAPACITY, 0.0)
        torch.testing.assert_close(output, expected, **ERRORS[torch.float32])


def test_a_count_of_recomputed_rows_need_not_be_asked_for():
    query, keys, values = torch.ones(3, 1, 1, 1, 16, device=DEVICE)
    length = torch.tensor(1, device=DEVICE)
    output = attention_kernels.decode_attention(query[0], keys, values, length, 1000.0, scale=1.0, low=LOW, high=HIGH)
    assert torch.equal(output, query[0])


PRODUCTS = [
    *[(rows, 37, 45, torch.float32) for rows in (1, 2, 3, 5, 8, 16, 17)],
    *[(rows, 5, 1100, torch.float32) for rows in (1, 4, 65)],  # more than one block of K
    *[(rows, 33, 300, torch.float16) for rows in (3, 17)],
    *[(rows, 1, 129, torch.bfloat16) for rows in (1, 4)],
]


@pytest.mark.parametrize(("rows", "outer", "inner", "dtype"), PRODUCTS)
def test_products(rows, outer, inner, dtype):
    draw = torch.Generator().manual_seed(rows)
    x, weight, bias = (
        torch.randn(shape, generator=draw).to(DEVICE, dtype) for shape in ((rows, inner), (outer, inner), (outer,))
    )
    x, weight = (torch.cat((part, part), 1)[:, :inner] for part in (x, weight))  # rows not next to each other
    for offset in (None, bias):
        expected = x.double() @ weight.double().T + (0 if offset is None else offset.double())
        products = [kernels.gemv(x, weight, offset)] if rows <= kernels.GEMV_ROWS else []
        if dtype != torch.bfloat16 or DEVICE == "cuda":
            products += [kernels.flat_gemm(x, weight, offset, splits=splits) for splits in (None, 3)]
        for product in products:
            assert product.dtype == dtype
            error = ERRORS[dtype] | {"atol": ERRORS[dtype]["atol"] * inner**0.5}
            torch.testing.assert_close(product.double(), expected, **error)


def test_gemv_refuses_more_rows_than_it_has_sums_for():
    with pytest.raises(ValueError, match="1 to 4 rows, not 5"):
        kernels.gemv(torch.ones(5, 16, device=DEVICE), torch.ones(3, 16, device=DEVICE))


def test_as_many_splits_as_give_each_multiprocessor_its_programs(monkeypatch):
    class Device:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Device)
    cuda = torch.device("cuda")
    attention = [
        attention_kernels._splits(pairs, blocks, cuda) for pairs, blocks in ((32, 128), (32, 2), (1, 512), (600, 9))
    ]
    assert attention == [17, 2, attention_kernels.MOST_SPLITS, 1]
    products = [kernels._splits(tiles, blocks, cuda) for tiles, blocks in ((128, 86), (32, 86), (32, 8), (344, 32))]
    assert products == [2, 8, 2, 1]
