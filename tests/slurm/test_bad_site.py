"""Mistakes in the Slurm profile, on a real Slurm: what it says to them, and what is said before it is asked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import Cluster, Unavailable
from conftest import ROOT, copy_project, environment
from disturbed import wait_until
from espalier import slurm_site
from espalier.errors import UserError

pytestmark = pytest.mark.slurm

PROFILE = "profiles/slurm/config.yaml: set-resources.prune_model"
OWN_MOUNTS = ("unshare", "--mount", "sh", "-c")
LAGGING = """\
rule made:
    output: "out/made.txt"
    resources: mem_mb=1000, runtime=5
    shell: "echo once >> starts.txt; touch {output}"
"""


def may_mount() -> bool:
    """Return whether a process may see other mounts than the rest; few containers let even root do that."""
    try:
        return not subprocess.run(
            [*OWN_MOUNTS, "mount -t tmpfs none /mnt"], capture_output=True, check=False
        ).returncode
    except FileNotFoundError:
        return False


needs_mounts = pytest.mark.skipif(not may_mount(), reason="file systems cannot be mounted here")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    try:
        with Cluster(cpus=8, memory_mb=16000) as cluster:
            yield cluster
    except Unavailable as reason:
        pytest.skip(str(reason))


def check(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, **rule: object) -> str:
    """Return what is said of a profile with these resources of a rule."""
    monkeypatch.setenv("PATH", cluster.environment()["PATH"])
    with pytest.raises(UserError) as caught:
        slurm_site.check({"prune_model": rule}, {}, {})
    return str(caught.value)


UNAVAILABLE = "Requested node configuration is not available"
# What is asked, what of it sbatch is given, what Slurm says, and what is said before.
MISTAKES = {
    "a partition": (
        {"slurm_partition": "gpus"},
        ["--partition=gpus"],
        "Invalid partition name specified",
        f"{PROFILE}.slurm_partition: this cluster has no partition 'gpus'. Did you mean 'gpu'?",
    ),
    "a GPU type": (
        {"gres": "gpu:h100:1"},
        ["--gres=gpu:h100:1"],
        UNAVAILABLE,
        f"{PROFILE}.gres: no node of partition 'cpu' has gpu:h100:1; they have gpu:a100:2.",
    ),
    "too many GPUs": (
        {"gres": "gpu:3"},
        ["--gres=gpu:3"],
        UNAVAILABLE,
        f"{PROFILE}.gres: no node of partition 'cpu' has gpu:3; they have gpu:a100:2.",
    ),
    "a feature": (
        {"constraint": "h100"},
        ["--constraint=h100"],
        "Invalid feature specification",
        f"{PROFILE}.constraint: no node of partition 'cpu' has the features 'h100'; no node of this cluster has 'h100'."
        " Did you mean 'a100'?",
    ),
    "memory": (
        {"mem_mb": 16001},
        ["--mem=16001"],
        UNAVAILABLE,
        f"{PROFILE}.mem_mb: no node of partition 'cpu' has 16001 MB of memory; the most is 16000.",
    ),
    "CPUs, for which a job waits for ever": (
        {"cpus_per_task": 9},
        ["--cpus-per-task=9"],
        "PartitionConfig",
        f"{PROFILE}.cpus_per_task: no node of partition 'cpu' has 9 CPUs; the most is 8.",
    ),
    "time, for which a job waits for ever": (
        {"runtime": 61},
        ["--time=61"],
        "PartitionTimeLimit",
        f"{PROFILE}.runtime: no node of partition 'cpu' has 61 minutes for a job; the most is 60.",
    ),
}


@pytest.mark.parametrize(("rule", "options", "slurm", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_before_slurm_refuses_or_waits(cluster, monkeypatch, rule, options, slurm, sentence):
    for partition in ("cpu", "gpu", "urgent"):
        cluster.run("scontrol", "update", f"PartitionName={partition}", "MaxTime=60")
    assert check(cluster, monkeypatch, **rule) == sentence
    command = ["sbatch", "--parsable", "--output=/dev/null", *options, "--wrap", "true"]
    submitted = subprocess.run(command, env=cluster.environment(), capture_output=True, text=True, check=False)
    if submitted.returncode:
        assert slurm in submitted.stderr
    else:
        number = submitted.stdout.strip()
        wait_until(lambda: {job["JobId"]: job["Reason"] for job in cluster.jobs()}[number] == slurm)
        cluster.run("scancel", number)


def test_what_the_node_has_is_let_through_and_runs(cluster, monkeypatch):
    monkeypatch.setenv("PATH", cluster.environment()["PATH"])
    slurm_site.check({"prune_model": {"gres": "gpu:a100:2", "mem_mb": 16000, "constraint": "a100&fast"}}, {}, {})
    options = ("--gres=gpu:a100:2", "--mem=16000", "--constraint=a100&fast", "--output=/dev/null")
    cluster.run("sbatch", "--wait", *options, "--wrap", "true")


def test_without_accounting_any_account_will_do(cluster, monkeypatch):
    monkeypatch.setenv("PATH", cluster.environment()["PATH"])
    assert not slurm_site.accounting()
    slurm_site.check({"prune_model": {"slurm_account": "nobody"}}, {}, {})


def test_the_command_as_typed_submits_nothing(cluster, tmp_path):
    project = copy_project(tmp_path / "project")
    profile = project / "profiles/slurm/config.yaml"
    text = profile.read_text(encoding="utf-8")
    for rule, line in {"pretrain_model": "slurm_partition: gpus", "prune_model": "constraint: h100"}.items():
        assert f"\n  {rule}:\n" in text
        text = text.replace(f"\n  {rule}:\n", f"\n  {rule}:\n    {line}\n")
    profile.write_text(text, encoding="utf-8")
    before = len(cluster.jobs())
    run = subprocess.run(
        [sys.executable, "-m", "snakemake", "--profile", "slurm", "--configfile", "tests/slurm/study.yaml"],
        cwd=project,
        env={**cluster.environment(), "PYTHONPATH": environment(project)["PYTHONPATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    said = run.stdout + run.stderr
    assert "pretrain_model.slurm_partition: this cluster has no partition 'gpus'. Did you mean 'gpu'?" in said
    assert "prune_model.constraint: no node of partition 'cpu' has the features 'h100'; no node of this" in said
    assert "Traceback" not in said
    assert len(cluster.jobs()) == before


class Lagging:
    """A run whose job writes into `out`, a folder that has other content on its node than where snakemake runs."""

    def __init__(self, cluster: Cluster, folder: Path, latency_wait: int):
        self.folder, self.log, self.seen = folder, folder / "log", folder / "seen"
        for made in (folder, folder / "out", self.seen):
            made.mkdir()
        (folder / "Snakefile").write_text(LAGGING)
        options = f"--latency-wait {latency_wait} --retries 0 --slurm-init-seconds-before-status-checks 2"
        snakemake = f"{sys.executable} -m snakemake --profile {ROOT}/profiles/slurm {options} out/made.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*OWN_MOUNTS, f"mount --bind seen out && exec {snakemake}"],
                cwd=folder, env=cluster.environment(), stdout=log, stderr=log,
            )  # fmt: skip

    def ends(self) -> int:
        """Return the exit status, after the end."""
        return self.process.wait(60)


@needs_mounts
def test_a_file_that_comes_late_is_waited_for_or_named_with_the_option_that_waits_longer(cluster, tmp_path):
    late, lost = Lagging(cluster, tmp_path / "late", 20), Lagging(cluster, tmp_path / "lost", 2)
    wait_until(lambda: "Waiting at most 20 seconds for missing files" in late.log.read_text())
    assert (late.folder / "out/made.txt").exists()
    (late.seen / "made.txt").touch()
    assert late.ends() == 0, late.log.read_text()
    assert (late.folder / "starts.txt").read_text() == "once\n"

    assert lost.ends() == 1
    said = lost.log.read_text()
    assert "completed successfully, but some output files are missing. Missing files after 2 seconds" in said
    assert "consider to increase the wait time with --latency-wait:\nout/made.txt (missing locally" in said


FULL = {
    "bytes": ("size=4k", "the file system is full (0.0 MB are free)"),
    "files": ("nr_inodes=1", "it may hold no more files (0 inodes are free)"),
    "read-only": ("ro", "Read-only file system"),
}


@needs_mounts
@pytest.mark.parametrize(("options", "reason"), FULL.values(), ids=FULL)
def test_a_home_directory_that_is_full_is_named_before_snakemake_ends_in_a_traceback(tmp_path, options, reason):
    script = f"mount -t tmpfs -o {options} none {tmp_path} && cd {ROOT} && {sys.executable} -m snakemake -n prefetch"
    home = {name: value for name, value in os.environ.items() if name not in ("XDG_CACHE_HOME", "HF_HOME")}
    run = subprocess.run(
        [*OWN_MOUNTS, script],
        env={**home, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    assert run.stderr.splitlines()[-1] == (
        f"{tmp_path}/.cache (the cache of Snakemake and others) cannot be written to: {reason}; make room there, or set"
        " the environment variable XDG_CACHE_HOME to a folder with room that all nodes share."
    )
