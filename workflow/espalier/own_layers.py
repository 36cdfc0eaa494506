"""Checkpoints whose layers are Espalier's own: transformers reads their weights into layers that we put there first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "espalier"  # the quantization method by which transformers finds our layers


def load(
    auto_class: Any, source: Path, device: str, put_layers: Callable[[PreTrainedModel, dict], None], **options: Any
) -> tuple[PreTrainedModel, dict]:
    """Return a model, by a class such as AutoModelForCausalLM, and transformers' loading report.

    `put_layers` gets the model, without weights, and the `quantization_config` of its config.json, and puts our layers
    into it. Raises ValueError for weights that have no place in the model then.
    """
    from transformers import AutoConfig

    _know()
    config = AutoConfig.from_pretrained(source)
    described = config.quantization_config
    config.quantization_config = {"quant_method": METHOD, "described": described, "put_layers": put_layers}
    options = {"device_map": {"": device}, **options}
    model, found = auto_class.from_pretrained(source, config=config, output_loading_info=True, **options)
    if found["unexpected_keys"]:
        raise ValueError(f"its weights have no place in the model, such as {min(found['unexpected_keys'])}")
    return model, found


def _know() -> None:
    """Teach transformers our method, once."""
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return

    @auto.register_quantization_config(METHOD)
    class Config(QuantizationConfigMixin):
        def __init__(self, described: dict, put_layers: Callable, **_: Any):
            self.quant_method, self.described, self.put_layers = METHOD, described, put_layers

        def to_dict(self) -> dict:
            return self.described  # without the function, which could not be printed

    @auto.register_quantizer(METHOD)
    class Quantizer(HfQuantizer):
        is_trainable = False

        def is_serializable(self) -> bool:
            return False

        def _process_model_before_weight_loading(self, model, **_):
            self.quantization_config.put_layers(model, self.quantization_config.described)
