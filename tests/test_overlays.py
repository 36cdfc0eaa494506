"""`base:`: a study that is another one with changes."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
import yaml

from conftest import copy_project, snakemake
from espalier.config import read
from espalier.errors import UserError
from espalier.overlays import merged
from espalier.study import Study

LOWER = {"study": "a", "axes": {"n": [1, 2]}, "recipes": {"x": {"tune": "lora", "steps": 3}}, "models": {"m": {"p": 1}}}


def write(folder: Path, name: str, mapping: dict | str) -> str:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(mapping if isinstance(mapping, str) else yaml.safe_dump(mapping))
    return str(file)


@pytest.mark.parametrize(
    ("upper", "expected"),
    [
        ({}, LOWER),
        ({"study": "b"}, LOWER | {"study": "b"}),
        ({"recipes": {"x": {"steps": 4}}}, LOWER | {"recipes": {"x": {"tune": "lora", "steps": 4}}}),
        ({"recipes": {"x": {"steps": None}}}, LOWER | {"recipes": {"x": {"tune": "lora"}}}),
        ({"recipes": {"y": {"steps": None}}}, LOWER | {"recipes": LOWER["recipes"] | {"y": {"steps": None}}}),
        ({"recipes": {"x": None}}, LOWER | {"recipes": {}}),
        ({"recipes": None}, {key: value for key, value in LOWER.items() if key != "recipes"}),
        ({"axes": {"n": [7]}}, LOWER | {"axes": {"n": [7]}}),
        ({"axes": {"m": [7]}}, LOWER | {"axes": {"n": [1, 2], "m": [7]}}),
        ({"models": {"m": {"p": {"q": 1}}}}, LOWER | {"models": {"m": {"p": {"q": 1}}}}),
    ],
)
def test_mappings_are_merged_and_all_else_is_replaced(tmp_path, upper, expected):
    write(tmp_path, "lower.yaml", LOWER)
    file = str(tmp_path / "over" / "upper.yaml")
    before = json.dumps(upper)
    assert merged({"base": "../lower.yaml", **upper}, file)[0] == expected
    assert json.dumps(upper) == before, "the mapping that was given is changed"


def test_what_a_file_takes_away_no_base_below_brings_back(tmp_path):
    write(tmp_path, "one.yaml", {"models": {"m": {"path": "x", "dtype": "auto"}}})
    write(tmp_path, "two.yaml", {"base": "one.yaml", "models": {"m": {"dtype": None, "path": "y"}}})
    whole, _ = merged({"base": "two.yaml", "models": {"m": {"path": None, "hub": "z"}}}, str(tmp_path / "three.yaml"))
    assert whole == {"models": {"m": {"hub": "z"}}}


def test_one_of_the_entries_that_an_axis_stands_for_can_be_changed(tmp_path):
    """Also where the upper file gives the axis other values: the base's entries follow."""
    entries = {"x-{n}": {"steps": "{n}"}, "y": {"of": ["x-{n}"]}}
    write(tmp_path, "lower.yaml", {"axes": {"n": [1, 2]}, "recipes": entries})
    file = str(tmp_path / "upper.yaml")
    whole, _ = merged({"base": "lower.yaml", "recipes": {"x-2": {"r": 3}}}, file)
    assert whole["recipes"] == {"x-1": {"steps": 1}, "x-2": {"steps": 2, "r": 3}, "y": {"of": ["x-1", "x-2"]}}
    whole, _ = merged({"base": "lower.yaml", "axes": {"n": [2, 5]}, "recipes": {"x-{n}": {"r": "{n}"}}}, file)
    assert whole["recipes"] == {
        "x-2": {"steps": 2, "r": 2},
        "x-5": {"steps": 5, "r": 5},
        "y": {"of": ["x-2", "x-5"]},
    }
    whole, _ = merged({"base": "lower.yaml", "recipes": {"x-1": None}}, file)
    assert set(whole["recipes"]) == {"x-2", "y"}


def test_without_a_base_nothing_changes():
    assert merged(LOWER, "a.yaml") == (LOWER, "a.yaml")


def test_a_base_of_a_base_and_how_messages_name_them(tmp_path):
    write(tmp_path, "one.yaml", LOWER)
    write(tmp_path, "over/two.yaml", {"base": "../one.yaml", "title": "two", "study": "two"})
    whole, label = merged({"base": "over/two.yaml", "study": "three"}, str(tmp_path / "three.yaml"))
    assert whole == LOWER | {"title": "two", "study": "three"}
    assert label == f"{tmp_path}/three.yaml (base {tmp_path}/over/two.yaml, {tmp_path}/one.yaml)"


@pytest.mark.parametrize(
    ("content", "named", "message"),
    [
        (None, "lower.yaml", "upper.yaml: base: The study {folder}/lower.yaml cannot be read: No such file"),
        ("[1]", "lower.yaml", "upper.yaml: base: The study {folder}/lower.yaml must be a mapping"),
        ("base: upper.yaml", "lower.yaml", "lower.yaml: base: {folder}/upper.yaml would be its own base"),
        (None, "upper.yaml", "upper.yaml: base: {folder}/upper.yaml would be its own base"),
        ("axes: {n: 7}", "lower.yaml", "lower.yaml: axes: expected name: [value, ...]"),
        (None, 3, "upper.yaml: base: expected the path of another study, found 3"),
    ],
)
def test_a_base_that_is_none(tmp_path, content, named, message):
    if content is not None:
        write(tmp_path, "lower.yaml", content)
    with pytest.raises(UserError) as caught:
        merged({"base": named}, str(tmp_path / "upper.yaml"))
    assert message.format(folder=tmp_path) in str(caught.value)


def test_a_mistake_names_both_files(tmp_path, demo_config):
    write(tmp_path, "lower.yaml", demo_config)
    mapping = {"base": "lower.yaml", "recipes": {"sft": {"stepz": 3}}}
    with pytest.raises(UserError) as caught:
        Study(mapping, str(tmp_path / "upper.yaml"))
    expected = f"{tmp_path}/upper.yaml (base {tmp_path}/lower.yaml): recipes.sft: unknown key 'stepz'."
    assert str(caught.value).startswith(expected)


def test_snakemake_takes_a_study_with_a_base(tmp_path):
    """The jobs are those of the base's recipes under the study's own name; a step that differs is another one."""
    project = copy_project(tmp_path)
    upper = """
        base: ../config.yaml
        study: mine
        figures: {latency_throughput: null, glue_bits: null, quantization_tradeoff: null, block_importance: null,
                  engine_speedup: null, size_tradeoff: {series: {Ours: null, Ours + GPTQ: null, LLM-Pruner: null}}}
        measure: []
        recipes: {gptq-w4: {bits: 8}}
    """
    write(project, "mine/upper.yaml", textwrap.dedent(upper))
    run = snakemake(project, "-n", "--configfile", "mine/upper.yaml")
    assert run.returncode == 0, run.stderr
    output = run.stdout + run.stderr
    assert "results/mine/runs/tiny-llama/s0/dense+gptq-w4" in output
    assert "lora" not in output
    study = Study(read(project / "mine" / "upper.yaml"), str(project / "mine" / "upper.yaml"))
    assert study.step("recipes", "gptq-w4").content["bits"] == 8
