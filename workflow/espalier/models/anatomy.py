"""Where a model keeps its transformer blocks, and how some of them are taken away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from espalier.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def blocks_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    """Return the model's transformer blocks, the first one first; raises UserError where there are none to be found."""
    blocks = getattr(model.get_decoder(), "layers", None)
    if blocks is None:
        raise UserError(f"It is not known where a {type(model).__name__} keeps its transformer blocks.")
    return blocks


def remove_blocks(model: PreTrainedModel, removed: Sequence[int]) -> None:
    """Remove blocks for good, so that any transformers opens the saved model: config and cache indices follow."""
    import torch

    kept = [i for i in range(len(blocks_of(model))) if i not in set(removed)]
    decoder = model.get_decoder()
    decoder.layers = torch.nn.ModuleList(decoder.layers[i] for i in kept)
    for position, block in enumerate(decoder.layers):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
