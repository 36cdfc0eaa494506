"""The layouts that a weight can have, each with its product: what measurement chooses from (products.py).

A layout is a class, made of a weight, out × in, and its bias, or None. It is called with … × in and returns … × out,
allocating no more than that; `dense` gives the weight back. A new one is a class here and a line in `LAYOUTS`.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch.nn.functional import linear

PACKED_ROWS = 64  # rows that oneDNN packs a weight for; it packs alike for all numbers but 1, and 1 is then as fast

# A tensor in oneDNN's own order is nothing that torch.compile knows how to pass on, but it may go into an operator.
_operators = torch.library.Library("espalier", "FRAGMENT")
_operators.define("packed_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _packed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _packed_linear_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


_operators.impl("packed_linear", _packed_linear, "CompositeExplicitAutograd")
_operators.impl("packed_linear", _packed_linear_shape, "Meta")


class Stored:
    """A weight as checkpoints store it, out × in, and the library's product."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.weight, self.bias = weight.contiguous(), bias

    @staticmethod
    def works(rows: int, dtype: torch.dtype, device: str) -> bool:
        """Whether products of this many rows can be computed so."""
        return True

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return … × out of … × in."""
        return linear(x, self.weight, self.bias)

    def dense(self) -> torch.Tensor:
        """Return the weight, out × in."""
        return self.weight


class Kernel(Stored):
    """The same weight: a Triton kernel for few rows (FlashDecoding++, section 4), the library's product for more."""

    name: str  # of the function in kernels.py
    most: int  # rows

    @classmethod
    def works(cls, rows: int, dtype: torch.dtype, device: str) -> bool:
        return device.startswith("cuda") and rows <= cls.most and find_spec("triton") is not None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        if not 0 < len(flat) <= self.most:
            return super().__call__(x)
        from espalier.trellis import kernels

        return getattr(kernels, self.name)(flat, self.weight, self.bias).view(*x.shape[:-1], -1)


class Gemv(Kernel):
    """Each row by itself, without tensor cores."""

    name, most = "gemv", 4


class FlatGemm(Kernel):
    """Rows filled up to the smallest tile of the tensor cores."""

    name, most = "flat_gemm", 64


class Transposed:
    """A weight as in × out."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.weight, self.bias = weight.t().contiguous(), bias

    @staticmethod
    def works(rows: int, dtype: torch.dtype, device: str) -> bool:
        return True

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        product = flat @ self.weight if self.bias is None else torch.addmm(self.bias, flat, self.weight)
        return product.view(*x.shape[:-1], self.weight.shape[1])

    def dense(self) -> torch.Tensor:
        return self.weight.t().contiguous()


class Packed:
    """A weight in oneDNN's own blocks of channels, on a CPU, and its product."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_ROWS), bias

    @staticmethod
    @cache
    def works(rows: int, dtype: torch.dtype, device: str) -> bool:
        if device != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        try:
            Packed(torch.ones(16, 16, dtype=dtype), None)(torch.ones(rows, 16, dtype=dtype))
        except RuntimeError:  # a dtype that this processor has no instructions for
            return False
        return True

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.espalier.packed_linear(x, self.weight, self.bias)

    def dense(self) -> torch.Tensor:
        return self.weight.to_dense()


LAYOUTS = {"stored": Stored, "gemv": Gemv, "flat-gemm": FlatGemm, "transposed": Transposed, "packed": Packed}
