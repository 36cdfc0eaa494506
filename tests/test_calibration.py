"""Calibration sets: what is drawn and recorded, and that no evaluated text is calibrated on."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from conftest import ROOT
from espalier import contamination, recipes
from espalier.contamination import RUN, SHORTEST, Suite
from espalier.data import Calibration, Dataset, Text
from espalier.errors import UserError
from espalier.quantize import gptq


class Words:
    """A tokenizer of one token a word; the number of a word is its place in the language."""

    def __init__(self, end: int | None):
        self.eos_token_id = end

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [int(word) for word in text.split()]}


def text_of(folder: Path, documents: list[str], split: str = "calibration") -> Text:
    folder.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps({"text": document}) + "\n" for document in documents)
    (folder / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    return Text(Dataset("mine", "local", path=str(folder)), split)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory) -> tuple[Text, list[list[int]]]:
    """2500 documents of 3 to 40 numbers, some of them empty; a number tells its row and its place there."""
    chance = random.Random(0)
    rows = [[100 * row + place for place in range(chance.randrange(3, 41))] for row in range(2500)]
    rows[7] = rows[2499] = []
    return text_of(tmp_path_factory.mktemp("numbers"), [" ".join(map(str, row)) for row in rows]), rows


@pytest.mark.parametrize("windows", ["packed", "crops"])
@pytest.mark.parametrize("end", [None, 999_999])
def test_sets_of_one_seed_are_nested_in_tokens_and_in_record(numbers, windows, end):
    text, _ = numbers
    sets = [Calibration(text, samples, 8, seed=3, windows=windows).draw(Words(end)) for samples in (20, 200, 2000)]
    for (small, few), (large, more) in itertools.pairwise(sets):
        assert large[: len(small)] == small
        assert more["documents"][: len(small)] == few["documents"]
    assert [len(ids) for ids, _ in sets] == [20, 200, 2000]
    assert all(len(window) == 8 for ids, _ in sets for window in ids)
    other = Calibration(text, 20, 8, seed=4, windows=windows).draw(Words(end))
    assert other.token_ids != sets[0].token_ids
    assert other.record["documents"] != sets[0].record["documents"]


@pytest.mark.parametrize("end", [None, 999_999])
def test_packed_windows_lie_where_the_record_says(numbers, end):
    text, rows = numbers
    ids, record = Calibration(text, 2000, 8, seed=3).draw(Words(end))
    joined = list(itertools.chain.from_iterable(ids))
    # Every document stands whole, one after another, in an order that is told by the tokens themselves.
    expected, order, at = [], [], 0
    while at < len(joined):
        row = joined[at] // 100
        order.append(row)
        expected += rows[row] + ([] if end is None else [end])
        at = len(expected)
    assert joined == expected[: len(joined)]
    assert len(set(order)) == len(order)
    assert order != sorted(order)
    owner = [row for row in order for _ in rows[row] + ([] if end is None else [end])]
    assert record["documents"] == [[owner[8 * i], owner[8 * i + 7]] for i in range(2000)]


def test_crops_lie_where_the_record_says(numbers):
    text, rows = numbers
    ids, record = Calibration(text, 2000, 8, seed=3, windows="crops").draw(Words(None))
    assert ids == [rows[row][start : start + 8] for row, start in record["documents"]]
    assert len({row for row, _ in record["documents"]}) == 2000
    assert len({start for _, start in record["documents"]}) > 20


def test_the_record_says_what_was_drawn(numbers):
    text, _ = numbers
    record = Calibration(text, 5, 8, seed=3, windows="crops").draw(Words(None)).record
    assert json.loads(json.dumps(record)) == record
    del record["documents"]
    assert record == {
        "dataset": "mine", "config": None, "split": "calibration", "seed": 3, "windows": "crops",
        "samples": 5, "length": 8, "tokens": 40,
    }  # fmt: skip


def test_fewer_samples_than_asked_for_is_an_error_before_a_model_is_loaded(tmp_path, monkeypatch):
    parent = tiny.llama(tmp_path / "parent", hidden=32)
    sets = tiny.calibration(tmp_path / "data", samples=4, length=32) | {"samples": 500}
    recipe = recipes.build(gptq.Recipe, {"bits": 4, "group_size": 32, "calibration": sets}, "")
    monkeypatch.setitem(sys.modules, "gptqmodel", None)  # an import of what loads the model would be another error
    monkeypatch.setattr("espalier.gptq_loading.prepare", lambda device: None)
    message = r"'words', split 'calibration', holds only \d+ windows of 32 tokens, .* asks for 500 samples"
    with pytest.raises(UserError, match=message):
        gptq.apply(parent, tmp_path / "out", recipe, seed=0, device="cpu")


# Contamination --------------------------------------------------------------------------------------------------------


def naive(documents: list[str], passage: str) -> bool:
    """The rule again: text between spaces, searched as text."""

    def spaced(text: str) -> str:
        return " " + " ".join(re.sub(r"[^\w]", " ", text.lower()).split()) + " "

    words = spaced(passage).split()
    length = min(50, len(words))
    pieces = [" " + " ".join(words[i : i + length]) + " " for i in range(len(words) - length + 1)]
    return len(words) >= 8 and any(piece in spaced(document) for piece in pieces for document in documents)


def test_the_search_agrees_with_a_plain_one():
    chance = random.Random(1)
    documents = [" ".join(chance.choices("abc", k=chance.randrange(5, 200))) for _ in range(60)]
    passages = []
    for length in (7, 8, 9, 12, 13, 49, 50, 51, 70) * 40:
        source = chance.choice(documents).split()
        start = chance.randrange(max(1, len(source) - length))
        words = source[start : start + length]
        for _ in range(chance.randrange(3)):
            words[chance.randrange(len(words))] = chance.choice("abcd")
        passages.append(" ".join(words))
    found = contamination.found_in(documents, passages)
    held = [any(hash(run) in found for run in contamination.runs(passage)) for passage in passages]
    assert held == [naive(documents, passage) for passage in passages]
    assert 50 < sum(held) < len(held) - 50


def sentence(seed: int, words: int) -> str:
    return " ".join(f"word{random.Random(f'{seed}-{i}').randrange(9999)}" for i in range(words))


LONG, QUESTION = sentence(0, 120), "Question: what colour has the old house by the sea?\nAnswer: green"
OTHER = [sentence(number, 90) for number in range(1, 20)]
FOUND = {
    "a document": (f"Before it. {LONG} And after it.", LONG),
    "a piece of a long document": (" ".join(LONG.split()[31 : 31 + RUN]), LONG),
    "a question with its answer": (f"{OTHER[1]} {QUESTION} {OTHER[2]}", QUESTION),
    "in other letters and punctuation": (
        "question what COLOUR has: the old house, by (the sea)? answer green",
        QUESTION,
    ),
}
NOT_FOUND = {
    "nothing": ("", LONG),
    "a shorter piece of a long document": (" ".join(LONG.split()[31 : 31 + RUN - 1]), LONG),
    "a question with another answer": (QUESTION.replace("green", "red"), QUESTION),
    "a passage that goes on in the next document": (QUESTION.split("\n")[0], QUESTION.split("\n")[1]),
    "words inside words": ("a" + QUESTION + "er", QUESTION),
    "what is too short to tell": ("the answer is a green house by the sea", "a green house by the sea"),
}


def calibration(folder: Path, documents: list[str], samples: int = 2) -> Calibration:
    return Calibration(text_of(folder, documents), samples, 8)


@pytest.mark.parametrize("name", FOUND)
def test_a_leaked_passage_is_an_error_that_quotes_it(tmp_path, name):
    document, passage = FOUND[name]
    suites = {"clean": Suite([OTHER[0]]), "scores": Suite([OTHER[3], passage, OTHER[4]])}
    with pytest.raises(UserError) as caught:
        contamination.report({"general": calibration(tmp_path, [*OTHER[5:], document])}, suites)
    message = str(caught.value)
    assert "calibration set 'general' (dataset 'mine', split 'calibration') holds 1 of the 3 passages" in message
    assert f"the suite 'scores' evaluates, such as '{' '.join(passage.split())[:300]}" in message


@pytest.mark.parametrize("name", NOT_FOUND)
def test_text_that_is_not_evaluated_is_no_leak(tmp_path, name):
    document, passage = NOT_FOUND[name]
    suites = {"scores": Suite([passage, OTHER[0]]), "elsewhere": Suite([], "no network")}
    sets = {"general": calibration(tmp_path, [*OTHER[5:], document]), "few": calibration(tmp_path / "b", OTHER[5:], 1)}
    short = int(len(passage.split()) < SHORTEST)
    report = contamination.report(sets, suites)
    assert report["suites"] == {
        "scores": {"passages": 2 - short, "too_short": short},
        "elsewhere": {"not_checked": "no network"},
    }
    few = {"dataset": "mine", "config": None, "split": "calibration", "documents": 14, "samples": 1, "length": 8}
    assert report["calibrations"]["few"] == few | {"seed": 1234, "found": {"scores": 0}}
    assert report["calibrations"]["general"]["documents"] == (15 if document else 14)


# The script, on the demo's language -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    from espalier.demo.dataset import Recipe, write

    folder = tmp_path_factory.mktemp("world")
    sizes = {"pretrain_documents": 0, "instruct_pairs": 1, "encoder_texts": 1, "glue_train": 1, "glue_validation": 12}
    write(folder, Recipe(seed=3, calibration_documents=1000, heldout_documents=60, items_per_task=60, **sizes))
    return folder


def check(world: Path, output: Path, leak: str | None = None) -> subprocess.CompletedProcess:
    """Run the check on the world's suites, with one more document in the calibration text, where torch is absent."""
    calibrated = output.with_name("data")
    documents = [json.loads(line)["text"] for line in (world / "calibration.jsonl").read_text().splitlines()]
    text_of(calibrated, [*documents, *([leak] if leak else [])])
    dataset = {"name": "world", "source": "demo", "path": str(world)}
    tasks = ["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
    suites = {
        "zero-shot": {"evaluate": "harness", "dataset": dataset, "tasks": tasks},
        "heldout": {"evaluate": "perplexity", "text": {"dataset": dataset, "split": "heldout"}},
        "glue-rte": {"evaluate": "glue", "dataset": dataset, "task": "rte"},
        "missing": {"evaluate": "perplexity", "text": {"dataset": dataset, "split": "elsewhere"}},
    }
    text = {"dataset": {"name": "mine", "source": "local", "path": str(calibrated)}, "split": "calibration"}
    sets = {"general": {"text": text, "samples": 20, "length": 16}}
    (output.parent / "torch.py").write_text("raise ImportError('torch must not be imported here')\n")
    command = [sys.executable, ROOT / "workflow/scripts/check_calibration.py", "--output", output]
    command += ["--calibrations", json.dumps(sets), "--suites", json.dumps(suites)]
    environment = {"PYTHONPATH": f"{output.parent}:{ROOT / 'workflow'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


def test_the_demo_calibrates_on_no_evaluated_text(world, tmp_path):
    run = check(world, tmp_path / "calibration.json")
    assert run.returncode == 0, run.stderr
    assert "warning: the suite 'missing' is not checked against calibration text. The dataset 'world'" in run.stderr
    report = json.loads((tmp_path / "calibration.json").read_text())
    found = report["calibrations"]["general"]["found"]
    assert found == {"zero-shot": 0, "heldout": 0, "glue-rte": 0}
    choices = 60 * (2 + 2 + 4 + 2 + 4 + 4 + 4)
    assert sum(report["suites"]["zero-shot"].values()) == choices
    assert report["suites"]["zero-shot"]["passages"] > 0.9 * choices
    assert report["suites"]["heldout"] == {"passages": 60, "too_short": 0}
    assert report["suites"]["glue-rte"] == {"passages": 12, "too_short": 0}
    assert "no file" in report["suites"]["missing"]["not_checked"]


def line(file: Path) -> dict:
    return json.loads(file.read_text().splitlines()[7])


LEAKS = {
    "heldout": lambda world: line(world / "heldout.jsonl")["text"],
    "glue-rte": lambda world: "{sentence1} {sentence2}".format(**line(world / "glue/rte/validation.jsonl")),
    "zero-shot": lambda world: (
        lambda row: f"Question: {row['question']}\nAnswer: {row['choices']['text'][ord(row['answerKey']) - 65]}"
    )(line(world / "tasks/arc_easy.jsonl")),
}


@pytest.mark.parametrize("suite", LEAKS)
def test_a_leak_into_the_demo_stops_the_job(world, tmp_path, suite):
    leak = LEAKS[suite](world)
    run = check(world, tmp_path / "calibration.json", leak=f"Read on.\n{leak}\nThe end.")
    assert run.returncode == 1
    assert f"passages that the suite '{suite}' evaluates" in run.stderr.splitlines()[-1]
    assert not (tmp_path / "calibration.json").exists()
