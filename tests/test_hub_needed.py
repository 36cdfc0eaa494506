"""What a study needs of the hub, found in its config."""

from __future__ import annotations

from espalier import hub
from espalier.study import Study
from hub_study import study, use_cache


def test_what_a_study_needs_is_found_in_every_section(tmp_path):
    tiny_at, words_at, glue_at = "a" * 40, "b" * 40, "c" * 40
    encoder = {"hub": "someone/encoder", "revision": tiny_at, "task": "masked-lm"}
    text = {"dataset": "words", "config": "one"}
    found = hub.needed(
        study(
            tmp_path,
            {"tiny": tiny_at, "words": words_at},
            models={
                "m": {"hub": "someone/tiny", "revision": tiny_at},
                "e": encoder,
                "never-measured": {"hub": "someone/huge", "revision": tiny_at},
            },
            datasets={
                "words": {"hub": "someone/words", "revision": words_at},
                "glue": {"hub": "someone/glue", "revision": glue_at},
            },
            calibrations={"few": {"text": {**text, "split": "train[:50%]"}, "samples": 2, "length": 8}},
            recipes={
                "w4": {"quantize": "gptq", "bits": 4, "calibration": "few"},
                "more": {
                    "tune": "continued-pretraining",
                    "text": {**text, "config": "two", "split": "train[10%:]+extra"},
                    "validation": {**text, "config": "two", "split": "held"},
                    "steps": 1,
                },
                "instruct": {"tune": "lora", "dataset": "words", "split": "chat", "steps": 1},
                "mnli": {"tune": "classify", "task": "mnli", "dataset": "glue", "steps": 1},
                "never-used": {"tune": "sft", "dataset": "words", "split": "other", "steps": 1},
            },
            suites={
                "held": {"evaluate": "perplexity", "text": {**text, "split": "test"}},
                "mnli": {"evaluate": "glue", "task": "mnli", "dataset": "glue"},
                "zero-shot": {"evaluate": "harness", "tasks": ["boolq", "piqa"]},
            },
            workloads={
                "ask": {"profile": "scoring", "tasks": ["piqa"]},
                "idle": {"profile": "scoring", "tasks": ["wic"]},
            },
            measure=[
                {"model": "m", "chains": ["dense+more+w4", "dense+instruct"], "suites": ["held"], "workloads": ["ask"]},
                {"model": "e", "chains": ["dense+mnli"], "suites": ["mnli"]},
            ],
        )
    )
    splits = {(one.kind, one.id, one.config, one.revision): one.splits for one in found}
    assert splits == {
        ("model", "someone/tiny", None, tiny_at): (),
        ("model", "someone/encoder", None, tiny_at): (),
        ("dataset", "someone/words", "one", words_at): ("test", "train"),
        ("dataset", "someone/words", "two", words_at): ("extra", "held", "train"),
        ("dataset", "someone/words", None, words_at): ("chat",),
        ("dataset", "someone/glue", "mnli", glue_at): ("train", "validation_matched", "validation_mismatched"),
        ("task", "boolq", None, None): (),
        ("task", "piqa", None, None): (),
    }
    by_name = {(one.id, one.config): one.needed_by for one in found}
    assert by_name["piqa", None] == ("suites.zero-shot", "workloads.ask")
    assert by_name["someone/words", "one"] == ("calibrations.few", "datasets.words", "recipes.w4", "suites.held")


def test_the_code_of_a_model_is_trusted_if_one_entry_trusts_it(tmp_path):
    entry = {"hub": "someone/tiny", "revision": "a" * 40}
    of = study(
        tmp_path,
        {"tiny": "a" * 40, "words": "b" * 40},
        models={"m": entry, "trusted": {**entry, "trust_remote_code": True}, "other": {**entry, "hub": "someone/big"}},
        measure=[{"model": name, "chains": ["dense"], "suites": ["held"]} for name in ("m", "trusted", "other")],
    )
    models = {one.id: (one.trust_remote_code, one.needed_by) for one in hub.needed(of) if one.kind == "model"}
    assert models == {"someone/big": (False, ("models.other",)), "someone/tiny": (True, ("models.m", "models.trusted"))}


def test_jobs_write_to_the_cache_only_where_they_read_data_sets(tmp_path, demo_config, monkeypatch):
    use_cache(monkeypatch, tmp_path / "cache")
    commits = {"tiny": "a" * 40, "words": "b" * 40}
    length = {"profile": "memory", "input_tokens": [8], "output_tokens": [2], "batch_sizes": [1]}
    measure = [{"model": "m", "chains": ["dense"], "workloads": ["long"]}]
    bare = {"datasets": {}, "suites": {}, "workloads": {"long": length}, "measure": measure}
    assert hub.written(Study(demo_config)) == []
    assert hub.written(study(tmp_path, commits, **bare)) == []
    assert hub.written(study(tmp_path, commits)) == [tmp_path / "cache/datasets"]


def test_the_demo_needs_nothing_of_the_hub(demo_config):
    assert hub.needed(Study(demo_config)) == []
    hub.check(Study(demo_config))
