"""A frozen base in NF4: blocks of 64 values, scaled by their largest magnitude, each the nearest of 16 codes.

The scales are quantized to 8 bits in turn (double quantization). Dettmers et al. 2023, 2305.14314, Sections 3 and 4; by
bitsandbytes. Embeddings and the output head stay as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from espalier import checkpoints
from espalier.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 64  # values that share a scale


def check_widths(parent: Path, device: str) -> None:
    """Raise UserError if a linear layer cannot be packed in whole blocks where it must be; reads no weights.

    bitsandbytes fails, or misreads what it packed, of rows that blocks do not fill, on a CPU only.
    """
    from espalier.models.lowbit import linear_layers

    for name, layer in linear_layers(checkpoints.skeleton(parent)).items() if device == "cpu" else ():
        if layer.in_features % BLOCK:
            raise UserError(
                f"The layer {name} of {parent} has {layer.in_features} input features; 4 bits need a multiple of"
                f" {BLOCK} on a CPU: say 'round_to: {BLOCK}' where its widths are pruned; else take 8 bits, or a GPU."
            )


def load(parent: Path, device: str, **options) -> checkpoints.Checkpoint:
    """Load `parent` with the linear layers of its blocks in NF4; `options` need the dtype that is computed in."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=options["dtype"],
    )
    checkpoint = checkpoints.load(parent, device, quantization_config=config, device_map={"": device}, **options)
    for part in checkpoint.model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            # Else the first validation on such a CPU repacks the weights in place, and computes in bfloat16.
            part.support_avx512bf16_for_cpu = False
    return checkpoint


def round_weights(model: PreTrainedModel, device: str) -> None:
    """Replace the weights that `load` packs by the values that the packed ones stand for, in place.

    They are computed on `device`, a layer at a time, as `load` computes them there; the model stays where it is.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from espalier.models.lowbit import linear_layers

    for layer in linear_layers(model).values():
        weight = layer.weight.data
        packed, state = quantize_4bit(weight.to(device), blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        layer.weight.data = dequantize_4bit(packed, state).to(weight)
