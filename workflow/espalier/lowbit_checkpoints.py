"""Models of packed integers on disk: the compressed-tensors format, which vLLM serves with its own kernels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from espalier import checkpoints, lowbit_loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from espalier.models.lowbit import Scheme


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, info: dict, scheme: Scheme, dtype: str
) -> None:
    """Write a model whose linear layers are `LowBitLinear`; `dtype` is what everything else computes in."""
    from torch import nn

    ignored = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    model.config.quantization_config = lowbit_loading.described(scheme, ignored)
    arithmetic = "unpacked" if scheme.activations is None else "integer"
    storage = {"format": "compressed-tensors", "bits": scheme.bits, "dtype": dtype, "arithmetic": arithmetic}
    checkpoints.save(model, tokenizer, folder, info, **storage)
