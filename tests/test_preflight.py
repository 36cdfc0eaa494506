"""What is checked before the first job, with a stand-in of a Slurm cluster and real dry-runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, copy_project, snakemake
from espalier import preflight, slurm_site
from espalier.study import Study

SMOKE = yaml.safe_load((ROOT / "tests/smoke.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A copy of the project, on a machine with one partition: 32 cores, 64 GB and two GPUs, for three hours."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for command in slurm_site.COMMANDS:
        (commands / command).write_text("#!/bin/sh\n")
    (commands / "sinfo").write_text("#!/bin/sh\necho 'short|short*|up|gpu:2|(null)|32|UNLIMITED|64000|3:00:00'\n")
    for command in commands.iterdir():
        command.chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    return copy_project(tmp_path / "project")


def dry_run(project: Path, study: dict, *arguments: str):
    (project / "study.yaml").write_text(yaml.safe_dump(study))
    return snakemake(project, "-n", "--quiet", "rules", "--configfile", "study.yaml", *arguments)


def test_a_dry_run_for_slurm_says_what_its_cluster_lacks(project):
    run = dry_run(project, SMOKE, "--profile", "slurm")
    assert run.returncode == 1
    mistakes = [
        line for line in (run.stdout + run.stderr).splitlines() if line.startswith("profiles/slurm/config.yaml")
    ]
    assert [line.split(": ")[1] for line in mistakes] == [
        "set-resources.pretrain_model.runtime",
        "set-resources.tune_model.runtime",
        "set-resources.distill_model.runtime",
    ]
    assert "has 241 minutes for a job; the most is 180" in mistakes[1], "more for the largest model that is tuned"
    assert not list(project.glob("results/*"))


def test_a_dry_run_for_this_machine_asks_nothing_of_slurm(project):
    run = dry_run(project, SMOKE)
    assert run.returncode == 0, run.stdout + run.stderr


def test_rules_without_a_job_in_the_study_are_not_checked(project):
    """Only a job of training takes longer than this cluster allows, and this study has none."""
    study = {key: value for key, value in SMOKE.items() if key not in ("measure", "models", "figures", "recipes")}
    study["models"] = {"theirs": {"path": str(model(project)), "seeds": [0]}}
    study["measure"] = [{"model": "theirs", "chains": ["dense"], "suites": ["heldout"]}]
    study["figures"] = {}
    run = dry_run(project, study, "--profile", "slurm")
    assert run.returncode == 0, run.stdout + run.stderr


def model(project: Path) -> Path:
    """A model of 4 values, as far as a dry-run looks."""
    import torch
    from safetensors.torch import save_file

    folder = project.parent / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "dtype": "float32"}')
    save_file({"weight": torch.zeros(4)}, folder / "model.safetensors")
    return folder


def test_the_largest_model_of_each_rule_is_taken():
    entries = {
        **SMOKE,
        "models": {
            "tiny-llama": SMOKE["models"]["tiny-llama"],
            "tiny-bert": SMOKE["models"]["tiny-bert"],
            "large": {"pretrain": "random-weights", "shape": "llama-7b", "weights_dtype": "float16"},
        },
        "measure": [{"model": "large", "chains": ["dense+depth-1"], "workloads": ["generation"]}],
    }
    largest = preflight._largest_jobs(Study(entries))
    assert largest["prune_model"] == largest["profile_model"] == largest["pretrain_model"] == {"model": "large"}
    assert largest["tune_model"] != {"model": "large"}, "it is never tuned"
    assert largest["distill_model"] == {"model": "tiny-bert"} != largest["quantize_model"]


def test_an_access_token_is_not_handed_to_jobs_that_ask_no_hub(monkeypatch, tmp_path):
    from types import SimpleNamespace

    from espalier import folders, hub

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(folders, "check", lambda *_: None)
    monkeypatch.setattr(hub, "check", lambda _: None)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "ESPALIER_PREFETCH"):
        monkeypatch.setenv(name, "")
    workflow = SimpleNamespace(
        dag_settings=SimpleNamespace(targets=set()),
        _build_dag=lambda: None,
        storage_settings=SimpleNamespace(shared_fs_usage={preflight.SharedFSUsage.PERSISTENCE}),
    )
    preflight.check(workflow, Study(SMOKE, results=str(tmp_path)), "local", None)
    assert os.environ["HF_TOKEN"] == "hf_secret"
    preflight.check(workflow, Study(SMOKE, results=str(tmp_path)), "some-cluster", None)
    assert "HF_TOKEN" not in os.environ
    assert os.environ["HF_HUB_OFFLINE"] == "1"
