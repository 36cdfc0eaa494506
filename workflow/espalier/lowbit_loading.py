"""Models of packed integers in the compressed-tensors format: what their config says, and how they are loaded.

github.com/vllm-project/compressed-tensors: 8-bit codes for integer products are `int-quantized`, all others
`pack-quantized`. transformers opens these files too, but unpacks all weights at the first forward pass, so that neither
memory nor speed would be those of the format. Here the layers of models/lowbit.py take them as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier import own_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from espalier.models.lowbit import Scheme


def described(scheme: Scheme, ignored: list[str]) -> dict:
    """Return a `quantization_config` of the compressed-tensors format."""
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size < 0 else "group",
        "group_size": None if scheme.group_size < 0 else scheme.group_size,
        "dynamic": False,
    }
    inputs = {"num_bits": scheme.activations, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    stored = "pack-quantized" if scheme.packed else "int-quantized"
    group = {
        "format": stored,
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None if scheme.activations is None else inputs,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
    }


def scheme_of(described: dict) -> Scheme:
    from espalier.models.lowbit import Scheme

    group = described["config_groups"]["group_0"]
    weights, inputs = group["weights"], group["input_activations"]
    return Scheme(
        bits=weights["num_bits"],
        group_size=weights["group_size"] or -1,
        symmetric=weights["symmetric"],
        activations=inputs and inputs["num_bits"],
    )


def load(auto_class: Any, source: Path, device: str, **options: Any) -> tuple[PreTrainedModel, dict]:
    """Return a model of packed integers, by a class such as AutoModelForCausalLM, and transformers' loading report.

    `options` need the dtype. Raises ValueError for weights that the config does not describe.
    """
    return own_layers.load(auto_class, source, device, _put_layers, **options)


def _put_layers(model: PreTrainedModel, described: dict) -> None:
    import torch

    from espalier.models.lowbit import LowBitLinear, linear_layers, put

    scheme = scheme_of(described)
    for name, layer in linear_layers(model).items():
        with torch.device("meta"):
            made = LowBitLinear(
                layer.in_features, layer.out_features, layer.bias is not None, scheme, layer.weight.dtype
            )
        put(model, name, made)
