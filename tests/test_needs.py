"""What jobs need: expressions that Snakemake evaluates, and sizes of models that equal real counts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from snakemake.iocontainers import Wildcards
from snakemake.resources import Resource

import tiny
from conftest import ROOT, snakemake
from espalier import checkpoints, needs, plugins, shapes
from espalier.study import Study

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TINY = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GATED = {**TINY, "intermediate_size": 24, "max_position_embeddings": 64}
OPT = {"model_type": "opt", "ffn_dim": 24, "word_embed_proj_dim": 32, "max_position_embeddings": 64, **TINY}
CONFIGS = {
    "llama": {"model_type": "llama", **GATED},
    "tied": {"model_type": "llama", "tie_word_embeddings": True, **GATED},
    "biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, **GATED},
    "wide heads": {"model_type": "llama", "head_dim": 16, "num_key_value_heads": 2, **GATED},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 1, **GATED},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, **GATED},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16, **GATED},
    "glm": {
        "model_type": "glm",
        "attention_bias": True,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": None,
        **GATED,
    },
    "opt": OPT,
    "opt, narrow embeddings": {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "opt, no biases": {**OPT, "enable_bias": False, "tie_word_embeddings": False},
    "bert": {"model_type": "bert", **GATED},
}


def study(**models: dict) -> Study:
    return Study({"study": "sizes", "figures": {}, "models": models})


def value(expression: str, attempt: int = 1, **wildcards: str) -> int:
    """Return what Snakemake makes of an expression of a profile."""
    named = Wildcards(fromdict=wildcards)
    given = {"input": [], "attempt": attempt, "threads": 1, "rulename": "rule", "async_run": None}
    return Resource.from_cli_expression("mem_mb", expression).evaluate(named, **given).value


@pytest.fixture
def llama_7b(monkeypatch):
    """A study with the model of 6,738,415,616 parameters, registered as the Snakefile does."""
    monkeypatch.setattr(needs, "study", study(big={"pretrain": "random-weights", "shape": "llama-7b"}))


# 6,738,415,616 parameters of 2 bytes are 13,476.831 MB.
@pytest.mark.parametrize(
    ("expression", "attempt", "expected"),
    [
        (needs.memory(base=8000), 1, 8000),
        (needs.memory(base=8000, weights=3), 1, 48431),
        (needs.memory(base=8000, weights=3), 2, 96861),
        (needs.memory(base=8000, weights=0.5), 1, 14739),
        (needs.memory(base=8000, weights=3, most=50000), 1, 48431),
        (needs.memory(base=8000, weights=3, most=50000), 2, 50000),
        (needs.minutes(base=30, billions=40), 1, 300),
        (needs.minutes(base=30, billions=40), 3, 899),
        (needs.minutes(base=30, billions=40, most=720), 3, 720),
    ],
)
def test_needs_follow_from_the_model_and_grow_with_each_attempt(llama_7b, expression, attempt, expected):
    assert value(expression, attempt, model="big", seed="0", chain="dense") == expected


def test_a_job_about_no_one_model_needs_the_base(llama_7b):
    assert value(needs.memory(base=500, weights=3), 1, figure="size_tradeoff") == 500
    assert value(needs.minutes(base=20, billions=40), 2) == 40


def test_a_misspelt_key_in_a_profile_is_an_error():
    with pytest.raises(TypeError, match="weight"):
        needs.memory(base=8000, weight=3)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_parameters_of_a_config_are_those_of_the_model(config):
    import torch
    import transformers

    content = dict(config)
    kind = content.pop("model_type")
    auto = transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(transformers.AutoConfig.for_model(kind, **content))
    assert needs.parameters(config) == checkpoints.logical_parameters(model)


@pytest.mark.parametrize(
    ("entry", "bytes_each"),
    [
        ({"pretrain": "demo-decoder", "text": {"dataset": "words", "split": "calibration"}, "layers": 3}, 4),
        ({"pretrain": "demo-encoder", "dataset": "words", "hidden": 32, "mlp": 24, "max_tokens": 48}, 4),
        ({"pretrain": "random-weights", "shape": "llama-7b"}, 2),
        ({"pretrain": "random-weights", "shape": "qwen3-0.6b", "layers": 2, "weights_dtype": "float32"}, 4),
        ({"pretrain": "random-weights", "shape": "chatglm2-6b"}, 2),
        ({"pretrain": "random-weights", "config": OPT}, 2),
        ({"pretrain": "random-weights", "shape": "llama-7b", "narrow": 32}, 2),
        ({"pretrain": "random-weights", "shape": "opt-6.7b", "positions": 4096, "layers": 1}, 2),
        ({"pretrain": "random-encoder", "shape": "bert-base-uncased", "narrow": 4, "layers": 2}, 4),
    ],
)
def test_a_model_of_ones_own_has_the_size_of_its_shapes(tmp_path, entry, bytes_each):
    tiny.calibration(tmp_path / "words")
    own = Study(
        {
            "study": "sizes",
            "figures": {},
            "models": {"model": entry},
            "datasets": {"words": {"path": str(tmp_path / "words")}},
        }
    )
    step = own.resolved.pretrained["model"]
    model, _ = plugins.load("pretrain", step.method).skeleton(step.recipe)
    count = checkpoints.logical_parameters(model)
    assert needs.size(own, "model") == needs.Size(count, bytes_each * count, "shape")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("tiny") / "model", hidden=16, mlp=24)


def test_a_local_model_is_measured_by_its_files(tmp_path, checkpoint):
    count = checkpoints.describe(checkpoint)["parameters"]
    sharded = tmp_path / "sharded"
    checkpoints.load(checkpoint, device="cpu").model.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    models = {
        "whole": {"path": str(checkpoint)},
        "sharded": {"path": str(sharded)},
        "halved": {"path": str(checkpoint), "dtype": "bfloat16"},
    }
    expected = {"whole": 4 * count, "sharded": 4 * count, "halved": 2 * count}
    for name, held in expected.items():
        assert needs.size(study(**models), name) == needs.Size(count, held, "weight files")


def test_a_model_of_the_hub_is_unknown_until_its_files_have_come(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(needs, "study", study(far={"hub": "someone/model", "revision": COMMIT}))
    snapshot = tmp_path / "models--someone--model" / "snapshots" / COMMIT
    assert needs.size(needs.study, "far") is needs.ASSUMED
    assert value(needs.memory(base=1000, weights=2), model="far") == 33000
    shutil.copytree(checkpoint, snapshot)
    (snapshot / "model.safetensors").rename(snapshot / "elsewhere")
    count = checkpoints.describe(checkpoint)["parameters"]
    assert needs.size(needs.study, "far") == needs.Size(count, 4 * count, "shape"), "its config.json is there"
    (snapshot / "elsewhere").rename(snapshot / "model.safetensors")
    assert needs.size(needs.study, "far") == needs.Size(count, 4 * count, "weight files")


@pytest.mark.parametrize(
    ("entry", "parameters", "bytes_each"),
    [
        ({"shape": "llama-7b"}, 6_738_415_616, 2),
        ({"shape": "llama-7b", "dtype": "float32"}, 6_738_415_616, 4),
        ({"shape": "bert-base-uncased", "task": "masked-lm"}, 109_514_298, 4),
    ],
)
def test_a_model_of_the_hub_has_the_size_of_its_shape_until_then(
    tmp_path, checkpoint, monkeypatch, entry, parameters, bytes_each
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    far = study(far={"hub": "someone/model", "revision": COMMIT, **entry})
    assert needs.size(far, "far") == needs.Size(parameters, parameters * bytes_each, "shape")
    assert needs.config_of(far, "far") == shapes.read(entry["shape"])
    snapshot = tmp_path / "models--someone--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    shutil.copy(checkpoint / "config.json", snapshot)  # its weights have not come yet
    count = checkpoints.describe(checkpoint)["parameters"]
    assert needs.size(far, "far") == needs.Size(count, 4 * count, "shape")
    shutil.copy(checkpoint / "model.safetensors", snapshot)
    assert needs.size(far, "far").parameters == checkpoints.describe(checkpoint)["parameters"]


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}", b"\x04\0\0\0\0\0\0\0null"])
def test_a_damaged_file_is_no_size(tmp_path, checkpoint, content):
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(content)
    assert needs.size(study(model={"path": str(damaged)}), "model").source == "shape"
    (damaged / "config.json").write_bytes(content)
    assert needs.size(study(model={"path": str(damaged)}), "model") is needs.ASSUMED


UNWRITTEN = {
    "as its config says": ({"torch_dtype": "float16"}, {}, 2),
    "as its entry says": ({"torch_dtype": "float16"}, {"dtype": "float32"}, 4),
    "as decoders are published": ({}, {}, 2),
    "not known, without a shape": ({"hidden_size": None}, {}, None),
    "of another kind": ({"intermediate_size": None, "model_type": "nemotron"}, {}, None),
}


@pytest.mark.parametrize("case", UNWRITTEN)
def test_a_model_without_safetensors_is_counted_from_its_config(tmp_path, case):
    """As one whose weights are to be converted."""
    changes, entry, width = UNWRITTEN[case]
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGS["llama"], **changes}))
    count = needs.parameters(CONFIGS["llama"])
    expected = needs.Size(count, width * count, "shape") if width else needs.ASSUMED
    assert needs.size(study(old={"path": str(tmp_path), "convert": True, **entry}), "old") == expected


def test_torch_is_not_imported():
    program = (
        "import sys, yaml; from espalier import needs; from espalier.study import Study;"
        "needs.study = Study(yaml.safe_load(open('config.yaml')));"
        "assert needs.megabytes({'model': 'tiny-llama'}, 1, base=0, weights=1e6) > 1e6;"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_a_profile_asks_and_a_failed_job_gets_more(tmp_path):
    """Through Snakemake: the profile is a template, the first attempt fails, and the second has twice as much."""
    (tmp_path / "Snakefile").write_text(
        "from espalier import needs\n"
        "from espalier.study import Study\n"
        "needs.study = Study(config)\n"
        "rule all:\n    input: 'big.txt'\n"
        "rule one:\n    output: '{model}.txt'\n"
        "    shell: 'echo {resources.mem_mb} {resources.runtime} >> asked; test -e tried && touch {output} || "
        "{{ touch tried; false; }}'\n"
    )
    profile = {"__use_yte__": True, "__definitions__": ["from espalier.needs import memory, minutes"], "retries": 1}
    asked = {"mem_mb": "?memory(base=8000, weights=3)", "runtime": "?minutes(base=30, billions=40, most=500)"}
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "config.yaml").write_text(yaml.safe_dump({**profile, "set-resources": {"one": asked}}))
    config = {
        "study": "big",
        "figures": {},
        "models": {"big": {"pretrain": "random-weights", "shape": "llama-7b"}},
    }
    (tmp_path / "study.json").write_text(json.dumps(config))
    run = snakemake(tmp_path, "--cores", "1", "--profile", "profile", "--configfile", "study.json")
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "asked").read_text().split() == ["48431", "300", "96861", "500"]
