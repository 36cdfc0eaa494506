"""Encoders of 1- and 2-bit weights in a format of Espalier's own: what it is, and how it is loaded.

config.json says under `quantization_config` how the weights are packed, the fields of models/packed.py's `Scheme`. The
safetensors hold, of each packed layer, `weight_packed` (bytes, rows × ⌈columns · bits / 8⌉) and `weight_scale`
(float32, (1 or rows) × groups), and everything else in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier import own_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "espalier-packed"


def load(auto_class: Any, source: Path, device: str, **options: Any) -> tuple[PreTrainedModel, dict]:
    """Return a packed model, by a class such as AutoModelForSequenceClassification, and transformers' loading report.

    `options` need the dtype, float32. Raises ValueError for weights that the config does not describe.
    """
    return own_layers.load(auto_class, source, device, _put_layers, **options)


def _put_layers(model: PreTrainedModel, described: dict) -> None:
    import torch

    from espalier.models.encoders import linear_layers, word_embeddings
    from espalier.models.lowbit import put
    from espalier.models.packed import PackedEmbedding, PackedLinear, Scheme

    scheme = Scheme(**{key: value for key, value in described.items() if key != "quant_method"})
    name, table = word_embeddings(model)
    with torch.device("meta"):
        put(model, name, PackedEmbedding(table.num_embeddings, table.embedding_dim, scheme))
        for name, part in linear_layers(model).items():
            put(model, name, PackedLinear(part.in_features, part.out_features, part.bias is not None, scheme))
