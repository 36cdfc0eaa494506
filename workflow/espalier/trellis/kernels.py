"""Triton kernels of products with few rows: M×K by a weight N×K, whose reading from memory is what takes the time.

FlashDecoding++ (Hong et al. 2023, arXiv 2311.01282), sections 4 and 5. `gemv` multiplies and adds for each row, without
tensor cores. `flat_gemm` fills the rows up to the smallest tile that tensor cores take, 16, and has the next tiles
fetched while one is multiplied (Triton's `num_stages`). The kernels of attention are in attention_kernels.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

GEMV_ROWS = 4  # at most: each has sums of its own in registers
GEMV_TILE = 4096  # numbers of the weight that a program of 128 threads reads at a time
GEMV_COLUMNS = 4  # of the output, that one program computes: so small that every multiprocessor gets several programs

FLAT_COLUMNS = 32  # of the output, in one program of flat_gemm
FLAT_STAGES = 4  # tiles of the weight under way
FLAT_ROWS = 64  # at most, in one program; more rows are several programs
PROGRAMS = 2  # that a multiprocessor should get, in all; where N is too small for that, K is split
LEAST_BLOCKS = 4  # of K, in a split: fewer would not fill the stages


def gemv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x·weightᵀ + bias, M×N in x's dtype, for `x` M×K of 1 to 4 rows and `weight` N×K; sums are in float32.

    The last stride of both is 1. Raises ValueError for another number of rows.
    """
    rows, inner = x.shape
    outer = len(weight)
    if not 1 <= rows <= GEMV_ROWS:
        raise ValueError(f"gemv takes 1 to {GEMV_ROWS} rows, not {rows}.")
    block = min(GEMV_TILE // GEMV_COLUMNS, max(16, triton.next_power_of_2(inner)))
    output = x.new_empty((rows, outer))
    _gemv[(triton.cdiv(outer, GEMV_COLUMNS),)](
        x, weight, bias, output, outer, inner, x.stride(0), weight.stride(0),
        ROWS=rows, COLUMNS=GEMV_COLUMNS, BLOCK=block,
    )  # fmt: skip
    return output


def flat_gemm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, splits: int | None = None
) -> torch.Tensor:
    """Return x·weightᵀ + bias, M×N in x's dtype, for `x` M×K and `weight` N×K; sums are in float32.

    The last stride of both is 1. `splits` (of K) is for tests.
    """
    rows, inner = x.shape
    outer = len(weight)
    block_rows = min(FLAT_ROWS, max(16, triton.next_power_of_2(rows)))
    block = 256 // x.element_size()  # 256 bytes of each row of the weight: 128 numbers in bfloat16
    tiles = triton.cdiv(outer, FLAT_COLUMNS), triton.cdiv(rows, block_rows)
    blocks = triton.cdiv(inner, block)
    splits = min(splits or _splits(tiles[0] * tiles[1], blocks, x.device), blocks)
    output = x.new_empty((rows, outer))
    sums = output if splits == 1 else x.new_empty((splits, rows, outer), dtype=torch.float32)
    _flat_gemm[(*tiles, splits)](
        x, weight, bias if splits == 1 else None, sums, rows, outer, inner, x.stride(0), weight.stride(0),
        BLOCK_ROWS=block_rows, COLUMNS=FLAT_COLUMNS, BLOCK=block, SPLITS=splits, num_stages=FLAT_STAGES,
    )  # fmt: skip
    if splits > 1:
        _add_splits[(triton.cdiv(rows * outer, 256),)](
            sums, bias, output, rows * outer, outer, SPLITS=splits, BLOCK=256
        )
    return output


def _splits(tiles: int, blocks: int, device: torch.device) -> int:
    """Return into how many parts K is split, so that every multiprocessor gets its programs."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(PROGRAMS * processors // tiles, blocks // LEAST_BLOCKS))


@triton.jit
def _gemv(
    x, weight, bias, output, outer, inner, x_stride, weight_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write some columns of the output. The sums of each place in a block are added up at the end only."""
    columns, places = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, BLOCK)
    weights = weight + columns.to(tl.int64)[:, None] * weight_stride
    sum0 = tl.zeros((COLUMNS, BLOCK), tl.float32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    for start in range(0, inner, BLOCK):
        place = start + places
        there = place < inner
        tile = tl.load(weights + place[None, :], (columns < outer)[:, None] & there[None, :], 0.0).to(tl.float32)
        sum0 += tile * tl.load(x + place, there, 0.0).to(tl.float32)[None, :]
        if ROWS > 1:
            sum1 += tile * tl.load(x + x_stride + place, there, 0.0).to(tl.float32)[None, :]
        if ROWS > 2:
            sum2 += tile * tl.load(x + 2 * x_stride + place, there, 0.0).to(tl.float32)[None, :]
        if ROWS > 3:
            sum3 += tile * tl.load(x + 3 * x_stride + place, there, 0.0).to(tl.float32)[None, :]
    offset = tl.zeros((COLUMNS,), tl.float32)
    if bias is not None:
        offset = tl.load(bias + columns, columns < outer, 0.0).to(tl.float32)
    _store(output + columns, tl.sum(sum0, 1) + offset, columns < outer)
    if ROWS > 1:
        _store(output + outer + columns, tl.sum(sum1, 1) + offset, columns < outer)
    if ROWS > 2:
        _store(output + 2 * outer + columns, tl.sum(sum2, 1) + offset, columns < outer)
    if ROWS > 3:
        _store(output + 3 * outer + columns, tl.sum(sum3, 1) + offset, columns < outer)


@triton.jit
def _store(pointers, numbers, mask):
    """Store numbers in the dtype of the memory they go to."""
    tl.store(pointers, numbers.to(pointers.dtype.element_ty), mask)


@triton.jit
def _flat_gemm(
    x, weight, bias, sums, rows, outer, inner, x_stride, weight_stride,
    BLOCK_ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Write one tile of the output, or, where K is split, of one split's sums."""
    split = tl.program_id(2)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    lines = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    places = tl.arange(0, BLOCK)
    share = tl.cdiv(tl.cdiv(inner, BLOCK), SPLITS) * BLOCK
    total = tl.zeros((BLOCK_ROWS, COLUMNS), tl.float32)
    for start in range(split * share, tl.minimum((split + 1) * share, inner), BLOCK):
        place = start + places
        there = (place < inner)[None, :]
        x_tile = tl.load(x + lines[:, None] * x_stride + place[None, :], (lines < rows)[:, None] & there, 0.0)
        weights = weight + columns.to(tl.int64)[:, None] * weight_stride + place[None, :]
        weight_tile = tl.load(weights, (columns < outer)[:, None] & there, 0.0)
        total = tl.dot(x_tile, tl.trans(weight_tile), total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + columns, columns < outer, 0.0).to(tl.float32)[None, :]
    places_out = (split * rows + lines[:, None]) * outer + columns[None, :]
    _store(sums + places_out, total, (lines < rows)[:, None] & (columns < outer)[None, :])


@triton.jit
def _add_splits(sums, bias, output, size, outer, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Add the splits' sums, and the bias, always in the same order."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = places < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(sums + split * size + places, there, 0.0)
    if bias is not None:
        total += tl.load(bias + places % outer, there, 0.0).to(tl.float32)
    _store(output + places, total, there)
