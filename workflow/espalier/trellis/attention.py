"""Attention of one new token over a static cache: split keys, one maximum for all, rows out of range recomputed.

FlashDecoding++ (Hong et al. 2023, arXiv 2311.01282), section 3: softmax(x)_i = e^(x_i − φ) / Σ_j e^(x_j − φ) for any φ.
With the same φ for all splits of the keys, their sums are added as they are; nothing waits for a maximum. A row whose
largest score lies too far from φ is computed again with its own maximum.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

# What a row's largest score minus φ may be. Sums are in float32, whose normal numbers reach from e^−87.3 to e^88.7.
# HIGH: a sum of n terms e^60·|v| stays finite while n·|v| < e^28 = 1.4e12, such as 2^17 positions of values up to 1e7.
# LOW: a term is lost only below e^−87.3, so beside a largest term of e^−50 at most n·e^−37.3 of the sum is lost: for
# 2^17 positions 8e-12, far below float32's own 6e-8.
LOW = -50.0
HIGH = 60.0

# On a CPU the scores of a split are a tensor, and keys of a narrower dtype are first written out in float32.
SPLIT = 1024  # positions of one split
PASS = 2**20  # numbers that are written out at once, 4 MB: so many heads make one pass


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: int | torch.Tensor,
    centre: float,
    *,
    scale: float | None = None,
    recomputed: torch.Tensor | None = None,
    split: int | None = None,
) -> torch.Tensor:
    """Return softmax(query·keysᵀ·scale)·values over the first `length` positions, b×h×d, in the query's dtype.

    `query` is b×h×d; `keys` and `values` are b×kv×capacity×d and contiguous, and h is a multiple of kv: h/kv heads in
    turn share one head of the cache. What lies beyond `length` (at least 1) is not read. `centre` is φ. `scale` is
    1/√d unless given. `recomputed`, an int64 tensor of one number on the same device, is raised by the number of rows
    (b, h) that left the range [φ + LOW, φ + HIGH]. `split` is the positions of one split, for tests.

    On a CPU `length` is an int. On CUDA it is a 0-d int32 or int64 tensor on the device, so that one CUDA graph serves
    every length, and nothing here waits for the device. Sums are in float32 (float64 for float64).
    """
    if scale is None:
        scale = query.shape[-1] ** -0.5
    if query.is_cuda:
        from espalier.trellis import attention_kernels

        return attention_kernels.decode_attention(
            query, keys, values, length, centre, scale=scale, low=LOW, high=HIGH, recomputed=recomputed
        )
    width = query.shape[-1]
    exact = torch.promote_types(query.dtype, torch.float32)
    converted = keys.dtype != exact
    keys, values = (cache.view(-1, cache.shape[2], width)[:, :length] for cache in (keys, values))
    # Pairs (batch, head of the cache), each with the group of query heads that share it.
    grouped = query.reshape(len(keys), -1, width).to(exact) * scale
    split = min(length, split or SPLIT)
    pairs = max(1, PASS // (split * (width if converted else grouped.shape[1])))
    passes = [_sums(*part, centre, split, converted) for part in _parts(pairs, 0, grouped, keys, values)]
    numerator, denominator, largest = passes[0] if len(passes) == 1 else map(torch.cat, zip(*passes, strict=True))
    output = numerator / denominator
    lowest, highest = largest.aminmax()
    if not (lowest.item() >= LOW and highest.item() <= HIGH):  # so written that a NaN is out of range
        outside = ~((largest >= LOW) & (largest <= HIGH))
        _recompute(output, outside, grouped, keys, values)
        if recomputed is not None:
            recomputed += outside.sum()
    return output.reshape(query.shape).to(query.dtype)


def _parts(size: int, dim: int, *tensors: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    """Return the tensors cut into parts of at most `size` along `dim`, or as they are, which is the quick case."""
    if tensors[0].shape[dim] <= size:
        return (tensors,)
    return zip(*(tensor.split(size, dim) for tensor in tensors), strict=True)


def _sums(query, keys, values, centre, split, converted) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return Σ e^(x − φ)·v (pairs×group×d), Σ e^(x − φ) and the largest x − φ (pairs×group×1) of all splits.

    Keys in float32 come from memory, which a product with the key matrix first reads fastest (1.3–1.7 times as fast
    for heads of 128, measured); those just converted come from the cache, where the usual order is the faster one.
    """
    room = query.new_empty(keys.shape[0] * split * keys.shape[2]) if converted else None
    sums = None
    for key, value in _parts(split, 1, keys, values):
        if room is None:
            scores = torch.bmm(key, query.transpose(1, 2)).transpose(1, 2)
        else:
            scores = torch.bmm(query, room[: key.numel()].view(key.shape).copy_(key).transpose(1, 2))
            value = room[: value.numel()].view(value.shape).copy_(value)  # the keys are no longer needed
        if centre:
            scores -= centre
        largest = scores.amax(-1, keepdim=True)
        denominator = scores.exp_().sum(-1, keepdim=True)
        numerator = torch.bmm(scores, value)
        if sums is not None:
            numerator, denominator = numerator.add_(sums[0]), denominator.add_(sums[1])
            largest = torch.maximum(largest, sums[2])
        sums = numerator, denominator, largest
    return sums


def _recompute(output, outside, query, keys, values) -> None:
    """Write into `output` (pairs×group×d) the rows that are `outside` (pairs×group×1), each by its own maximum."""
    for pair in outside.any(1).flatten().nonzero().flatten().tolist():
        key, value = keys[pair].to(query.dtype), values[pair].to(query.dtype)
        rows = torch.softmax(query[pair] @ key.T, -1) @ value
        output[pair] = torch.where(outside[pair], rows, output[pair])
