"""Attention of the engine flash-decoding: torch's flash kernels, and keys and values in memory taken once.

transformers calls `attend` in each block, as the attention named ATTENTION. Which kernel it runs is set by `kernel`,
around a whole call.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer

from espalier.worker import Unavailable

ATTENTION = "espalier-split-kv"  # with "flash" in the name transformers would look for a package
UNKNOWN = ("position_bias", "softcap", "s_aux")  # what other architectures ask for and the kernels do not compute


def kernel() -> AbstractContextManager:
    """Return a context in which torch takes its flash kernels for attention, or raises RuntimeError."""
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **asked: object,
) -> tuple[torch.Tensor, None]:
    """Return the attention of queries (batch × heads × n × size) as batch × n × heads × size.

    Keys and values are batch × groups × length × size; query heads share them in order, without a copy. One query sees
    all keys, and of as many queries as keys each sees those up to its own. Raises Unavailable for anything else.
    """
    queries = query.shape[2]
    if attention_mask is not None or queries not in (1, key.shape[2]):
        raise Unavailable("flash attention here is for whole prompts of equal lengths, and single tokens")
    if found := [name for name in UNKNOWN if asked.get(name) is not None]:
        raise Unavailable(f"the model's attention has {found[0]}, which torch's flash kernels do not compute")
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, scale=scaling, is_causal=queries > 1, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2).contiguous(), None


def cache(blocks: int, capacity: int) -> Cache:
    """Return an empty cache of `capacity` tokens a block, which takes its memory when the first tokens come."""
    return Cache(layers=[Room(capacity) for _ in range(blocks)])


class Room(DynamicLayer):
    """Keys and values of one block: new tokens are written behind the earlier ones, which stay where they are."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.length = capacity, 0

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens (batch × groups × n × size) and return views of all that there are."""
        if not self.is_initialized:
            batch, groups = keys.shape[:2]
            self.keys, self.values = (
                new.new_empty(batch, groups, self.capacity, new.shape[3]) for new in (keys, values)
            )
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        start, self.length = self.length, self.length + keys.shape[2]
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length


AttentionInterface.register(ATTENTION, attend)  # without a function for masks: transformers then makes none
