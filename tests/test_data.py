"""Datasets and calibration sets."""

from __future__ import annotations

import json

import pytest

from espalier.data import Calibration, Dataset, Text
from espalier.errors import UserError


class Letters:
    """A tokenizer of one token a letter."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.fixture
def dataset(tmp_path):
    rows = [{"text": letter * (1 + i % 5), "other": i} for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + json.dumps({"text": " "}))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    return Dataset("letters", "local", path=str(tmp_path))


def test_calibration_sets_are_nested_seeded_and_exact(dataset):
    def ids(samples, seed=1):
        return Calibration(Text(dataset, "train"), samples, 6, seed).token_ids(Letters())

    assert [len(window) for window in ids(10)] == [6] * 10
    assert ids(10)[:4] == ids(4)
    assert ids(4) == ids(4)
    assert ids(4, seed=2) != ids(4)


def test_a_line_ends_at_a_line_feed_alone(tmp_path):
    texts = ["a\u2028b", "c\u0085d\u000be"]
    lines = [json.dumps({"text": text}, ensure_ascii=False).replace("\\u000b", "\\u000b") for text in texts]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "empty.jsonl").write_text("")
    dataset = Dataset("lines", "local", path=str(tmp_path))
    assert [row["text"] for row in dataset.rows("train")] == texts
    assert dataset.rows("empty") == []


def test_crops_are_pieces_of_single_documents(tmp_path):
    """The document n is the number n again and again, then its place: a crop shows where it was cut."""
    lines = [json.dumps({"text": " ".join(f"{n}.{place}" for place in range(3 * n))}) + "\n" for n in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(lines))

    class Places:
        eos_token_id = None

        def __call__(self, text, add_special_tokens):
            return {"input_ids": text.split()}

    text = Text(Dataset("places", "local", path=str(tmp_path)), "train")
    crops = Calibration(text, 6, 6, windows="crops").token_ids(Places())
    assert sorted(crop[0].split(".")[0] for crop in crops) == list("234567"), "only documents with 6 tokens, once each"
    for crop in crops:
        start = int(crop[0].split(".")[1])
        assert crop == [f"{crop[0].split('.')[0]}.{place}" for place in range(start, start + 6)]
    assert any(not crop[0].endswith(".0") for crop in crops)
    assert crops[:3] == Calibration(text, 3, 6, windows="crops").token_ids(Places())
    with pytest.raises(UserError, match="holds only 6 windows of 6 tokens"):
        Calibration(text, 7, 6, windows="crops").token_ids(Places())


def test_too_small_a_dataset_is_named(dataset):
    with pytest.raises(UserError, match=r"'letters', split 'train', holds only \d+ windows of 6 tokens.*asks for 100"):
        Calibration(Text(dataset, "train"), 100, 6).token_ids(Letters())


def test_missing_split_column_and_damaged_line_are_named(dataset):
    with pytest.raises(UserError, match=r"no file .*trian\.jsonl\. Did you mean 'train'"):
        dataset.rows("trian")
    with pytest.raises(UserError, match=r"has no column 'txt'\. Did you mean 'text'"):
        Text(dataset, "train", column="txt").documents()
    with pytest.raises(UserError, match=r"broken\.jsonl, line 2, is not valid JSON"):
        dataset.rows("broken")
    assert len(Text(dataset, "train").documents()) == 26, "the empty document is left out"


def hub(split: str, config: str | None = None, number: str = "a/b", revision: str = "0" * 40) -> Text:
    return Text(Dataset("name", "hub", id=number, revision=revision), split, config)


def folder(path: str, split: str, config: str | None = None, source: str = "local") -> Text:
    return Text(Dataset("name", source, path=path), split, config)


OVERLAPS = [
    (hub("train"), hub("train"), True),
    (hub("train"), hub("train", revision="1" * 40), True),
    (hub("train"), hub("test"), False),
    (hub("train"), hub("train", number="a/c"), False),
    (hub("train"), hub("train", config="small"), False),
    (hub("train[:100]"), hub("train"), True),
    (hub("train[:100]"), hub("train[:100]"), True),
    (hub("train[:100]"), hub("train[100:200]"), False),
    (hub("train[:100]"), hub("test[:100]"), False),
    (hub("train[:100]+test"), hub("validation+test"), True),
    (folder("x", "train"), folder("./y/../x", "train"), True),
    (folder("x", "train", source="demo"), folder("x", "train"), True),
    (folder("x", "train", "y"), folder("x/y", "train"), True),
    (folder("x", "train"), folder("x", "test"), False),
    (folder("x", "train"), folder("y", "train"), False),
    (folder("x", "train"), hub("train"), False),
]


@pytest.mark.parametrize(("one", "two", "expected"), OVERLAPS, ids=range(len(OVERLAPS)))
def test_texts_of_the_same_rows(one, two, expected):
    assert one.overlaps(two) is two.overlaps(one) is expected


def test_rows_are_read_one_by_one(dataset):
    """The last line of this split is damaged, and is not read before it is asked for."""
    rows = dataset.each("broken")
    assert next(rows) == {"text": "a"}
    with pytest.raises(UserError, match=r"broken\.jsonl, line 2"):
        next(rows)
