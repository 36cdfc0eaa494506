"""Models of packed integers in the compressed-tensors format: what their config says, and how they are loaded.

github.com/vllm-project/compressed-tensors: 8-bit codes for integer products are `int-quantized`, all others
`pack-quantized`. transformers opens these files too, but unpacks all weights at the first forward pass, so that neither
memory nor speed would be those of the format. Here the layers of models/lowbit.py take them as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from transformers import AutoConfig

    _know_layers()
    config = AutoConfig.from_pretrained(source)
    config.quantization_config = {**config.quantization_config, "quant_method": "espalier"}
    options = {"device_map": {"": device}, **options}
    model, found = auto_class.from_pretrained(source, config=config, output_loading_info=True, **options)
    if found["unexpected_keys"]:
        raise ValueError(f"its weights have no place in the model, such as {min(found['unexpected_keys'])}")
    return model, found


def _know_layers() -> None:
    """Teach transformers, once, to make our layers before it reads weights into them."""
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if "espalier" in auto.AUTO_QUANTIZER_MAPPING:
        return

    @auto.register_quantization_config("espalier")
    class Config(QuantizationConfigMixin):
        def __init__(self, **described: Any):
            self.quant_method, self.described = "espalier", described

    @auto.register_quantizer("espalier")
    class Quantizer(HfQuantizer):
        is_trainable = False

        def is_serializable(self) -> bool:
            return False

        def _process_model_before_weight_loading(self, model, **_):
            import torch

            from espalier.models.lowbit import LowBitLinear, linear_layers, put

            scheme = scheme_of(self.quantization_config.described)
            for name, layer in linear_layers(model).items():
                with torch.device("meta"):
                    made = LowBitLinear(
                        layer.in_features, layer.out_features, layer.bias is not None, scheme, layer.weight.dtype
                    )
                put(model, name, made)
