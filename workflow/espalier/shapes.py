"""Shapes: the architecture's numbers of published config.json files, each a file of reference/shapes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from espalier.errors import UserError, did_you_mean
from espalier.files import read_json

FOLDER = Path(__file__).parents[2] / "reference" / "shapes"
# What of a config.json decides how large a model is, and what its widths can be divided into.
SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "ffn_dim",
    "word_embed_proj_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def check(name: str) -> None:
    """Raise ValueError for a name that no shape has."""
    known = [file.stem for file in FOLDER.glob("*.json")]
    if name not in known:
        raise ValueError(f"there is no shape '{name}' in reference/shapes.{did_you_mean(name, known)}")


def file_of(name: str) -> Path:
    """Return a shape's file, relative to the working folder."""
    return Path(os.path.relpath(FOLDER / f"{name}.json"))


def read(name: str) -> dict:
    """Return what a shape says, named as in a config.json."""
    return read_json(FOLDER / f"{name}.json")


def check_config(name: str, config: Mapping[str, Any], where: str) -> None:
    """Raise UserError, opened by `where`, if a model's config.json has other sizes than the shape that stood for it.

    A size that one of the two does not name is not compared, as where an architecture of its own has names of its own.
    """
    shape = read(name)
    every_head = config.get("num_attention_heads")  # as old configs mean it
    found = {"num_key_value_heads": every_head, **{key: value for key, value in config.items() if value is not None}}
    wrong = [key for key in SIZES if found.get(key) is not None and shape.get(key, found[key]) != found[key]]
    if wrong:
        numbers = ", ".join(f"{key} {shape[key]}, but the model has {found[key]}" for key in wrong)
        raise UserError(f"{where}: the shape '{name}' says {numbers}. Name the shape that it has, or none.")
