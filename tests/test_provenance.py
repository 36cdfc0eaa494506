"""The code version: what changes it and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from espalier import provenance


@pytest.fixture
def version(tmp_path, monkeypatch):
    """Return a function that hashes a small library of two modules after edits to one of its files."""
    library = tmp_path / "espalier"
    (library / "prune").mkdir(parents=True)
    files = {
        "__init__.py": "",
        "base.py": "def half(x):\n    return x / 2\n",
        "other.py": "VALUE = 1\n",
        "prune/__init__.py": "",
        "prune/depth.py": 'from espalier.base import half\n\ndef score(x):\n    """Score."""\n    return half(x)\n',
        "prune/flap.py": "from .. import base\n",
    }
    script = tmp_path / "script.py"

    def write(changed: dict[str, str]) -> str:
        for name, text in {**files, **changed}.items():
            (library / name).write_text(text)
        script.write_text(changed.get("script.py", "import json\n"))
        for cached in ("_closure", "_tree", "_imports", "_module_file", "_fingerprint"):
            getattr(provenance, cached).cache_clear()
        return provenance.code_version(script, ["espalier.prune.depth"])

    monkeypatch.setattr(provenance, "LIBRARY", library)
    yield write
    for cached in ("_closure", "_tree", "_imports", "_module_file", "_fingerprint"):
        getattr(provenance, cached).cache_clear()


@pytest.mark.parametrize(
    "edit",
    [
        {},
        {"prune/depth.py": '# y\nfrom espalier.base import half\n\ndef score(x):\n    """O."""\n    return half(x)'},
        {"base.py": "def half(x):\n\n    return (x / 2)  # comment\n"},
        {"other.py": "VALUE = 2\n"},
        {"prune/flap.py": "VALUE = 3\n"},
    ],
)
def test_stays(version, edit):
    assert version(edit) == version({})


@pytest.mark.parametrize(
    "edit",
    [
        {"prune/depth.py": "from espalier.base import half\n\ndef score(x):\n    return 2 * half(x)\n"},
        {"base.py": "def half(x):\n    return x / 3\n"},
        {"prune/__init__.py": "VALUE = 1\n"},
        {"script.py": "import sys\n"},
    ],
)
def test_changes(version, edit):
    assert version(edit) != version({})


def test_follows_relative_imports(version):
    version({})
    flap = provenance.LIBRARY / "prune" / "flap.py"
    assert provenance.LIBRARY / "base.py" in provenance._closure(flap)


NESTED = """
class Anything:
    async def anywhere(self, x):
        \"\"\"Do nothing.\"\"\"
        for _ in x:
            while x:
                try:
                    pass
                except ValueError:
                    with x:
                        match x:
                            case 1:
                                if x:
                                    pass
                                else:
                                    from espalier import other
"""


def test_what_is_imported_for_types_alone_is_not_run(version):
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from espalier.other import VALUE\n"
    run = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    from espalier.other import VALUE\n"
    for text, same in ((typed, True), (run, False)):
        found = [version({"prune/depth.py": text, **edit}) for edit in ({}, {"other.py": "VALUE = 2\n"})]
        assert (found[0] == found[1]) is same


def test_imports_and_docstrings_are_found_anywhere(version):
    found = [version({"prune/depth.py": NESTED, **edit}) for edit in ({}, {"other.py": "VALUE = 2\n"})]
    assert found[0] != found[1]
    assert version({"prune/depth.py": NESTED.replace("nothing", "little")}) == found[0]


def test_every_script_has_a_version_of_its_own():
    scripts = sorted((Path(__file__).parents[1] / "workflow" / "scripts").glob("*.py"))
    assert scripts
    assert len({provenance.code_version(script) for script in scripts}) == len(scripts)
