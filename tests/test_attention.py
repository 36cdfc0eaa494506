"""Attention over a static cache against softmax written out in float64: splits, groups, and rows out of range."""

from __future__ import annotations

import math

import pytest
import torch

from espalier.trellis import attention
from espalier.trellis.attention import HIGH, LOW, decode_attention

CAPACITY = 40
SPLIT = 16
SHAPES = [(1, 2, 2, 16), (3, 4, 2, 80), (1, 6, 2, 128), (2, 3, 1, 24)]  # batch, heads, heads of the cache, head_dim
# What float32 sums leave, and beside it the one rounding to the dtype that is returned.
ERRORS = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float16: {"rtol": 2**-11 * 1.01, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2**-8 * 1.01, "atol": 1e-6},
}


def tensors(shape, dtype=torch.float32, length=CAPACITY, factor=1.0):
    """Return a query and a cache, in which all that is not live is NaN."""
    batch, heads, kv_heads, width = shape
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(batch, heads, width, generator=draw) * factor
    keys, values = torch.randn(2, batch, kv_heads, CAPACITY, width, generator=draw)
    keys[:, :, length:] = values[:, :, length:] = math.nan
    return query.to(dtype), keys.to(dtype), values.to(dtype)


def written_out(query, keys, values, length, scale=None):
    """Return the attention of each head in float64, one after another."""
    shared = query.shape[1] // keys.shape[1]
    output = torch.empty(query.shape, dtype=torch.float64)
    for row, head in torch.cartesian_prod(torch.arange(len(query)), torch.arange(query.shape[1])).tolist():
        key, value = (cache[row, head // shared, :length].double() for cache in (keys, values))
        scores = key @ query[row, head].double() * (query.shape[-1] ** -0.5 if scale is None else scale)
        weights = torch.exp(scores - scores.max())
        output[row, head] = weights @ value / weights.sum()
    return output


def counter():
    return torch.zeros((), dtype=torch.int64)


def assert_right(output, expected):
    torch.testing.assert_close(output.double(), expected, **ERRORS[output.dtype])


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_the_softmax_of_the_live_positions_at_every_edge_of_a_split(shape, dtype):
    for length in (1, 2, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT, 2 * SPLIT + 1, CAPACITY):
        inputs = tensors(shape, dtype, length)
        recomputed = counter()
        output = decode_attention(*inputs, length, 0.5, split=SPLIT, recomputed=recomputed)
        assert output.dtype == dtype
        assert_right(output, written_out(*inputs, length))
        assert not recomputed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_context_longer_than_the_usual_split_and_more_heads_than_one_pass_takes(dtype, monkeypatch):
    monkeypatch.setattr(attention, "SPLIT", SPLIT)
    monkeypatch.setattr(attention, "PASS", 5 * SPLIT * 16)  # at most so many numbers: passes of 5, 5 and 2 heads
    inputs = tensors((3, 8, 4, 16), dtype)
    assert_right(decode_attention(*inputs, CAPACITY, 0.0), written_out(*inputs, CAPACITY))
    recomputed = counter()
    assert_right(decode_attention(*inputs, CAPACITY, 1000.0, recomputed=recomputed), written_out(*inputs, CAPACITY))
    assert recomputed == 24


@pytest.mark.parametrize("split", [SPLIT, None])
@pytest.mark.parametrize("centre", [1000.0, -1000.0])
@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_out_of_range_are_computed_again_by_their_own_maximum(shape, dtype, centre, split):
    inputs = tensors(shape, dtype, 33)
    recomputed = counter()
    output = decode_attention(*inputs, 33, centre, split=split, recomputed=recomputed)
    assert_right(output, written_out(*inputs, 33))
    assert recomputed == shape[0] * shape[1]


@pytest.mark.parametrize("centre", [1000.0, -1000.0])
def test_without_being_computed_again_such_rows_are_wrong(centre, monkeypatch):
    monkeypatch.setattr(attention, "_recompute", lambda *_: None)
    assert decode_attention(*tensors(SHAPES[0]), CAPACITY, centre).isnan().all()


def test_only_the_rows_that_leave_the_range_are_computed_again():
    query, keys, values = tensors((2, 4, 2, 16))
    query[0, 1] *= 100  # its group is (0, 1) of the cache's first head
    query[1, 3] *= 100
    recomputed = counter()
    output = decode_attention(query, keys, values, CAPACITY, 0.0, recomputed=recomputed)
    assert recomputed == 2
    assert_right(output, written_out(query, keys, values, CAPACITY))


@pytest.mark.parametrize(("largest", "rows"), [(LOW, 0), (LOW - 0.01, 1), (HIGH, 0), (HIGH + 0.01, 1)])
def test_the_range_is_exact_and_right_up_to_its_ends(largest, rows):
    """One position has the largest score, the others lie below it by up to 40; values are large and small."""
    length, draw = 3000, torch.Generator().manual_seed(0)
    scores = -40 * torch.rand(length, generator=draw)
    scores[7] = 0.0
    keys = torch.zeros(1, 1, length, 16)
    keys[0, 0, :, 0] = scores
    keys[0, 0, :, 1] = 1.0
    query = torch.zeros(1, 1, 16)
    query[0, 0, 0], query[0, 0, 1] = 1.0, 2.0  # x = scores + 2
    values = torch.randn(1, 1, length, 16, generator=draw) * torch.tensor([1e4, 1e-4] * 8)
    recomputed = counter()
    output = decode_attention(query, keys, values, length, 2.0 - largest, scale=1.0, recomputed=recomputed)
    assert recomputed == rows
    expected = written_out(query, keys, values, length, 1.0)
    torch.testing.assert_close(output.double(), expected, rtol=2e-5, atol=1e-9)


def test_the_scale_can_be_given_and_a_query_need_not_be_contiguous():
    query, keys, values = tensors((2, 4, 2, 16))
    spread = torch.stack((query, query), -2)[..., 0, :]
    assert not spread.is_contiguous()
    expected = written_out(query, keys, values, CAPACITY, 1.0)
    assert_right(decode_attention(spread, keys, values, CAPACITY, 0.0, scale=1.0), expected)


def test_a_nan_stays_with_the_heads_that_read_it():
    query, keys, values = tensors((2, 4, 2, 16))
    keys[1, 0, 3, 5] = math.nan
    output = decode_attention(query, keys, values, CAPACITY, 0.0)
    assert output[1, :2].isnan().all()
    output[1, :2] = expected = torch.zeros(2, 16)
    wanted = written_out(query, keys, values, CAPACITY)
    wanted[1, :2] = expected
    assert_right(output, wanted)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_graph_serves_every_length():
    query, keys, values = (tensor.cuda() for tensor in tensors((2, 4, 2, 128)))
    length, recomputed = torch.tensor(1, device="cuda"), counter().cuda()
    decode_attention(query, keys, values, length, 0.0, recomputed=recomputed)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = decode_attention(query, keys, values, length, 0.0, recomputed=recomputed)
    for now in (1, 17, CAPACITY):
        length.fill_(now)
        graph.replay()
        assert_right(output.cpu(), written_out(*(tensor.cpu() for tensor in (query, keys, values)), now))
    assert recomputed.item() == 0
    query *= 1000
    graph.replay()
    assert_right(output.cpu(), written_out(*(tensor.cpu() for tensor in (query, keys, values)), CAPACITY))
    assert recomputed.item() == 8
