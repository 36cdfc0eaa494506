"""Axes, references, and what a study asks of snakemake; all of it without the heavy libraries."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from conftest import ROOT
from espalier.config import expand
from espalier.errors import UserError
from espalier.study import Study


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"run-{task}": {"task": "{task}"}}, {"run-a": {"task": "a"}, "run-b": {"task": "b"}}),
        (["dense+{task}", "dense"], ["dense+a", "dense+b", "dense"]),
        ([{"chain": "{task}", "suite": "s-{task}"}], [{"chain": "a", "suite": "s-a"}, {"chain": "b", "suite": "s-b"}]),
        ({"w{bits}": {"bits": "{bits}"}}, {"w2": {"bits": 2}, "w4": {"bits": 4}}),
        (["{task}{bits}"], ["a2", "a4", "b2", "b4"]),
        ({"{task}": {"w{bits}": "{task}-{bits}"}}, {"a": {"w2": "a-2", "w4": "a-4"}, "b": {"w2": "b-2", "w4": "b-4"}}),
        ("{task}", "{task}"),
        ({"x": "{other} {"}, {"x": "{other} {"}),
    ],
)
def test_axes(entry, expected):
    axes = {"task": ["a", "b"], "bits": [2, 4]}
    assert expand({"axes": axes, "section": entry}, "file")["section"] == expected


def test_names_refer_to_entries_and_defaults_are_written_out(demo_config):
    recipe = Study(demo_config).step("recipes", "gptq-w4-n20").content
    assert recipe["quantize"] == "gptq"
    assert recipe["calibration"]["samples"] == 20
    assert recipe["calibration"]["text"]["dataset"]["path"] == "results/demo/data/world"
    assert recipe["damp"] == 0.05, "a default is part of the recipe, so that a changed default reruns its jobs"


def test_results_are_those_of_charts_and_measures_for_every_seed(demo_config):
    demo_config["models"]["tiny-llama"]["seeds"] = [0, 4]
    demo_config["figures"] = {}
    demo_config["measure"] = [{"model": "tiny-llama", "chains": ["dense+depth-2+lora"], "suites": ["heldout"]}]
    runs = [f"results/demo/runs/tiny-llama/s{seed}" for seed in (0, 4)]
    steps = ("dense/step.json", "dense+depth-2/step.json", "dense+depth-2+lora/step.json")
    results = (*steps, "dense+depth-2+lora/evaluate/heldout.json")
    assert sorted(Study(demo_config).raw_results()) == sorted(f"{run}/{result}" for run in runs for result in results)


def test_what_calibrates_on_one_text_waits_for_one_check(demo_config):
    demo_config["calibrations"]["few"]["text"]["split"] = "instruct"
    study = Study(demo_config)
    general, few = study.calibration_check("gptq-w4"), study.calibration_check("taylor-3")
    assert len(general) == len(few) == 1
    assert study.calibration_check("gptq-w4-n20") == study.calibration_check("flap") == general != few
    assert study.calibration_check("magnitude-3") == study.calibration_check("bnb-nf4") == []
    sets = {f"results/demo/calibration/{text}.json": set(json.loads(study.calibrations(text))) for text in study.texts}
    assert sets == {few[0]: {"few"}, general[0]: set(demo_config["calibrations"]) - {"few", "general-{samples}"} | {
        f"general-{samples}" for samples in demo_config["axes"]["samples"]}}  # fmt: skip
    assert set(json.loads(study.calibrations())) == set.union(*sets.values())
    assert study.calibration_data() == ["results/demo/data/world"]


def test_an_edit_to_a_local_model_changes_its_reference_and_a_touch_does_not(demo_config, tmp_path):
    config = tmp_path / "config.json"
    config.write_text("{}")
    demo_config["models"]["mine"] = {"path": str(tmp_path)}
    before = Study(demo_config).reference("mine")
    config.touch()
    assert Study(demo_config).reference("mine") == before
    config.write_text('{"hidden_size": 8}')
    assert Study(demo_config).reference("mine") != before


def test_an_axis_that_is_no_list_is_refused(demo_config):
    demo_config["axes"]["task"] = "cola"
    with pytest.raises(UserError, match="axes: expected name"):
        Study(demo_config)


def test_a_study_is_checked_without_the_heavy_libraries():
    script = (
        "import sys, yaml; from espalier.study import Study; Study(yaml.safe_load(open('config.yaml'))).raw_results()\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'pandas', 'matplotlib', 'datasets'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
