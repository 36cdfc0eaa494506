"""Rows of GLUE tasks: from a folder, or from the hub; what is wrong with them is named before anything is trained."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from transformers import AutoModelForSequenceClassification

from espalier import checkpoints, glue_tasks, hub, hub_cache, hub_download
from espalier.data import Dataset
from espalier.errors import UserError
from espalier.evaluate import glue
from espalier.recipes import build
from espalier.study import Study
from espalier.tune import classify
from hub_encoders import encoder
from hub_study import study

PAIR = {"question1": "What is red?", "question2": "Which is red?", "label": 1}
SCORED = {"sentence1": "a robin", "sentence2": "a tulip", "label": 2.5}


def write(file: Path, *rows: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def without(row: dict, *keys: str, **more: object) -> dict:
    return {key: value for key, value in row.items() if key not in keys} | more


# Bad rows -----------------------------------------------------------------------------------------------------------

# What the second row is, behind a good one, and what is said of it.
ROWS = {
    "no column": (
        "qqp",
        without(PAIR, "question2"),
        "lacks the column 'question2' in row 2. Did you mean 'question1'?",
    ),
    "a misspelt column": (
        "qqp",
        without(PAIR, "question1", qestion1="What?"),
        "lacks the column 'question1' in row 2. Did you mean 'qestion1'?",
    ),
    "no label": ("qqp", without(PAIR, "label", labels=1), "lacks the column 'label' in row 2. Did you mean 'labels'?"),
    "null in the place of text": (
        "qqp",
        PAIR | {"question2": None},
        "holds None in the column 'question2' of row 2, and not text.",
    ),
    "a number in the place of text": ("stsb", SCORED | {"sentence1": 7}, "holds 7 in the column 'sentence1' of row 2"),
    "a list in the place of text": ("qqp", PAIR | {"question1": ["a"]}, "holds ['a'] in the column 'question1' of row"),
    "a label too high": ("qqp", PAIR | {"label": 2}, "label 2 in row 2; it must be a whole number from 0 to 1."),
    "a label below": ("qqp", PAIR | {"label": -2}, "label -2 in row 2; it must be a whole number from 0 to 1."),
    "a row without a label": ("qqp", PAIR | {"label": -1}, "0 to 1. The test splits of GLUE have no labels."),
    "a label of three": (
        "mnli",
        {"premise": "a", "hypothesis": "b", "label": 3},
        "label 3 in row 2; it must be a whole number from 0 to 2.",
    ),
    "true": ("qqp", PAIR | {"label": True}, "label True in row 2; it must be a whole number from 0 to 1."),
    "a label as text": ("qqp", PAIR | {"label": "1"}, "label '1' in row 2; it must be a whole number from 0 to 1."),
    "a label with a point": (
        "qqp",
        PAIR | {"label": 1.0},
        "label 1.0 in row 2; it must be a whole number from 0 to 1.",
    ),
    "a null label": ("qqp", PAIR | {"label": None}, "label None in row 2; it must be a whole number from 0 to 1."),
    "a score too high": ("stsb", SCORED | {"label": 5.01}, "label 5.01 in row 2; it must be a number from 0 to 5."),
    "a score below": ("stsb", SCORED | {"label": -0.2}, "label -0.2 in row 2; it must be a number from 0 to 5."),
    "a score that is none": (
        "stsb",
        SCORED | {"label": float("nan")},
        "label nan in row 2; it must be a number from 0",
    ),
    "an endless score": ("stsb", SCORED | {"label": float("inf")}, "label inf in row 2; it must be a number from 0 to"),
    "a score as text": ("stsb", SCORED | {"label": "2.5"}, "label '2.5' in row 2; it must be a number from 0 to 5."),
    "true as a score": ("stsb", SCORED | {"label": True}, "label True in row 2; it must be a number from 0 to 5."),
    "no columns at all": ("qqp", ["What?", "Which?", 1], "holds ['What?', 'Which?', 1] in row 2, and not columns"),
}
GOOD = {"qqp": PAIR, "stsb": SCORED, "mnli": {"premise": "a", "hypothesis": "b", "label": 2}}


def refused(folder: Path, task: str, split: str = "train") -> str:
    """Return what fine-tuning says of a folder's rows, before it looks at the model, which is nowhere."""
    dataset = {"name": "mine", "source": "local", "path": str(folder)}
    recipe = build(classify.Recipe, {"task": task, "dataset": dataset, "split": split, "steps": 1}, "recipe")
    with pytest.raises(UserError) as caught:
        classify.apply(Path("nowhere"), Path("nowhere"), recipe, seed=0, device="cpu")
    return str(caught.value)


@pytest.mark.parametrize("case", ROWS)
def test_a_bad_row_is_named_before_training(tmp_path, case):
    task, row, message = ROWS[case]
    file = tmp_path / task / "train.jsonl"
    write(file, GOOD[task], row)
    said = refused(tmp_path, task)
    assert said.startswith(f"The file {file} ")
    assert message in said


FILES = {
    "an empty split": (b"", "train", "The file {folder}/qqp/train.jsonl has no rows."),
    "empty lines alone": (b"\n\n", "train", "The file {folder}/qqp/train.jsonl has no rows."),
    "no such split": (b"", "trian", "has no file {folder}/qqp/trian.jsonl. Did you mean 'train'?"),
    "half a line": (b'{"question1": "Wh', "train", "{folder}/qqp/train.jsonl, line 1, is not valid JSON (Unterminated"),
    "another encoding": (
        b'\n{"question1": "W\xe4s"}\n',
        "train",
        "{folder}/qqp/train.jsonl, line 2, is not valid JSON ('utf-8' codec",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_without_rows_is_named(tmp_path, case):
    content, split, message = FILES[case]
    (tmp_path / "qqp").mkdir()
    (tmp_path / "qqp/train.jsonl").write_bytes(content)
    assert message.format(folder=tmp_path) in refused(tmp_path, "qqp", split)


def test_what_is_odd_and_allowed(tmp_path):
    """Empty texts are in QQP itself; whole scores are numbers; other columns do not matter."""
    odd = [PAIR | {"question1": "", "idx": 3, "more": None}, PAIR]
    write(tmp_path / "qqp/train.jsonl", *odd)
    write(tmp_path / "stsb/train.jsonl", SCORED | {"label": 5}, SCORED | {"label": 0})
    dataset = Dataset("mine", "local", str(tmp_path))
    assert glue_tasks.rows(dataset, "qqp", "train") == odd
    assert [row["label"] for row in glue_tasks.rows(dataset, "stsb", "train")] == [5, 0]


def test_tasks_lie_in_the_folder_or_in_its_glue(tmp_path):
    dataset = Dataset("mine", "local", str(tmp_path))
    write(tmp_path / "qqp/train.jsonl", PAIR)
    assert glue_tasks.rows(dataset, "qqp", "train") == [PAIR]
    write(tmp_path / "glue/qqp/train.jsonl", PAIR | {"label": 0})
    assert glue_tasks.rows(dataset, "qqp", "train") == [PAIR | {"label": 0}]


# Before any job -----------------------------------------------------------------------------------------------------

GLUE = {"evaluate": "glue", "dataset": "mine"}
SECTIONS = {
    "a folder of another name": (
        {"suites": {"glue": GLUE | {"task": "sst2"}}},
        "suites.glue: The dataset 'mine' has no folder {folder}/sst2. Did you mean 'sst-2'?",
    ),
    "a missing validation split": (
        {"suites": {"glue": GLUE | {"task": "mnli"}}},
        "suites.glue: The dataset 'mine' has no file {folder}/mnli/validation_mismatched.jsonl. "
        "Did you mean 'validation_matched'?",
    ),
    "a missing training split": (
        {"recipes": {"mnli": {"tune": "classify", "task": "mnli", "dataset": "mine", "steps": 1}}},
        "recipes.mnli: The dataset 'mine' has no file {folder}/mnli/train.jsonl. Known: validation_matched.",
    ),
}


@pytest.mark.parametrize("case", SECTIONS)
def test_a_local_dataset_without_a_task_or_split_is_refused_at_dry_run(tmp_path, case):
    sections, message = SECTIONS[case]
    (tmp_path / "sst-2").mkdir()
    write(tmp_path / "mnli/validation_matched.jsonl", GOOD["mnli"])
    mapping = {"study": "s", "models": {}, "figures": {}, "datasets": {"mine": {"path": str(tmp_path)}}, **sections}
    with pytest.raises(UserError) as caught:
        Study(mapping, file="s.yaml")
    assert str(caught.value) == "s.yaml: " + message.format(folder=tmp_path)


# The hub ------------------------------------------------------------------------------------------------------------

LABELS = {"train": [0, 1, 2], "validation_matched": [2, 1], "validation_mismatched": [1], "test_matched": [-1]}
MNLI = {
    split: [{"premise": f"{split} {i}", "hypothesis": "", "label": one, "idx": i} for i, one in enumerate(labels)]
    for split, labels in LABELS.items()
}
STSB = {"train": [SCORED | {"label": 3.5}], "validation": [SCORED, SCORED | {"sentence2": None}]}
CARD = {
    "configs": [
        {"config_name": task, "data_files": [{"split": one, "path": f"{task}/{one}.parquet"} for one in splits]}
        for task, splits in (("mnli", MNLI), ("stsb", STSB))
    ],
    "dataset_info": [
        {
            "config_name": "mnli",
            "features": [
                {"name": "premise", "dtype": "string"},
                {"name": "hypothesis", "dtype": "string"},
                {"name": "label", "dtype": {"class_label": {"names": {"0": "entailment", "1": "neutral", "2": "c"}}}},
                {"name": "idx", "dtype": "int32"},
            ],
        }
    ],
}


def published() -> dict[str, bytes]:
    """Return the files of a data set that is laid out as nyu-mll/glue is."""
    import pyarrow
    import pyarrow.parquet

    files = {"README.md": f"---\n{yaml.safe_dump(CARD)}---\n".encode()}
    for task, splits in (("mnli", MNLI), ("stsb", STSB)):
        for split, rows in splits.items():
            stream = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
            files[f"{task}/{split}.parquet"] = stream.getvalue()
    return files


def test_a_teacher_and_its_rows_come_from_the_hub_and_are_prefetched(client, tmp_path, monkeypatch):
    commit = client.add("datasets", "nyu-mll/glue", published())
    client.add("datasets", "nyu-mll/glue", {"README.md": b"newer, and without rows"})
    folder = encoder(tmp_path / "given", "roberta", AutoModelForSequenceClassification, num_labels=3)
    given = {"hub": "someone/teacher", "revision": client.add("models", "someone/teacher", folder)}
    of = study(
        tmp_path,
        {"tiny": "a" * 40, "words": "b" * 40},
        models={
            "given": given | {"task": "sequence-classification"},
            "bert": {"hub": "someone/bert", "revision": "a" * 40, "task": "masked-lm"},
        },
        datasets={"glue": {"hub": "nyu-mll/glue", "revision": commit}},
        recipes={"mnli": {"tune": "classify", "task": "mnli", "dataset": "glue", "steps": 1}},
        suites={"glue-mnli": {"evaluate": "glue", "task": "mnli", "dataset": "glue"}},
        measure=[
            {"model": "given", "chains": ["dense"], "suites": ["glue-mnli"]},
            {"model": "bert", "chains": ["dense+mnli"], "suites": ["glue-mnli"]},
        ],
    )
    needed = [one for one in hub.needed(of) if one.id != "someone/bert"]
    read = ("train", "validation_matched", "validation_mismatched")
    assert [(one.id, one.config, one.revision, one.splits) for one in needed] == [
        ("nyu-mll/glue", "mnli", commit, read),
        ("someone/teacher", None, given["revision"], ()),
    ]
    hub_download.prefetch("s", needed, hub.manifest_file(of))
    client.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv(hub_cache.MANIFEST, str(hub.manifest_file(of)))
    suite, recipe = of.step("suites", "glue-mnli").recipe, of.step("recipes", "mnli").recipe
    assert glue_tasks.rows(recipe.dataset, recipe.task, recipe.split) == MNLI["train"]
    (tmp_path / "pointer").mkdir()
    checkpoints.refer(tmp_path / "pointer", json.loads(of.reference("given")))
    measured = glue.measure(checkpoints.load(tmp_path / "pointer", "cpu"), suite, seed=0, device="cpu")
    assert {name: one["labels"] for name, one in measured.samples.items()} == {"mnli": [2, 1], "mnli_mismatched": [1]}
    assert client.asked == []


def test_bad_rows_and_splits_of_the_hub_are_named(client):
    dataset = Dataset("glue", "hub", id="nyu-mll/glue", revision=client.add("datasets", "nyu-mll/glue", published()))
    assert glue_tasks.rows(dataset, "stsb", "train") == STSB["train"]
    for task, split, message in (
        ("mnli", "test_matched", "'glue', config mnli, split 'test_matched', has the label -1 in row 1;.* no labels"),
        (
            "stsb",
            "validation",
            "'glue', config stsb, split 'validation', holds None in the column 'sentence2' of row 2",
        ),
        ("mnli", "trian", r"'glue' \(nyu-mll/glue, split 'trian'\): .*validation_matched"),
        ("qnli", "train", r"'glue' \(nyu-mll/glue, split 'train'\): .*'qnli' not found. Available: \['mnli', 'stsb'\]"),
    ):
        with pytest.raises(UserError, match=message):
            glue_tasks.rows(dataset, task, split)
