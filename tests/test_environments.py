"""Environments of engines: built from their lock, once, and again only where the lock says otherwise.

The packages are wheels of one line, in a folder: pip is real, and asks no index.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, copy_project, environment, snakemake
from espalier import devices, environments, plugins, preflight
from espalier.errors import UserError
from espalier.study import Study
from test_reruns import jobs
from test_scale import STAND_IN

SCRIPT = ROOT / "workflow/scripts/build_environment.py"


def wheel(folder: Path, version: str) -> None:
    """Write a wheel of the package tiny-one, whose module says its version."""
    about = f"tiny_one-{version}.dist-info"
    files = {
        "tiny_one.py": f"version = {version!r}\n",
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: tiny-one\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{about}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{about}/RECORD"])
    with zipfile.ZipFile(folder / f"tiny_one-{version}-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


@pytest.fixture
def wheels(tmp_path, monkeypatch) -> Path:
    """A folder of wheels, which is all that pip knows; version 1.0 is there."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel(folder, "1.0")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(folder)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


@pytest.fixture
def lock(tmp_path) -> Path:
    file = tmp_path / "tiny-one.lock"
    file.write_text("# for tests\ntiny-one==1.0  # exact\n")
    return file


# Building -------------------------------------------------------------------------------------------------------------


def test_an_environment_is_built_once_and_anew_for_another_lock(wheels, lock, tmp_path, monkeypatch):
    place = environments.venv_folder(lock, tmp_path / "env")
    left = place / "lib/left.py"
    left.parent.mkdir(parents=True)
    left.write_text("# by a job that was killed\n")
    found = environments.build(lock, tmp_path / "env")
    python = place / "bin/python"
    assert found == {"outcome": "ok", "python": str(python), "packages": {"tiny-one": "1.0"}}
    assert not left.exists()
    says = [str(python), "-I", "-c", "import sys, tiny_one; print(tiny_one.version, sys.prefix)"]
    assert subprocess.check_output(says, text=True).split() == ["1.0", str(place)]

    def no_pip(*_):
        raise AssertionError("nothing is to be installed")

    with monkeypatch.context() as patch:
        patch.setattr(environments, "_pip", no_pip)
        lock.write_text("\n# another comment\n  tiny-one==1.0\n")
        assert environments.build(lock, tmp_path / "env") == found
    wheel(wheels, "2.0")
    lock.write_text("tiny-one==2.0\n")
    other = environments.build(lock, tmp_path / "env")
    assert (other["outcome"], other["packages"]) == ("ok", {"tiny-one": "2.0"})
    assert subprocess.check_output([other["python"], *says[1:]], text=True).startswith("2.0")
    assert subprocess.check_output(says, text=True).startswith("1.0"), "a job may still run in the old one"


def test_a_build_that_was_killed_is_done_again_by_one_of_two_at_once(wheels, lock, tmp_path):
    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, SCRIPT, "--lock", lock, "--folder", tmp_path / "env", "--output", tmp_path / name]
        settings = {"env": environment(ROOT), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, **settings)

    killed = start("killed.json")
    deadline = time.monotonic() + 30
    place = environments.venv_folder(lock, tmp_path / "env")
    while not (place / "bin/python").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    assert place.is_dir()
    assert not (place / environments.MARKER).exists()
    two = [start("one.json"), start("two.json")]
    said = [process.communicate(timeout=60)[0] for process in two]
    assert [process.returncode for process in two] == [0, 0], said
    assert "".join(said).count("Successfully installed tiny-one-1.0") == 1
    found = [json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json")]
    assert found[0] == found[1]
    assert (found[0]["outcome"], found[0]["packages"], found[0]["trial"]) == ("ok", {"tiny-one": "1.0"}, 1)


def test_what_cannot_be_installed_is_said_in_one_line_and_leaves_nothing(wheels, lock, tmp_path):
    lock.write_text("tiny-one==3.0\n")
    found = environments.build(lock, tmp_path / "env")
    assert re.fullmatch(
        r"unavailable: the environment tiny-one could not be installed: Could not find a version that satisfies the"
        r" requirement tiny-one==3\.0",
        found["outcome"],
    )
    assert (found["python"], found["packages"]) == (None, {})
    assert [file.name for file in (tmp_path / "env").iterdir()] == ["lock"]


def test_a_disk_that_is_full_is_a_reason(lock, tmp_path, monkeypatch):
    def full(_, place):
        Path(place).mkdir()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(venv.EnvBuilder, "create", full)
    outcome = environments.build(lock, tmp_path / "env")["outcome"]
    assert outcome == "unavailable: the environment tiny-one could not be installed: No space left on device"
    assert [file.name for file in (tmp_path / "env").iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("text", "alone"),
    [("torch==2.13.0\nnumpy==2.2.6\n", [["torch==2.13.0"]]), ("torch==2.13.0 --hash=sha256:00\n", [])],
    ids=["without checksums", "with checksums"],
)
def test_torch_is_installed_first_and_alone_unless_checksums_bind_its_requirements(
    lock, tmp_path, monkeypatch, text, alone
):
    lock.write_text(text)
    calls = []
    monkeypatch.setattr(environments, "_pip", lambda python, arguments, held: calls.append(arguments))
    environments.build(lock, tmp_path / "env")
    assert calls == [*alone, ["--no-deps", "--requirement", str(lock)]]


RETRYING = (
    "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by 'NewConnectionError('<pip._vendor."
    "HTTPSConnection object at 0x7f>: Failed to establish a new connection: [Errno -3] Temporary failure in name"
    " resolution')': /simple/torch/\n"
)
NONE = (
    "ERROR: Could not find a version that satisfies the requirement torch==2.13.0 (from versions: none)\n"
    "ERROR: No matching distribution found for torch==2.13.0\n"
)
PIP_SAID = {
    "no network": (
        RETRYING + NONE,
        "the index of packages cannot be reached (Failed to establish a new connection: [Errno -3] Temporary failure"
        " in name resolution)",
    ),
    "an index that hangs": (
        "WARNING: Retrying (Retry(total=0)) after connection broken by 'ReadTimeoutError(\"HTTPSConnectionPool(host="
        "'pypi.org', port=443): Read timed out. (read timeout=15)\")': /simple/torch/\n" + NONE,
        "the index of packages cannot be reached (HTTPSConnectionPool(host='pypi.org', port=443): Read timed out."
        " (read timeout=15))",
    ),
    "no such version, after a retry": (
        RETRYING + NONE.replace("none", "1.0, 2.0"),
        "Could not find a version that satisfies the requirement torch==2.13.0",
    ),
    "no such build of torch, and lists of others": (
        "ERROR: Ignored the following yanked versions: 1.0, 1.1\n"
        + NONE.replace("none", "1.0, 2.0").replace("2.13.0", "2.13.0+cpu"),
        "Could not find a version that satisfies the requirement torch==2.13.0+cpu; an index that has it:"
        " PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu",
    ),
    "no version at all": ("ERROR: No matching distribution found for a\n", "No matching distribution found for a"),
    "disk full": (
        "Collecting torch\nERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n\n",
        "Could not install packages due to an OSError: [Errno 28] No space left on device",
    ),
    "Python too old": (
        "ERROR: Package 'tiny' requires a different Python: 3.11.7 not in '>=3.14'\n",
        "Package 'tiny' requires a different Python: 3.11.7 not in '>=3.14'",
    ),
    "no pip": ("/usr/bin/python: No module named pip\n", "/usr/bin/python: No module named pip"),
    "silence": ("", "pip says nothing"),
}


@pytest.mark.parametrize("case", PIP_SAID)
def test_reasons_of_pip(case):
    said, expected = PIP_SAID[case]
    assert environments.reason(said.splitlines(keepends=True)) == expected


def test_a_lock_is_known_by_what_it_asks_for(lock):
    known = environments.digest(lock)
    for same in ("tiny-one==1.0", "#\n\n tiny-one==1.0 \n# more\n"):
        lock.write_text(same)
        assert environments.digest(lock) == known
    for other in ("tiny-one==1.1", "tiny-one==1.0\nmore==1", "tiny-one==1.0 --hash=sha256:00", "a#b==1"):
        lock.write_text(other)
        assert environments.digest(lock) != known
        known = environments.digest(lock)


@pytest.mark.parametrize("file", sorted(environments.LOCKS.glob("*.lock")), ids=lambda file: file.stem)
def test_every_lock_is_exact(file):
    text = file.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.partition("#")[0].split() for line in text.splitlines()]
    asked = [line[0] for line in lines if line and not line[0].startswith("--")]
    assert asked
    assert [one for one in asked if not re.fullmatch(r"[\w.\[\]-]+==[\w.+!]+", one)] == []
    assert len({one.partition("==")[0].lower() for one in asked}) == len(asked)


# Studies --------------------------------------------------------------------------------------------------------------

TINY = {"model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 2, "max_position_embeddings": 64}
STUDY = {
    "study": "engines",
    "device": "cpu",
    "models": {"tiny": {"pretrain": "random-weights", "config": TINY}},
    "workloads": {
        name: {"profile": "generation", "engine": name, "input_tokens": [4], "output_tokens": [4], "batch_sizes": [1]}
        for name in ("hf", "tiny-one")
    },
    "figures": {
        "engine_speedup": {
            "title": "Engines",
            "panels": [
                {"title": "Tiny", "model": "tiny", "chain": "dense", "series": {"HF": "hf", "vLLM": "tiny-one"}}
            ],
        }
    },
}
ENGINE = """
ENVIRONMENTS = {"cpu": "tiny-one"}
PACKAGES = ("tiny-one",)
SAMPLINGS = ("greedy", "top-k-top-p")


class Engine:
    name = "tiny-one"
"""


def hf_study(device: str, submits: bool = False) -> Study:
    workloads = {"own": {**STUDY["workloads"]["hf"]}, "scoring": {"profile": "scoring", "tasks": ["piqa"]}}
    mapping = {**STUDY, "device": device, "workloads": workloads, "figures": {}}
    mapping["measure"] = [{"model": "tiny", "chains": ["dense"], "workloads": ["own"]}]
    return Study(mapping, "my.yaml", submits=lambda: submits)


@pytest.fixture
def two_environments(monkeypatch, tmp_path):
    """Engines that have an environment on each device, with locks that are there."""
    monkeypatch.setattr(environments, "LOCKS", tmp_path)
    monkeypatch.setattr(environments, "of_engine", lambda engine: {"cpu": "for-cpu", "cuda": "for-cuda"})
    for name in ("for-cpu", "for-cuda"):
        (tmp_path / f"{name}.lock").write_text("")


@pytest.mark.parametrize(
    ("device", "gpus", "submits", "expected"),
    [
        ("cpu", 1, True, "for-cpu"),
        ("cuda", 0, False, "for-cuda"),
        ("cuda", 0, True, "for-cuda"),
        ("auto", 0, False, "for-cpu"),
        ("auto", 1, False, "for-cuda"),
    ],
)
def test_the_environment_of_a_workload_follows_its_engine_and_the_device(
    monkeypatch, two_environments, device, gpus, submits, expected
):
    monkeypatch.setattr(devices, "present", lambda: dict.fromkeys(range(gpus), ""))
    study = hf_study(device, submits)
    assert study.environment("own") == expected
    assert study.environment("scoring") is None, "it names no engine"
    assert study.environment_files() == [f"results/engines/environments/{expected}.json"]
    assert study.environments == {"for-cpu", "for-cuda"}


def test_where_jobs_are_submitted_a_study_says_the_device_if_it_matters(monkeypatch, two_environments):
    """A chart that is drawn later, where nothing is submitted, must not have it all measured on another device."""
    monkeypatch.setattr(devices, "present", lambda: {0: ""})
    sentence = r"^my\.yaml: device: say cuda or cpu: the engine 'hf' has another environment on each\.$"
    with pytest.raises(UserError, match=sentence):
        hf_study("auto", submits=True)
    for same in ({"cpu": "for-cpu", "cuda": "for-cpu"}, {}):
        monkeypatch.setattr(environments, "of_engine", lambda engine, same=same: same)
        assert hf_study("auto", submits=True).environment("own") == same.get("cuda")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["-n"], False), (["--cores", "2"], False), (["-n", "--executor", "slurm"], True), (["--profile", "slurm"], True)],
)
def test_whether_jobs_are_submitted_is_read_from_the_command_line(monkeypatch, arguments, expected):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["snakemake", *arguments])
    assert preflight.submits() is expected


def test_an_engine_without_an_environment_for_the_device_runs_in_the_main_one(monkeypatch, tmp_path):
    monkeypatch.setattr(environments, "LOCKS", tmp_path)
    monkeypatch.setattr(environments, "of_engine", lambda engine: {"cuda": "for-cuda"})
    (tmp_path / "for-cuda.lock").write_text("")
    assert hf_study("cpu").environment("own") is None
    assert hf_study("cpu").environment_files("own") == []


def test_a_lock_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(environments, "LOCKS", Path("nowhere"))
    monkeypatch.setattr(environments, "of_engine", lambda engine: {"cpu": "tiny-one"})
    with pytest.raises(UserError, match=r"workloads\.own\.engine: the engine 'hf' needs the environment tiny-one, and"):
        hf_study("cpu")


def test_every_engine_names_locks_that_are_there():
    for engine in plugins.names("engines"):
        for device, name in environments.of_engine(engine).items():
            assert device in ("cpu", "cuda")
            assert environments.lock_file(name).is_file(), f"the engine {engine} names envs/{name}.lock"


def test_the_next_trial_follows_one_that_failed_or_whose_python_is_gone(tmp_path):
    def file(name: str, content: dict) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(content))
        return path

    assert environments.trial(tmp_path / "none.json") == 1
    assert environments.trial(file("failed.json", {"outcome": "unavailable: why", "python": None, "trial": 2})) == 3
    there, gone = ({"outcome": "ok", "python": str(python), "trial": 3} for python in (sys.executable, tmp_path / "no"))
    assert environments.trial(file("there.json", there)) == 3
    assert environments.trial(file("gone.json", gone)) == 4


# bash reads it before each command: only environments are built, all other outputs are empty.
STAND_IN_BASH = (
    STAND_IN.replace("python() {", "stand_in() {")
    + 'python() { case $1 in *build_environment.py) command python "$@" ;; *) stand_in "$@" ;; esac; }\n'
)


def test_what_runs_again(wheels, tmp_path, monkeypatch):
    """A failed build and what followed from it; a lock that asks for something else, and what uses it; nothing more."""
    project = copy_project(tmp_path / "project")
    study, runs = ("--configfile", "engines.yaml", "--"), "results/engines/runs/tiny/s0/dense"
    (project / "engines.yaml").write_text(yaml.safe_dump(STUDY))
    (project / "workflow/espalier/engines/tiny_one.py").write_text(ENGINE)
    (project / "envs/tiny-one.lock").write_text("tiny-one==2.0\n")
    (tmp_path / "stand-in.bash").write_text(STAND_IN_BASH)
    monkeypatch.setenv("BASH_ENV", str(tmp_path / "stand-in.bash"))
    build = "results/engines/environments/tiny-one.json"
    targets = [f"{runs}/profile/hf.json", f"{runs}/profile/tiny-one.json"]

    def run() -> dict:
        done = snakemake(project, "--cores", "2", *study, *targets)
        assert done.returncode == 0, done.stdout + done.stderr
        rules = re.findall(r"^(?:local)?rule (\w+):", done.stdout + done.stderr, flags=re.M)
        return {"rules": sorted(rules), **json.loads((project / build).read_text())}

    first = run()
    assert first["rules"] == ["build_environment", "pretrain_model", "profile_model", "profile_model"]
    assert re.match("unavailable: .* tiny-one==2.0", first["outcome"])
    wheel(wheels, "2.0")
    second = run()
    assert second["rules"] == ["build_environment", "profile_model"]
    lock = project / "envs/tiny-one.lock"
    python = environments.venv_folder(lock, Path("results/environments/tiny-one")) / "bin/python"
    assert (second["outcome"], second["python"]) == ("ok", str(python))

    lock.write_text("# A comment.\ntiny-one==2.0\n")
    os.utime(lock)
    assert jobs(project, *study, *targets) == set()
    shutil.rmtree(project / "results/environments")
    assert jobs(project, *study, *targets) == {build, targets[1]}
    lock.write_text("tiny-one==1.0\n")
    said = snakemake(project, "-n", "--profile", "slurm", *study, *targets, "prefetch").stdout
    outputs = {line.split()[1].rstrip(",") for line in said.splitlines() if re.match(r" {4}output: ", line)}
    assert outputs == {build, targets[1]}
    assert re.search(rf"^rule prefetch:\n    input: {build}$", said, flags=re.M)
