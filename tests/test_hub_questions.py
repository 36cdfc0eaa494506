"""What the hub refuses is found before the first job, all at once; and what the cache holds is not asked for."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import HfApi, constants

import hub_server
from conftest import copy_project, snakemake
from espalier import harness_names, hub, hub_cache, hub_download, hub_files, hub_questions, preflight
from espalier.errors import UserError
from hub_server import Fault, Hub, Repository, serve
from hub_study import DEAD, TOKEN, model_files, of_cache, study, words


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> dict[str, bytes]:
    return model_files(tmp_path_factory.mktemp("hub") / "model")


def broken(tmp_path: Path, server: Hub, model: dict, tasks: tuple[str, ...]) -> tuple[dict, list[str]]:
    """Return the sections of a study almost all of which the hub refuses, and what is to be said of each thing."""
    at = server.add("models", "someone/tiny", model)
    server.add("models", "someone/gated", model, token=TOKEN)
    private = server.repositories["models", "someone/private"] = Repository({at: model}, TOKEN, "RepoNotFound")
    pickled = {"config.json": model["config.json"], "pytorch_model.bin": b"pickle"}
    old = server.add("models", "someone/old", pickled)
    text_at = server.add("datasets", "someone/words", words(0))
    locked_at = server.add("datasets", "someone/locked", words(100), token=TOKEN)
    gated_at = next(iter(server.repositories["models", "someone/gated"].commits))
    entries = {
        "fine": ("someone/tiny", at),
        "gated": ("someone/gated", gated_at),
        "moved": ("someone/tiny", "f" * 40),
        "misspelt": ("someone/tinny", at),
        "private": ("someone/private", next(iter(private.commits))),
        "old": ("someone/old", old),
    }
    text = {"dataset": "words", "config": "one", "split": "test"}
    suites = {
        "held": {"evaluate": "perplexity", "text": text},
        "other": {"evaluate": "perplexity", "text": {**text, "config": "three"}},
        "tset": {"evaluate": "perplexity", "text": {**text, "config": "two", "split": "tset"}},
        "shut": {"evaluate": "perplexity", "text": {**text, "dataset": "locked"}},
        "zero-shot": {"evaluate": "harness", "tasks": list(tasks)},
    }
    sections = {
        "models": {name: {"hub": one, "revision": revision} for name, (one, revision) in entries.items()},
        "datasets": {
            "words": {"hub": "someone/words", "revision": text_at},
            "locked": {"hub": "someone/locked", "revision": locked_at},
        },
        "suites": suites,
        "measure": [{"model": name, "chains": ["dense"], "suites": list(suites)} for name in entries],
    }
    pages = server.endpoint
    said = [
        f"model someone/gated at {gated_at[:12]} (models.gated) is gated: accept its licence at {pages}/someone/gated,",
        f"model someone/tiny at {'f' * 12} (models.moved) cannot be downloaded: {server.endpoint} has no such revision",
        f"model someone/tinny at {at[:12]} (models.misspelt) cannot be downloaded: {server.endpoint} has nothing of",
        f"model someone/private at {at[:12]} (models.private) cannot be downloaded: {server.endpoint} has nothing of",
        f"model someone/old at {old[:12]} (models.old) has no safetensors weights",
        f"data set someone/words, config three at {text_at[:12]} (datasets.words, suites.other) cannot be downloaded:"
        " BuilderConfig 'three' not found. Available: ['one', 'two']",
        f"data set someone/words, config two at {text_at[:12]} (datasets.words, suites.tset) has no split 'tset'",
        f"data set someone/locked, config one at {locked_at[:12]} (datasets.locked, suites.shut) is gated: accept its"
        f" licence at {pages}/datasets/someone/locked, and set HF_TOKEN",
    ]
    return sections, said


def unmatched(sentences: list[str], said: list[str]) -> list[str]:
    """Return what is not said by exactly one of the sentences, and sentences that say nothing of it."""
    wrong = [one for one in said if sum(one in sentence for sentence in sentences) != 1]
    return wrong + [sentence for sentence in sentences if not any(one in sentence for one in said)]


def test_all_that_the_hub_refuses_is_said_at_once(client, model, tmp_path, monkeypatch):
    monkeypatch.setattr(harness_names, "data_sets", lambda name: {"someone/locked", "json"})
    sections, said = broken(tmp_path, client, model, ("boolq",))
    of = study(tmp_path, {"tiny": "", "words": ""}, **sections)
    said.append("data set someone/locked (suites.zero-shot) is gated")
    sentences = hub_questions.refusals(of, hub.needed(of))
    assert unmatched(sentences, said) == []
    assert TOKEN not in "".join(sentences)
    heads = {path for method, path, _ in client.asked if method == "HEAD" and "/locked/resolve/main/" in path}
    assert heads == {"/datasets/someone/locked/resolve/main/one/test.jsonl"}, "a page's README may be for all"
    assert not [path for path in client.downloads() if not path.endswith("README.md")], "only asked, not downloaded"
    with pytest.raises(UserError) as caught:
        hub_download.prefetch("s", hub.needed(of), tmp_path / "prefetch.json")
    assert unmatched(str(caught.value).splitlines(), said) == []
    assert not [path for path in client.downloads() if not path.endswith("README.md")]


def test_with_a_token_what_was_gated_is_not_refused(client, model, tmp_path, monkeypatch):
    monkeypatch.setattr(harness_names, "data_sets", lambda name: {"someone/locked"})
    sections, said = broken(tmp_path, client, model, ("boolq",))
    of = study(tmp_path, {"tiny": "", "words": ""}, **sections)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    expected = [one for one in said if "is gated" not in one and "someone/private" not in one]
    assert unmatched(hub_questions.refusals(of, hub.needed(of)), expected) == []


def test_weights_in_pytorchs_own_format_are_not_refused_where_they_are_to_be_converted(client, model, tmp_path):
    pickled = {"config.json": model["config.json"], "pytorch_model.bin": b"pickle"}
    item = hub.Item("model", "someone/old", revision=client.add("models", "someone/old", pickled), convert=True)
    of = study(tmp_path, {"tiny": "a" * 40, "words": "b" * 40})
    assert hub_questions.refusals(of, [item]) == []


def test_nothing_is_asked_for_what_the_cache_holds(client, model, tmp_path, monkeypatch):
    """With a manifest, and without one, as the jobs of a run leave the cache."""
    monkeypatch.setattr(harness_names, "data_sets", lambda name: {"someOne/Words-Big"})
    commits = {name: client.add("models", f"someone/{name}", model) for name in ("tiny", "other")}
    commits["words"] = client.add("datasets", "someone/words", words(0))
    big = client.add("datasets", "someOne/Words-Big", words(100))
    zero_shot = {"evaluate": "harness", "tasks": ["boolq"]}
    text = {"dataset": "words", "config": "one", "split": "test"}
    suites = {"held": {"evaluate": "perplexity", "text": text}, "zero-shot": zero_shot}
    of = study(tmp_path, commits, suites=suites)
    needed = hub.needed(of)
    listed = [item for item in needed if item.kind != "task"]
    hub_download.prefetch("s", listed, hub.manifest_file(of))
    hub_cache.open_dataset("someOne/Words-Big", "one", "train", big)
    for manifest in (True, False):
        if not manifest:
            hub.manifest_file(of).unlink()
        client.asked.clear()
        assert hub_questions.refusals(of, needed) == []
        assert client.asked == []
    (
        Path(constants.HF_HUB_CACHE) / hub_cache.snapshot("model", "someone/tiny", commits["tiny"]) / "config.json"
    ).unlink()
    assert hub_questions.refusals(of, needed) == []
    others = {path for _, path, _ in client.asked if "/someone/tiny" not in path}
    assert others == {"/"}, "only for what is missing, and whether the hub answers"


CHANGES = {
    "another model": ("models", {"m": {"hub": "someone/other", "revision": "e" * 40}}),
    "another commit": ("datasets", {"words": {"hub": "someone/words", "revision": "e" * 40}}),
    "another config": ("suites", {"config": "two", "split": "train"}),
    "another split": ("suites", {"config": "one", "split": "tset"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_cache_holds_of_something_else_is_asked_for(client, model, tmp_path, change):
    commits = {"tiny": client.add("models", "someone/tiny", model)}
    commits["words"] = client.add("datasets", "someone/words", words(0))
    before = study(tmp_path, commits)
    hub_download.prefetch("s", hub.needed(before), hub.manifest_file(before))
    hub.manifest_file(before).unlink()
    section, entry = CHANGES[change]
    if section == "suites":
        entry = {"held": {"evaluate": "perplexity", "text": {"dataset": "words", **entry}}}
    of = study(tmp_path, commits, **{section: entry})
    client.asked.clear()
    refusals = hub_questions.refusals(of, hub.needed(of))
    assert client.asked
    assert len(refusals) == (change != "another config")


def test_half_a_model_is_asked_for(client, model, tmp_path):
    """Such as one of two files of weights, which the index names."""
    index = b'{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}'
    commits = {"words": client.add("datasets", "someone/words", words(0))}
    commits["tiny"] = client.add("models", "someone/tiny", {**model, "model.safetensors.index.json": index})
    of = study(tmp_path, commits)
    models = [item for item in hub.needed(of) if item.kind == "model"]
    hub_download.prefetch("s", models, tmp_path / "elsewhere.json")
    client.asked.clear()
    hub_questions.refusals(of, models)
    assert client.asked


def test_a_hub_that_does_not_answer_is_one_sentence(client, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", DEAD)
    of = study(tmp_path, {"tiny": "a" * 40, "words": "b" * 40})
    (sentence,) = hub_questions.refusals(of, hub.needed(of))
    assert f"{DEAD} cannot be reached, or stops answering" in sentence
    assert sentence.endswith("jobs read with HF_HUB_OFFLINE=1 what `snakemake prefetch` downloaded elsewhere.")


def test_a_token_that_is_not_accepted_is_one_sentence(client, model, tmp_path, monkeypatch):
    """The hub refuses it for what is public, too, in words that it has for nothing else."""
    commits = {"tiny": client.add("models", "someone/tiny", model)}
    commits["words"] = client.add("datasets", "someone/words", words(0))
    of = study(tmp_path, commits)
    client.tokens = set()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError) as caught:
        hub_download.prefetch("s", hub.needed(of), tmp_path / "prefetch.json")
    (sentence,) = hub_questions.refusals(of, hub.needed(of))
    assert sentence == str(caught.value)
    assert sentence.startswith(f"{client.endpoint} does not accept the token that is set (HF_TOKEN, or that of `hf au")
    client.tokens.add(TOKEN)
    assert hub_questions.refusals(of, hub.needed(of)) == []


def test_a_hub_that_falls_silent_over_a_data_set_is_not_waited_for_long(client, tmp_path, monkeypatch):
    """A download of its README would ask again, with ever longer limits."""
    monkeypatch.setattr(hub_server, "LONG", 3)
    metadata = functools.partialmethod(HfApi.get_hf_file_metadata, timeout=0.1)
    monkeypatch.setattr(HfApi, "get_hf_file_metadata", metadata)
    item = hub.Item("dataset", "someone/words", "one", client.add("datasets", "someone/words", words(0)))
    client.faults.append(Fault("README.md", "silence", method="HEAD"))
    started = time.monotonic()
    _, (sentence,) = hub_questions.ask([item])
    assert "cannot be reached, or stops answering" in sentence
    assert time.monotonic() - started < 5
    assert [path for _, path, _ in client.asked if path.endswith("README.md")] == hub_files.ATTEMPTS * [
        f"/datasets/someone/words/resolve/{item.revision}/README.md"
    ]


def test_only_what_the_jobs_of_a_run_read_is_asked_for(tmp_path):
    text = {"dataset": "words", "config": "one"}
    few = {"text": {**text, "split": "train"}, "samples": 1, "length": 8}
    recipes = {"w4": {"quantize": "gptq", "bits": 4, "calibration": "few"}}
    commits = {"tiny": "a" * 40, "words": "b" * 40}
    of = study(tmp_path, commits, calibrations={"few": few}, recipes=recipes)

    def read(rule: str, **wildcards: str) -> set[str]:
        return preflight._entries_read([job(rule, **wildcards)], of)

    assert read("draw_figure", figure="x") == set()
    assert read("evaluate_model", model="m", seed="0", chain="dense", suite="held") == {"models.m", "suites.held"}
    assert read("quantize_model", model="m", recipe="w4") == {"models.m", "recipes.w4"}
    assert read("profile_model", model="m", workload="long") == {"models.m", "workloads.long"}
    assert read("check_calibration", text="x") == {"calibrations.few", "suites.held"}


def job(rule: str, **wildcards: str) -> SimpleNamespace:
    return SimpleNamespace(rule=SimpleNamespace(name=rule), wildcards_dict=wildcards)


def run_of(*jobs: SimpleNamespace) -> SimpleNamespace:
    """What a run of these jobs on this machine knows of itself."""
    options = {"is_main_process": True, "local_exec": True, "touch": False, "_build_dag": lambda: None}
    targets = SimpleNamespace(targets=set())
    return SimpleNamespace(dag=SimpleNamespace(needrun_jobs=lambda: jobs), dag_settings=targets, **options)


MADE = {
    "converted": {"hub": "someone/old", "revision": "a" * 40, "convert": True},
    "trained": {"pretrain": "demo-decoder", "text": {"dataset": "words", "config": "two", "split": "train"}},
}


@pytest.mark.parametrize("model", MADE)
def test_what_a_model_was_made_of_is_needed_by_the_job_that_makes_it_alone(client, tmp_path, model):
    """Later jobs read what lies in results, and the hub may be gone."""
    measure = [{"model": model, "chains": ["dense"], "suites": ["held"]}]
    of = study(tmp_path, {"tiny": "", "words": "b" * 40}, models={model: MADE[model]}, measure=measure)
    rule = {"converted": "fetch_model", "trained": "pretrain_model"}[model]
    makes, measures = job(rule, model=model), job("evaluate_model", model=model, suite="held")

    def refused(*jobs: SimpleNamespace, offline: bool) -> bool:
        run = run_of(*jobs)
        try:
            if not offline:
                preflight.ask_hub(run, of)
            else:
                preflight._check_cache_later(run, of)
                run._build_dag()
        except UserError as error:
            return f"models.{model}" in str(error)
        return False

    for offline in (False, True):
        assert not refused(measures, offline=offline)
        assert refused(makes, measures, offline=offline)


def test_where_the_hub_is_off_all_that_lacks_is_said_at_once(client, tmp_path):
    zero_shot = {"evaluate": "harness", "tasks": ["boolq", "piqua"]}
    text = {"dataset": "words", "config": "one", "split": "test"}
    suites = {"held": {"evaluate": "perplexity", "text": text}, "zero-shot": zero_shot}
    of = study(tmp_path, {"tiny": "a" * 40, "words": "b" * 40}, suites=suites)
    with pytest.raises(UserError) as caught:
        preflight._check_hub(of, offline=True, asks=False)  # it ends here, before its jobs are known
    for lack in (
        f"model someone/tiny at {'a' * 12} (models.m): never prefetched",
        f"data set someone/words, config one at {'b' * 12} (datasets.words, suites.held): never prefetched",
        "harness task boolq (suites.zero-shot): never prefetched",
        "s.yaml: suites.zero-shot.tasks: the lm-evaluation-harness has no task 'piqua'. Did you mean 'piqa'?",
    ):
        assert lack in str(caught.value)
    assert client.asked == []


def test_a_run_ends_before_its_first_job_and_says_all(model, tmp_path, monkeypatch):
    """With a task that the harness lacks it ends before it knows its jobs; without, it asks for what they read."""
    project = copy_project(tmp_path / "project")
    with serve() as server:
        server.add("datasets", "aps/super_glue", words(200))
        sections, said = broken(tmp_path, server, model, ("boolq", "piqua"))
        mapping = study(tmp_path, {"tiny": "", "words": ""}, **sections).mapping
        (project / "s.yaml").write_text(yaml.safe_dump(mapping))
        for name, value in of_cache(tmp_path / "cache", server.endpoint).items():
            monkeypatch.setenv(name, value)
        run = snakemake(project, "--configfile", "s.yaml", "--cores", "1")
        mapping["suites"]["zero-shot"]["tasks"].remove("piqua")
        (project / "s.yaml").write_text(yaml.safe_dump(mapping))
        part = snakemake(
            project, "results/s/runs/gated/s0/dense/evaluate/held.json", "--configfile", "s.yaml", "--cores", "1"
        )
    said.append("suites.zero-shot.tasks: the lm-evaluation-harness has no task 'piqua'. Did you mean 'piqa'?")
    for ended, expected in ((run, said), (part, said[:1])):
        assert ended.returncode == 1
        lines = [line for line in (ended.stdout + ended.stderr).splitlines() if line.startswith("s.yaml: ")]
        assert unmatched(lines, expected) == [], ended.stdout + ended.stderr
    assert not list((project / "results").rglob("*.log")), "no job has started"
