"""Models whose layers differ in width. This file is carried in each such checkpoint, and needs transformers alone:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

`block_shapes` in the config says, for each block, the shape of every linear layer that may differ from the original's:
{"self_attn.q_proj": [in_features, out_features, has_bias]}. Such a class exists for every architecture of
transformers whose blocks are `get_decoder().layers` and which reads the number of heads off its tensors or off
`num_heads`; it is made when its name is asked for: PrunedLlamaForCausalLM, PrunedOPTConfig.
"""

from __future__ import annotations

import transformers
from torch import nn


def _config_class(original: type) -> type:
    def init(self, block_shapes=None, **options):
        original.__init__(self, **options)
        self.block_shapes = block_shapes or []

    content = {"model_type": f"pruned_{original.model_type}", "__init__": init, "__module__": __name__}
    made = type(f"Pruned{original.__name__}", (original,), content)
    made.register_for_auto_class()
    return made


def _model_class(original: type) -> type:
    config_class = __getattr__(f"Pruned{original.config_class.__name__}")

    def init(self, config):
        original.__init__(self, config)
        for block, shapes in zip(self.get_decoder().layers, config.block_shapes, strict=True):
            for name, (in_features, out_features, bias) in shapes.items():
                path, _, own = name.rpartition(".")
                owner = block.get_submodule(path)
                setattr(owner, own, nn.Linear(in_features, out_features, bias=bias))
                if own == "q_proj" and hasattr(owner, "num_heads"):
                    owner.num_heads = out_features // owner.head_dim

    content = {"config_class": config_class, "__init__": init, "__module__": __name__}
    made = type(f"Pruned{original.__name__}", (original,), content)
    made.register_for_auto_class("AutoModelForCausalLM")
    transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    transformers.AutoModelForCausalLM.register(config_class, made, exist_ok=True)
    return made


def __getattr__(name: str) -> type:
    """Make the class of this name, once, from the class of transformers without "Pruned"."""
    if name in globals():
        return globals()[name]
    original = name.removeprefix("Pruned")
    if original == name or not hasattr(transformers, original):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    make = _config_class if original.endswith("Config") else _model_class
    globals()[name] = made = make(getattr(transformers, original))
    return made
