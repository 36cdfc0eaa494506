"""Layers that train towards 1 and 2 bits: they keep weights in float32 and compute with their codes and scales.

Straight-through (Bengio et al. 2013, arXiv 1308.3432): with codes C and scales a of the weight W, and the inputs X
rounded to 8 bits, the forward pass is Y = round(X) · (a C)ᵀ, and the backward pass is that of the plain product of
round(X) and a C, whose gradients are taken for those of X and W. Scales are no parameters: they follow from W.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import embedding, linear
from transformers import PreTrainedModel

from espalier.errors import UserError
from espalier.models import packed
from espalier.models.encoders import linear_layers, word_embeddings
from espalier.models.lowbit import put, round_tokens
from espalier.models.packed import Codes, Scheme


class LatentLinear(nn.Linear):
    """A linear layer that computes with the codes of its weight."""

    scheme: Scheme

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.scheme.activations is None:
            return linear(inputs, _Quantized.apply(self.weight, self.scheme), self.bias)
        found = _Product.apply(inputs.flatten(0, -2), self.weight, self.scheme).unflatten(0, inputs.shape[:-1])
        return found if self.bias is None else found + self.bias


class LatentEmbedding(nn.Embedding):
    """A table of embeddings that are looked up among its codes."""

    scheme: Scheme

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return embedding(ids, _Quantized.apply(self.weight, self.scheme), self.padding_idx)


class _Quantized(torch.autograd.Function):
    """A weight's quantized values, whose gradient is taken for the weight's."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
        return packed.values(packed.quantized(weight, scheme))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        return gradient, None


class _Product(torch.autograd.Function):
    """The product of rounded inputs, tokens × in, and a weight's codes; float32, tokens × out.

    What the backward pass needs is kept as integers of 8 bits. Its products are in bfloat16 under autocast.
    """

    @staticmethod
    def forward(ctx, inputs: torch.Tensor, weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
        codes, token_scale = round_tokens(inputs)
        quantized = packed.quantized(weight, scheme)
        ctx.save_for_backward(codes, token_scale, *quantized)
        kind = inputs.device.type
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        ctx.input_dtype = inputs.dtype
        return packed.product(codes, token_scale, quantized)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        codes, token_scale, weight_codes, scale = ctx.saved_tensors
        gradient = gradient.to(ctx.dtype)
        to_inputs = gradient @ packed.values(Codes(weight_codes, scale), ctx.dtype)
        to_weight = gradient.T @ (codes * token_scale).to(ctx.dtype)
        return to_inputs.to(ctx.input_dtype), to_weight.float(), None


def make_latent(model: PreTrainedModel, scheme: Scheme) -> None:
    """Have the encoder layers' linear layers and the word embeddings compute with codes; their weights stay the same.

    Raises UserError for groups that do not divide a layer's inputs.
    """
    layers, (_, table) = linear_layers(model), word_embeddings(model)
    for name, layer in layers.items() if scheme.scales == "group" else ():
        if layer.in_features % scheme.group_size:
            raise UserError(
                f"The layer {name} has {layer.in_features} input channels, which groups of {scheme.group_size} (the key"
                " 'group_size') do not divide."
            )
    for part, kind in [*((layer, LatentLinear) for layer in layers.values()), (table, LatentEmbedding)]:
        part.__class__, part.scheme = kind, scheme


def pack_latent(model: PreTrainedModel) -> None:
    """Replace the layers of `make_latent` by packed ones that give the same."""
    for name, part in [(name, part) for name, part in model.named_modules() if hasattr(part, "scheme")]:
        if isinstance(part, LatentLinear):
            made = packed.PackedLinear(part.in_features, part.out_features, part.bias is not None, part.scheme)
            packed.fill(made, packed.quantized(part.weight.detach(), part.scheme), part.bias)
        else:
            made = packed.PackedEmbedding(part.num_embeddings, part.embedding_dim, part.scheme)
            packed.fill(made, packed.quantized(part.weight.detach(), part.scheme))
        put(model, name, made)
