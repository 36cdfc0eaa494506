"""Bad input: each mistake gives one clear error that names the file, the key and the nearest right name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, copy_project, snakemake
from espalier import checkpoints, tables
from espalier.errors import UserError
from espalier.study import Study


def put(*keys):
    """Return an edit that sets a value deep in the config: put("recipes", "lora", "steps", 3)."""
    *path, last, value = keys

    def edit(config):
        node = config
        for key in path:
            node = node[key]
        node[last] = value

    return edit


def rename(*keys):
    *path, old, new = keys

    def edit(config):
        node = config
        for key in path:
            node = node[key]
        node[new] = node.pop(old)

    return edit


NO_FIGURES = put("figures", {})
MEASURE = {"model": "tiny-llama", "chains": ["dense"], "suites": ["heldout"]}

AT_PARSE_TIME = {
    "a misspelt section": (rename("recipes", "recipies"), "unknown key 'recipies'. Did you mean 'recipes'?"),
    "a missing section": (lambda config: config.pop("models"), "the key 'models' is missing"),
    "a study without a name": (put("study", None), "study: expected text, found nothing"),
    "a name with capitals": (
        rename("suites", "heldout", "Heldout"),
        "suites.Heldout: the name 'Heldout' must be lower-case",
    ),
    "a misspelt recipe key": (
        put("recipes", "lora", "stepz", 3),
        "recipes.lora: unknown key 'stepz'. Did you mean 'steps'?",
    ),
    "a missing recipe key": (
        lambda config: config["recipes"]["gptq-w4"].pop("bits"),
        "recipes.gptq-w4: the key 'bits' is",
    ),
    "a number as text": (
        put("recipes", "lora", "learning_rate", "fast"),
        "recipes.lora.learning_rate: expected a number",
    ),
    "text for a number": (
        put("recipes", "taylor-3", "blocks", "one"),
        "recipes.taylor-3.blocks: expected a whole number",
    ),
    "a value out of range": (
        put("recipes", "taylor-3", "blocks", 0),
        "recipes.taylor-3: 'blocks' must be at least 1.",
    ),
    "a choice that is none": (put("recipes", "taylor-3", "schedule", "gredy"), "Did you mean 'greedy'?"),
    "bits that a method lacks": (put("recipes", "gptq-w4", "bits", 5), "recipes.gptq-w4.bits: 5 (int) is not a choice"),
    "groups that do not divide the model's widths": (
        put("recipes", "gptq-w4", "group_size", 128),
        "'gptq-w4' makes groups of 128 input channels (the key 'group_size'), which do not divide the model's hidden_s",
    ),
    "a kernel that a number of bits lacks": (
        lambda config: config["recipes"]["gptq-w4"].update(bits=2, kernel="marlin"),
        "recipes.gptq-w4: the kernel 'marlin' takes 'bits' 4, 8, not 2.",
    ),
    "a kernel that a group size lacks": (
        lambda config: config["recipes"]["gptq-w4"].update(group_size=-1, kernel="torch-aten"),
        "recipes.gptq-w4: the kernel 'torch-aten' takes 'group_size' 16, 32, 64, 128, not -1.",
    ),
    "a kernel without zero points": (
        lambda config: config["recipes"]["gptq-w4"].update(symmetric=False, kernel="marlin"),
        "recipes.gptq-w4: the kernel 'marlin' needs 'symmetric: true'.",
    ),
    "a kernel of the GPU on a CPU": (
        lambda config: (config.update(device="cpu"), config["recipes"]["gptq-w4"].update(kernel="marlin")),
        "recipes.gptq-w4: the kernel 'marlin' needs 'device: cuda', and the device is cpu.",
    ),
    "a misspelt method": (
        put("recipes", "lora", "tune", "lroa"),
        "recipes.lora.tune: there is no tune method 'lroa'. Did you",
    ),
    "a misspelt stage": (
        rename("recipes", "taylor-3", "prune", "prun"),
        "exactly one of the keys prune, tune, quantize",
    ),
    "two stages in a recipe": (put("recipes", "lora", "prune", "depth"), "recipes.lora: exactly one of the keys"),
    "a misspelt chain token": (
        put("measure", 0, "chains", ["dense+depht-2"]),
        "measure[0]: the chain 'dense+depht-2' names no recipe 'depht-2'. Did you mean 'depth-2'?",
    ),
    "a chain without dense": (put("measure", 0, "chains", ["depth-2+lora"]), "must begin with 'dense'"),
    "pruning after quantizing": (
        put("measure", 0, "chains", ["dense+gptq-w4+depth-2"]),
        "'depth-2' (prune) cannot follow 'gptq-w4', because a quantizing step ends a chain",
    ),
    "a classifier on a decoder": (
        put("measure", 0, "chains", ["dense+cola"]),
        "'cola' (tune: classify) takes a masked-lm model, and finds a causal-lm model",
    ),
    "an encoder in the harness": (
        put("measure", [{"model": "tiny-bert", "chains": ["dense"], "suites": ["zero-shot"]}]),
        "suites.zero-shot measures causal-lm models, but tiny-bert with the chain 'dense' is a masked-lm model",
    ),
    "a misspelt model": (
        put("measure", 0, "model", "tiny-lama"),
        "there is no model 'tiny-lama'. Did you mean 'tiny-llama'?",
    ),
    "a misspelt suite": (
        put("measure", 0, "suites", ["zeroshot"]),
        "there is no suite 'zeroshot'. Did you mean 'zero-shot'?",
    ),
    "a misspelt workload": (
        put("figures", "latency_throughput", "workload", "generatoin"),
        "figures.latency_throughput: there is no workload 'generatoin'. Did you mean 'generation'?",
    ),
    "a workload of no batch": (
        put("workloads", "memory", "batch_sizes", []),
        "workloads.memory: 'batch_sizes' must be",
    ),
    "a misspelt engine": (
        put("workloads", "generation", "engine", "hff"),
        "workloads.generation.engine: there is no engine 'hff'. Did you mean 'hf'?",
    ),
    "a misspelt chart": (
        rename("figures", "glue_bits", "glue_bit"),
        "there is no figures method 'glue_bit'. Did you mean",
    ),
    "a misspelt series": (
        put("figures", "size_tradeoff", "series", {"Our": ["dense"]}),
        "there is no 'Our' in this chart. Did you mean 'Ours'?",
    ),
    "a chart of scores of a step that has none": (
        put("figures", "block_importance", "panels", {"LoRA": "dense+depth-2+lora"}),
        "figures.block_importance: this chart shows steps of 'depth', and 'dense+depth-2+lora' ends in 'lora'",
    ),
    "a chart of scores of the dense model": (
        put("figures", "block_importance", "panels", {"None": "dense"}),
        "figures.block_importance: this chart shows steps of 'depth', and 'dense' ends in 'dense'",
    ),
    "two targets": (
        put("recipes", "flap", "ratio", 0.2),
        "recipes.flap: exactly one of 'ratio' and 'parameters' must be given.",
    ),
    "no target": (
        lambda config: config["recipes"]["llm-pruner"].pop("parameters"),
        "recipes.llm-pruner: exactly one of 'ratio' and 'parameters' must be given.",
    ),
    "a misspelt row": (
        rename("figures", "quantization_tradeoff", "rows", "SFT Model", "SFT-Model"),
        "there is no 'SFT-Model' in this chart. Did you mean 'SFT Model'?",
    ),
    "a misspelt task": (
        put("suites", "zero-shot", "tasks", ["bool"]),
        "suites.zero-shot.tasks: 'world' has no task 'bool'. Did you mean 'boolq'?",
    ),
    "a chart of a task that its suite lacks": (
        put("suites", "zero-shot", "tasks", ["boolq", "piqa"]),
        "figures.size_tradeoff.tasks: the suite 'zero-shot' has no task 'winogrande'",
    ),
    "a misspelt GLUE task": (put("axes", "task", ["cola", "sst-2"]), "Did you mean 'sst2'?"),
    "a misspelt dataset": (
        put("suites", "zero-shot", "dataset", "word"),
        "there is no dataset 'word'. Did you mean 'world'?",
    ),
    "a misspelt calibration": (
        put("recipes", "gptq-w4", "calibration", "genral"),
        "recipes.gptq-w4.calibration: there is no calibration 'genral'. Did you mean 'general'?",
    ),
    "a calibration of no samples": (
        put("calibrations", "general", "samples", 0),
        "calibrations.general: 'samples' must be",
    ),
    "a calibration on evaluated text": (
        put("calibrations", "few", "text", "split", "heldout"),
        "calibrations.few: its text (dataset 'world', split 'heldout') is what suites.heldout evaluates (split 'heldou",
    ),
    "a calibration without a name": (
        put(
            "recipes", "gptq-w4", "calibration", {"text": {"dataset": "world", "split": "x"}, "samples": 2, "length": 8}
        ),
        "recipes.gptq-w4.calibration: expected the name of an entry of the section calibrations.",
    ),
    "an empty axis": (put("axes", "task", []), "axes: expected name: [value, ...]"),
    "a model from nowhere": (put("models", "x", {"seeds": [0]}), "models.x: a model needs exactly one of the keys"),
    "a model from two places": (
        put("models", "x", {"path": "a", "hub": "b/c"}),
        "models.x: a model needs exactly one of",
    ),
    "a missing model folder": (
        put("models", "x", {"path": "/no/such"}),
        "models.x.path: /no/such is not a checkpoint folder",
    ),
    "a hub model that is not pinned": (put("models", "x", {"hub": "a/b", "revision": "main"}), "40 hexadecimal digits"),
    "a repeated seed": (put("models", "tiny-llama", "seeds", [1, 1]), "'seeds' must be different whole numbers"),
    "a misspelt pretraining key": (
        put("models", "tiny-llama", "step", 3),
        "models.tiny-llama: unknown key 'step'. Did you",
    ),
    "a missing dataset folder": (
        put("datasets", "x", {"path": "no/such"}),
        "datasets.x.path: there is no folder no/such",
    ),
    "a device that is none": (put("device", "gpu"), "device: 'gpu' (str) is not a choice. Did you mean 'cpu'?"),
    "a list for a mapping": (put("recipes", "lora", ["tune"]), "recipes.lora: expected a mapping"),
}


@pytest.mark.parametrize("name", AT_PARSE_TIME)
def test_mistake_in_a_config(name, demo_config):
    edit, message = AT_PARSE_TIME[name]
    edit(demo_config)
    with pytest.raises(UserError) as caught:
        Study(demo_config, "studies/mine.yaml")
    text = str(caught.value)
    assert text.startswith("studies/mine.yaml: ")
    assert message in text
    assert "\n" not in text


def test_there_is_no_mistake_in_the_demo(demo_config):
    assert Study(demo_config).raw_results()


def test_snakemake_prints_the_sentence_and_fails(tmp_path, demo_config):
    project = copy_project(tmp_path)
    demo_config["measure"][0]["chains"] = ["dense+depht-2"]
    (project / "mine.yaml").write_text(yaml.safe_dump(demo_config))
    run = snakemake(project, "-n", "--configfile", "mine.yaml")
    assert run.returncode != 0
    said = run.stdout + run.stderr
    assert "mine.yaml: measure[0]: the chain 'dense+depht-2' names no recipe 'depht-2'." in said
    assert "Traceback" not in said
    assert not (project / "results").exists()


def script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "workflow" / "scripts" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


IDENTITY = ("--study", "s", "--model-name", "m", "--seed", "0", "--chain", "dense", "--name", "dense")


def test_a_missing_checkpoint_is_named(tmp_path):
    text = {"dataset": {"name": "a", "source": "local"}, "split": "b"}
    recipe = json.dumps({"prune": "depth", "blocks": 1, "calibration": {"text": text, "samples": 1, "length": 8}})
    output = ("--output", tmp_path / "o", "--step", tmp_path / "s.json")
    run = script("prune_model", "--parent", tmp_path / "none", "--recipe", recipe, *output, *IDENTITY)
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1] == f"error: The checkpoint folder {tmp_path / 'none'} does not exist."
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_is_no_json_is_refused(tmp_path):
    run = script("evaluate_model", "--model", tmp_path, "--recipe", "{evaluate", "--output", tmp_path / "o", *IDENTITY)
    assert run.returncode == 2
    assert "neither a JSON object nor a JSON file" in run.stderr


@pytest.fixture
def llama(tmp_path) -> Path:
    """A tiny checkpoint as plain transformers writes it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    model.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def refer(path: Path, folder: Path) -> dict:
    folder.mkdir()
    reference = {
        "path": str(path),
        "id": None,
        "revision": None,
        "task": "causal-lm",
        "dtype": "auto",
        "trust_remote_code": False,
    }
    checkpoints.refer(folder, reference)
    return checkpoints.describe(folder)


def test_a_whole_local_model_is_counted(llama, tmp_path):
    info = refer(llama, tmp_path / "pointer")
    assert info["parameters"] == 2 * 8 * 8 + 4 * 8 * 8 + 3 * 8 * 8 + 3 * 8
    assert info["bits"] == 32


def test_a_truncated_model_is_named(llama, tmp_path):
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        refer(llama, tmp_path / "pointer")


def test_a_model_without_safetensors_is_refused(llama, tmp_path):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(UserError, match="has no safetensors weights"):
        refer(llama, tmp_path / "pointer")


def test_a_damaged_checkpoint_is_named_when_it_is_loaded(llama, tmp_path):
    refer(llama, tmp_path / "pointer")
    (llama / "config.json").write_text("{")
    with pytest.raises(UserError, match="llama cannot be loaded"):
        checkpoints.load(tmp_path / "pointer", device="cpu")


def result(**changes) -> dict:
    whole = {
        "version": 1,
        "kind": "evaluate",
        "identity": {"study": "s", "model": "m", "seed": 0, "chain": "dense", "name": "suite"},
        "recipe": {},
        "checkpoint": {"format": "transformers", "task": "causal-lm", "parameters": 7, "bits": 32},
        "measurements": [{"task": "t", "metric": "acc", "value": 0.5, "stderr": 0.1, "n": 4, "unit": "fraction"}],
        "samples": {},
        "provenance": {
            "commit": None, "packages": {"torch": "2"}, "device": {"kind": "cpu", "name": "cpu"}, "started": "",
            "seconds": 1, "code": "c",
        },
    }  # fmt: skip
    return whole | changes


DAMAGED = {
    "truncated": (json.dumps(result())[:200], "is not valid JSON"),
    "empty": ("", "is not valid JSON"),
    "of an older version": (json.dumps(result(version=0)), "its format version is 0"),
    "something else": ('{"a": 1}', "is not a raw result of Espalier"),
    "a list": ("[]", "is not a raw result of Espalier"),
    "without a metric": (
        json.dumps(result(measurements=[{"task": "t"}])),
        "measurements.0: 'metric' is a required property",
    ),
    "with a value that is text": (
        json.dumps(result(measurements=[{"task": "t", "metric": "a", "unit": "", "value": "0.5"}])),
        "measurements.0.value",
    ),
    "moved": (json.dumps(result(identity={**result()["identity"], "chain": "dense+x"})), "moved or copied by hand"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_raw_result_is_named(name, tmp_path):
    text, message = DAMAGED[name]
    path = tmp_path / "results" / "s" / "runs" / "m" / "s0" / "dense" / "evaluate" / "suite.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result()))
    assert tables.read(path) == result()
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        tables.read(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_table_of_a_damaged_result_keeps_the_old_table(tmp_path):
    table = tmp_path / "metrics.csv"
    table.write_text("old")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    run = script("make_metrics", "--results", broken, "--output", table)
    assert run.returncode == 1
    assert run.stderr.startswith(f"error: {broken} is not valid JSON")
    assert table.read_text() == "old"
