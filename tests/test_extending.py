"""The worked example of docs/extending.md does what the page says: its file, its entry, its list of jobs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, copy_project, snakemake
from espalier import checkpoints
from espalier.errors import UserError
from test_reruns import STAND_IN, jobs
from tiny import llama

SCRIPT = "workflow/scripts/prune_model.py"


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of docs/extending.md in a language."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project with the page's file in it, and a config of no charts and little to measure."""
    project = copy_project(tmp_path_factory.mktemp("extended"))
    (source,) = blocks("python")
    (project / "workflow" / "espalier" / "prune" / "deepest.py").write_text(source)
    config = yaml.safe_load((project / "config.yaml").read_text())
    config |= {"figures": {}, "measure": [{"model": "tiny-llama", "chains": ["dense"], "suites": ["heldout"]}]}
    (project / "config.yaml").write_text(yaml.safe_dump(config))
    return project


def method():
    """Return the page's file as a module of this process."""
    (source,) = blocks("python")
    module = types.ModuleType("espalier.prune.deepest")
    sys.modules[module.__name__] = module  # where dataclasses look for the types of fields
    try:
        exec(compile(source, "docs/extending.md", "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return module


def pointer(folder: Path, source: Path) -> Path:
    """Return a checkpoint that only points to `source`, as a model given by `path:` is."""
    folder.mkdir()
    reference = {"path": str(source), "id": None, "revision": None}
    checkpoints.refer(folder, {**reference, "task": "causal-lm", "dtype": "auto", "trust_remote_code": False})
    return folder


def prune(project: Path, parent: Path, output: Path, **recipe) -> subprocess.CompletedProcess:
    """Run the copy's prune_model.py with the copy's espalier."""
    command = [sys.executable, SCRIPT, "--parent", parent, "--recipe", json.dumps({"prune": "deepest", **recipe})]
    command += ["--device", "cpu", "--output", output / "model", "--step", output / "step.json", "--study", "demo"]
    command += ["--model-name", "tiny-llama", "--seed", "0", "--chain", "dense+deepest-2", "--name", "deepest-2"]
    environment = {**os.environ, "PYTHONPATH": str(project / "workflow"), "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(part) for part in command], cwd=project, env=environment, capture_output=True, text=True)


def test_the_entry_adds_exactly_the_jobs_that_the_page_lists(project, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(STAND_IN)
    run = snakemake(project, "--cores", "4", python_path=[tmp_path])
    assert run.returncode == 0, run.stdout + run.stderr
    assert jobs(project) == set()

    file = project / "config.yaml"
    before = file.read_text()
    config, (entry,) = yaml.safe_load(before), map(yaml.safe_load, blocks("yaml"))
    config["recipes"] |= entry["recipes"]
    config["measure"] += entry["measure"]
    file.write_text(yaml.safe_dump(config))
    try:
        listed = next(block for block in blocks("text") if block.startswith("results/"))
        assert jobs(project) == set(listed.split())
    finally:
        file.write_text(before)


def test_the_method_prunes(project, tmp_path):
    import torch
    from safetensors.torch import load_file

    parent = llama(tmp_path / "parent", layers=4)
    run = prune(project, pointer(tmp_path / "pointer", parent), tmp_path / "pruned", blocks=2)
    assert run.returncode == 0, run.stderr
    step = json.loads((tmp_path / "pruned" / "step.json").read_text())
    assert step["recipe"] == {"prune": "deepest", "blocks": 2}
    assert step["samples"]["blocks"] == 4
    kept = [block for block in range(4) if block not in step["samples"]["removed"]]
    assert kept == [0, 3]

    dense, pruned = (load_file(folder / "model.safetensors") for folder in (parent, tmp_path / "pruned" / "model"))
    expected = {}
    for name, tensor in dense.items():
        block = re.match(r"model\.layers\.(\d+)\.", name)
        if block and int(block[1]) not in kept:
            continue
        expected[name.replace(block[0], f"model.layers.{kept.index(int(block[1]))}.") if block else name] = tensor
    assert pruned.keys() == expected.keys()
    assert all(torch.equal(pruned[name], expected[name]) for name in expected)
    assert step["checkpoint"]["parameters"] == sum(tensor.numel() for tensor in expected.values())
    assert len(checkpoints.load(tmp_path / "pruned" / "model", device="cpu").model.model.layers) == 2


def test_the_plan_is_what_is_made_and_leaves_a_block(tmp_path):
    parent, deepest = llama(tmp_path / "parent", layers=4), method()
    shapes = checkpoints.skeleton(parent)
    assert deepest.plan(shapes, deepest.Recipe(blocks=3)) is True
    (tmp_path / "pruned").mkdir()
    deepest.apply(parent, tmp_path / "pruned", deepest.Recipe(blocks=3), seed=0, device="cpu")
    assert checkpoints.describe(tmp_path / "pruned")["parameters"] == checkpoints.logical_parameters(shapes)
    with pytest.raises(UserError, match="has 4 blocks; the recipe removes 4"):
        deepest.plan(checkpoints.skeleton(parent), deepest.Recipe(blocks=4))


def test_a_misspelt_key_of_the_method_is_an_error(project, tmp_path):
    run = prune(project, tmp_path, tmp_path / "pruned", blocks=2, seeds=[1])
    assert run.returncode == 1
    assert "unknown key 'seeds'" in run.stderr
