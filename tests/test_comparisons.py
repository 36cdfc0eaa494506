"""The section `compare` of a study: its mistakes, what it has measured, and what makes its table again."""

from __future__ import annotations

import json

import pytest
import yaml

from conftest import ROOT, copy_project, snakemake
from espalier import comparisons
from espalier.config import expand
from espalier.errors import UserError
from espalier.study import Study
from test_published_rows import DENSE, PERPLEXITY, quality
from test_reruns import STAND_IN

# The section of a study -----------------------------------------------------------------------------------------------

SEVEN = dict.fromkeys(("boolq", "piqa"), "acc")
COLUMN = {"suite": "heldout", "metric": "perplexity", "tolerance": "1%"}


def compare(column=COLUMN, rows=None, name="wikitext2_ppl", **keys):
    rows = rows or {"tiny-llama": {"dense+depth-2": DENSE}}
    return {"values": "shortened_llama_quality", "columns": {name: column}, "rows": rows} | keys


def rows(**keys):
    return {"tiny-llama": {"dense": keys}}


ORDER = compare({"order": True}, name="first_blocks_removed", values="shortened_llama_block_orders")
MISTAKES = {
    "of two sources": (compare(figure="glue_bits"), "exactly one of the keys 'values' and 'figure'"),
    "a misspelt file": (
        compare(values="shortened_llama_qualty"),
        "compare[0].values: there is no 'shortened_llama_qualty' in reference/papers. Did you mean 'shortened_",
    ),
    "a misspelt column": (
        compare(name="wikitext_ppl"),
        "compare[0].columns: shortened_llama_quality.csv has no column 'wikitext_ppl'. Did you mean 'wikitext2_ppl'?",
    ),
    "a column of no numbers": (compare(name="criterion"), "columns.criterion: 'original' in shortened_llama_quality"),
    "no column": (compare(columns={}), "compare[0]: 'values' needs 'columns' and 'rows'."),
    "a row that is not there": (
        compare(rows=rows(model="LLaMA7B")),
        "no such row of shortened_llama_quality.csv has model 'LLaMA7B'. Did you mean 'LLaMA-7B'?",
    ),
    "several rows": (
        compare(rows=rows(model="LLaMA-7B")),
        "rows.tiny-llama.dense: 3 rows of shortened_llama_quality.csv are meant; say criterion or",
    ),
    "a misspelt key of a row": (compare(rows=rows(modl="x")), "has no column 'modl'. Did you mean 'model'?"),
    "a misspelt model": (
        compare(rows={"tiny-lama": {"dense": DENSE}}),
        "compare[0]: there is no model 'tiny-lama'. Did you mean 'tiny-llama'?",
    ),
    "a misspelt chain": (
        compare(rows={"tiny-llama": {"dense+depht-2": DENSE}}),
        "compare[0]: the chain 'dense+depht-2' names no recipe 'depht-2'. Did you mean 'depth-2'?",
    ),
    "a misspelt suite": (compare(COLUMN | {"suite": "helout"}), "there is no suite 'helout'. Did you mean 'heldout'?"),
    "a misspelt workload": (
        compare({"workload": "memry", "metric": "weights_allocated", "tolerance": 1}),
        "there is no workload 'memry'. Did you mean 'memory'?",
    ),
    "a misspelt task": (
        compare({"suite": "zero-shot", "tasks": {"bolq": "acc"}, "tolerance": 1.0}),
        "tasks: the suite 'zero-shot' has no task 'bolq'. Did you mean 'boolq'?",
    ),
    "a misspelt metric": (
        compare({"suite": "zero-shot", "tasks": {"boolq": "acc_nrm"}, "tolerance": 1.0}),
        "the suite 'zero-shot' has no metric 'acc_nrm'. Did you mean 'acc_norm'?",
    ),
    "a misspelt metric of GLUE": (
        compare({"suite": "glue-mrpc", "tasks": {"mrpc": "f_1"}, "tolerance": 1.0}),
        "the suite 'glue-mrpc' has no metric 'f_1'. Did you mean 'f1'?",
    ),
    "a misspelt metric of a workload": (
        compare({"workload": "memory", "metric": "weights_alocated", "tolerance": 1}),
        "the workload 'memory' has no metric 'weights_alocated'. Did you mean 'weights_allocated'?",
    ),
    "one metric of many tasks": (
        compare({"suite": "zero-shot", "metric": "acc", "tolerance": 1.0}),
        "the suite 'zero-shot' scores 7 tasks: say under 'tasks' which are meant.",
    ),
    "a suite that cannot measure the model": (
        compare(rows={"tiny-bert": {"dense": DENSE}}),
        "compare[0]: suites.heldout measures causal-lm models, but tiny-bert",
    ),
    "a tolerance in words": (
        compare(COLUMN | {"tolerance": "little"}),
        "compare[0].columns.wikitext2_ppl: the tolerance 'little' is neither a number from 0 nor a percentage",
    ),
    "a negative tolerance": (compare(COLUMN | {"tolerance": -1}), "the tolerance -1.0 is neither"),
    "no tolerance": (
        compare({"suite": "heldout", "metric": "perplexity"}),
        "compare[0]: 'wikitext2_ppl' needs 'tolerance', or the comparison 'why' nothing is judged.",
    ),
    "a tolerance in words, of a chart": (
        {"figure": "glue_bits", "tolerance": {"CoLA": "1 %%"}},
        "compare[0]: the tolerance '1 %%' is neither",
    ),
    "a unit that is none": (compare(COLUMN | {"unit": "MiBs"}), "unit: 'MiBs' (str) is not a choice. Did you mean"),
    "two things to measure": (
        compare(COLUMN | {"workload": "memory"}),
        "exactly one of the keys 'suite', 'workload' and 'order: true'",
    ),
    "a chart that the study lacks": (
        {"figure": "glue_bit", "tolerance": 1},
        "compare[0].figure: this study has no chart 'glue_bit'. Did you mean 'glue_bits'?",
    ),
    "a chart without published points": (
        {"figure": "block_importance", "tolerance": 1},
        "compare[0].figure: 'block_importance' has no published points",
    ),
    "a device that is no pattern": (compare(device="A100("), "compare[0]: 'device' is no regular expression"),
    "an order of a step that records none": (
        ORDER | {"rows": {"tiny-llama": {"dense+flap": {"model": "Vicuna-7B"}}}},
        "rows.tiny-llama: an order is recorded by steps of 'depth', and 'dense+flap' ends in 'flap'.",
    ),
    "numbers for an order": (compare({"order": True}), "columns.wikitext2_ppl: '12.62' in shortened_llama_quality.csv"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_in_a_comparison(name, demo_config):
    entry, message = MISTAKES[name]
    demo_config["compare"] = [entry]
    with pytest.raises(UserError) as caught:
        Study(demo_config, "mine.yaml")
    text = str(caught.value)
    assert text.startswith("mine.yaml: compare[0]")
    assert message in text
    assert "\n" not in text


def test_what_is_compared_is_measured_too_but_not_an_empty_cell(demo_config):
    order = ORDER | {"rows": {"tiny-llama": {"dense+depth-2+lora+depth-3": {"model": "Vicuna-7B"}}}}
    accuracy = {"suite": "zero-shot", "tasks": SEVEN, "unit": "%", "tolerance": 1}
    chains = {"dense+rtn-w3": DENSE, "dense+rtn-w2": {"model": "LLaMA-7B", "criterion": "PPL"}}
    entry = compare(rows={"tiny-llama": chains}, columns={"wikitext2_ppl": COLUMN, "mean_accuracy": accuracy})
    demo_config["figures"].pop("quantization_tradeoff")
    before = set(Study(demo_config).raw_results())
    allocated = {"weights_MiB": {"workload": "memory", "metric": "weights_allocated", "unit": "MiB", "tolerance": 1}}
    weights = compare(columns=allocated, rows={"tiny-llama": {"dense+rtn-w3": {"parameters": 5524118000}}})
    weights["values"] = "shortened_llama_weights"
    demo_config["compare"] = [entry, order, weights, {"figure": "glue_bits", "tolerance": 1.0}]
    study = Study(demo_config)
    run = "results/demo/runs/tiny-llama/s0"
    compared = {f"{run}/dense+{name}/evaluate/heldout.json" for name in ("rtn-w3", "rtn-w2")}
    # Of LLaMA-7B itself, which the first chain stands for, no accuracy is published.
    compared |= {f"{run}/dense+rtn-w2/evaluate/zero-shot.json", f"{run}/dense+depth-2+lora+depth-3/step.json"}
    compared |= {f"{run}/dense+rtn-w3/profile/memory.json"}
    steps = {f"{run}/dense+{name}/step.json" for name in ("rtn-w3", "rtn-w2")}
    assert set(study.raw_results()) - before == compared | steps
    assert set(study.comparison_results()) == compared | set(study.figure_results("glue_bits"))
    assert comparisons.files(study.resolved) == [
        f"reference/papers/{name}.csv"
        for name in ("glue_bits", "shortened_llama_block_orders", "shortened_llama_quality", "shortened_llama_weights")
    ]


def test_the_title_of_a_chart_is_not_compared(demo_config):
    demo_config["compare"] = [{"figure": "engine_speedup", "tolerance": "20%"}]
    study = Study(demo_config)
    assert comparisons.files(study.resolved)[1].endswith("engine_speedup_headlines.csv")
    demo_config["figures"]["engine_speedup"]["title"] = "Another"
    assert comparisons.content(Study(demo_config).resolved) == comparisons.content(study.resolved)
    demo_config["compare"][0]["tolerance"] = "10%"
    assert comparisons.content(Study(demo_config).resolved) != comparisons.content(study.resolved)


def test_a_section_is_valid_by_the_schema(demo_config):
    from jsonschema import Draft202012Validator

    demo_config["compare"] = [
        compare(),
        ORDER,
        {"figure": "size_tradeoff", "tolerance": {"memory": "10%", "accuracy": 1}},
    ]
    schema = json.loads((ROOT / "workflow/schemas/study.schema.json").read_text())
    assert list(Draft202012Validator(schema).iter_errors(expand(demo_config, "demo"))) == []
    demo_config["compare"] = [compare(COLUMN | {"tolerence": 1})]
    assert list(Draft202012Validator(schema).iter_errors(expand(demo_config, "demo")))


# Which models count ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_espalier_made_is_no_published_model(demo_config, tmp_path):
    """Also where another study names it by its path."""
    (tmp_path / "config.json").write_text("{}")
    demo_config["models"]["other"] = {"path": str(tmp_path)}
    assert "other" not in comparisons.made_here(Study(demo_config).resolved, {"evaluate"})
    (tmp_path / "espalier.json").write_text("{}")
    assert comparisons.made_here(Study(demo_config).resolved, {"profile"})["other"] == f"path: {tmp_path}"


SHAPED = {"pretrain": "random-weights", "shape": "llama-7b"}


@pytest.mark.parametrize(
    ("entry", "kinds", "made"),
    [
        (SHAPED, {"profile"}, False),
        (SHAPED | {"positions": 33024}, {"profile"}, False),
        (SHAPED, {"evaluate"}, True),
        (SHAPED, {"step"}, True),
        (SHAPED, {"evaluate", "profile"}, True),
        (SHAPED | {"narrow": 2}, {"profile"}, True),
        (SHAPED | {"weights_dtype": "float32"}, {"profile"}, True),
        (SHAPED | {"layers": 2}, {"profile"}, True),
        ({"pretrain": "random-weights", "config": {"model_type": "llama"}}, {"profile"}, True),
        ({"pretrain": "demo-decoder", "text": {"dataset": "world", "split": "pretrain"}}, {"profile"}, True),
        ({"hub": "a/b", "revision": "0" * 40}, {"evaluate", "profile", "step"}, False),
    ],
)
def test_which_models_reproduce_nothing(entry, kinds, made, demo_config):
    demo_config["models"]["other"] = entry
    found = comparisons.made_here(Study(demo_config).resolved, kinds)
    assert ("other" in found) == made


# The job --------------------------------------------------------------------------------------------------------------


def test_an_edit_of_a_tolerance_or_of_a_published_value_remakes_the_table_alone(tmp_path):
    project = copy_project(tmp_path / "project")
    model = project / "llama"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (project / "text").mkdir()
    (project / "text" / "test.jsonl").write_text('{"text": "a"}\n')
    study = {
        "study": "c",
        "models": {"m": {"path": "llama"}},
        "datasets": {"text": {"path": "text"}},
        "recipes": {"magnitude": {"prune": "depth", "blocks": 1, "criterion": "magnitude"}},
        "suites": {"wiki": {"evaluate": "perplexity", "text": {"dataset": "text", "split": "test"}}},
        "figures": {},
        "compare": quality(PERPLEXITY) + quality(PERPLEXITY, rows={"m": {"dense+magnitude": DENSE}}),
    }
    (project / "c.yaml").write_text(yaml.safe_dump(study))
    stand_in = tmp_path / "stand-in"
    stand_in.mkdir()
    (stand_in / "sitecustomize.py").write_text(STAND_IN)
    run = snakemake(project, "--cores", "1", "--configfile", "c.yaml", "--", "tables", python_path=[stand_in])
    assert run.returncode == 0, run.stdout + run.stderr
    assert (project / "results/c/tables/published.csv").is_file()
    papers = project / "reference/papers/shortened_llama_quality.csv"
    for file, old, new in ((project / "c.yaml", "1%", "2%"), (papers, "12.62", "12.63")):
        text = file.read_text()
        file.write_text(text.replace(old, new, 1))
        said = snakemake(project, "-n", "--configfile", "c.yaml", "--", "tables").stdout
        outputs = [line.strip() for line in said.splitlines() if line.startswith("    output: ")]
        assert outputs == ["output: results/c/tables/published.csv"], said
        file.write_text(text)
