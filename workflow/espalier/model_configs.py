"""Where it is known how large a model is that the study does not make: in its config.json, or, until then, a shape."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from espalier import hub_cache, shapes

if TYPE_CHECKING:
    from espalier.config import Model


def folder(model: Model) -> Path:
    """Return the folder of a model of a path or of the hub: of this, one in the hub's cache, which may not be there."""
    if model.path:
        return Path(model.path)
    return hub_cache.roots()["hub"] / hub_cache.snapshot("model", model.hub, model.revision)


def stand_in(model: Model) -> str | None:
    """Return the shape that stands for a model of the hub while the cache has no config.json of it, if one is named."""
    return model.shape if model.hub and not (folder(model) / "config.json").is_file() else None


def file_of(model: Model) -> Path:
    """Return the config.json of a model of a path or of the hub, or its stand-in's file; it may not be there."""
    shape = stand_in(model)
    return shapes.file_of(shape) if shape else folder(model) / "config.json"
