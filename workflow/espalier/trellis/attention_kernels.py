"""Triton kernels of `attention.decode_attention`: sums over splits of the keys, then their merge with the range check.

FlashDecoding++ (Hong et al. 2023, arXiv 2311.01282), section 3. A program of the first kernel takes one head of the
cache and one split, and leaves Σ e^(x − φ)·v, Σ e^(x − φ) and the largest x of each query head that shares it. A
program of the second one adds these up for one row (batch, query head). If the row's largest x lies too far from φ, it
goes through the row's keys again, with that largest x in the place of φ.

The number of programs depends on shapes alone, and the length is read on the device, where the positions that are live
are dealt out evenly to the splits: so one CUDA graph serves every length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 2**14  # bytes of keys that a program holds at a time: 64 positions of heads of 128 in bfloat16
MOST_POSITIONS = 128  # of such a tile
PROGRAMS = 4  # that a multiprocessor should get, in all
MOST_SPLITS = 64


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    centre: float,
    *,
    scale: float,
    low: float,
    high: float,
    recomputed: torch.Tensor | None = None,
    block: int | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """Return what `attention.decode_attention` returns, b×h×d; `length` is a 0-d integer tensor on the device.

    `keys` and `values` are b×kv×capacity×d, of the same strides, the last of which is 1, as is the query's. A row is
    computed again unless low <= largest score − centre <= high. `block` (positions a tile) and `splits` are for tests.
    """
    batch, heads, width = query.shape
    kv_heads, capacity = keys.shape[1:3]
    group, pairs = heads // kv_heads, batch * kv_heads
    block_width = max(16, triton.next_power_of_2(width))
    block = block or min(MOST_POSITIONS, max(16, TILE // (block_width * keys.element_size())))
    splits = splits or _splits(pairs, triton.cdiv(capacity, block), query.device)
    numerators = query.new_empty((pairs, splits, group, width), dtype=torch.float32)
    denominators, largest = query.new_empty((2, pairs, splits, group), dtype=torch.float32)
    output = query.new_empty(query.shape)
    inputs = (query, keys, values, length, centre, scale, *query.stride()[:2], *keys.stride()[:3])
    shapes = {"KV_HEADS": kv_heads, "GROUP": group, "WIDTH": width, "SPLITS": splits}
    blocks = {"BLOCK": block, "BLOCK_WIDTH": block_width}
    _split_sums[(pairs, splits)](
        *inputs,
        numerators,
        denominators,
        largest,
        **shapes,
        **blocks,
        BLOCK_GROUP=max(16, triton.next_power_of_2(group)),
    )
    _merge[(pairs * group,)](
        *inputs, numerators, denominators, largest, output, recomputed, low, high,
        **shapes, **blocks, BLOCK_SPLITS=triton.next_power_of_2(splits),
    )  # fmt: skip
    return output


def _splits(pairs: int, blocks: int, device: torch.device) -> int:
    """Return how many splits give every multiprocessor its programs; a split has at least one block."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(triton.cdiv(PROGRAMS * processors, pairs), blocks, MOST_SPLITS))


@triton.jit
def _positions_of_a_split(live, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Return how many positions one split takes: whole blocks, so that some of the last splits may have none."""
    return tl.cdiv(tl.cdiv(live, SPLITS), BLOCK) * BLOCK


@triton.jit
def _sums_of_one(
    query, keys, values, begin, end, centre, position_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Return Σ e^(x − centre)·v (WIDTH), Σ e^(x − centre) and the largest x of one query, which holds the scale.

    Sums are kept for each place in a block, and added up at the end: within the loop only a score's own threads meet.
    """
    places, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_WIDTH)
    numerator = tl.zeros((BLOCK, BLOCK_WIDTH), tl.float32)
    denominator = tl.zeros((BLOCK,), tl.float32)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(begin, end, BLOCK):
        positions = start + places
        there = positions < end
        offsets = positions.to(tl.int64)[:, None] * position_stride + columns[None, :]
        mask = there[:, None] & (columns < WIDTH)[None, :]
        key = tl.load(keys + offsets, mask, 0.0).to(tl.float32)
        value = tl.load(values + offsets, mask, 0.0).to(tl.float32)
        scores = tl.where(there, tl.sum(key * query[None, :], 1), float("-inf"))
        weights = tl.exp(scores - centre)
        numerator += weights[:, None] * value
        denominator += weights
        largest = tl.maximum(largest, scores)
    return tl.sum(numerator, 0), tl.sum(denominator, 0), tl.max(largest, 0)


@triton.jit
def _split_sums(
    query, keys, values, length, centre, scale,
    query_batch, query_head, cache_batch, cache_head, cache_position,
    numerators, denominators, largest_scores,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_GROUP: tl.constexpr,
):  # fmt: skip
    """Write the sums and the largest score of one split of one head's keys, for the query heads that share it."""
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    live = tl.load(length).to(tl.int32)
    share = _positions_of_a_split(live, SPLITS, BLOCK)
    begin = split * share
    if begin >= live:
        return
    end = tl.minimum(begin + share, live)
    batch, head = pair // KV_HEADS, pair % KV_HEADS
    keys += batch * cache_batch + head * cache_head
    values += batch * cache_batch + head * cache_head
    query += batch * query_batch + head * GROUP * query_head
    place = pair * SPLITS + split
    columns = tl.arange(0, BLOCK_WIDTH)
    if GROUP == 1:
        one = tl.load(query + columns, columns < WIDTH, 0.0).to(tl.float32) * scale
        numerator, denominator, largest = _sums_of_one(
            one, keys, values, begin, end, centre, cache_position, WIDTH, BLOCK, BLOCK_WIDTH
        )
        tl.store(numerators + place * WIDTH + columns, numerator, columns < WIDTH)
        tl.store(denominators + place, denominator)
        tl.store(largest_scores + place, largest)
    else:
        # Tensor cores take at least 16 rows. Products of weights and values: exact float32, or TF32, which holds all
        # digits of a narrower value, and whose range, unlike float16's, is that of e^(x − φ).
        precision: tl.constexpr = "ieee" if keys.dtype.element_ty == tl.float32 else "tf32"
        rows, places = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK)
        several = tl.load(
            query + rows[:, None] * query_head + columns[None, :],
            (rows < GROUP)[:, None] & (columns < WIDTH)[None, :], 0.0,
        )  # fmt: skip
        numerator = tl.zeros((BLOCK_GROUP, BLOCK_WIDTH), tl.float32)
        denominator = tl.zeros((BLOCK_GROUP,), tl.float32)
        largest = tl.full((BLOCK_GROUP,), float("-inf"), tl.float32)
        for start in range(begin, end, BLOCK):
            positions = start + places
            there = positions < end
            offsets = positions.to(tl.int64)[:, None] * cache_position + columns[None, :]
            mask = there[:, None] & (columns < WIDTH)[None, :]
            key = tl.load(keys + offsets, mask, 0.0)
            value = tl.load(values + offsets, mask, 0.0).to(tl.float32)
            scores = tl.dot(several, tl.trans(key), input_precision="ieee") * scale
            scores = tl.where(there[None, :], scores, float("-inf"))
            weights = tl.exp(scores - centre)
            numerator = tl.dot(weights, value, numerator, input_precision=precision)
            denominator += tl.sum(weights, 1)
            largest = tl.maximum(largest, tl.max(scores, 1))
        tl.store(
            numerators + (place * GROUP + rows[:, None]) * WIDTH + columns[None, :], numerator,
            (rows < GROUP)[:, None] & (columns < WIDTH)[None, :],
        )  # fmt: skip
        tl.store(denominators + place * GROUP + rows, denominator, rows < GROUP)
        tl.store(largest_scores + place * GROUP + rows, largest, rows < GROUP)


@triton.jit
def _merge(
    query, keys, values, length, centre, scale,
    query_batch, query_head, cache_batch, cache_head, cache_position,
    numerators, denominators, largest_scores, output, recomputed, low, high,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Write one row (batch, query head) of the output: the splits' sums, or the row computed again."""
    row = tl.program_id(0).to(tl.int64)
    pair, member = row // GROUP, row % GROUP
    live = tl.load(length).to(tl.int32)
    columns, splits = tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_SPLITS)
    there = splits < tl.cdiv(live, _positions_of_a_split(live, SPLITS, BLOCK))
    places = (pair * SPLITS + splits) * GROUP + member
    largest = tl.max(tl.load(largest_scores + places, there, float("-inf")), 0)
    if (largest - centre >= low) & (largest - centre <= high):
        mask = there[:, None] & (columns < WIDTH)[None, :]
        numerator = tl.sum(tl.load(numerators + places[:, None] * WIDTH + columns[None, :], mask, 0.0), 0)
        denominator = tl.sum(tl.load(denominators + places, there, 0.0), 0)
    else:
        batch, head = pair // KV_HEADS, pair % KV_HEADS
        cache = batch * cache_batch + head * cache_head
        query += batch * query_batch + (head * GROUP + member) * query_head
        one = tl.load(query + columns, columns < WIDTH, 0.0).to(tl.float32) * scale
        numerator, denominator, _ = _sums_of_one(
            one, keys + cache, values + cache, 0, live, largest, cache_position, WIDTH, BLOCK, BLOCK_WIDTH
        )
        if recomputed is not None:
            tl.atomic_add(recomputed, 1)
    result = numerator / denominator
    tl.store(output + row * WIDTH + columns, result.to(output.dtype.element_ty), columns < WIDTH)
