"""Strict recipes: a frozen dataclass built from a mapping of the study's config, with every mistake named.

A method's `Recipe` says which keys exist, their types and defaults; nothing else in Espalier reads a recipe with
`.get(key, default)`. Supported field types: bool, int, float, str, None, Literal, nested dataclasses, and list, dict,
tuple and unions of these. An int is accepted where a float is asked for, and nothing else is converted.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from espalier.errors import UserError, did_you_mean

T = TypeVar("T")
EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


@cache
def fields_of(cls: type) -> dict[str, tuple[Any, bool]]:
    """Return field name → (resolved type, required) of the dataclass `cls`."""
    hints = typing.get_type_hints(cls)
    return {
        field.name: (
            hints[field.name],
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
        )
        for field in dataclasses.fields(cls)
    }


def build(cls: type[T], mapping: object, where: str) -> T:
    """Return `cls` filled from `mapping`; `where` (a path of keys, or a file and ":") opens each error message.

    Raises UserError for a missing or unknown key, a value of the wrong type, or one outside a Literal's choices. A
    dataclass may define `check(self)`, which raises ValueError with a sentence about values that do not go together.
    """
    if not isinstance(mapping, Mapping):
        raise UserError(f"{_colon(where)} expected a mapping of keys, found {_say(mapping)}.")
    fields = fields_of(cls)
    for key in mapping:
        if key not in fields:
            raise UserError(f"{_colon(where)} unknown key '{key}'.{did_you_mean(key, fields)}")
    for key, (_, required) in fields.items():
        if required and key not in mapping:
            raise UserError(f"{_colon(where)} the key '{key}' is missing.")
    value = cls(**{key: _convert(fields[key][0], item, f"{_dot(where)}{key}") for key, item in mapping.items()})
    if hasattr(value, "check"):
        try:
            value.check()
        except ValueError as error:
            raise UserError(f"{_colon(where)} {error}") from None
    return value


def as_dict(recipe: object) -> dict:
    """Return a built recipe as plain JSON-able values."""
    return dataclasses.asdict(recipe)  # type: ignore[call-overload]


def _colon(where: str) -> str:
    return where if where.endswith(":") else f"{where}:"


def _dot(where: str) -> str:
    return f"{where} " if where.endswith(":") else f"{where}."


def _convert(kind: Any, value: object, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is typing.Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            raise UserError(f"{where}: {_say(value)} is not a choice.{did_you_mean(value, map(str, arguments))}")
        return value
    if origin in (types.UnionType, typing.Union):
        return _convert_union(arguments, value, where)
    if dataclasses.is_dataclass(kind):
        return build(kind, value, where)
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}: expected a list, found {_say(value)}.")
        return origin(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected a mapping of keys, found {_say(value)}.")
        return {
            _convert(arguments[0], key, where): _convert(arguments[1], item, f"{where}.{key}")
            for key, item in value.items()
        }
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str) and EXPONENT.fullmatch(value):
        return float(value)  # YAML 1.1 reads 4.9e9 and 1e-4 as text: it wants a dot and a sign
    expected = type(None) if kind is None else kind
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise UserError(f"{where}: expected {_name(expected)}, found {_say(value)}.")
    return value


def _convert_union(choices: tuple, value: object, where: str) -> Any:
    errors = []
    for kind in choices:
        if kind is type(None):
            if value is None:
                return None
            continue
        try:
            return _convert(kind, value, where)
        except UserError as error:
            errors.append((kind, error))
    # Of a mapping or a list what is wrong in it is said, if such a thing is a choice.
    fitting = [error for kind, error in errors if typing.get_origin(kind) is type(value)]
    raise (fitting or [error for _, error in errors])[0]


def _name(kind: type) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "a mapping of keys"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _say(value: object) -> str:
    return "nothing" if value is None else f"{value!r} ({type(value).__name__})"
