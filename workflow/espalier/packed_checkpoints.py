"""Encoders of 1- and 2-bit weights on disk (the format: packed_loading.py)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from espalier import checkpoints, packed_loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from espalier.models.packed import Scheme


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, info: dict, scheme: Scheme) -> None:
    """Write a model whose layers are packed."""
    model.config.quantization_config = {"quant_method": packed_loading.METHOD, **asdict(scheme)}
    arithmetic = "unpacked" if scheme.activations is None else "integer"
    storage = {"format": "packed", "bits": scheme.bits, "dtype": "float32", "arithmetic": arithmetic}
    checkpoints.save(model, tokenizer, folder, info, **storage)
