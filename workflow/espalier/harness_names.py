"""Names of the tasks that the installed lm-evaluation-harness brings, and their data sets, read from its files.

The harness's own index takes seconds, and torch. Here its files are searched for what declares a name: at the start of
a line `task:`, `group:` or `tag:`. Every name of the index is found so, and a few more, which only templates declare.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec

from espalier.errors import did_you_mean
from espalier.hub import Item

DECLARATION = re.compile(r"^[\"']?(?:task|group|tag)[\"']?[ \t]*:(.*(?:\n[ \t]*-.*)*)", re.MULTILINE)
NAME = re.compile(r"[^\s\[\]{},\"'-][^\s\[\]{},\"']*")
COMMENT = re.compile(r"(?:^|\s)#.*")
OTHER_FILES = (".py", ".pyc", ".md", ".sh", ".ipynb")


def mistakes(items: Iterable[Item]) -> list[str]:
    """Return a sentence about each task among `items` that the harness does not have, with the keys that name it."""
    wanted = {item.id: item for item in items if item.kind == "task"}
    missing = set(wanted)
    if not wanted or not installed():
        return []
    for _, declared in _declarations(tuple(sorted(wanted))):
        missing -= declared
        if not missing:
            return []
    return [
        f"{', '.join(f'{key}.tasks' for key in wanted[name].needed_by)}: the lm-evaluation-harness has no task"
        f" '{name}'.{did_you_mean(name, names())}"
        for name in sorted(missing)
    ]


def installed() -> bool:
    return find_spec("lm_eval") is not None


def names() -> set[str]:
    """Return all names of tasks, groups and tags that the harness's files declare."""
    return set(_files_by_name())


def data_sets(name: str) -> set[str]:
    """Return the ids of the data sets that a task reads, or the tasks of a group or tag, as far as its files say so."""
    if not installed():
        return set()
    found, seen, left = set(), set(), [name]
    while left:
        seen.add(one := left.pop())
        for file in _files_by_name().get(one, ()):
            content = _content(file)
            tags = content.get("tag") or ()
            if one in (content.get("task"), *([tags] if isinstance(tags, str) else tags)):
                found.add(content.get("dataset_path"))
            elif content.get("group") == one:
                left += set(_members(content)) - seen
    return {one for one in found if isinstance(one, str)}


def _members(group: dict) -> Iterator[str]:
    """Yield the names that a group lists, also in groups inside it."""
    members = group.get("task") or ()
    for member in [members] if isinstance(members, str) else members:
        if isinstance(member, str):
            yield member
        elif isinstance(member.get("task"), str):
            yield member["task"]
        else:
            yield from _members(member)


def _content(file: str) -> dict:
    """Return what a file of the harness says, with what it includes; functions that it names are left out."""
    import yaml

    class Loader(yaml.CSafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda *_: None)
    with open(os.path.join(_folder(), file), encoding="utf-8", errors="replace") as stream:
        own = yaml.load(stream, Loader) or {}
    included = own.get("include") or ()
    whole: dict = {}
    for one in [included] if isinstance(included, str) else included:
        whole |= _content(os.path.join(os.path.dirname(file), one))
    return whole | own


def _folder() -> str:
    """Return the folder of the harness's tasks; imports nothing of it."""
    return os.path.join(find_spec("lm_eval").submodule_search_locations[0], "tasks")


@cache
def _files_by_name() -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for file, declared in _declarations():
        for one in declared:
            files.setdefault(one, []).append(file)
    return files


def _declarations(first: tuple[str, ...] = ()) -> Iterator[tuple[str, set[str]]]:
    """Yield each file and the names that it declares; files with a word of `first` in their path come first."""
    folder = _folder()
    words = {word for name in first for word in re.split(r"[^a-z0-9]+", name.lower()) if len(word) > 2}
    for file in sorted(_files(folder), key=lambda file: not any(word in file for word in words)):
        with open(os.path.join(folder, file), encoding="utf-8", errors="replace") as stream:
            yield (
                file,
                {
                    name
                    for found in DECLARATION.findall(stream.read())
                    for line in found.splitlines()
                    for name in NAME.findall(COMMENT.sub("", line))
                },
            )


@cache
def _files(folder: str) -> list[str]:
    """Return the files below a folder, relative to it, that may declare a name."""
    found = []
    for path, _, files in os.walk(folder):
        inside = os.path.relpath(path, folder)
        found += [os.path.join(inside, file) for file in files if not file.endswith(OTHER_FILES)]
    return sorted(found)
