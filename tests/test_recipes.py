"""Strict recipes: what is accepted, what is refused, and what the refusal says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest
import yaml

from espalier.errors import UserError
from espalier.recipes import as_dict, build


@dataclass(frozen=True)
class Inner:
    length: int


@dataclass(frozen=True)
class Outer:
    rate: float
    inner: Inner
    mode: Literal["fast", "slow", 4] = "fast"
    names: list[str] = field(default_factory=list)
    table: dict[str, int] = field(default_factory=dict)
    limit: int | None = None
    place: str | dict[str, str] = ""
    flag: bool = False

    def check(self) -> None:
        if self.rate < 0:
            raise ValueError("'rate' must not be negative.")


GOOD = {"rate": 1, "inner": {"length": 3}}


def test_builds_with_defaults_and_nested_recipes():
    built = build(Outer, {**GOOD, "names": ["a"], "table": {"x": 1}, "limit": 5}, "here")
    assert built == Outer(1.0, Inner(3), "fast", ["a"], {"x": 1}, 5, "", False)
    assert isinstance(built.rate, float)
    assert build(Outer, as_dict(built), "again") == built


@pytest.mark.parametrize(("text", "number"), [("1e-4", 1e-4), ("4.9e9", 4.9e9), ("2e+3", 2000.0)])
def test_numbers_that_yaml_reads_as_text(text, number):
    assert yaml.safe_load(text) == text
    assert build(Outer, {**GOOD, "rate": text}, "here").rate == number


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rat": 1}, "here: unknown key 'rat'. Did you mean 'rate'?"),
        ({"inner": {"lenght": 3}}, "here.inner: unknown key 'lenght'. Did you mean 'length'?"),
        ({"inner": {}}, "here.inner: the key 'length' is missing."),
        ({"inner": 3}, "here.inner: expected a mapping"),
        ({"rate": "1e-4x"}, "here.rate: expected a number, found '1e-4x' (str)"),
        ({"rate": True}, "here.rate: expected a number, found True (bool)"),
        ({"mode": "fats"}, "'fats' (str) is not a choice. Did you mean 'fast'?"),
        ({"mode": "4"}, "is not a choice"),
        ({"limit": "3"}, "here.limit: expected a whole number, found '3' (str)"),
        ({"limit": 2.5}, "here.limit: expected a whole number, found 2.5 (float)"),
        ({"flag": 1}, "here.flag: expected true or false, found 1 (int)"),
        ({"names": "a"}, "here.names: expected a list"),
        ({"names": ["a", 2]}, "here.names[1]: expected text, found 2 (int)"),
        ({"table": {"x": "1"}}, "here.table.x: expected a whole number"),
        ({"place": {"x": 1}}, "here.place.x: expected text, found 1 (int)"),
        ({"place": 1}, "here.place: expected text, found 1 (int)"),
        ({"rate": -1}, "here: 'rate' must not be negative."),
        ({"rate": None}, "here.rate: expected a number, found nothing"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(UserError) as caught:
        build(Outer, {**GOOD, **change}, "here")
    assert message in str(caught.value)
