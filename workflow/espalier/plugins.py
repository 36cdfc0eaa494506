"""Methods by name: `prune: depth` in a config is the file `espalier/prune/depth.py`, and nothing else registers it."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType

from espalier.errors import UserError, did_you_mean

ROOT = Path(__file__).parent
KINDS = ("pretrain", "prune", "tune", "quantize", "evaluate", "profile", "engines", "figures")


@cache
def names(kind: str) -> tuple[str, ...]:
    """Return the names of all plugins of a kind, as they are written in a config."""
    files = sorted((ROOT / kind).glob("*.py"))
    return tuple(
        file.stem.replace("_", "-") if kind != "figures" else file.stem
        for file in files
        if file.stem not in ("__init__", "style")
    )


def module_name(kind: str, name: str, where: str) -> str:
    """Return the dotted module of a plugin; raises UserError, opened by `where`, for a name without a file."""
    if name not in names(kind):
        what = "engine" if kind == "engines" else f"{kind} method"
        raise UserError(f"{where}: there is no {what} '{name}'.{did_you_mean(name, names(kind))}")
    return f"espalier.{kind}.{name.replace('-', '_')}"


def load(kind: str, name: str, where: str = "config") -> ModuleType:
    """Import a plugin. Its heavy libraries are imported by its functions, so this is cheap enough for a dry-run."""
    return importlib.import_module(module_name(kind, name, where))


def fill(module: ModuleType, content: dict, where: str) -> dict:
    """Return a recipe's keys with those of the preset that its key `preset` names filled in, where it lacks them.

    A plugin names its presets in `PRESETS`, name → keys, and in `PRESET_FIXES` the keys that an entry may not say
    otherwise. Raises UserError, opened by `where`, for a name that is none, and for an entry that does so.
    """
    presets = getattr(module, "PRESETS", {})
    if not presets or "preset" not in content:
        return content
    name = str(content["preset"])
    if name not in presets:
        raise UserError(f"{where}.preset: there is no preset '{name}'.{did_you_mean(name, presets)}")
    for key in getattr(module, "PRESET_FIXES", ()):
        fixed = presets[name][key]
        if content.get(key, fixed) != fixed:
            raise UserError(f"{where}.{key}: the preset '{name}' is for {fixed}, not for {content[key]}.")
    return presets[name] | {key: value for key, value in content.items() if key != "preset"}


def modules(module: ModuleType, recipe: object) -> list[str]:
    """Return the dotted names of a plugin and of those that its recipe names in turn: its `uses`, if it has one."""
    return [module.__name__, *(module.uses(recipe) if hasattr(module, "uses") else [])]


def check_device(module: ModuleType, recipe: object, device: str, where: str) -> None:
    """Raise UserError, opened by `where`, if a plugin's `needs_device` says that a recipe runs on another device."""
    needed = module.needs_device(recipe) if hasattr(module, "needs_device") else None
    if needed and device not in ("auto", needed[0]):
        raise UserError(f"{where}: {needed[1]} needs 'device: {needed[0]}', and the device is {device}.")
