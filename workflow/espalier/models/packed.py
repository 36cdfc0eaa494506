"""Weights of 1 and 2 bits: binary and ternary codes with scales, packed in bytes, and the layers that multiply them.

    binary    code = sign(w), of 0 it is +1                    scale = mean |w|
    ternary   code = sign(w) where |w| > 0.7 · mean |w|, or 0  scale = mean |w| where the code is not 0

Rastegari et al. 2016 (arXiv 1603.05279), equation 6; Li et al. 2016 (arXiv 1605.04711), equations 5 and 6; as in XTC
(Wu et al. 2022, arXiv 2206.01859). Means are over the whole matrix, over a row, or over a group of a row's channels.

With 8-bit activations a product is one of integers, exact whatever computes it. So a packed layer gives, bit for bit,
what the same weight gave in training (models/latent.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear, pad

from espalier.models.lowbit import integer_product, round_tokens

THRESHOLD = 0.7  # of the mean magnitude: what is smaller becomes 0 in a ternary weight
ROWS = 1024  # output channels unpacked at once for integer products


@dataclass(frozen=True)
class Scheme:
    """How weights are quantized, and what they are multiplied with."""

    bits: int  # 1: binary; 2: ternary
    scales: str = "tensor"  # tensor, row or group: what shares a scale
    group_size: int = -1  # input channels of a group, for `scales` group
    activations: int | None = 8  # bits that a layer's inputs are rounded to, token by token; None: they stay


class Codes(NamedTuple):
    """A quantized weight: int8 codes of −1, 0 and 1, out × in; float32 scales, (1 or out) × groups."""

    codes: torch.Tensor
    scale: torch.Tensor


def quantized(weight: torch.Tensor, scheme: Scheme) -> Codes:
    """Return codes and scales of a weight, out × in."""
    blocks = _blocks(weight.float(), scheme)
    sizes = blocks.abs()
    mean = sizes.mean(-1)
    if scheme.bits == 1:
        codes, scale = (blocks >= 0).to(torch.int8).mul_(2).sub_(1), mean
    else:
        kept = sizes > THRESHOLD * mean[..., None]
        codes = blocks.sign() * kept
        scale = (sizes * kept).sum(-1) / kept.sum(-1).clamp(min=1)
    return Codes(codes.to(torch.int8).reshape(weight.shape), scale)


def values(weight: Codes, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return code · scale, in the shape of the codes."""
    groups = weight.scale.shape[1]
    return (weight.codes.unflatten(1, (groups, -1)).to(dtype) * weight.scale[..., None].to(dtype)).flatten(1)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes as bytes, rows × ⌈columns · bits / 8⌉, the first code in the lowest bits.

    A binary code is stored as 0 for −1 and 1 for +1, a ternary one as code + 1.
    """
    count = 8 // bits
    stored = ((codes + 1) // 2 if bits == 1 else codes + 1).to(torch.uint8)
    numbers = pad(stored, (0, -codes.shape[1] % count)).unflatten(1, (-1, count))
    packed = numbers[..., 0].clone()
    for place in range(1, count):
        packed |= numbers[..., place] << (bits * place)
    return packed


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Return the int8 codes, rows × columns, that `pack` made into bytes."""
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    stored = (packed[..., None] >> places).bitwise_and_(2**bits - 1).view(torch.int8).flatten(-2)[..., :columns]
    return 2 * stored - 1 if bits == 1 else stored - 1


def product(tokens: torch.Tensor, token_scale: torch.Tensor, weight: Codes) -> torch.Tensor:
    """Return the float32 product, tokens × out, of tokens' int8 codes with a weight's.

    Each group's sum of integers is exact in 32 bits, and in float32 as well (below 2^24 for 132,000 channels or fewer).
    """
    groups = weight.scale.shape[1]
    parts = zip(tokens.chunk(groups, 1), weight.codes.chunk(groups, 1), weight.scale.unbind(1), strict=True)
    total = None
    for inputs, codes, scale in parts:
        found = integer_product(inputs.contiguous(), codes.contiguous()).float().mul_(scale)
        total = found if total is None else total.add_(found)
    return total.mul_(token_scale)


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed."""

    def __init__(self, in_features: int, out_features: int, bias: bool, scheme: Scheme):
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        _add_weight(self, out_features, in_features, scheme)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def codes(self, rows: slice = slice(None)) -> Codes:
        """Return the codes of some output channels."""
        scale = self.weight_scale if len(self.weight_scale) == 1 else self.weight_scale[rows]
        return Codes(unpack(self.weight_packed[rows], self.scheme.bits, self.in_features), scale)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return … × out_features from … × in_features."""
        if self.scheme.activations is None:
            return linear(inputs, values(self.codes()), self.bias)
        tokens = inputs.flatten(0, -2)
        codes, token_scale = round_tokens(tokens)
        outputs = tokens.new_empty(len(tokens), self.out_features)
        for start in range(0, self.out_features, ROWS):
            rows = slice(start, start + ROWS)
            found = product(codes, token_scale, self.codes(rows))
            outputs[:, rows] = found if self.bias is None else found + self.bias[rows]
        return outputs.unflatten(0, inputs.shape[:-1])

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.scheme}"


class PackedEmbedding(nn.Module):
    """A table of embeddings that is packed; only the rows that are looked up are unpacked."""

    def __init__(self, num_embeddings: int, embedding_dim: int, scheme: Scheme):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.scheme = num_embeddings, embedding_dim, scheme
        _add_weight(self, num_embeddings, embedding_dim, scheme)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return … × embedding_dim, float32, from … ids."""
        rows = ids.flatten()
        scale = self.weight_scale if len(self.weight_scale) == 1 else self.weight_scale[rows]
        codes = unpack(self.weight_packed[rows], self.scheme.bits, self.embedding_dim)
        return values(Codes(codes, scale)).unflatten(0, ids.shape)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.scheme}"


def fill(layer: PackedLinear | PackedEmbedding, weight: Codes, bias: torch.Tensor | None = None) -> None:
    """Put a quantized weight into a packed layer."""
    layer.weight_packed, layer.weight_scale = pack(weight.codes, layer.scheme.bits), weight.scale
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)


def _add_weight(layer: nn.Module, rows: int, columns: int, scheme: Scheme) -> None:
    groups = columns // scheme.group_size if scheme.scales == "group" else 1
    layer.register_buffer("weight_packed", torch.empty(rows, -(-columns * scheme.bits // 8), dtype=torch.uint8))
    layer.register_buffer("weight_scale", torch.empty(1 if scheme.scales == "tensor" else rows, groups))


def _blocks(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Return a weight as (1 or out) × groups × what shares a scale."""
    if scheme.scales == "tensor":
        return weight.reshape(1, 1, -1)
    return weight.unflatten(1, (1, -1) if scheme.scales == "row" else (-1, scheme.group_size))
