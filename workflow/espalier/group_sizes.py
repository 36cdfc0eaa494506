"""Groups that do not divide a model's widths, and layers that it has not, found before any job runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from espalier import plugins
from espalier.config import Model, Step
from espalier.errors import UserError
from espalier.files import read_json

# Keys of config.json that are input widths of linear layers; OPT calls the MLP's ffn_dim.
WIDTHS = ("hidden_size", "intermediate_size", "ffn_dim")


def sizes_of(model: Model, pretrained: Step | None) -> Mapping[str, Any]:
    """Return a model's sizes, named as in config.json, as far as the study's config tells; {} for one of the hub."""
    if pretrained:
        return plugins.load("pretrain", pretrained.method).sizes(pretrained.recipe)
    sizes = read_json(Path(model.path) / "config.json") if model.path else {}
    return {} if "block_shapes" in sizes else sizes  # a width-pruned one has its widths there: its job looks at them


def check(sizes: Mapping[str, Any], steps: Sequence[Step], where: str) -> None:
    """Raise UserError, opened by `where`, if a step asks for groups that do not divide widths, or for missing layers.

    Behind a method that changes widths nothing is known here; its job finds out before it calibrates.
    """
    for step in steps:
        if getattr(plugins.load(step.kind, step.method), "CHANGES_WIDTHS", False):
            return
        layers, kept = sizes.get("num_hidden_layers"), getattr(step.recipe, "layers", None)
        if layers and isinstance(kept, list) and max(kept) >= layers:
            raise UserError(
                f"{where}: '{step.name}' keeps layer {max(kept)} (the key 'layers'), but the model has layers 0 to"
                f" {layers - 1}."
            )
        size = getattr(step.recipe, "group_size", -1)
        for key in WIDTHS:
            if size > 0 and sizes.get(key, size) % size:
                raise UserError(
                    f"{where}: '{step.name}' makes groups of {size} input channels (the key 'group_size'), which do"
                    f" not divide the model's {key} of {sizes[key]}."
                )
