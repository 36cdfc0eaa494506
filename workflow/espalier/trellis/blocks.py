"""A loaded model of transformers, read into uniform blocks: whatever its architecture, one loop in model.py runs it.

A block is, with x the residual stream (tokens × hidden):

    query, key, value = project(attention_norm(x))          queries and keys then turned by their position
    x = x + output(attention(query, key, value))
    x = x + down(activation(gate) · up), where (gate, up) = up(mlp_norm(x)), or down(activation(up)) without a gate

Widths are read off the layers, so blocks may differ. Weights of nn.Linear are taken out of the model as they are read,
so that they are never held twice. Every other kind of linear layer (packed integers) is kept and called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from espalier.models.anatomy import LAYOUTS, PRUNED, parts_of
from espalier.trellis.products import Projections
from espalier.worker import Unavailable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Architectures → whether rotary embeddings turn neighbouring channels (2i, 2i + 1), not (i, i + half). None: no rotary.
ROTARY = {"llama": False, "mistral": False, "qwen2": False, "glm": True, "opt": None}
FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # of transformers, those whose angles no prompt's length changes
LEARNED_OFFSET = 2  # OPT's learned positions begin in this row of their table
Product = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


@dataclass
class RmsNorm:
    """x · weight / √(mean x² + eps), over the last dimension."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass
class LayerNorm:
    """(x − mean) · weight / √(variance + eps) + bias, over the last dimension."""

    width: tuple[int, ...]
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.width, self.weight, self.bias, self.eps)


@dataclass
class Called:
    """Layers that hold packed weights, called as they are; `stacked` of them are cut into as many equal parts."""

    layers: list[nn.Module]
    stacked: int = 1

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(part for layer in self.layers for part in layer(x).chunk(self.stacked, -1))


@dataclass
class Block:
    """One transformer block: its norms, its products, and its numbers of heads."""

    attention_norm: RmsNorm | LayerNorm
    project: Product  # tokens × hidden → query, key and value, tokens × (heads · head_dim)
    output: Product
    mlp_norm: RmsNorm | LayerNorm
    up: Product  # tokens × hidden → gate and up, or up alone, tokens × neurons
    activation: Callable[[torch.Tensor], torch.Tensor]
    down: Product
    heads: int
    kv_heads: int
    head_dim: int


@dataclass
class Blocks:
    """A whole model: token ids → embedding (+ learned positions) → blocks → norm → head."""

    embedding: torch.Tensor  # vocabulary × hidden
    positions: torch.Tensor | None  # learned: context × hidden
    rotary: nn.Module | None  # transformers' own, which makes the tables of cosines and sines
    interleaved: bool  # whether rotary embeddings turn neighbouring channels
    blocks: list[Block]
    norm: RmsNorm | LayerNorm
    head: Product  # tokens × hidden → logits, tokens × vocabulary
    context: int  # most tokens, prompt and output together

    def products(self) -> list[tuple[str, Product]]:
        """Return every product with the name of its kind."""
        kinds = ("project", "output", "up", "down")
        return [(kind, getattr(block, kind)) for block in self.blocks for kind in kinds] + [("head", self.head)]


def read(model: PreTrainedModel) -> Blocks:
    """Return the model's blocks and take its weights out of it: it cannot be used any more.

    Raises Unavailable for a model that trellis cannot run. A sliding window ends the context: before it nothing slides.
    """
    config = model.config
    architecture = config.model_type.removeprefix(PRUNED)
    _check(architecture, model)
    decoder = model.get_decoder()
    layout = LAYOUTS[architecture]
    activation = _activation(getattr(config, "hidden_act", None) or config.activation_function)
    embedding = model.get_input_embeddings().weight.detach()
    positions = decoder.embed_positions.weight.detach()[LEARNED_OFFSET:] if architecture == "opt" else None
    blocks = []
    for parts, block in zip(parts_of(model), decoder.layers, strict=True):
        blocks.append(
            Block(
                attention_norm=_norm(block.get_submodule(layout.attention_norm)),
                project=_product([parts.query, parts.key, parts.value]),
                output=_product([parts.output]),
                mlp_norm=_norm(block.get_submodule(layout.mlp_norm)),
                up=_product(parts.up, parts.stacked),
                activation=activation,
                down=_product([parts.down]),
                heads=parts.heads,
                kv_heads=parts.groups,
                head_dim=parts.head_dim,
            )
        )
    return Blocks(
        embedding=embedding,
        positions=positions,
        rotary=getattr(decoder, "rotary_emb", None),
        interleaved=bool(ROTARY[architecture]),
        blocks=blocks,
        norm=_norm(decoder.final_layer_norm if architecture == "opt" else decoder.norm),
        head=_product([model.get_output_embeddings()]),
        context=min(config.max_position_embeddings, getattr(config, "sliding_window", None) or 1 << 62),
    )


def _check(architecture: str, model: PreTrainedModel) -> None:
    config = model.config
    if architecture not in ROTARY:
        raise Unavailable(f"trellis does not know the architecture {architecture}; it knows {', '.join(ROTARY)}")
    if ROTARY[architecture] is None:
        decoder = model.get_decoder()
        if not config.do_layer_norm_before or decoder.final_layer_norm is None:
            raise Unavailable("trellis needs norms before attention and MLP, and this OPT has them behind or none")
        if decoder.project_in is not None:
            raise Unavailable("trellis needs embeddings as wide as the blocks, and this OPT projects narrower ones")
        return
    kind = config.rope_parameters["rope_type"]
    if kind not in FIXED_ROPE:
        raise Unavailable(f"trellis does not know rotary embeddings of type {kind}; it knows {', '.join(FIXED_ROPE)}")


def _norm(module: nn.Module) -> RmsNorm | LayerNorm:
    if isinstance(module, nn.LayerNorm):
        return LayerNorm(tuple(module.normalized_shape), _detached(module.weight), _detached(module.bias), module.eps)
    return RmsNorm(module.weight.detach(), module.variance_epsilon)


def _activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    from transformers.activations import ACT2FN

    # The plain functions, where transformers' modules do no more, cost less to call.
    return {"silu": F.silu, "relu": F.relu}.get(name) or ACT2FN[name]


def _product(layers: list[nn.Module], stacked: int = 1) -> Product:
    """Return the product of layers that read the same input, and take the weights out of those that are nn.Linear."""
    if any(type(layer) is not nn.Linear for layer in layers):
        return Called(layers, stacked)
    weights, biases = [], []
    for layer in layers:
        bias = layer.bias
        weights += layer.weight.detach().chunk(stacked)
        biases += [None] * stacked if bias is None else bias.detach().chunk(stacked)
        del layer.weight, layer.bias
    return Projections(weights, biases)


def _detached(parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if parameter is None else parameter.detach()
