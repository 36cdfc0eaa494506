"""What an encoder with a classification head is made of, as far as quantizing and distilling it reads its parts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from espalier.errors import UserError, did_you_mean


class Layout(NamedTuple):
    """Where an architecture has its parts: dotted names below the model without its head, and below one layer."""

    layers: str
    query: str
    key: str


_BERT = Layout("encoder.layer", "attention.self.query", "attention.self.key")
LAYOUTS = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": Layout("transformer.layer", "attention.q_lin", "attention.k_lin"),
}


def layout_of(model: PreTrainedModel) -> Layout:
    """Return where a model has its parts. Raises UserError for an architecture that is not known here."""
    kind = model.config.model_type
    if kind not in LAYOUTS:
        near = did_you_mean(kind, LAYOUTS)
        raise UserError(f"An encoder of the type '{kind}' is not known; {', '.join(LAYOUTS)} are.{near}")
    return LAYOUTS[kind]


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the encoder's layers, the first one first."""
    return model.base_model.get_submodule(layout_of(model).layers)


def keep_layers(model: PreTrainedModel, kept: list[int]) -> None:
    """Remove all layers but those of these numbers, from 0. Raises UserError for a layer that there is not."""
    layers = layers_of(model)
    if max(kept) >= len(layers):
        raise UserError(f"The teacher has {len(layers)} layers, 0 to {len(layers) - 1}: there is no layer {max(kept)}.")
    owner, _, name = layout_of(model).layers.rpartition(".")
    setattr(model.base_model.get_submodule(owner), name, nn.ModuleList(layers[number] for number in kept))
    model.config.num_hidden_layers = len(kept)


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linear layers of all encoder layers by their names in the model: not the pooler, not the head."""
    inside = {part for layer in layers_of(model) for part in layer.modules() if isinstance(part, nn.Linear)}
    return {name: part for name, part in model.named_modules() if part in inside}


def word_embeddings(model: PreTrainedModel) -> tuple[str, nn.Embedding]:
    """Return the name and the module of the table of word embeddings."""
    table = model.get_input_embeddings()
    return next(name for name, part in model.named_modules() if part is table), table


class AttentionScores:
    """Records what each layer's attention computes before the softmax, in every forward pass of a model.

    `taken()` gives, and forgets, one tensor a layer, batch × heads × query × key: the products of queries and keys,
    divided by the square root of the head's width, without a mask. They are computed from what the projections gave,
    so that any implementation of attention is recorded alike.
    """

    def __init__(self, model: PreTrainedModel):
        layout, heads = layout_of(model), model.config.num_attention_heads
        self.queries: list[torch.Tensor] = []
        self.keys: list[torch.Tensor] = []
        for layer in layers_of(model):
            for name, found in ((layout.query, self.queries), (layout.key, self.keys)):
                layer.get_submodule(name).register_forward_hook(
                    lambda module, inputs, output, found=found: found.append(output.unflatten(-1, (heads, -1)))
                )

    def taken(self) -> list[torch.Tensor]:
        scores = [
            torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
            for query, key in zip(self.queries, self.keys, strict=True)
        ]
        self.queries.clear()
        self.keys.clear()
        return scores
