"""Groups that do not divide a model's widths, and blocks that it has not, found before any job runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from espalier import model_configs, plugins
from espalier.config import Model, Step
from espalier.errors import UserError
from espalier.files import read_json

# Keys of config.json that are input widths of linear layers; OPT calls the MLP's ffn_dim.
WIDTHS = ("hidden_size", "intermediate_size", "ffn_dim")


def sizes_of(model: Model, pretrained: Step | None) -> Mapping[str, Any]:
    """Return a model's sizes, named as in config.json; {} for one of the hub that neither cache nor shape tells."""
    if pretrained:
        return plugins.load("pretrain", pretrained.method).sizes(pretrained.recipe)
    file = model_configs.file_of(model)
    sizes = read_json(file) if file.is_file() else {}
    return {} if "block_shapes" in sizes else sizes  # a width-pruned one has its widths there: its job looks at them


def check(sizes: Mapping[str, Any], steps: Sequence[Step], where: str) -> None:
    """Raise UserError, opened by `where`, if a step asks for groups that do not divide widths, or for missing blocks.

    Behind a method that changes widths nothing is known here; its job finds out before it calibrates.
    """
    left = sizes.get("num_hidden_layers")
    for step in steps:
        removed = getattr(step.recipe, "blocks", None)
        if left and isinstance(removed, int):
            most = min(left - step.recipe.keep_first - step.recipe.keep_last, left - 1)
            if removed > most:
                raise UserError(
                    f"{where}: '{step.name}' removes {removed} blocks (the key 'blocks'), and of the model's {left} at"
                    f" most {max(most, 0)} may go."
                )
            left -= removed
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
