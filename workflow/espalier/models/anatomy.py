"""Where a model keeps its transformer blocks, and within a block its attention heads and MLP neurons.

One description for every architecture, `LAYOUTS`: a new one is one line there. Sizes are always read from the modules
and never from the config, so that a model that was pruned before, with widths that differ by layer, is like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from espalier.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

PRUNED = "pruned_"  # what the model type of a width-pruned checkpoint begins with (pruned.py)


@dataclass(frozen=True)
class Layout:
    """Names of a block's linear layers, and of the norms before attention and before the MLP.

    Rows of `up` and columns of `down` are the neurons of the MLP. `query`, `key` and `value` alone read what
    `attention_norm` gives, and `up` alone what `mlp_norm` gives.
    """

    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    stacked: int = 1  # how many matrices one layer of `up` stacks: 2 where gate and up are one
    down: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"


# Model type of transformers → layout. None: only whole blocks can be removed.
LAYOUTS: dict[str, Layout | None] = {
    "llama": Layout(),  # Vicuna too
    "mistral": Layout(),
    "qwen2": Layout(),
    "qwen3": Layout(),
    "glm": Layout(up=("mlp.gate_up_proj",), stacked=2),
    "glm4": Layout(up=("mlp.gate_up_proj",), stacked=2),
    "opt": Layout(
        output="self_attn.out_proj",
        up=("fc1",),
        down="fc2",
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
    ),
    "gpt_neox": None,  # Pythia; its query, key and value are interleaved in one matrix
}


@dataclass
class Parts:
    """The linear layers of one block. A group is a key/value head with the query heads that read it."""

    query: torch.nn.Linear
    key: torch.nn.Linear
    value: torch.nn.Linear
    output: torch.nn.Linear
    up: list[torch.nn.Linear]
    stacked: int
    down: torch.nn.Linear
    attention: torch.nn.Module
    head_dim: int

    @property
    def groups(self) -> int:
        """Number of key/value heads."""
        return self.key.out_features // self.head_dim

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.query.out_features // self.head_dim

    @property
    def neurons(self) -> int:
        """Width of the MLP."""
        return self.down.in_features

    def group_channels(self, group: int) -> range:
        """Return the rows of the query, and columns of the output layer, that belong to a group."""
        width = self.query.out_features // self.groups
        return range(group * width, (group + 1) * width)

    def linear_layers(self) -> list[torch.nn.Linear]:
        return [self.query, self.key, self.value, self.output, *self.up, self.down]


def model_type(config: PreTrainedConfig) -> str:
    """Return the architecture: the model type of transformers, of a width-pruned model that of the original.

    Raises UserError, which lists the architectures that can be pruned, for any other.
    """
    name = config.model_type.removeprefix(PRUNED)
    if name not in LAYOUTS:
        raise UserError(f"A '{name}' model cannot be pruned; supported are {', '.join(LAYOUTS)}.")
    return name


def layout_of(config: PreTrainedConfig) -> Layout:
    """Return where heads and neurons are; raises UserError for an architecture of which that is not known."""
    layout = LAYOUTS[model_type(config)]
    if layout is None:
        known = ", ".join(name for name, layout in LAYOUTS.items() if layout)
        raise UserError(
            f"Heads and neurons of a '{config.model_type}' model cannot be pruned, only whole blocks; those of these"
            f" can: {known}."
        )
    return layout


def blocks_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    """Return the model's transformer blocks, the first one first.

    Raises UserError for an unsupported architecture, and for heads that key/value heads do not divide.
    """
    model_type(model.config)
    heads, shared = model.config.num_attention_heads, getattr(model.config, "num_key_value_heads", None)
    if shared and heads % shared:
        raise UserError(f"{heads} query heads cannot be shared out evenly over {shared} key/value heads.")
    return model.get_decoder().layers


def parts_of(model: PreTrainedModel) -> list[Parts]:
    """Return heads and neurons of every block; raises UserError where these cannot be pruned."""
    layout = layout_of(model.config)
    found = []
    for block in blocks_of(model):
        query = block.get_submodule(layout.query)
        attention = block.get_submodule(layout.query.rpartition(".")[0])
        found.append(
            Parts(
                query=query,
                key=block.get_submodule(layout.key),
                value=block.get_submodule(layout.value),
                output=block.get_submodule(layout.output),
                up=[block.get_submodule(name) for name in layout.up],
                stacked=layout.stacked,
                down=block.get_submodule(layout.down),
                attention=attention,
                head_dim=attention.head_dim,
            )
        )
    return found


def remove_blocks(model: PreTrainedModel, removed: Iterable[int]) -> None:
    """Remove blocks for good, so that any transformers opens the saved model: config and cache indices follow."""
    import torch

    removed = set(removed)
    whole = blocks_of(model)
    kept = [i for i in range(len(whole)) if i not in removed]
    decoder = model.get_decoder()
    decoder.layers = torch.nn.ModuleList(whole[i] for i in kept)
    for position, block in enumerate(decoder.layers):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position
    model.config.num_hidden_layers = len(kept)
    for per_block in ("layer_types", "block_shapes"):
        if getattr(model.config, per_block, None):
            setattr(model.config, per_block, [getattr(model.config, per_block)[i] for i in kept])


def keep(parts: Parts, groups: Sequence[int], neurons: Sequence[int]) -> None:
    """Keep only these groups of heads and these neurons of a block, in this order; at least one of each.

    The residual width stays. A checkpoint of such a model is saved after `pruned.adopt`.
    """
    if not groups or not neurons:
        raise ValueError("a block keeps at least one group of heads and one neuron")
    channels = [channel for group in groups for channel in parts.group_channels(group)]
    shared = [group * parts.head_dim + i for group in groups for i in range(parts.head_dim)]
    rows = [part * parts.neurons + neuron for part in range(parts.stacked) for neuron in neurons]
    _select(parts.query, rows=channels)
    _select(parts.key, rows=shared)
    _select(parts.value, rows=shared)
    _select(parts.output, columns=channels)
    for layer in parts.up:
        _select(layer, rows=rows)
    _select(parts.down, columns=neurons)
    if hasattr(parts.attention, "num_heads"):
        parts.attention.num_heads = parts.heads


def adopt(model: PreTrainedModel) -> None:
    """Make a model with changed widths one whose class and config know them, so that what is saved opens anywhere."""
    from espalier.models import pruned

    layout, shapes = layout_of(model.config), []
    names = (layout.query, layout.key, layout.value, layout.output, *layout.up, layout.down)
    for block in blocks_of(model):
        layers = {name: block.get_submodule(name) for name in names}
        shapes.append({name: [one.in_features, one.out_features, one.bias is not None] for name, one in layers.items()})
    if not model.config.model_type.startswith(PRUNED):
        cls = getattr(pruned, f"Pruned{type(model).__name__}")
        # The blocks hold the same config object and its class alone changes, so they all go on sharing it.
        model.__class__, model.config.__class__ = cls, cls.config_class
    model.config.block_shapes = shapes


def _select(layer: torch.nn.Linear, rows: Sequence[int] | None = None, columns: Sequence[int] | None = None) -> None:
    import torch

    weight, bias = layer.weight.data, layer.bias
    if rows is not None:
        index = torch.tensor(rows, device=weight.device)
        weight = weight.index_select(0, index)
        layer.out_features = len(rows)
        if bias is not None:
            layer.bias = torch.nn.Parameter(bias.data.index_select(0, index), bias.requires_grad)
    if columns is not None:
        weight = weight.index_select(1, torch.tensor(columns, device=weight.device))
        layer.in_features = len(columns)
    layer.weight = torch.nn.Parameter(weight.contiguous(), layer.weight.requires_grad)
