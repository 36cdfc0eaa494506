"""Named files of a data set of the hub: these alone are downloaded and read, with the hub and without it."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from espalier import hub, hub_cache, hub_download
from espalier.config import DatasetEntry
from espalier.data import Dataset, Text
from espalier.document_stream import Documents
from espalier.errors import UserError
from espalier.recipes import build
from hub_server import Hub
from hub_study import DEAD, lines, study, use_hub

# A card that says what the whole data set has: not true of some of its files.
CARD = """---
configs:
- config_name: en
  default: true
  data_files: [{split: train, path: "en/train*"}, {split: validation, path: "en/held*"}]
dataset_info:
- config_name: en
  features: [{name: text, dtype: string}]
  splits: [{name: train, num_bytes: 9, num_examples: 9000000}, {name: validation, num_bytes: 9, num_examples: 9}]
  dataset_size: 900000000000000
---
"""


def parquet(*rows: dict) -> bytes:
    written = io.BytesIO()
    datasets.Dataset.from_list(list(rows)).to_parquet(written)
    return written.getvalue()


FORMATS = {
    "jsonl": ("jsonl", lines, ""),
    "jsonl, compressed": ("json.gz", lambda *rows: gzip.compress(lines(*rows)), ""),
    "parquet": ("parquet", parquet, ""),
    "with a card": ("jsonl", lines, CARD),
}


def repository(format: str) -> dict[str, bytes]:
    """Four files of two rows each, numbered through."""
    ending, write, card = FORMATS[format]
    names = [f"en/train.{number}-of-3" for number in range(3)] + ["en/held.0-of-1"]
    rows = ([{"text": f"row {2 * i}"}, {"text": f"row {2 * i + 1}"}] for i in range(4))
    files = {f"{name}.{ending}": write(*some) for name, some in zip(names, rows, strict=True)}
    return files | ({"README.md": card.encode()} if card else {})


def asked_for(client: Hub) -> set[str]:
    """Return the names of the rows' files that were sent."""
    return {Path(path).name.partition(".json")[0].partition(".parquet")[0] for path in client.downloads()} - {
        "README.md",
        ".huggingface.yaml",
        "dataset_infos",
    }


def of_files(tmp_path: Path, revision: str, files: list[str]):
    entry = {"hub": "someone/web", "revision": revision, "files": files}
    text = {"dataset": "web", "split": "train"}
    suites = {"held": {"evaluate": "perplexity", "text": text}}
    return study(tmp_path, {"tiny": "a" * 40, "words": revision}, datasets={"web": entry}, suites=suites)


@pytest.mark.parametrize("format", FORMATS)
def test_named_files_alone_are_read_with_and_without_the_hub(client, tmp_path, monkeypatch, format):
    files = repository(format)
    revision = client.add("datasets", "someone/web", files)
    ending = FORMATS[format][0]
    of = of_files(tmp_path, revision, [f"en/train.0-of-3.{ending}", "en/train.2*"])
    text = of.resolved.suites["held"].recipe.text
    expected = ["row 0", "row 1", "row 4", "row 5"]
    assert text.documents() == expected
    assert asked_for(client) == {"train.0-of-3", "train.2-of-3"}

    use_hub(monkeypatch, client, tmp_path / "other")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other/datasets")
    client.asked.clear()
    (item,) = [one for one in hub.needed(of) if one.kind == "dataset"]
    assert (item.config, item.splits) == (None, ("train",))
    file = hub.manifest_file(of)
    (found,) = hub_download.prefetch("s", [item], file)["items"]
    assert asked_for(client) == {"train.0-of-3", "train.2-of-3"}
    downloads = [Path(one["path"]).name for one in found["downloads"]]
    assert downloads == [f"train.{number}-of-3.{ending}" for number in (0, 2)]
    monkeypatch.setattr(hub, "needed", lambda of: [item])
    hub.check(of)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", DEAD)
    monkeypatch.setenv(hub_cache.MANIFEST, str(file))
    client.asked.clear()
    assert text.documents() == expected
    stream = Documents(text)
    begun = next(iter(stream))
    rest = Documents(text)
    rest.seek(json.loads(json.dumps(stream.position())))
    assert [begun, *rest] == expected
    assert client.asked == []


def test_named_files_are_streamed(client):
    """Continued pretraining reads a document at a time."""
    revision = client.add("datasets", "someone/web", repository("jsonl"))
    web = Dataset("web", "hub", id="someone/web", revision=revision, files=("en/train.1-of-3.jsonl",))
    assert list(Documents(Text(web, "train"))) == ["row 2", "row 3"]
    assert asked_for(client) == {"train.1-of-3"}
    assert Documents(Text(web, "train")).fingerprint() == f"someone/web {revision} en/train.1-of-3.jsonl"


def test_other_files_of_one_commit_are_other_rows(client, tmp_path, monkeypatch):
    """Also with the hub off, where both lie in the cache: the manifest says which is which."""
    revision = client.add("datasets", "someone/web", repository("jsonl"))
    names = [("en/train.0-of-3.jsonl",), ("en/train.1-of-3.jsonl",), ()]
    items = [hub.Item("dataset", "someone/web", revision=revision, data_files=some) for some in names[:2]]
    of = of_files(tmp_path, revision, list(names[0]))
    file = hub.manifest_file(of)
    hub_download.prefetch("s", items, file)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv(hub_cache.MANIFEST, str(file))
    read = [Dataset("web", "hub", id="someone/web", revision=revision, files=some) for some in names]
    assert [row["text"] for one in read[:2] for row in one.rows("train")] == ["row 0", "row 1", "row 2", "row 3"]
    with pytest.raises(UserError, match=r"someone/web \(config None\) is not in .*prefetch.json"):
        read[2].rows("train")
    other = of_files(tmp_path, revision, ["en/train.2-of-3.jsonl"])
    monkeypatch.setattr(hub, "needed", lambda of: [one for one in needed(of) if one.kind == "dataset"])
    with pytest.raises(UserError, match=r"files en/train.2-of-3.jsonl at .* another revision, config or choice of fil"):
        hub.check(other)


needed = hub.needed
WRONG = {
    "a name": (
        ["en/train.0-of-3.jsonl", "en/trian.1-of-3.jsonl"],
        r"'en/trian.1-of-3.jsonl'. Did you mean 'en/train.1",
    ),
    "a pattern": (["en/train.0-of-3.jsonl", "fr/*.jsonl"], r"has no file 'fr/\*.jsonl'\."),
    "all": (["fr/*.jsonl"], r"has no file 'fr/\*.jsonl'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_is_not_there_is_named(client, tmp_path, case):
    files, message = WRONG[case]
    revision = client.add("datasets", "someone/web", repository("jsonl"))
    of = of_files(tmp_path, revision, files)
    with pytest.raises(UserError, match=f"data set someone/web at {revision[:12]} has no file .*") as online:
        of.resolved.suites["held"].recipe.text.documents()
    (item,) = [one for one in hub.needed(of) if one.kind == "dataset"]
    with pytest.raises(UserError, match=message) as before:
        hub_download.prefetch("s", [item], tmp_path / "p.json")
    assert str(online.value) in str(before.value)
    assert asked_for(client) == set()


REFUSED = {
    "a split": ({"split": "validation"}, {}, "names its files, which together are the split 'train'"),
    "a config": ({"split": "train", "config": "en"}, {}, "and not split 'train' of config 'en'"),
    "of a folder": ({"split": "train"}, {"hub": None, "path": "tests"}, "'files' are those of a dataset of the hub"),
    "elsewhere": ({"split": "train"}, {"files": ["../x.jsonl"]}, "'../x.jsonl' is none"),
    "an address": ({"split": "train"}, {"files": ["https://a.org/x"]}, "'https://a.org/x' is none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_named_files_cannot_be_is_refused_in_a_dry_run(tmp_path, case):
    part, changes, message = REFUSED[case]
    entry = {"hub": "someone/web", "revision": "b" * 40, "files": ["en/x.jsonl"]} | changes
    entry = {key: value for key, value in entry.items() if value is not None}
    suites = {"held": {"evaluate": "perplexity", "text": {"dataset": "web", **part}}}
    with pytest.raises(UserError, match=rf"s.yaml: (suites.held.text|datasets.web): .*{message}"):
        study(tmp_path, {"tiny": "a" * 40, "words": "b" * 40}, datasets={"web": entry}, suites=suites)


TRAINED = {
    "lora": {"tune": "lora", "split": "chat", "steps": 1},
    "sft": {"tune": "sft", "config": "en", "steps": 1},
    "a GLUE task": {"tune": "classify", "task": "mnli", "steps": 1},
}


@pytest.mark.parametrize("case", TRAINED)
def test_training_on_what_named_files_are_not_is_refused_in_a_dry_run(tmp_path, case):
    entry = {"hub": "someone/web", "revision": "b" * 40, "files": ["en/x.jsonl"]}
    sections = {"datasets": {"web": entry}, "recipes": {"more": {**TRAINED[case], "dataset": "web"}}}
    with pytest.raises(UserError, match=r"s.yaml: recipes.more: the dataset 'web' names its files"):
        study(tmp_path, {"tiny": "a" * 40, "words": "b" * 40}, suites={}, measure=[], **sections)


OVERLAPS = {
    "the same": (("a.jsonl",), ("b.jsonl", "a.jsonl"), True),
    "others": (("a.jsonl",), ("b.jsonl",), False),
    "a pattern of it": (("a*",), ("ab.jsonl",), True),
    "it of a pattern": (("ab.jsonl",), ("b*", "a*"), True),
    "a split": (("a.jsonl",), (), False),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_texts_overlap_if_they_share_a_file(case):
    *names, expected = OVERLAPS[case]
    texts = [Text(Dataset("web", "hub", id="someone/web", revision="b" * 40, files=some), "train") for some in names]
    assert texts[0].overlaps(texts[1]) is texts[1].overlaps(texts[0]) is expected


def test_the_files_are_part_of_every_recipe_that_reads_them(tmp_path):
    of = of_files(tmp_path, "b" * 40, ["en/x.jsonl"])
    assert json.loads(of.content("suites", "held"))["text"]["dataset"]["files"] == ["en/x.jsonl"]
    assert build(DatasetEntry, {"hub": "x", "revision": "b" * 40}, "d").files == []
