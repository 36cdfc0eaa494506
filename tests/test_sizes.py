"""The sizes of a study's variants: known counts of a real model, models from everywhere, and what cannot be."""

from __future__ import annotations

import contextlib
import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import families
import tiny
from conftest import ROOT
from espalier import checkpoints, shapes, sizes
from espalier.errors import UserError
from espalier.study import Study

SCRIPT = ROOT / "workflow" / "scripts" / "plan_sizes.py"
LLAMA_7B, BLOCK = 6_738_415_616, 202_383_360
LORA = {"tune": "lora", "dataset": "words", "split": "calibration", "steps": 1}


def study(folder: Path, model: dict, recipes: dict, chains: list[str]) -> dict:
    """Return a study that measures these chains of one model; recipes without a calibration get one."""
    if not (folder / "words").exists():
        tiny.calibration(folder / "words")
    calibration = {"text": {"dataset": "words", "split": "calibration"}, "samples": 10, "length": 128}
    return {
        "study": "sizes",
        "figures": {},
        "models": {"model": model},
        "datasets": {"words": {"path": str(folder / "words")}},
        "calibrations": {"few": calibration},
        "recipes": recipes,
        "suites": {"heldout": {"evaluate": "perplexity", "text": {"dataset": "words", "split": "heldout"}}},
        "measure": [{"model": "model", "chains": chains, "suites": ["heldout"]}],
    }


def config(folder: Path, content: dict) -> str:
    """Write a checkpoint's config.json and nothing else; return the folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


def small_llama(folder: Path, layers: int) -> dict:
    shape = {"hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 257}
    return {"path": config(folder, {"model_type": "llama", "num_hidden_layers": layers, **shape})}


def counts(mapping: dict) -> dict[str, tuple[int, bool]]:
    return {one.chain: (one.parameters, one.exact) for one in sizes.of_study(Study(mapping, "study.yaml"))}


@pytest.mark.parametrize(
    "model",
    [
        {"pretrain": "random-weights", "shape": "llama-7b"},
        {"hub": "huggyllama/llama-7b", "revision": "0" * 40, "shape": "llama-7b"},
    ],
    ids=["random weights", "hub"],
)
def test_llama_7b(tmp_path, monkeypatch, model):
    """Also as a model of the hub of which nothing was ever downloaded, and without internet."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "nothing"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipes: dict = {
        f"depth-{blocks}": {"prune": "depth", "blocks": blocks, "calibration": "few"} for blocks in (6, 9, 15, 20)
    }
    recipes |= {
        f"pruner-{percent}": {"prune": "llm-pruner", "ratio": percent / 100, "calibration": "few"}
        for percent in (25, 35)
    }
    recipes |= {"lora": LORA, "w4": {"quantize": "bitsandbytes", "bits": 4}}
    chains = ["dense", *(f"dense+{name}" for name in recipes if name[0] in "dp"), "dense+depth-9+lora+w4"]
    found = counts(study(tmp_path, model, recipes, chains))
    assert found.pop("dense") == (LLAMA_7B, True)
    assert [round(found[f"dense+depth-{blocks}"][0] / 1e9, 3) for blocks in (6, 9, 15, 20)] == [
        5.524,
        4.917,
        3.703,
        2.691,
    ]
    assert found == {
        "dense+depth-6": (5_524_115_456, True),  # LLAMA_7B - 6 * BLOCK
        "dense+depth-9": (LLAMA_7B - 9 * BLOCK, True),
        "dense+depth-9+lora": (LLAMA_7B - 9 * BLOCK, True),
        "dense+depth-9+lora+w4": (LLAMA_7B - 9 * BLOCK, True),
        "dense+depth-15": (LLAMA_7B - 15 * BLOCK, True),
        "dense+depth-20": (LLAMA_7B - 20 * BLOCK, True),
        "dense+pruner-25": (5_422_977_024, True),
        "dense+pruner-35": (4_907_642_880, True),
    }


def test_a_model_pruned_twice_is_that_of_its_chain(tmp_path):
    recipes = {name: {"prune": "depth", "blocks": 1, "calibration": "few"} for name in ("one", "again")}
    model = small_llama(tmp_path / "llama", 4)
    found = counts(study(tmp_path, model, recipes, ["dense+one+again", "dense+again"]))
    block = 4 * 128**2 + 3 * 128 * 64 + 2 * 128
    dense = 2 * 257 * 128 + 4 * block + 128
    assert found == {
        "dense": (dense, True),
        "dense+again": (dense - block, True),
        "dense+one": (dense - block, True),
        "dense+one+again": (dense - 2 * block, True),
    }


def test_peak_and_share_are_those_of_16_bit_weights(tmp_path):
    recipes = {"half": {"prune": "depth", "blocks": 16, "calibration": "few", "batch_size": 1}}
    mapping = study(tmp_path, {"pretrain": "random-weights", "shape": "llama-7b"}, recipes, ["dense+half"])
    dense, half = sizes.of_study(Study(mapping, "study.yaml"))
    assert (dense.share_of_dense, dense.gb_at_16_bit, dense.peak_gb) == (1, LLAMA_7B * 2 / 1e9, None)
    assert half.share_of_dense == (LLAMA_7B - 16 * BLOCK) / LLAMA_7B
    # Embeddings and head in 16 bit are the most that is there at once, and hidden states of ten short windows.
    beside = 2 * 32000 * 4096 * 2 / 1e9
    assert beside < half.peak_gb < 2 * beside


def test_the_demo_says_what_only_its_text_decides(demo_config):
    found = {(one.model, one.chain): one for one in sizes.of_study(Study(demo_config, "config.yaml"))}
    assert {("tiny-llama", "dense+depth-2+lora+gptq-w4"), ("tiny-bert", "dense+cola")} < found.keys()
    assert not any(one.exact for one in found.values())
    block = 4 * 64**2 + 3 * 64 * 64 + 2 * 64
    for chain, blocks in (("dense", 8), ("dense+depth-5", 3), ("dense+depth-5+lora", 3)):
        assert found["tiny-llama", chain].parameters == 1024 * 64 + blocks * block + 64
    assert found["tiny-llama", "dense+depth-5"].peak_gb > 0
    assert found["tiny-llama", "dense+depth-5+lora"].peak_gb is None
    # Words, positions, two segments, their norm; four blocks of 12 h² and its vectors; a head tied to the words.
    h, words = 128, 1000
    blocks = 4 * (4 * (h * h + h) + 2 * 512 * h + 512 + h + 4 * h)
    assert found["tiny-bert", "dense"].parameters == (words + 64 + 2 + 2) * h + blocks + h * h + h + 2 * h + words


def test_a_new_head_makes_the_size_about(tmp_path):
    sizes_of_bert = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    model = {"path": config(tmp_path / "bert", {"model_type": "bert", **sizes_of_bert}), "task": "masked-lm"}
    recipes = {"cola": {"tune": "classify", "task": "cola", "dataset": "glue", "steps": 1}}
    mapping = study(tmp_path, model, recipes, ["dense", "dense+cola"])
    mapping["datasets"]["glue"] = {"hub": "someone/glue", "revision": "a" * 40}
    mapping["suites"] = {"glue": {"evaluate": "glue", "task": "cola", "dataset": "glue"}}
    mapping["measure"] = [{"model": "model", "chains": ["dense+cola"], "suites": ["glue"]}]
    found = counts(mapping)
    assert found["dense"][1]
    assert found["dense+cola"] == (found["dense"][0], False)


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ({"prune": "depth", "ratio": 0.99, "calibration": "few"}, "ratio"),
        ({"prune": "depth", "parameters": 1.0e12, "calibration": "few"}, "parameters"),
        ({"prune": "llm-pruner", "parameters": 10.0, "calibration": "few"}, "parameters"),
    ],
)
def test_size_that_cannot_be_met_names_the_chain(tmp_path, recipe, named):
    model = small_llama(tmp_path / "llama", 8)
    mapping = study(tmp_path, model, {"small": recipe}, ["dense+small"])
    with pytest.raises(UserError) as error:
        counts(mapping)
    sentence = str(error.value)
    assert sentence.startswith("study.yaml: model, chain 'dense+small': ")
    assert named in sentence


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"hub": "a/b", "revision": "0" * 40, "shape": "lama-7b"}, "no shape 'lama-7b' .* Did you mean 'llama-7b'"),
        ({"path": "{here}", "shape": "llama-7b"}, "a local folder says its sizes itself: leave out the key 'shape'"),
        ({"pretrain": "random-weights", "shape": "lama-7b"}, "no shape 'lama-7b' .* Did you mean 'llama-7b'"),
    ],
)
def test_shape_that_cannot_be(tmp_path, entry, message):
    model = {key: value.format(here=tmp_path) for key, value in entry.items()}
    with pytest.raises(UserError, match=rf"study.yaml: models.model: .*{message}"):
        Study(study(tmp_path, model, {}, ["dense"]), "study.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"num_key_value_heads": None}, None),  # as in old configs: as many as heads
        ({"num_hidden_layers": 30}, "num_hidden_layers 32, but the model has 30"),
        ({"num_key_value_heads": 8, "vocab_size": 9}, "num_key_value_heads 32, .* has 8, vocab_size 32000, .* has 9"),
        (
            {"num_attention_heads": 64, "num_key_value_heads": None},
            "num_attention_heads 32, .* 64, num_key_value_.* 64",
        ),
        ({"model_type": "own", "num_layers": 3}, None),  # a size by a name of its own is not known
    ],
)
def test_shape_that_a_model_turns_out_not_to_have(change, message):
    config = {**shapes.read("llama-7b"), "hidden_act": "relu", **change}
    expected = contextlib.nullcontext() if message is None else pytest.raises(UserError, match=message)
    with expected:
        shapes.check_config("llama-7b", config, "models.x.shape")


def test_a_model_is_compared_with_its_shape_once_it_is_there(tmp_path):
    """By the script of the rule, which leaves no pointer to a model of another shape."""
    model = tiny.llama(tmp_path / "model", hidden=16, mlp=24)
    script = runpy.run_path(str(ROOT / "workflow" / "scripts" / "fetch_model.py"))
    reference = {"path": str(model), "id": None, "revision": None, "task": "causal-lm", "dtype": "auto"}
    given = ["--reference", json.dumps({**reference, "trust_remote_code": False, "convert": False})]
    given += ["--output", str(tmp_path / "pointer"), "--step", str(tmp_path / "step.json"), "--study", "s"]
    given += ["--model-name", "mine", "--seed", "0", "--chain", "dense", "--name", "dense"]
    with pytest.raises(UserError, match=r"models.mine.shape: the shape 'llama-7b' says .*hidden_size 4096, .* has 16"):
        script["main"]([*given, "--shape", "llama-7b"])
    assert not (tmp_path / "pointer").exists()
    script["main"](given)
    assert checkpoints.describe(tmp_path / "pointer")["format"] == "reference"


def test_model_of_the_hub_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    mapping = study(tmp_path, {"hub": "nobody/nothing", "revision": "0" * 40}, {}, ["dense"])
    with pytest.raises(
        UserError, match=r"model, chain 'dense': The checkpoint nobody/nothing cannot be loaded: "
    ) as error:
        counts(mapping)
    assert "\n" not in str(error.value)


def test_script_prints_a_table_and_writes_it(tmp_path, capsys):
    recipes = {"one": {"prune": "depth", "blocks": 1, "calibration": "few"}}
    model = small_llama(tmp_path / "llama", 4)
    mapping = study(tmp_path, model, recipes, ["dense+one"])
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(mapping))
    script = runpy.run_path(str(SCRIPT))
    script["main"]([str(tmp_path / "study.yaml"), "--csv", str(tmp_path / "sizes.csv")])
    heading, *lines = capsys.readouterr().out.splitlines()
    expected = sizes.of_study(Study(mapping))
    assert [line.split()[:3] for line in lines] == [[one.model, one.chain, f"{one.parameters:,}"] for one in expected]
    end = heading.index("parameters") + len("parameters")
    assert all(line[:end].endswith(f"{one.parameters:,}") for line, one in zip(lines, expected, strict=True))
    with (tmp_path / "sizes.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["chain"], int(row["parameters"])) for row in rows] == [(one.chain, one.parameters) for one in expected]
    assert [float(row["peak_gb"]) if row["peak_gb"] else None for row in rows] == [one.peak_gb for one in expected]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "study.yaml cannot be read: No such file or directory."),
        ("a: [", "study.yaml is not valid YAML"),
        ("- a", "study.yaml must be a mapping of sections."),
        (json.dumps({"study": "x"}), "study.yaml: the key 'models' is missing."),
    ],
)
def test_script_says_what_is_wrong_with_the_study(tmp_path, content, message):
    if content is not None:
        (tmp_path / "study.yaml").write_text(content)
    run = subprocess.run([sys.executable, str(SCRIPT), "study.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1
    assert message in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_tied_weight_that_a_file_holds_twice_counts_once(tmp_path):
    """As many published checkpoints do; the size of a dense model and that of its pruned children must agree."""
    from safetensors.torch import load_file, save_file

    model = families.tiny("qwen3", tie_word_embeddings=True)
    source, pointer = tmp_path / "source", tmp_path / "pointer"
    model.save_pretrained(source)
    stored = load_file(source / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    pointer.mkdir()
    reference = dict.fromkeys(("id", "revision")) | {"path": str(source), "task": "causal-lm", "dtype": "auto"}
    checkpoints.refer(pointer, {**reference, "trust_remote_code": False})
    described = checkpoints.describe(pointer)
    assert described["parameters"] == checkpoints.logical_parameters(model) < sum(map(torch.numel, stored.values()))
    assert described["bits"] == 32
