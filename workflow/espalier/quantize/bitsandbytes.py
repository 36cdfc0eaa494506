"""bitsandbytes: weights in 8 or 4 bits without calibration.

8 bits is LLM.int8 (Dettmers et al. 2022, 2208.07339): each row of a weight is scaled by its largest magnitude to int8,
and input columns that hold a value above `threshold` are multiplied in higher precision. 4 bits is QLoRA's storage
(Dettmers et al. 2023, 2305.14314): blocks of 64 values scaled by their largest magnitude, each value the nearest of
16 codes; `double_quantization` stores these scales in 8 bits too. Embeddings and the output head stay as they are.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from espalier import checkpoints, nf4

TAKES = ("causal-lm",)


@dataclass(frozen=True)
class Recipe:
    """How weights are stored, and what they are multiplied in."""

    bits: Literal[4, 8]  # a weight
    type: Literal["nf4", "fp4"] = "nf4"  # 4 bits: codes spaced for normally distributed weights, or a small float
    double_quantization: bool = False  # 4 bits: the scales of blocks are quantized as well
    threshold: float = 6.0  # 8 bits: input columns with a larger magnitude are left in higher precision
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # computed in; none: as the parent


def apply(parent: Path, output: Path, recipe: Recipe, *, seed: int, device: str) -> dict:
    """Quantize the parent's weights and save them packed; returns the seconds taken and the bytes before and after.

    Raises UserError for a parent that is quantized already, or whose layers 4 bits cannot pack.
    """
    import torch
    import transformers

    info = checkpoints.describe(parent)
    checkpoints.refuse_quantized(parent, "bitsandbytes")
    if recipe.bits == 4:
        nf4.check_widths(parent, device)
    dtype = recipe.dtype or checkpoints.weights_dtype(parent)
    config = transformers.BitsAndBytesConfig(
        load_in_8bit=recipe.bits == 8,
        load_in_4bit=recipe.bits == 4,
        llm_int8_threshold=recipe.threshold,
        bnb_4bit_quant_type=recipe.type,
        bnb_4bit_use_double_quant=recipe.double_quantization,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    started = time.monotonic()
    loaded = checkpoints.load(parent, device, quantization_config=config, device_map={"": device}, dtype=dtype)
    # Saved before any forward pass: on CPUs with AVX512-BF16 the first one repacks 4-bit weights for itself.
    arithmetic = "integer" if recipe.bits == 8 else "unpacked"
    storage = {"format": "bitsandbytes", "bits": recipe.bits, "dtype": dtype, "arithmetic": arithmetic}
    checkpoints.save(loaded.model, loaded.tokenizer, output, info, **storage)
    return {
        "seconds": time.monotonic() - started,
        "bytes": {"before": checkpoints.weight_bytes(parent), "after": checkpoints.weight_bytes(output)},
    }
