"""Linear layers whose weights are integers of 2, 3, 4 or 8 bits, packed as in the compressed-tensors format.

A weight is a code times the scale of its group, (code − zero) · scale. With 8-bit activations the layer multiplies
integers: each token's inputs are rounded to 8 bits by their own largest magnitude, the product is exact in 32 bits, and
one factor a token and output channel turns it back (Xiao et al. 2022, 2211.10438, equations 1 and 2). Without, the
weights are unpacked for each product, some rows at a time, and multiplied in floating point.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear, pad

from espalier.errors import UserError

ROWS = 1024  # output channels computed at once: what bounds the memory of unpacked weights and of 32-bit products
TOKENS = 512  # up to which ROWS output channels of 8-bit codes are computed at once, and more for fewer tokens
# Bits → shifts that move the upper half of each part away, and masks of what is to stay.
SPREAD = {
    2: ((12, 0x000F000F), (6, 0x03030303)),
    3: ((20, 0x00000FFF00000FFF), (10, 0x003F003F003F003F), (5, 0x0707070707070707)),
    4: ((4, 0x0F0F),),
}


@dataclass(frozen=True)
class Scheme:
    """How a weight is stored, and what it is multiplied with."""

    bits: int  # of a weight's code: 2, 3, 4 or 8
    group_size: int = -1  # input channels that share a scale; -1: all of them
    symmetric: bool = True  # no zero points
    activations: int | None = None  # 8: inputs are rounded to as many bits; none: they stay as they are

    @property
    def packed(self) -> bool:
        """Whether codes share bytes or words: all but 8-bit codes for integer products."""
        return self.bits < 8 or self.activations is None


class Codes(NamedTuple):
    """A quantized weight: int8 codes, out × in; float32 scales and int8 zero points, out × groups."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None


def grid(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return scales and zero points by which a weight (out × in) just fits the codes.

    Symmetric: max|w| / (2^(bits−1) − 1), of Xiao et al.'s equation 1. Otherwise (max − min) / (2^bits − 1), where zero
    is always among the values (Nagel et al. 2021, 2106.08295, equations 4 to 7).
    """
    groups = _groups(weight.float(), scheme)
    if scheme.symmetric:
        scale = groups.abs().amax(-1) / (2 ** (scheme.bits - 1) - 1)
        return torch.where(scale > 0, scale, 1.0), None
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = (high - low) / (2**scheme.bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    zero = (-low / scale).round() - 2 ** (scheme.bits - 1)
    return scale, zero.to(torch.int8)


def rounded(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, scheme: Scheme) -> Codes:
    """Return the nearest codes of a weight (out × in) on a grid."""
    codes = (_groups(weight.float(), scheme) / scale[..., None]).round_()
    if zero is not None:
        codes += zero[..., None]
    largest = 2 ** (scheme.bits - 1) - 1
    lowest = -largest if scheme.symmetric else -largest - 1
    return Codes(codes.clamp_(lowest, largest).to(torch.int8).flatten(1), scale, zero)


def dequantized(weight: Codes) -> torch.Tensor:
    """Return the values that the codes stand for, out × in, float32."""
    groups = weight.scale.shape[1]
    codes = weight.codes.unflatten(1, (groups, -1)).float()
    if weight.zero is not None:
        codes -= weight.zero[..., None]
    return (codes * weight.scale[..., None]).flatten(1)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes (rows × columns, int8) as words of 32 bits, rows × ⌈columns · bits / 32⌉, without gaps.

    A code is stored as code + 2^(bits−1), the lowest bits first: the format pack-quantized of compressed-tensors.
    """
    count, size = (8, 3) if bits == 3 else (8 // bits, 1)  # codes, and bytes, that are the least to go together
    columns = codes.shape[1]
    numbers = pad(codes.int() + 2 ** (bits - 1), (0, -columns % 32)).unflatten(1, (-1, count))
    units = sum(numbers[..., place] << (bits * place) for place in range(count))
    found = torch.stack([(units >> (8 * byte)) & 255 for byte in range(size)], -1).to(torch.uint8)
    return found.flatten(1).view(torch.int32)[:, : -(-columns * bits // 32)].contiguous()


def unpack(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Return the codes, rows × columns, int8, that `pack` made into words."""
    found = words.contiguous().view(torch.uint8)
    if bits == 8:
        return found[:, :columns].bitwise_xor(128).view(torch.int8)
    if bits == 3:  # eight codes in three bytes
        found = pad(found, (0, -found.shape[1] % 3)).unflatten(1, (-1, 3)).to(torch.int64)
        found = found[..., 0] | found[..., 1] << 8 | found[..., 2] << 16
    # A number becomes so wide that each of its bytes is to hold one code: halves move apart, then quarters …
    wide = found.to({2: torch.int32, 3: torch.int64, 4: torch.int16}[bits])
    for shift, mask in SPREAD[bits]:
        wide = (wide | wide << shift) & mask
    return wide.view(torch.int8).sub_(2 ** (bits - 1))[:, :columns]


def round_tokens(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes of tokens × channels and each token's scale, tokens × 1, float32: its max|x| / 127."""
    inputs = inputs.float()
    scale = torch.maximum(inputs.amax(-1, keepdim=True), -inputs.amin(-1, keepdim=True)) / 127  # quicker than abs
    scale = torch.where(scale == 0, 1.0, scale)  # and not "> 0": what is not a number stays so
    return (inputs / scale).round_().to(torch.int8), scale


def integer_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left · rightᵀ of int8 matrices (m × k and n × k) in int32, exactly."""
    rows, columns = len(left), len(right)
    if _refuses_odd_shapes(left) or left.shape[1] == 1:
        # cuBLAS takes more than 16 rows, and multiples of 8; oneDNN gives zeros for a single column.
        left = pad(left, (0, -left.shape[1] % 8, 0, max(0, 17 - rows)))
        right = pad(right, (0, -right.shape[1] % 8, 0, -columns % 8))
    return torch._int_mm(left, right.T)[:rows, :columns]


class LowBitLinear(nn.Module):
    """A linear layer of packed codes. Its buffers have the names and shapes of the compressed-tensors format."""

    def __init__(self, in_features: int, out_features: int, bias: bool, scheme: Scheme, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        groups = 1 if scheme.group_size < 0 else in_features // scheme.group_size
        if scheme.packed:
            words = torch.empty(out_features, -(-in_features * scheme.bits // 32), dtype=torch.int32)
            self.register_buffer("weight_packed", words)
            self.register_buffer("weight_shape", torch.tensor([out_features, in_features]))
        else:
            self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(out_features, groups, dtype=torch.float32))
        if not scheme.symmetric:
            words = torch.empty(-(-out_features * scheme.bits // 32), groups, dtype=torch.int32)
            self.register_buffer("weight_zero_point", words)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def of(cls, weight: Codes, bias: torch.Tensor | None, scheme: Scheme) -> LowBitLinear:
        """Return the layer that holds these codes."""
        outputs, inputs = weight.codes.shape
        made = cls(inputs, outputs, bias is not None, scheme, torch.float32 if bias is None else bias.dtype)
        if scheme.packed:
            made.weight_packed = pack(weight.codes, scheme.bits)
        else:
            made.weight = weight.codes
        made.weight_scale = weight.scale
        if weight.zero is not None:
            made.weight_zero_point = pack(weight.zero.T, scheme.bits).T.contiguous()
        if bias is not None:
            made.bias.data = bias.detach()
        return made

    def codes(self, rows: slice = slice(None)) -> Codes:
        """Return the codes of some output channels."""
        zero = None
        if not self.scheme.symmetric:
            zero = unpack(self.weight_zero_point.T, self.scheme.bits, self.out_features).T[rows]
        return Codes(self._numbers(rows), self.weight_scale[rows], zero)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return … × out_features from … × in_features, in the dtype of the inputs."""
        tokens = inputs.flatten(0, -2)
        outputs = tokens.new_empty(len(tokens), self.out_features)
        products = self._unpacked_products if self.scheme.activations is None else self._integer_products
        for rows, product in products(tokens):
            outputs[:, rows] = product if self.bias is None else product + self.bias[rows]
        return outputs.unflatten(0, inputs.shape[:-1])

    def _integer_products(self, tokens: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        rounded_tokens, token_scale = round_tokens(tokens)
        # Few tokens have small products, and codes that are not packed need no memory of their own.
        for rows in self._some_rows(ROWS if self.scheme.packed else max(ROWS, ROWS * TOKENS // max(1, len(tokens)))):
            product = integer_product(rounded_tokens, self._numbers(rows)).float()
            yield rows, product.mul_(token_scale).mul_(self.weight_scale[rows, 0])

    def _unpacked_products(self, tokens: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        for rows in self._some_rows(ROWS):
            yield rows, linear(tokens, dequantized(self.codes(rows)).to(tokens.dtype))

    def _some_rows(self, count: int) -> list[slice]:
        return [slice(start, start + count) for start in range(0, self.out_features, count)]

    def _numbers(self, rows: slice) -> torch.Tensor:
        if not self.scheme.packed:
            return self.weight[rows]
        return unpack(self.weight_packed[rows], self.scheme.bits, self.in_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.scheme}"


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the layers that quantization stores in fewer bits: all linear ones but the output head."""
    head = model.get_output_embeddings()
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head}


def check_widths(layers: Mapping[str, nn.Linear], scheme: Scheme, where: object) -> None:
    """Raise UserError, which names `where`, the layer and the key, if groups do not divide a layer's inputs."""
    for name, layer in layers.items() if scheme.group_size > 0 else ():
        if layer.in_features % scheme.group_size:
            raise UserError(
                f"The layer {name} of {where} has {layer.in_features} input channels, which groups of"
                f" {scheme.group_size} (the key 'group_size') do not divide. Take another size, or -1 for one scale a"
                " row; or say 'round_to' where its widths are pruned."
            )


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the one of this name."""
    owner, _, own = name.rpartition(".")
    setattr(model.get_submodule(owner), own, layer)


def round_layers(model: nn.Module, scheme: Scheme) -> None:
    """Replace all linear layers but the output head by their nearest codes."""
    for name in list(linear_layers(model)):  # names alone, so that each layer is freed once it is replaced
        layer = model.get_submodule(name)
        codes = rounded(layer.weight.data, *grid(layer.weight.data, scheme), scheme)
        put(model, name, LowBitLinear.of(codes, layer.bias, scheme))


def _groups(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Return a weight as out × groups × channels of a group."""
    return weight.unflatten(1, (1, -1) if scheme.group_size < 0 else (-1, scheme.group_size))


def _refuses_odd_shapes(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda
