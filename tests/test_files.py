"""Outputs appear whole or not at all."""

from __future__ import annotations

import errno

import pytest

from espalier.errors import UserError
from espalier.files import read_json, whole_file, whole_folder, write_json


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), whole_file(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_nan_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "result.json", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(tmp_path):
    with pytest.raises(UserError, match=r"model could not be written: No space left"), whole_folder(tmp_path / "model"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".model.partial-1").mkdir()
    (tmp_path / ".model.partial-1" / "half").write_text("half")
    (tmp_path / ".result.json.partial-1").write_text("half")
    with whole_folder(tmp_path / "model"):
        pass
    write_json(tmp_path / "result.json", {})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "result.json"]


def test_a_folder_appears_whole(tmp_path):
    with whole_folder(tmp_path / "model") as partial:
        (partial / "a").write_text("1")
        assert not (tmp_path / "model").exists()
    assert (tmp_path / "model" / "a").read_text() == "1"
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "model") as partial:
        (partial / "b").write_text("2")
        raise ZeroDivisionError
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["a"]


@pytest.mark.parametrize("text", ["", "{", '{"a": 1', "\x00\xff"])
def test_damaged_json_is_named(tmp_path, text):
    path = tmp_path / "result.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"result\.json is not valid JSON"):
        read_json(path)
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "none.json")
