"""What was prefetched: jobs that read the cache alone, a token that is nowhere, and what is missing, said in time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load

from conftest import ROOT, copy_project, snakemake
from espalier import hub, hub_cache
from espalier.errors import UserError
from hub_server import Hub, serve
from hub_study import DEAD, TOKEN, leaks, lines, model_files, of_cache, study, use_cache, words

WEIGHTS = "model.safetensors"
TASK = """
task: capitals
dataset_path: someone/questions
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> dict[str, bytes]:
    return model_files(tmp_path_factory.mktemp("hub") / "model")


# What jobs read ------------------------------------------------------------------------------------------------------

DRIVER = """
import runpy, sys
import lm_eval.tasks
from espalier import harness_names
class Few(lm_eval.tasks.TaskManager):
    def __init__(self):
        super().__init__(include_path=tasks, include_defaults=False)
_, tasks, *sys.argv = sys.argv
lm_eval.tasks.TaskManager = Few
harness_names._folder = lambda: tasks
runpy.run_path(sys.argv[0], run_name="__main__")
"""
JOB = """
import json, sys
from pathlib import Path
from espalier import checkpoints, harness_tasks
from espalier.data import Dataset, Text
from espalier.document_stream import Documents
of = lambda commit: Dataset("words", "hub", id="someone/words", revision=commit)
folder, at, *commits = sys.argv[1:]
reference = {"path": None, "id": "someone/tiny", "revision": at, "task": "causal-lm", "dtype": "auto"}
Path(folder).mkdir()
sums = checkpoints.refer(Path(folder), {**reference, "trust_remote_code": False})["sha256"]
model = checkpoints.load(Path(folder), "cpu").model
print(json.dumps({
    "model": [sums, model.lm_head.weight[0].tolist()],
    "rows": [of(commit).rows("train", "one") for commit in commits],
    "slice": [row for row in of(commits[0]).each("train[1:]+test", "one")],
    "stream": list(Documents(Text(of(commits[0]), "test", "one"))),
    "task": harness_tasks.scored_texts(["capitals"], None, None),
}))
"""
ONLINE = """
import json, os
from espalier import harness_tasks, hub_cache
pinned = harness_tasks.scored_texts(["capitals"], None, None)
del os.environ[hub_cache.MANIFEST]
print(json.dumps([pinned, harness_tasks.scored_texts(["capitals"], None, None)]))
"""


@pytest.fixture(scope="module")
def prefetched(tmp_path_factory, model):
    """What the script left that ran twice; in between the cache was damaged, and the hub moved on."""
    folder = tmp_path_factory.mktemp("prefetched")
    with serve() as server:
        commits = [server.add("datasets", "someone/words", words(start)) for start in (0, 100)]
        asked = {"question": "Capital of France?", "choices": ["Paris", "Rome"]}
        questions = server.add("datasets", "someone/questions", {"test.jsonl": lines(asked)}, token=TOKEN)
        items = [
            hub.Item("dataset", "someone/words", "one", commit, ("train",), ("suites.held",)) for commit in commits
        ]
        tiny_at = server.add("models", "someone/tiny", model, token=TOKEN)
        items.append(hub.Item("model", "someone/tiny", None, tiny_at, (), ("models.m",)))
        items.append(hub.Item("task", "capitals", needed_by=("suites.zero-shot",)))
        (folder / "tasks").mkdir()
        (folder / "tasks/capitals.yaml").write_text(TASK)
        first = run_prefetch(folder, server, items)
        before = list(server.asked)
        (table,) = (folder / "cache/datasets").glob(f"someone___words/one/*/{commits[1]}/*test.arrow")
        table.write_bytes(table.read_bytes()[:100])
        server.add("datasets", "someone/questions", {"test.jsonl": lines(asked | {"question": "Another?"})})
        server.asked.clear()
        second = run_prefetch(folder, server, items)
        yield {
            "folder": folder,
            "commits": commits,
            "tiny": tiny_at,
            "questions": questions,
            "endpoint": server.endpoint,
            "manifests": (first[0], second[0]),
            "output": first[1] + second[1],
            "downloads": (server.downloads(), before),
        }


def run_prefetch(folder: Path, server: Hub, items: list[hub.Item]) -> tuple[dict, str]:
    command = [sys.executable, "-c", DRIVER, str(folder / "tasks"), str(ROOT / "workflow/scripts/prefetch_hub.py")]
    command += ["--study", "s", "--needed", json.dumps({"items": [vars(item) for item in items]})]
    command += ["--manifest", str(folder / "results/s/prefetch.json")]
    environment = of_cache(folder / "cache", server.endpoint) | {"HF_TOKEN": TOKEN}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads((folder / "results/s/prefetch.json").read_text()), run.stdout + run.stderr


def test_jobs_read_what_was_pinned_with_the_hub_switched_off(prefetched, model):
    folder, commits = prefetched["folder"], prefetched["commits"]
    for newest in (folder / "cache/datasets").glob(f"someone___words/one/*/{commits[1]}"):
        os.utime(newest, (2**32, 2**32))  # the datasets library alone would now read this commit for both
    environment = of_cache(folder / "cache", DEAD) | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment[hub_cache.MANIFEST] = str(folder / "results/s/prefetch.json")
    command = [sys.executable, "-c", DRIVER, str(folder / "tasks"), str(folder / "job.py")]
    command += [str(folder / "model"), prefetched["tiny"], *commits]
    (folder / "job.py").write_text(JOB)
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {
        "model": [
            {WEIGHTS: hashlib.sha256(model[WEIGHTS]).hexdigest()},
            load(model[WEIGHTS])["lm_head.weight"][0].tolist(),
        ],
        "rows": [[{"text": f"row {number}"} for number in range(start, start + 3)] for start in (0, 100)],
        "slice": [{"text": f"row {number}"} for number in range(1, 5)],
        "stream": ["row 3", "row 4"],
        "task": ["Capital of France? Paris", "Capital of France? Rome"],
    }


def test_a_task_has_the_pinned_commit_also_with_the_hub_on(prefetched, tmp_path):
    folder = prefetched["folder"]
    environment = of_cache(tmp_path / "cache", prefetched["endpoint"]) | {"HF_TOKEN": TOKEN}
    environment[hub_cache.MANIFEST] = str(folder / "results/s/prefetch.json")
    (tmp_path / "job.py").write_text(ONLINE)
    command = [sys.executable, "-c", DRIVER, str(folder / "tasks"), str(tmp_path / "job.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    questions = ("Capital of France?", "Another?")  # with the manifest, and without
    assert json.loads(run.stdout) == [[f"{asked} Paris", f"{asked} Rome"] for asked in questions]


def test_the_manifest_says_what_lies_where_and_its_checksums(prefetched):
    manifest, cache = prefetched["manifests"][1], prefetched["folder"] / "cache"
    found = {(one["kind"], one["id"], one["config"], one["revision"]) for one in manifest["items"]}
    expected = {("dataset", "someone/words", "one", commit) for commit in prefetched["commits"]}
    expected.add(("model", "someone/tiny", None, prefetched["tiny"]))
    assert found == expected | {("dataset", "someone/questions", None, prefetched["questions"])}
    assert [(one["tasks"], one["needed_by"]) for one in manifest["items"] if one["by_task"]] == [
        (["capitals"], ["suites.zero-shot"])
    ]
    files = [file for one in manifest["items"] for file in (*one["files"], *one.get("downloads", []))]
    assert {file["root"] for file in files} == {"hub", "datasets"}
    for file in files:
        content = (cache / file["root"] / file["path"]).read_bytes()
        assert (file["size"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    (tables,) = {
        tuple(Path(one["path"]).name for one in item["downloads"]) for item in manifest["items"] if item["config"]
    }
    assert tables == ("test.jsonl", "train.jsonl")


def test_a_second_prefetch_mends_the_cache_and_keeps_commits(prefetched):
    """A task's data set has moved on the hub; the study still reads the commit that its first prefetch found."""
    first, second = prefetched["manifests"]
    (downloads, before) = prefetched["downloads"]
    assert [one["revision"] for one in first["items"]] == [one["revision"] for one in second["items"]]
    assert prefetched["questions"] in {one["revision"] for one in second["items"]}
    assert any("/resolve/" in path for _, path, _ in before)
    assert downloads == [], "a damaged table is prepared again from files that are there"


def test_the_token_is_in_no_file_and_no_output(prefetched):
    assert TOKEN not in prefetched["output"]
    assert leaks(prefetched["folder"]) == []


# What is missing -----------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(prefetched, tmp_path, monkeypatch):
    """The commits of a study whose needs lie in a copy of the cache, and the copy."""
    shutil.copytree(prefetched["folder"] / "cache", tmp_path / "cache", symlinks=True)
    shutil.copytree(prefetched["folder"] / "results", tmp_path / "results")
    use_cache(monkeypatch, tmp_path / "cache")
    return {"tiny": prefetched["tiny"], "words": prefetched["commits"][0]}, tmp_path / "cache"


def test_a_whole_cache_passes(whole, tmp_path):
    hub.check(study(tmp_path, whole[0], suites={**SUITE, "zero-shot": {"evaluate": "harness", "tasks": ["capitals"]}}))


SUITE = {"held": {"evaluate": "perplexity", "text": {"dataset": "words", "config": "one", "split": "test"}}}
LENGTHS = {"profile": "memory", "input_tokens": [8], "output_tokens": [2], "batch_sizes": [1]}
CHANGES = {
    "a new model": (
        {"models": {"m": {"hub": "someone/other", "revision": "e" * 40}}},
        r"model someone/other at e{12} \(models.m\): never prefetched",
    ),
    "another revision": (
        {"datasets": {"words": {"hub": "someone/words", "revision": "e" * 40}}},
        r"data set someone/words, config one at e{12} \(datasets.words, suites.held\): prefetched at another revision",
    ),
    "a split that is not there": (
        {
            "suites": {
                "held": {"evaluate": "perplexity", "text": {"dataset": "words", "config": "one", "split": "tset"}}
            }
        },
        "it has no split 'tset'. Did you mean 'test'?",
    ),
    "a new task": (
        {"suites": {**SUITE, "more": {"evaluate": "harness", "tasks": ["capitals", "piqa"]}}},
        r"harness task piqa \(suites.more\): never prefetched",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_study_that_was_edited_after_prefetch_is_noticed(whole, tmp_path, change):
    sections, message = CHANGES[change]
    with pytest.raises(UserError, match=message) as caught:
        hub.check(study(tmp_path, whole[0], **sections))
    assert str(caught.value).endswith("type: snakemake prefetch --configfile s.yaml")
    assert "capitals" not in str(caught.value), "only what is missing is named"


def test_all_that_was_cleaned_up_or_cut_off_is_named_at_once(whole, tmp_path, model):
    commits, cache = whole
    weights = cache / "hub" / hub_cache.snapshot("model", "someone/tiny", commits["tiny"]) / WEIGHTS
    with weights.open("r+b") as stream:
        stream.truncate(100)
    (table,) = (cache / "datasets").glob(f"someone___words/one/*/{commits['words']}/*test.arrow")
    table.unlink()
    sizes = f"{weights} has 100 bytes, not {len(model[WEIGHTS])}"
    with pytest.raises(UserError, match=f"{table} is gone.*{sizes}"):
        hub.check(study(tmp_path, commits))


def test_the_commits_of_tasks_are_those_of_a_recipes_own(whole, prefetched, tmp_path):
    """They are a parameter of the jobs that read them: of others it never changes."""
    file = tmp_path / "results/s/prefetch.json"
    manifest = json.loads(file.read_text())
    (task,) = (one for one in manifest["items"] if one["by_task"])
    tables = {**task, "id": "someone/tables", "revision": "d" * 40, "tasks": ["more", "x"]}
    local = {**task, "id": "json", "revision": None, "tasks": ["more"]}
    manifest["items"] += [tables, {**tables, "arguments": {"revision": "parquet"}}, local]
    file.write_text(json.dumps(manifest))
    suites = {
        **SUITE,
        "zero-shot": {"evaluate": "harness", "tasks": ["capitals", "boolq"]},
        "more": {"evaluate": "harness", "tasks": ["more"]},
        "other": {"evaluate": "harness", "tasks": ["boolq"]},
    }
    workloads = {"ask": {"profile": "scoring", "tasks": ["capitals"]}, "long": LENGTHS}
    of = study(tmp_path, whole[0], suites=suites, workloads=workloads)
    found = {name: json.loads(hub.commits(of, "suites", name)) for name in suites}
    found |= {name: json.loads(hub.commits(of, "workloads", name)) for name in workloads}
    capitals = {"someone/questions": prefetched["questions"]}
    more = {"someone/tables": "d" * 40, "someone/tables@parquet": "d" * 40}
    assert found == {"held": {}, "zero-shot": capitals, "more": more, "other": {}, "ask": capitals, "long": {}}
    file.unlink()
    assert hub.commits(study(tmp_path, whole[0], suites=suites), "suites", "zero-shot") == "{}"


def test_without_a_manifest_everything_is_named(whole, tmp_path):
    hub.manifest_file(study(tmp_path, whole[0])).unlink()
    with pytest.raises(UserError, match=r"someone/words.*never prefetched; model someone/tiny.*never prefetched"):
        hub.check(study(tmp_path, whole[0]))


# With snakemake ------------------------------------------------------------------------------------------------------


def test_a_study_without_prefetch_stops_at_once_and_with_it_runs_offline(model, tmp_path, monkeypatch):
    project = copy_project(tmp_path / "project")
    text = {"dataset": "words", "config": "one"}
    calibrations = {"few": {"text": {**text, "split": "train"}, "samples": 1, "length": 8}}
    with serve() as server:
        revision = server.add("models", "someone/tiny", model, token=TOKEN)
        commits = {"tiny": revision, "words": server.add("datasets", "someone/words", words(0))}
        mapping = study(tmp_path, commits, calibrations=calibrations).mapping
        (project / "s.yaml").write_text(yaml.safe_dump(mapping))
        for name, value in {**of_cache(tmp_path / "cache", server.endpoint), "HF_TOKEN": TOKEN}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        refused = snakemake(project, "--configfile", "s.yaml", "-n")
        assert refused.returncode == 1
        message = refused.stdout + refused.stderr
        assert f"model someone/tiny at {revision[:12]} (models.m): never prefetched" in message
        assert "data set someone/words, config one" in message, "all at once"
        assert "type: snakemake prefetch --configfile s.yaml" in message
        refused = snakemake(project, "--configfile", "s.yaml", "--cores", "1")
        assert refused.returncode == 1
        assert message.splitlines()[-1] in refused.stdout + refused.stderr
        assert not list((project / "results").rglob("*.log")), "no job has started"
        published = snakemake(project, "reference_figures", "--configfile", "s.yaml", "-n")
        assert published.returncode == 0, "it needs nothing of the hub: " + published.stderr
        prefetch = snakemake(project, "prefetch", "--configfile", "s.yaml", "--cores", "1")
        assert prefetch.returncode == 0, prefetch.stderr
    monkeypatch.setenv("HF_ENDPOINT", DEAD)
    target = ("results/s/tables/calibration.json", "--configfile", "s.yaml")
    compared = snakemake(project, *target, "--cores", "1")
    assert compared.returncode == 0, compared.stderr
    table = json.loads((project / "results/s/tables/calibration.json").read_text())
    assert (table["calibrations"]["few"]["documents"], table["suites"]["held"]["too_short"]) == (3, 2)
    report = snakemake(project, "--report", "report.html", *target)
    assert report.returncode == 0, report.stderr
    assert "calibration.json" in (project / "report.html").read_text()
    assert all(TOKEN not in run.stdout + run.stderr for run in (refused, prefetch, compared, report))
    assert leaks(project) + leaks(tmp_path / "cache") == []


def test_a_new_pin_reruns_what_reads_it_and_nothing_else(tmp_path):
    project = copy_project(tmp_path / "project")
    suites = {**SUITE, "zero-shot": {"evaluate": "harness", "tasks": ["boolq"]}}
    scoring = {"ask": {"profile": "scoring", "tasks": ["boolq"]}, "long": LENGTHS}
    measure = [{"model": "m", "chains": ["dense"], "suites": list(suites), "workloads": list(scoring)}]
    commits = {"tiny": "a" * 40, "words": "b" * 40}
    of = study(tmp_path, commits, suites=suites, workloads=scoring, measure=measure)
    (project / "s.yaml").write_text(yaml.safe_dump(of.mapping))
    results = [str(Path("results", *Path(path).relative_to(of.results).parts)) for path in of.raw_results()]
    (project / "results/s/runs/m/s0/dense/model").mkdir(parents=True)
    for path in results:
        (project / path).parent.mkdir(exist_ok=True)
        (project / path).write_text("{}")
    common = ("--configfile", "s.yaml", "--cores", "1")
    made = snakemake(project, *results, *common, "--touch", "--forceall")
    assert made.returncode == 0, made.stderr
    question = {"by_task": True, "tasks": ["boolq"], "id": "questions", "arguments": {}, "revision": "c" * 40}
    (project / "results/s/prefetch.json").write_text(json.dumps({"items": [question]}))
    again = snakemake(project, *results, *common, "-n")
    assert again.returncode == 0, again.stderr
    said = (again.stdout + again.stderr).splitlines()
    outputs = {Path(line).name for line in said if line.startswith("    output: ")}
    assert outputs == {"zero-shot.json", "ask.json"}
