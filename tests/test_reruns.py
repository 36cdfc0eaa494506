"""Exact reruns: after any one edit to a finished demo, precisely the affected jobs run again.

What snakemake would rerun depends on the files and on what it recorded of each job, not on what is in the files. So
the finished demo here is one whose scripts were replaced, from outside, by a stand-in that makes empty outputs: every
job is run and recorded by snakemake itself, and nothing is computed.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from conftest import copy_project, snakemake
from espalier import plugins

RUNS = "results/demo/runs"
LLAMA = f"{RUNS}/tiny-llama/s0"
BERT = f"{RUNS}/tiny-bert/s0"
CHECK = "results/demo/tables/calibration.json"
TABLES = {"results/demo/tables/metrics.csv", "results/demo/tables/quantization.json"}


def jobs(project: Path, *arguments: str) -> set[str]:
    """Return the first output of each job that `snakemake -n` would run."""
    run = snakemake(project, "-n", *arguments)
    assert run.returncode == 0, run.stdout + run.stderr
    return {line.split()[1].rstrip(",") for line in run.stdout.splitlines() if re.match(r" {4}output: ", line)}


# Python runs a sitecustomize before any script: this one makes the script's outputs and ends the process.
STAND_IN = """
import os, sys
if len(sys.orig_argv) > 1 and sys.orig_argv[1].startswith("workflow/scripts/"):
    given = dict(zip(sys.orig_argv[2:], sys.orig_argv[3:]))
    for path in filter(None, (given.get("--output"), given.get("--step"), given.get("--paired"))):
        if path.endswith((".json", ".csv")):
            open(path, "w").close()
        elif "draw_figure" in sys.orig_argv[1]:
            for suffix in (".pdf", ".svg", ".png", ".csv"):
                open(path + suffix, "w").close()
        else:
            os.makedirs(path)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Iterator[Path]:
    """A copy of the project in which the demo is finished, as far as snakemake can tell."""
    project = copy_project(tmp_path_factory.mktemp("finished"))
    stand_in = tmp_path_factory.mktemp("stand-in")
    (stand_in / "sitecustomize.py").write_text(STAND_IN)
    run = snakemake(project, "--cores", "4", python_path=[stand_in])
    assert run.returncode == 0, run.stdout + run.stderr
    assert jobs(project) == set()
    yield project
    assert jobs(project) == set(), "edits that are undone leave nothing to do"


class Edit:
    """Edits files of the project and puts them back."""

    def __init__(self, project: Path):
        self.project, self.old = project, {}

    def text(self, file: str, old: str, new: str) -> None:
        path = self.project / file
        text = path.read_text(encoding="utf-8")
        self.old.setdefault(path, text)
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {file}"
        path.write_text(text.replace(old, new), encoding="utf-8")

    def config(self, change) -> None:
        path = self.project / "config.yaml"
        text = path.read_text(encoding="utf-8")
        self.old.setdefault(path, text)
        config = json.loads(json.dumps(yaml.safe_load(text)))  # YAML's aliases would share one mapping
        change(config)
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")

    def undo(self) -> None:
        for path, text in self.old.items():
            path.write_text(text, encoding="utf-8")


@pytest.fixture
def edit(finished):
    edit = Edit(finished)
    yield edit
    edit.undo()


def chart(*names: str) -> set[str]:
    return {f"figures/demo/{name}.pdf" for name in names}


def everything(finished: Path, *contains: str) -> set[str]:
    """Return the first outputs of all compute jobs whose path holds one of the strings."""
    return {
        path
        for path in outputs(finished, (finished / "config.yaml").read_text(encoding="utf-8"))
        if path.startswith((RUNS, "results/demo/data")) and any(part in path for part in contains)
    }


@functools.cache
def outputs(finished: Path, config: str) -> set[str]:
    """Return the first outputs of all jobs of the project, whose config.yaml this is: an edit of code adds none."""
    return jobs(finished, "--forceall")


def test_learning_rate_of_lora(finished, edit):
    edit.config(lambda config: config["recipes"]["lora"].update(learning_rate=4.0e-3))
    expected = everything(finished, "+lora/", "+lora+")
    assert any("+lora/model" in path for path in expected)
    assert jobs(finished) == expected | TABLES - {"results/demo/tables/quantization.json"} | chart(
        "size_tradeoff", "latency_throughput"
    )


def test_one_calibration_size(finished, edit):
    def change(config):
        config["axes"]["samples"] = [20, 200, 1000]
        rows = config["figures"]["quantization_tradeoff"]["rows"]
        for name, recipe in (("GPTQ 4bit", "gptq-w4"), ("SmoothQuant W8A8", "sq-w8a8")):
            del rows[f"{name} calib{{samples}}"]
            sizes = {20: 20, 200: 200, 2000: 1000}
            rows |= {f"{name} calib{size}": f"dense+sft+{recipe}-n{new}" for size, new in sizes.items()}

    edit.config(change)
    expected = everything(finished, "-n1000/")
    assert {path.split("/")[5] for path in expected} == {"dense+sft+gptq-w4-n1000", "dense+sft+sq-w8a8-n1000"}
    assert jobs(finished) == expected | TABLES | chart("quantization_tradeoff") | {CHECK}


def test_content_of_one_calibration_set(finished, edit):
    edit.config(lambda config: config["calibrations"].update({"general-{samples}": {
        "text": {"dataset": "world", "split": "calibration"}, 
        "samples": "{samples}", "length": 32, "seed": 1234}}))  # fmt: skip
    expected = everything(finished, "+gptq-w4-n", "+sq-w", "+awq-")
    assert len({path.split("/")[5] for path in expected}) == 3 + 4 + 1
    assert jobs(finished) == expected | TABLES | chart("quantization_tradeoff") | {CHECK}


@pytest.mark.parametrize("change", [{"samples": 11}, {"seed": 1}], ids=str)
def test_samples_and_seed_of_one_calibration_set(finished, edit, change):
    edit.config(lambda config: config["calibrations"]["few"].update(change))
    expected = everything(finished, "+taylor-3/", "+llm-pruner/", "+llm-pruner+")
    assert {path.split("/")[5] for path in expected} == {"dense+taylor-3", "dense+llm-pruner", "dense+llm-pruner+lora"}
    charts = chart("size_tradeoff", "latency_throughput", "block_importance")
    assert jobs(finished) == expected | TABLES - {"results/demo/tables/quantization.json"} | charts | {CHECK}


def test_one_more_suite_checks_calibration_again_and_makes_no_model_again(finished, edit):
    more = {"evaluate": "perplexity", "text": {"dataset": "world", "split": "heldout"}, "window": 64}
    edit.config(lambda config: config["suites"].update(more=more))
    assert jobs(finished) == {CHECK}


def test_task_list(finished, edit):
    def drop(config):
        config["suites"]["zero-shot"]["tasks"].remove("boolq")
        for figure in ("size_tradeoff", "quantization_tradeoff"):
            config["figures"][figure]["tasks"].pop("boolq")

    edit.config(drop)
    expected = everything(finished, "evaluate/zero-shot.json")
    assert expected
    assert jobs(finished) == expected | TABLES | chart("size_tradeoff", "quantization_tradeoff") | {CHECK}


def test_title_of_a_chart(finished, edit):
    edit.config(lambda config: config["figures"]["latency_throughput"].update(title="Another title"))
    assert jobs(finished) == chart("latency_throughput")


def test_comment_in_a_method(finished, edit):
    edit.text(
        "workflow/espalier/prune/depth.py",
        "    removed: list[int] = []",
        "    # a comment\n    removed: list[int] = []",
    )
    assert jobs(finished) == set()


def test_mathematics_of_a_method(finished, edit):
    edit.text("workflow/espalier/prune/depth.py", "number - Fraction(1, 2)", "number - Fraction(1, 3)")
    expected = everything(finished, "+depth-", "+taylor-", "+influence-", "+magnitude-")
    assert not [path for path in expected if path.startswith(BERT)]
    assert jobs(finished) == expected | TABLES - {"results/demo/tables/quantization.json"} | chart(
        "size_tradeoff", "latency_throughput", "block_importance"
    )


def test_target_of_one_width_pruner(finished, edit):
    edit.config(lambda config: config["recipes"]["flap"].update(parameters=180000))
    expected = everything(finished, "+flap/")
    assert len(expected) == 4  # the model, an evaluation, two profiles
    assert jobs(finished) == expected | TABLES - {"results/demo/tables/quantization.json"} | chart(
        "size_tradeoff", "latency_throughput"
    )


def test_learning_rate_of_one_student(finished, edit):
    def change(config):
        student = config["recipes"]["{task}-{bits}bit-a"]
        config["recipes"]["cola-1bit-a"] = {**student, "task": "cola", "bits": 1, "learning_rate": 3.0e-3}

    edit.config(change)
    chain = f"{BERT}/dense+cola+cola-1bit-a"
    expected = {f"{chain}/model", f"{chain}/evaluate/glue-cola.json", "results/demo/tables/metrics.csv"}
    assert jobs(finished) == expected | chart("glue_bits")


def test_what_width_pruners_share(finished, edit):
    edit.text("workflow/espalier/models/widths.py", "GRID = 10**9", "GRID = 10**8")
    expected = everything(finished, "+flap/", "+llm-pruner/", "+llm-pruner+lora/")
    assert jobs(finished) == expected | TABLES - {"results/demo/tables/quantization.json"} | chart(
        "size_tradeoff", "latency_throughput"
    )


def test_mathematics_of_a_quantizer(finished, edit):
    edit.text("workflow/espalier/quantize/bitsandbytes.py", "def apply(", "UNUSED = 1\n\n\ndef apply(")
    expected = everything(finished, "+bnb-")
    assert len(expected) == 6
    assert jobs(finished) == expected | TABLES | chart("quantization_tradeoff")


def test_code_of_an_engine(finished, edit):
    edit.text("workflow/espalier/engines/hf.py", "class Engine", "UNUSED = 1\n\n\nclass Engine")
    expected = everything(finished, "profile/generation.json", "profile/decode-hf.json", "profile/memory.json")
    assert expected
    charts = chart("size_tradeoff", "latency_throughput", "engine_speedup")
    assert jobs(finished) == expected | TABLES - {"results/demo/tables/quantization.json"} | charts


def test_shared_helper(finished, edit):
    edit.text("workflow/espalier/checkpoints.py", 'DESCRIPTION = "espalier.json"', 'DESCRIPTION = "describe.json"')
    everything_that_loads = everything(finished, "/runs/")
    assert jobs(finished) == everything_that_loads | TABLES | chart(*plugins.names("figures")) | {CHECK}


def test_drawing_code(finished, edit):
    edit.text("workflow/espalier/figures/glue_bits.py", "def draw(", "UNUSED = 1\n\n\ndef draw(")
    assert jobs(finished) == chart("glue_bits")


def test_seed_of_a_model(finished, edit):
    edit.config(lambda config: config["models"]["tiny-bert"].update(seeds=[1]))
    expected = {path.replace("/s0/", "/s1/") for path in everything(finished, f"{BERT}/")} | {
        path.replace("/s0/", "/s1/") for path in everything(finished, "/tiny-bert/")
    }
    assert any(path.startswith(f"{RUNS}/tiny-bert/s1/") for path in expected)
    assert jobs(finished) == expected | TABLES - {"results/demo/tables/quantization.json"} | chart("glue_bits")


def test_one_more_seed(finished, edit):
    edit.config(lambda config: config["models"]["tiny-bert"].update(seeds=[0, 1]))
    assert {path for path in jobs(finished) if path.startswith(RUNS)} == everything(finished, "/tiny-bert/s1/")


def test_touching_the_repository_reruns_nothing(finished):
    for path in finished.rglob("*"):
        relative = path.relative_to(finished).parts[0]
        if path.is_file() and relative not in ("results", "figures", ".snakemake", ".git"):
            path.touch()
    assert jobs(finished) == set()


def test_one_chart_needs_only_its_own_results(finished):
    wanted = jobs(finished, "--forceall", "glue_bits")
    assert wanted
    assert all("tiny-bert" in path or "/data/" in path or path in chart("glue_bits") for path in wanted)


def test_deleted_charts_and_tables_are_all_that_is_made_again(finished):
    hidden = {path: path.with_name(f"hidden-{path.name}") for path in finished.glob("figures/demo/*")}
    hidden |= {path: path.with_name(f"hidden-{path.name}") for path in finished.glob("results/demo/tables/*")}
    charts = chart(*plugins.names("figures"))
    for path, aside in hidden.items():
        path.rename(aside)
    try:
        assert jobs(finished) == TABLES | charts | {CHECK}
    finally:
        for path, aside in hidden.items():
            aside.rename(path)


def test_what_calibrates_waits_for_the_check_of_its_text(finished):
    for step, waits in (("dense+flap", True), ("dense+gptq-w4", True), ("dense+magnitude-3", False)):
        said = snakemake(finished, "-n", "--forceall", f"{LLAMA}/{step}/step.json").stdout
        assert ("rule check_calibration" in said) is waits


def test_a_chart_of_what_was_calibrated_has_the_table_of_what_was_compared(finished):
    for chart, compared in (("quantization_tradeoff", True), ("glue_bits", False)):
        said = snakemake(finished, "-n", "--forceall", chart).stdout
        assert ("rule make_calibration_table" in said) is compared
