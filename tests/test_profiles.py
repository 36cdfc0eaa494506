"""The profiles: snakemake knows their keys, and jobs ask for what they should. nvidia-smi is a fake of two GPUs."""

from __future__ import annotations

import os
import re
import shlex

import psutil
import pytest
import yte

from conftest import ROOT, copy_project, snakemake

STUDY = ("--configfile", "tests/smoke.yaml")
WORKSTATION = ("--profile", "profiles/workstation", "--cores", "4")
GPU_RULES = {
    "pretrain_model",
    "prune_model",
    "tune_model",
    "quantize_model",
    "distill_model",
    "evaluate_model",
    "profile_model",
}
OTHER_RULES = {"generate_data", "check_calibration", "make_metrics", "draw_figure"}
MEMORY = re.compile(r"__import__\('espalier\.needs'\).*")


# Python runs a sitecustomize before any script: this one makes a script's outputs, says which GPUs it sees and that it
# uses them, and ends the process. What holds the GPUs runs as it is, with another folder of locks.
STAND_IN = """
import os, pathlib, sys, time
script = pathlib.Path(sys.orig_argv[1]) if len(sys.orig_argv) > 1 else pathlib.Path()
if script.name == "hold_gpus.py":
    from espalier import devices
    devices.LOCKS = pathlib.Path("locks")
elif script.parts[:2] == ("workflow", "scripts"):
    given = dict(zip(sys.orig_argv[2:], sys.orig_argv[3:]))
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
    with open("seen.txt", "a") as seen:
        seen.write(f"{script.stem} {gpu}\\n")
    if gpu:
        os.mkdir(f"in-use-{gpu}")
        time.sleep(0.1)
        os.rmdir(f"in-use-{gpu}")
    for path in filter(None, (given.get("--output"), given.get("--step"), given.get("--paired"))):
        if path.endswith((".json", ".csv")):
            open(path, "w").close()
        elif script.stem == "draw_figure":
            for suffix in (".pdf", ".svg", ".png", ".csv"):
                open(path + suffix, "w").close()
        else:
            os.makedirs(path)
    os._exit(0)
"""


@pytest.fixture
def two_gpus(tmp_path, monkeypatch) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho '0, GPU-a'\necho '1, GPU-b'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def rendered(profile: str) -> dict:
    return yte.process_yaml((ROOT / f"profiles/{profile}/config.yaml").read_text(encoding="utf-8"))


def asked(said: str) -> dict[str, dict[str, str]]:
    """Return what a job of each rule asks for, by what snakemake said of it."""
    found = re.findall(r"^(?:local)?rule (\w+):\n(?: {4}.*\n)*? {4}resources: (.*)", said, flags=re.M)
    return {rule: dict(one.split("=", 1) for one in resources.split(", ")) for rule, resources in found}


def check_workstation(said: str, gpus: int) -> None:
    jobs = asked(said)
    assert jobs.keys() >= GPU_RULES | OTHER_RULES
    assert {rule for rule, resources in jobs.items() if "gpu" in resources} == GPU_RULES
    assert {jobs[rule]["gpu"] for rule in GPU_RULES} == {"1" if gpus else "0"}
    memory = psutil.virtual_memory().total // 10**6
    assert all(int(jobs[rule]["mem_mb"]) >= min(16000, memory) for rule in GPU_RULES - {"pretrain_model"})
    profile = rendered("workstation")
    assert profile["resources"] == [f"gpu={gpus}", f"mem_mb={memory}"]
    share = max(1, len(os.sched_getaffinity(0)) // max(1, gpus))
    assert profile["set-threads"] == dict.fromkeys(GPU_RULES - {"profile_model"}, share)


def test_a_workstation_whose_gpus_are_all_hidden_gives_none(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run = snakemake(copy_project(tmp_path), "-n", *STUDY, *WORKSTATION)
    assert run.returncode == 0, run.stdout + run.stderr
    check_workstation(run.stdout, gpus=0)


def test_kubernetes_asks_for_gpus_with_limits_memory_and_disk():
    """Its plugin is not installed here, so snakemake cannot read this profile: what it is made of is examined."""
    profile = rendered("kubernetes")
    always = profile["default-resources"]
    assert always["scale"] == 0, "text would be true, and no limits be set"
    assert always["gpu_manufacturer"] == "nvidia"
    assert profile["set-resources"].keys() == profile["set-threads"].keys() == GPU_RULES
    for resources in [always, *profile["set-resources"].values()]:
        assert MEMORY.fullmatch(resources["mem_mb"])
        assert MEMORY.fullmatch(resources["disk_mb"])
    assert {resources["gpu"] for resources in profile["set-resources"].values()} == {1}
    mounted = [volume.split(":")[1] for volume in profile["kubernetes-persistent-volumes"]]
    assert mounted == [profile["default-storage-prefix"]]
    assert profile["precommand"] == f"ln -s {mounted[0]}/results results"


@pytest.mark.parametrize("name", ["default", "slurm", "workstation", "kubernetes"])
def test_snakemake_knows_every_key(name):
    from snakemake.cli import get_argument_parser

    known = {option for action in get_argument_parser()._actions for option in action.option_strings}
    keys = {f"--{key}" for key in rendered(name)}
    assert {key for key in keys - known if not key.startswith((f"--{name}-", "--__"))} == set()


def test_the_container_file_has_what_a_job_needs():
    lines = [line for line in (ROOT / "envs/Containerfile").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    steps = [line.split(None, 1) for line in lines]
    assert {word for word, _ in steps} <= {"FROM", "RUN", "WORKDIR", "COPY", "ENV"}
    commands = [shlex.split(rest) for word, rest in steps if word == "RUN"]
    assert ["make", "install"] in commands
    assert {"git", "make", "g++", "rsync"} <= set(commands[0])
    variables = dict(rest.split("=", 1) for word, rest in steps if word == "ENV")
    assert variables["PYTHONPATH"] == '"/workdir/workflow"', "where the plugin unpacks the sources"


def test_jobs_of_a_workstation_have_a_gpu_each_and_never_meet_on_one(two_gpus, tmp_path_factory):
    project = copy_project(tmp_path_factory.mktemp("workstation"))
    study = project / "tests/smoke.yaml"
    study.write_text(study.read_text(encoding="utf-8").replace("device: cpu", "device: auto"), encoding="utf-8")
    stand_in = tmp_path_factory.mktemp("stand-in")
    (stand_in / "sitecustomize.py").write_text(STAND_IN)
    run = snakemake(project, *WORKSTATION, *STUDY, python_path=[stand_in])
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    check_workstation(run.stdout + run.stderr, gpus=2)
    seen = [line.split() for line in (project / "seen.txt").read_text(encoding="utf-8").splitlines()]
    scripts = GPU_RULES - {"distill_model"}  # whose script is quantize_model.py
    assert {script for script, gpu in seen if gpu != "None"} == scripts
    assert {gpu for script, gpu in seen if script in scripts} == {"0", "1"}
    again = snakemake(project, "-n", *STUDY)
    assert "Nothing to be done" in again.stdout + again.stderr, "another profile makes nothing again"
