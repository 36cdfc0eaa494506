"""FlashDecoding (Dao et al. 2023): attention of one query split along the keys, in transformers' model and loop.

The parts are computed at the same time and merged by their log-sum-exp. On CUDA that is what the flash kernels of
torch's `scaled_dot_product_attention` do for a single query where batch · heads alone would not fill the device: they
are FlashAttention's own, and choose how many parts. (`varlen_attn` with its `num_splits` reaches the same kernels, but
they split there only where query heads share keys or the cache is paged.) On a CPU torch's flash kernel takes keys in
parts of 512, one after the other; threads share batch · heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from espalier import hf_generation
from espalier.errors import first_line
from espalier.worker import Unavailable

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from espalier.worker import Load

PACKAGES = hf_generation.PACKAGES
SAMPLINGS = hf_generation.SAMPLINGS
probe = hf_generation.probe


class Engine(hf_generation.HFGeneration):
    """transformers' model with another attention, and a cache that takes its memory once a call."""

    name = "flash-decoding"

    def prepare(self, model: PreTrainedModel, load: Load) -> PreTrainedModel:
        from espalier import flash_attention

        hf_generation.refuse_window(model, load)
        config = model.config
        heads = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        try:
            _try_attention(heads // groups, size, model.dtype, load.device)
        except RuntimeError as error:
            reason = first_line(error).rstrip(".")
            raise Unavailable(
                f"torch's flash attention refuses heads of {size} channels in {model.dtype} here: {reason}"
            ) from error
        model.set_attn_implementation(flash_attention.ATTENTION)
        if config._attn_implementation != flash_attention.ATTENTION:
            raise Unavailable("transformers cannot replace this model's attention")
        return model

    def options(self, batch: int, tokens: int) -> dict:
        from espalier import flash_attention

        blocks = self.model.config.num_hidden_layers
        return {"past_key_values": flash_attention.cache(blocks, tokens - 1)}  # the last token is not kept

    def generate(
        self, token_ids: list[list[int]], output_tokens: int, sampling: str, first_token: Callable[[], None]
    ) -> list[list[int]]:
        from espalier import flash_attention

        with flash_attention.kernel():
            return super().generate(token_ids, output_tokens, sampling, first_token)

    def details(self) -> dict:
        """Return which kernel computes attention, who chooses its parts, and the kind of cache."""
        parts = {"cuda": "as many as the kernel chooses, at once", "cpu": "of 512 keys, one after the other"}
        return {
            "attention": "flash kernel of scaled_dot_product_attention",
            "parts": parts[self.device],
            "cache": "preallocated",
        }


def _try_attention(shared: int, size: int, dtype: torch.dtype, device: str) -> None:
    """Raise RuntimeError if the flash kernels refuse such heads: `shared` query heads a group, of `size` channels."""
    import torch

    from espalier import flash_attention

    keys = torch.zeros(1, 1, 2, size, dtype=dtype, device=device)
    with flash_attention.kernel(), torch.inference_mode():
        for queries in (2, 1):
            query = torch.zeros(1, shared, queries, size, dtype=dtype, device=device)
            flash_attention.attend(None, query, keys, keys, None)
