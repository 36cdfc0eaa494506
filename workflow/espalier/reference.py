"""The reference of every config key, from the dataclasses that read them: a JSON schema, and a page for people.

`make docs` writes both; a test refuses a repository where they are out of date. What a key means is the comment beside
its field, so that it is written once.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import tokenize
import types
import typing
from collections.abc import Iterator
from io import StringIO
from typing import Any

from espalier import config, plugins
from espalier.comparisons import Comparison
from espalier.data import Text
from espalier.demo import dataset
from espalier.recipes import fields_of

SECTIONS = {
    "models": ("pretrain", config.Model, "Models", "Where a model comes from: exactly one of pretrain, path and hub."),
    "datasets": (None, config.DatasetEntry, "Datasets", "Where rows come from: exactly one of generate, path and hub."),
    "recipes": (config.STAGES, None, "Recipes", "The tokens of chains. One key names the stage and its method."),
    "suites": (("evaluate",), None, "Suites", "Evaluations, by the method that `evaluate` names."),
    "workloads": (
        ("profile",),
        None,
        "Workloads",
        "Measurements of time and memory, by the method that `profile` names.",
    ),
    "figures": (("figures",), None, "Figures", "Charts, by the name of their module."),
}


REFERENCES = {
    config.Dataset: "name of an entry of `datasets`",
    config.Calibration: "name of an entry of `calibrations`",
    Text: "the documents",
}
SECTIONS_OF_THEIR_OWN = (config.Calibration, config.Dataset, config.Measure, Comparison)


def comments(cls: type) -> dict[str, str]:
    """Return field name → the comment on its line in the class's source."""
    source = inspect.cleandoc("\n" + inspect.getsource(cls))
    on_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (tree,) = ast.parse(source).body
    return {
        node.target.id: on_line.get(node.end_lineno, on_line.get(node.lineno, ""))
        for node in tree.body
        if isinstance(node, ast.AnnAssign)
    }


def methods(kinds: tuple[str, ...]) -> Iterator[tuple[str, str, type]]:
    """Yield (kind, method, Recipe) of every plugin of these kinds."""
    for kind in kinds:
        for name in plugins.names(kind):
            yield kind, name, plugins.load(kind, name).Recipe


def schema() -> dict:
    """Return the JSON schema of a study's config, for editors that complete and check YAML."""
    properties = {name: _schema_of(kind) for name, (kind, _) in fields_of(config.Config).items()}
    for name, note in comments(config.Config).items():
        properties[name]["description"] = note
    properties["models"]["additionalProperties"] = {
        "anyOf": [
            _object(config.Model),
            *(_object(cls, "pretrain", name, config.Model) for _, name, cls in methods(("pretrain",))),
        ]
    }
    properties["datasets"]["additionalProperties"] = {
        "anyOf": [_object(config.DatasetEntry), _object(dataset.Recipe, "generate", "demo")]
    }
    for section in ("recipes", "suites", "workloads"):
        entries = [_object(cls, kind, name) for kind, name, cls in methods(SECTIONS[section][0])]
        properties[section]["additionalProperties"] = {"anyOf": entries}
    properties["figures"]["additionalProperties"] = False
    properties["figures"]["properties"] = {name: _object(cls) for _, name, cls in methods(("figures",))}
    required = [name for name, (_, needed) in fields_of(config.Config).items() if needed]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A study of Espalier",
        "type": "object",
        "required": required,
        "additionalProperties": False,
        "properties": properties,
    }


def page() -> str:
    """Return docs/config.md."""
    out = [
        "# Every key of a study's config",
        "",
        "Written by `make docs` from the dataclasses that read the config; do not edit it. In an entry whose key (or,",
        "in a list, whose text) names an axis, `{axis}` stands for each of its values in turn. `dataset: NAME` and",
        "`calibration: NAME` refer to the entry of that name. A key without a default must be given.",
        "",
        "## Sections",
        "",
        *_table(config.Config),
        "## measure",
        "",
        *_table(config.Measure),
        "## compare",
        "",
        "Published values, and what measures them here: `tables/published.csv`, whose columns are defined in",
        "[metrics.md](metrics.md#published-values-beside-ours).",
        "",
        *_table(Comparison),
        "## calibrations",
        "",
        *_table(config.Calibration),
    ]
    for section, (kinds, own, _, note) in SECTIONS.items():
        out += [f"## {section}", "", note, ""]
        if own:
            out += _table(own)
        if section == "datasets":
            out += ["### generate: demo", "", *_table(dataset.Recipe)]
        for kind, name, cls in methods((kinds,) if isinstance(kinds, str) else kinds or ()):
            title = name if kind == "figures" else f"{kind}: {name}"
            module = inspect.getmodule(cls)
            out += [f"### {title}", "", f"{inspect.getdoc(module).splitlines()[0]}", "", *_table(cls)]
            out += _presets(cls)
    return "\n".join(out).rstrip() + "\n"


def _table(cls: type) -> list[str]:
    notes, rows = comments(cls), ["| key | type | default | meaning |", "|---|---|---|---|"]
    nested: list[type] = []
    for field in dataclasses.fields(cls):
        kind, needed = fields_of(cls)[field.name]
        default = "" if needed else f"`{_default(field)}`" if _default(field) else "empty"
        note = notes[field.name] or REFERENCES.get(kind, "")
        rows.append(f"| `{field.name}` | {_say(kind)} | {default} | {note} |")
        nested += [part for part in _dataclasses(kind) if part not in nested]
    rows.append("")
    for part in nested:
        if part not in SECTIONS_OF_THEIR_OWN:
            rows += [f"`{part.__name__}`: {inspect.getdoc(part).splitlines()[0]}", "", *_table(part)]
    return rows


def _presets(cls: type) -> list[str]:
    """Return the lines about the presets of a recipe's plugin; none if it has none."""
    presets = _presets_of(cls)
    if not presets:
        return []
    rows = []
    for name, keys in presets.items():
        said = ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in keys.items())
        rows.append(f"| `{name}` | {said} |".replace('"', ""))
    note = "The key `preset` fills in several keys at once, below those that the entry has itself:"
    return [note, "", "| preset | stands for |", "|---|---|", *rows, ""]


def _presets_of(cls: type) -> dict[str, dict]:
    return getattr(inspect.getmodule(cls), "PRESETS", {})


def _default(field: dataclasses.Field) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return json.dumps(value).replace("null", "none").strip('"')


def _dataclasses(kind: Any) -> Iterator[type]:
    if dataclasses.is_dataclass(kind):
        yield kind
    for part in typing.get_args(kind):
        yield from _dataclasses(part)


def _say(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_say(part) for part in arguments)
    if origin in (list, tuple):
        return f"list of {_say(arguments[0])}"
    if origin is dict:
        return f"{_say(arguments[0])} → {_say(arguments[1])}"
    if kind in (config.Calibration, config.Dataset):
        return "name"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "none", dict: "keys"}
    return names.get(kind, f"`{getattr(kind, '__name__', kind)}`")


def _object(cls: type, kind: str | None = None, method: str | None = None, beside: type | None = None) -> dict:
    properties, notes = {}, comments(cls)
    for name, (field_type, _) in fields_of(cls).items():
        properties[name] = {**_schema_of(field_type), **({"description": notes[name]} if notes[name] else {})}
    required = [name for name, (_, needed) in fields_of(cls).items() if needed]
    if beside:
        properties = {**_object(beside)["properties"], **properties}
    if kind:
        properties, required = {kind: {"const": method}, **properties}, [kind, *required]
    entry = {"type": "object", "additionalProperties": False, "required": required, "properties": properties}
    if presets := _presets_of(cls):
        properties["preset"] = {"enum": list(presets), "description": "keys to fill in below the entry's own"}
        filled = set.intersection(*(set(keys) for keys in presets.values()))
        missing = [name for name in required if name in filled]
        entry["required"] = [name for name in required if name not in filled]
        entry["anyOf"] = [{"required": ["preset"]}, {"required": missing}]
    return entry


def _schema_of(kind: Any) -> dict:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in (config.Calibration, config.Dataset):
        return {"type": "string", "description": "a name"}
    if dataclasses.is_dataclass(kind):
        return _object(kind)
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [_schema_of(part) for part in arguments]}
    if origin in (list, tuple):
        return {"type": "array", "items": _schema_of(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema_of(arguments[1])}
    names = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null", dict: "object"}
    return {"type": names[kind]} if kind in names else {}
