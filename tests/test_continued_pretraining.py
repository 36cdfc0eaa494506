"""Continued pretraining: packing against a naive packer, positions, the loss on all tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tiny
from espalier import checkpoints, hub_cache
from espalier.data import Text
from espalier.document_stream import Documents, Windows
from espalier.errors import UserError
from espalier.recipes import build
from espalier.tune import continued_pretraining
from training_runs import data, write
from training_runs import recipe as recipe_of

DOCUMENTS = ["red cat", "", "the dog sat on the mat", "  ", "é ran", "a", "blue " * 9]
END = 256


def text_of(folder: Path, documents: list[str], split: str = "text") -> Text:
    write(folder / f"{split}.jsonl", [{"text": one} for one in documents])
    return build(Text, {"dataset": {"name": "d", "source": "local", "path": str(folder)}, "split": split}, "text")


def packed(documents: list[str], length: int, count: int) -> list[list[int]]:
    """Return the first windows of the documents said over and over."""
    tokenizer, tokens = tiny.tokenizer(), []
    while len(tokens) < length * count:
        for document in documents:
            if document.strip():
                tokens += [*tokenizer(document)["input_ids"], END]
    return [tokens[i * length : (i + 1) * length] for i in range(count)]


@pytest.mark.parametrize("length", [2, 7, 16, 300])
def test_windows_are_those_of_a_naive_packer(tmp_path, length):
    windows = Windows(text_of(tmp_path, DOCUMENTS), tiny.tokenizer(), length)
    count = 3 * 110 // length + 2
    expected = packed(DOCUMENTS, length, count)
    assert [one for _ in range(count) for one in windows.take(1)] == expected
    tokens = sum(len(tiny.tokenizer()(one)["input_ids"]) + 1 for one in DOCUMENTS if one.strip())
    assert windows.passes == (length * count - 1) // tokens
    assert Windows(text_of(tmp_path, DOCUMENTS), tiny.tokenizer(), length).take(count) == expected


@pytest.mark.parametrize("taken", range(0, 30, 3))
def test_a_position_leads_back_to_the_same_windows(tmp_path, taken):
    text = text_of(tmp_path, DOCUMENTS)
    windows = Windows(text, tiny.tokenizer(), 10)
    windows.take(taken)
    position = json.loads(json.dumps(windows.position()))
    rest = windows.take(25)
    again = Windows(text, tiny.tokenizer(), 10)
    again.seek(position)
    assert again.take(25) == rest
    assert again.passes == windows.passes


def test_going_on_tokenizes_nothing_anew_and_reads_line_by_line(tmp_path):
    words = [f"w{i}" for i in range(50)]
    text, seen = text_of(tmp_path, words), []

    class Spy:
        eos_token_id = END

        def __call__(self, document, **_):
            seen.append(document)
            return {"input_ids": [1, 2, 3]}

    windows = Windows(text, Spy(), 8)
    windows.take(5)
    assert seen == words[:10], "as many documents as the windows need, and no more"
    position = windows.position()
    seen.clear()
    again = Windows(text, Spy(), 8)
    again.seek(position)
    again.take(1)
    assert seen == words[10:12]


def test_a_long_document_is_not_copied_for_each_of_its_windows(tmp_path):
    text = text_of(tmp_path, ["blue " * 40, "red"])
    windows = Windows(text, tiny.tokenizer(), 10)
    expected = packed(["blue " * 40, "red"], 10, 30)
    begun = windows.take(1)
    held = windows.pending
    assert begun + windows.take(15) == expected[:16]
    assert windows.pending is held
    assert len(held) == 201
    assert windows.position()["pending"] == held[160:]
    assert windows.take(14) == expected[16:]
    assert len(windows.pending) < 220, "what was taken goes when the next document comes"


def test_documents_of_the_hub_are_streamed(tmp_path, monkeypatch):
    """A stream of the datasets library, over files of this machine, stands for one of the hub."""
    import datasets

    write(tmp_path / "text.jsonl", [{"text": f"document {i}"} for i in range(20)])
    asked = []

    def builder_of(name, config, revision):
        asked.append((name, config, revision))
        return datasets.load_dataset_builder("json", data_files=str(tmp_path / "text.jsonl"))

    monkeypatch.setattr(hub_cache, "builder_of", builder_of)
    hub = {"name": "d", "source": "hub", "id": "someone/words", "revision": "a" * 40}
    text = build(Text, {"dataset": hub, "split": "train", "config": "small"}, "text")
    first = Documents(text)
    iterator = iter(first)
    begun = [next(iterator) for _ in range(7)]
    position = json.loads(json.dumps(first.position()))
    second = Documents(text)
    second.seek(position)
    assert [*begun, *second] == [f"document {i}" for i in range(20)]
    assert asked[0] == ("someone/words", "small", "a" * 40)


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("parent") / "model", hidden=32)


def recipe(folder: Path, **options) -> continued_pretraining.Recipe:
    values = recipe_of("continued-pretraining", data(folder), **options)
    return build(continued_pretraining.Recipe, {k: v for k, v in values.items() if k != "tune"}, "recipe")


def test_first_loss_is_on_all_tokens_but_the_first_of_a_window(parent, tmp_path):
    chosen = recipe(tmp_path / "data", steps=1, validation=None)
    report = continued_pretraining.apply(parent, tmp_path / "out", chosen, seed=0, device="cpu")
    model, losses = checkpoints.load(parent, "cpu").model, []
    documents = [json.loads(line)["text"] for line in (tmp_path / "data/text.jsonl").read_text().splitlines()]
    for window in packed(documents, 24, 5):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([window])).logits[0].double()
        losses += [-logits[i - 1].log_softmax(0)[window[i]].item() for i in range(1, 24)]
    assert report["losses"] == [pytest.approx(sum(losses) / len(losses), abs=2e-5)]
    assert (report["tokens"], report["validation_windows"], report["kept_step"]) == (120, 0, 1)


def test_text_is_learned_and_the_end_of_data_counted(parent, tmp_path):
    chosen = recipe(tmp_path / "data", steps=40, autocast=True, gradient_checkpointing=True)
    report = continued_pretraining.apply(parent, tmp_path / "out", chosen, seed=0, device="cpu")
    assert report["losses"][-1] < 0.6 * report["losses"][0]
    documents = [json.loads(line)["text"] for line in (tmp_path / "data/text.jsonl").read_text().splitlines()]
    tokens = sum(len(tiny.tokenizer()(one)["input_ids"]) + 1 for one in documents)
    assert report["ends_of_data"] == (40 * 5 * 24 - 1) // tokens >= 2
    assert report["kept_step"] == min(report["validation"], key=lambda one: one["loss"])["step"]
    assert report["validation_windows"] == 3


MISTAKES = {
    "no documents": (["", " "], {}, "has no documents to train on"),
    "another column": (["a"], {"text": {"column": "txet"}}, "no column 'txet'. Did you mean 'text'"),
    "a split that is not there": (["a"], {"text": {"split": "texts"}}, "Did you mean 'text'"),
    "too short to validate on": (["a"], {"validation": {}}, "shorter than one window of 24 tokens"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_refusals(parent, tmp_path, mistake):
    documents, changes, message = MISTAKES[mistake]
    plain = recipe_of("continued-pretraining", data(tmp_path), validation=None)
    for key, change in changes.items():
        plain[key] = {**plain["text"], **change}
    text_of(tmp_path, documents)
    chosen = build(continued_pretraining.Recipe, {k: v for k, v in plain.items() if k != "tune"}, "recipe")
    with pytest.raises(UserError, match=message):
        continued_pretraining.apply(parent, tmp_path / "out", chosen, seed=0, device="cpu")


def test_a_damaged_line_is_named(tmp_path):
    text = text_of(tmp_path, ["a", "b"])
    with (tmp_path / "text.jsonl").open("a") as stream:
        stream.write('{"text": "c\n')
    with pytest.raises(UserError, match=r"text.jsonl: the line at byte 28 is not valid JSON"):
        list(Documents(text))
