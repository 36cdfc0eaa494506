"""Prefetch: how what a study needs comes from a hub that fails."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, file_download

from conftest import ROOT
from espalier import harness_names, harness_tasks, hub, hub_cache, hub_download
from espalier.errors import UserError
from hub_server import LONG, Fault, Hub, Repository, serve
from hub_study import DEAD, TOKEN, fetch, model_files, of_cache, study, use_cache, use_hub, words


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> dict[str, bytes]:
    return model_files(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture
def client(monkeypatch, tmp_path):
    """A hub, which this process's own huggingface_hub asks."""
    with serve() as server:
        use_hub(monkeypatch, server, tmp_path / "cache")
        yield server


# Downloads -----------------------------------------------------------------------------------------------------------

WEIGHTS = "model.safetensors"
PASSING = [
    Fault("/cdn/", "stall", 1),
    Fault("/cdn/", "truncate", 1),
    Fault("/cdn/", "503", 2),
    Fault("/cdn/", "429", 1),
    Fault("/cdn/", "corrupt", 1),
    Fault("/resolve/", "corrupt", 1),
    Fault("/resolve/", "500", 1, "HEAD"),
    Fault("/tree/", "502", 2),
    Fault("/tree/", "stall", 1),
]


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: f"{fault.kind} {fault.path}")
def test_a_fault_that_passes_is_outlived(client, model, tmp_path, monkeypatch, fault):
    if fault.kind == "stall":
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    revision = client.add("models", "someone/tiny", model)
    client.faults.append(Fault(**vars(fault)))
    started = time.monotonic()
    manifest = fetch(tmp_path / "prefetch.json", "someone/tiny", revision)
    assert time.monotonic() - started < 0.9 * LONG, "an answer that does not come is not waited for"
    assert client.faults[0].times == 0
    files = {Path(one["path"]).name: one for one in manifest["items"][0]["files"]}
    assert set(files) == set(model)
    for name, content in model.items():
        stored = Path(constants.HF_HUB_CACHE) / files[name]["path"]
        assert stored.read_bytes() == content
        assert (files[name]["size"], files[name]["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    if fault.kind in ("stall", "truncate") and fault.path == "/cdn/":
        kept = len(model[WEIGHTS]) // 2 // 1000 * 1000
        assert client.ranges == [f"bytes={kept}-"], "the rest alone was asked for again"


LASTING = {
    "503": (Fault("/cdn/", "503"), "answers with status 503, again and again. Type the same command later"),
    "429": (Fault("/cdn/", "429"), "answers with status 429, again and again. Type the same command later"),
    "500 to HEAD": (Fault("/resolve/", "500", method="HEAD"), "answers with status 500, again and again"),
    "checksum": (
        Fault("/cdn/", "corrupt"),
        "file model.safetensors, cannot be downloaded: its checksum is not the one",
    ),
}


@pytest.mark.parametrize("case", LASTING)
def test_a_fault_that_lasts_is_one_sentence_and_leaves_nothing_half(client, model, tmp_path, case):
    fault, message = LASTING[case]
    revision = client.add("models", "someone/tiny", model)
    client.faults.append(Fault(**vars(fault)))
    with pytest.raises(UserError, match=message):
        fetch(tmp_path / "prefetch.json", "someone/tiny", revision)
    assert not (tmp_path / "prefetch.json").exists()
    for file in Path(constants.HF_HUB_CACHE).rglob("snapshots/*/*"):
        assert file.read_bytes() == model[file.name]
    client.faults.clear()
    fetch(tmp_path / "prefetch.json", "someone/tiny", revision)


def refused(server: Hub, model: dict) -> dict[str, tuple[str, str, str]]:
    """Name, revision and the sentence about each thing that cannot be had."""
    at = server.add("models", "someone/gated", model, token=TOKEN)
    server.add("models", "someone/private", model)
    server.repositories["models", "someone/private"] = Repository({at: model}, TOKEN, "RepoNotFound")
    return {
        "gated": ("someone/gated", at, "is gated: accept its licence .* set HF_TOKEN"),
        "private": ("someone/private", at, "has nothing of this name, or it is private. .* set HF_TOKEN"),
        "no such model": ("someone/gaited", at, "has nothing of this name"),
        "no such revision": ("someone/gated", "f" * 40, "no such revision"),
        "no id": ("some one/gated", at, "cannot be downloaded: Repo id must use alphanumeric"),
    }


@pytest.mark.parametrize("case", ["gated", "private", "no such model", "no such revision", "no id"])
def test_what_cannot_be_had_is_named_with_what_to_do(client, model, tmp_path, monkeypatch, case):
    name, revision, message = refused(client, model)[case]
    if case == "no such revision":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match=message) as caught:
        fetch(tmp_path / "prefetch.json", name, revision)
    assert f"The model {name} at {revision[:12]} (models.m)" in str(caught.value)
    assert TOKEN not in str(caught.value)


CODE = {
    "elsewhere": ("other/code--modeling.Tiny", True, r"runs code of another repository, other/code, whose commit"),
    "also elsewhere": ([None, "other/code--modeling.Tiny"], True, "another repository, other/code, whose commit"),
    "beside it": ("modeling.Tiny", True, None),
    "its own": ("someone/tiny--modeling.Tiny", True, None),
    "elsewhere, never run": ("other/code--modeling.Tiny", False, None),
}


@pytest.mark.parametrize("case", CODE)
def test_a_model_with_code_of_another_repository_is_refused(client, model, tmp_path, case):
    """Its commit is in no study; code that comes with the model is pinned with it."""
    name, trusted, message = CODE[case]
    config = json.loads(model["config.json"]) | {"auto_map": {"AutoModelForCausalLM": name}}
    revision = client.add("models", "someone/tiny", model | {"config.json": json.dumps(config).encode()})
    item = hub.Item("model", "someone/tiny", None, revision, (), ("models.m",), trust_remote_code=trusted)
    if message is None:
        hub_download.prefetch("s", [item], tmp_path / "prefetch.json")
        return
    with pytest.raises(UserError, match=message):
        hub_download.prefetch("s", [item], tmp_path / "prefetch.json")
    assert [path.rpartition("/")[2] for path in client.downloads()] == ["config.json"]


def test_a_model_without_safetensors_is_refused_before_its_download(client, model, tmp_path):
    revision = client.add(
        "models", "someone/old", {"config.json": model["config.json"], "pytorch_model.bin": b"pickle"}
    )
    with pytest.raises(UserError, match=r"someone/old at \w+ \(models.m\) has no safetensors weights; other formats"):
        fetch(tmp_path / "prefetch.json", "someone/old", revision)
    assert client.downloads() == []


DATA = {
    "gated": ("someone/gated", "one", None, r"is gated: accept its licence .* set HF_TOKEN"),
    "no such data set": ("someone/wirds", "one", None, r"has nothing of this name, or it is private"),
    "no such revision": ("someone/words", "one", "f" * 40, r"no such revision"),
    "no such config": ("someone/words", "three", None, r"'three' not found. Available: \['one', 'two'\]"),
    "no config": ("someone/words", None, None, r"Config name is missing"),
    "no such split": ("someone/words", "one", None, r"has no split 'tset'. Did you mean 'test'\?"),
    "503": ("someone/words", "one", None, r"answers with status 503, again and again"),
    "broken rows": ("someone/broken", None, None, r"cannot be downloaded: .*JSON"),
    "no rows": ("someone/empty", None, None, r"cannot be downloaded: .*(data files|Data files|empty)"),
}


@pytest.mark.parametrize("case", DATA)
def test_a_data_set_that_cannot_be_had_is_named_with_what_to_do(client, tmp_path, monkeypatch, case):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", client.endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache/datasets")
    name, config, revision, message = DATA[case]
    commit = client.add("datasets", "someone/words", words(0))
    client.add("datasets", "someone/broken", {"train.jsonl": b'{"text": "cut o'})
    client.add("datasets", "someone/empty", {"README.md": b"nothing"})
    client.add("datasets", "someone/gated", words(0), token=TOKEN)
    revision = revision or next(iter(client.repositories.get(("datasets", name), Repository({commit: {}})).commits))
    if case == "503":
        client.faults.append(Fault("train.jsonl", "503"))
    splits = ("tset",) if case == "no such split" else ("train",)
    item = hub.Item("dataset", name, config, revision, splits, ("suites.held",))
    with pytest.raises(UserError, match=message) as caught:
        hub_download.prefetch("s", [item], tmp_path / "prefetch.json")
    assert name in str(caught.value)


def of_task(monkeypatch, client, cache: Path, *asked: tuple, **arguments) -> hub.Item:
    """A task of the harness that loads its data so."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", client.endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")

    def named(names, load):
        return names, SimpleNamespace(load=lambda _: [load(*one, split="train", **arguments) for one in asked])

    monkeypatch.setattr(harness_tasks, "named", named)
    monkeypatch.setattr(harness_tasks, "only_errors", nullcontext)
    monkeypatch.setattr(harness_names, "data_sets", lambda name: set())  # of the real task
    return hub.Item("task", "boolq", needed_by=("suites.zero-shot",))


def test_all_that_tasks_read_of_a_data_set_has_one_commit(client, tmp_path, monkeypatch):
    """Also what a later prefetch adds, when the data set has moved on."""
    file, cache = tmp_path / "prefetch.json", tmp_path / "cache"
    commit = client.add("datasets", "someone/words", words(0))
    item = of_task(monkeypatch, client, cache, ("someone/words", "one"))
    hub_download.prefetch("s", [item], file)
    client.add("datasets", "someone/words", words(100))
    item = of_task(monkeypatch, client, cache, ("someone/words", "one"), ("someone/words", "two"))
    found = hub_download.prefetch("s", [item], file)["items"]
    assert [(one["config"], one["revision"]) for one in found] == [("one", commit), ("two", commit)]


def test_a_task_may_read_files_that_are_not_of_the_hub(client, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_bytes(words(0)["one/train.jsonl"])
    files = {"train": str(tmp_path / "rows.jsonl")}
    item = of_task(monkeypatch, client, tmp_path / "cache", ("json",), data_files=files)
    (found,) = hub_download.prefetch("s", [item], tmp_path / "prefetch.json")["items"]
    assert (found["id"], found["revision"], client.asked) == ("json", None, [])


def test_a_data_set_without_an_owner_is_one_of_the_hub(client, tmp_path, monkeypatch):
    """The hub's client knows such old names no more; that is said of the task."""
    commit = client.add("datasets", "xnli", words(0))
    item = of_task(monkeypatch, client, tmp_path / "cache", ("xnli", "one"))
    message = rf"data set xnli, config one at {commit[:12]} \(suites.zero-shot\) cannot be .*must be 'namespace/name'"
    with pytest.raises(UserError, match=message):
        hub_download.prefetch("s", [item], tmp_path / "prefetch.json")


def test_all_splits_together_and_tables_with_work_beside_them(client, tmp_path, monkeypatch):
    """What the datasets library leaves beside tables comes and goes, and is no part of the manifest."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", client.endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache/datasets")
    commits = {"tiny": "a" * 40, "words": client.add("datasets", "someone/words", words(0))}
    text = {"dataset": "words", "config": "one", "split": "all"}
    suites = {"held": {"evaluate": "perplexity", "text": text}}
    needed = [one for one in hub.needed(study(tmp_path, commits, suites=suites)) if one.kind == "dataset"]
    file = tmp_path / "results/s/prefetch.json"
    first = hub_download.prefetch("s", needed, file)
    rows = hub_cache.open_dataset("someone/words", "one", "all", commits["words"])
    assert [row["text"] for row in rows] == [f"row {number}" for number in range(5)]
    (folder,) = (tmp_path / "cache/datasets").glob("someone___words/one/*/*/")
    before = set(folder.iterdir())
    rows.filter(lambda row: row["text"] > "row 1").map(lambda row: {"letters": len(row["text"])})
    (folder / "tmp1234").write_bytes(b"half")
    assert len(set(folder.iterdir()) - before) > 1
    client.asked.clear()
    assert hub_download.prefetch("s", needed, file) == first
    assert {Path(one["path"]).name for one in first["items"][0]["files"]} == {one.name for one in before}
    monkeypatch.setattr(hub, "needed", lambda _: needed)
    hub.check(study(tmp_path, commits, suites=suites))


def test_a_hub_that_cannot_be_reached_is_named(client, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", DEAD)
    with pytest.raises(UserError, match=f"{DEAD} cannot be reached, or stops answering .*Connection refused"):
        fetch(tmp_path / "prefetch.json", "someone/tiny", "a" * 40)


def test_the_token_goes_to_the_hub_and_to_no_other_host(client, model, tmp_path, monkeypatch):
    revision = client.add("models", "someone/gated", model, token=TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetch(tmp_path / "prefetch.json", "someone/gated", revision)
    assert {token for _, path, token in client.asked if "/cdn/" in path} == {None}
    assert {token for _, path, token in client.asked if "/someone/gated/" in path} == {f"Bearer {TOKEN}"}


def test_a_disk_that_is_too_small_is_said_before_anything_is_downloaded(client, tmp_path, monkeypatch):
    revision = client.add("models", "someone/tiny", {WEIGHTS: bytes(10**4)})
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(
        UserError, match=r"needs 0.0 GB more in the hub's cache, and .* has 0.0 GB free: make room, or set HF_HOME"
    ):
        fetch(tmp_path / "prefetch.json", "someone/tiny", revision)
    assert client.downloads() == []


def test_a_disk_that_fills_up_is_named(client, model, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    revision = client.add("models", "someone/tiny", model)
    monkeypatch.setattr(file_download, "_chmod_and_move", fail)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\). Set HF_HOME"):
        fetch(tmp_path / "prefetch.json", "someone/tiny", revision)
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


def test_a_cache_that_cannot_be_written_is_named(client, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    use_cache(monkeypatch, tmp_path / "file")
    with pytest.raises(
        UserError, match=f"{tmp_path}/file/hub .the hub's cache. cannot be written to: Not a dir.*HF_HOME to"
    ):
        fetch(tmp_path / "prefetch.json", "someone/tiny", "a" * 40)


def test_a_prefetch_goes_on_where_another_ended(client, model, tmp_path):
    """Finished files stay, a partial one of a dead process goes, and a damaged one is downloaded again."""
    revision = client.add("models", "someone/tiny", model)
    file = tmp_path / "prefetch.json"
    first = fetch(file, "someone/tiny", revision)
    stored = Path(constants.HF_HUB_CACHE) / hub_cache.snapshot("model", "someone/tiny", revision)
    (stored / "config.json").unlink()
    with (stored / WEIGHTS).open("r+b") as stream:
        stream.truncate(100)
    dead, living = (stored.parents[1] / "blobs" / f"{name}.incomplete" for name in ("dead", "living"))
    for partial in (dead, living):
        partial.write_bytes(b"half")
    os.utime(dead, (0, 0))
    client.asked.clear()
    assert fetch(file, "someone/tiny", revision) == first
    (again,) = client.downloads()
    assert again.endswith(WEIGHTS), "what the link that went pointed to is still there"
    assert (stored / WEIGHTS).read_bytes() == model[WEIGHTS]
    assert (dead.exists(), living.exists()) == (False, True)
    client.asked.clear()
    fetch(file, "someone/tiny", revision)
    assert client.downloads() == []


def test_a_link_out_of_the_cache_is_replaced_and_its_target_kept(client, model, tmp_path):
    """Such as to a group's copy of a model, which is not this user's to delete."""
    revision = client.add("models", "someone/tiny", model)
    stored = Path(constants.HF_HUB_CACHE) / hub_cache.snapshot("model", "someone/tiny", revision)
    stored.mkdir(parents=True)
    copies = {WEIGHTS: b"short", "config.json": bytes(len(model["config.json"]))}  # one of another size, one damaged
    for name, content in copies.items():
        (tmp_path / name).write_bytes(content)
        (stored / name).symlink_to(tmp_path / name)
    fetch(tmp_path / "prefetch.json", "someone/tiny", revision)
    for name, content in copies.items():
        assert (tmp_path / name).read_bytes() == content
        assert (stored / name).read_bytes() == model[name]


def test_two_prefetches_at_once_leave_one_whole_cache(client, model, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    revision = client.add("models", "someone/tiny", model)
    client.faults.append(Fault("/cdn/", "stall", 1))
    with ThreadPoolExecutor(2) as pool:
        files = [tmp_path / study / "prefetch.json" for study in ("one", "two")]
        first, second = pool.map(lambda file: fetch(file, "someone/tiny", revision), files)
    assert first == second
    for file in first["items"][0]["files"]:
        assert (Path(constants.HF_HUB_CACHE) / file["path"]).read_bytes() == model[Path(file["path"]).name]


def test_a_killed_prefetch_is_gone_on_with(client, model, tmp_path):
    revision = client.add("models", "someone/tiny", model)
    client.faults.append(Fault("/cdn/", "stall", 1))
    file = tmp_path / "prefetch.json"
    command = [sys.executable, str(ROOT / "workflow/scripts/prefetch_hub.py"), "--study", "s", "--manifest", str(file)]
    command += ["--needed", json.dumps({"items": [{"kind": "model", "id": "someone/tiny", "revision": revision}]})]
    with subprocess.Popen(command, env=of_cache(tmp_path / "cache", client.endpoint)) as process:
        stored = tmp_path / "cache/hub" / hub_cache.snapshot("model", "someone/tiny", revision)
        small = {stored / name for name in model} - {stored / WEIGHTS}
        while not all(one.exists() for one in small):  # time.sleep does not sleep here
            assert process.poll() is None
            threading.Event().wait(0.02)
        process.kill()
    assert not file.exists()
    client.asked.clear()
    fetch(file, "someone/tiny", revision)
    assert [path.rpartition("/")[2] for path in client.downloads()] == [WEIGHTS]
