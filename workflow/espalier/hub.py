"""What a study needs of the hub, and whether it lies in the cache: asked before jobs start that have no internet.

`snakemake prefetch` (hub_download.py) writes the manifest, results/{study}/prefetch.json. `check` compares it with the
study and with the cache, by names and sizes alone, so that it costs a dry-run nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from espalier import glue_tasks, hub_cache
from espalier.data import Dataset
from espalier.errors import UserError, did_you_mean
from espalier.files import read_json

if TYPE_CHECKING:
    from espalier.study import Study


@dataclass(frozen=True)
class Item:
    """A model, a data set, or a task of the lm-evaluation-harness, whose data set only the harness knows."""

    kind: Literal["model", "dataset", "task"]
    id: str  # of the hub; of a task, its name
    config: str | None = None  # subset of a data set
    revision: str | None = None  # the commit; of a task's data set prefetch finds it
    splits: tuple[str, ...] = ()  # of a data set, those that are read by their names
    needed_by: tuple[str, ...] = ()  # entries of the study's config
    trust_remote_code: bool = False  # whether code that a model carries may run
    convert: bool = False  # whether a model's weights are in PyTorch's own format
    data_files: tuple[str, ...] = ()  # of a data set, the only files that are read; none: those of the config

    @property
    def arguments(self) -> dict[str, Any]:
        """What `datasets.load_dataset` gets beside name, config and revision, as the manifest holds it."""
        return hub_cache.arguments_of(self.data_files)


def needed(study: Study) -> list[Item]:
    """Return what the study's jobs read of the hub, each thing once, in a fixed order.

    Of models, recipes and workloads those that are measured; suites and calibration sets all, because each is compared
    with each.
    """
    found: dict[tuple, Item] = {}
    for item in _named(study):
        key = (item.kind, item.id, item.config or "", item.revision or "", item.convert, item.data_files)
        have = found.get(key, item)
        splits, needed_by = {*have.splits, *item.splits}, {*have.needed_by, *item.needed_by}
        found[key] = dataclasses.replace(
            item,
            splits=tuple(sorted(splits)),
            needed_by=tuple(sorted(needed_by)),
            trust_remote_code=have.trust_remote_code or item.trust_remote_code,
        )
    return [found[key] for key in sorted(found)]


def _named(study: Study) -> Iterator[Item]:
    resolved = study.resolved
    models = {one.model for one in study.wanted}
    tokens = {token for one in study.wanted for token in one.chain.split("+")[1:]}
    workloads = {one.name for one in study.wanted if one.kind == "profile"}
    for name in models:
        if (entry := resolved.models[name]).hub:
            yield Item(
                "model",
                entry.hub,
                revision=entry.revision,
                needed_by=(f"models.{name}",),
                trust_remote_code=entry.trust_remote_code,
                convert=entry.convert,
            )
    for name, calibration in resolved.calibrations.items():
        yield from _datasets(calibration, f"calibrations.{name}")
    sections = {
        "models": {name: step for name, step in resolved.pretrained.items() if name in models},
        "recipes": {name: step for name, step in resolved.recipes.items() if name in tokens},
        "suites": resolved.suites,
        "workloads": {name: step for name, step in resolved.workloads.items() if name in workloads},
    }
    for section, steps in sections.items():
        for name, step in steps.items():
            yield from _datasets(step.recipe, f"{section}.{name}")
            yield from (Item("task", task, needed_by=(f"{section}.{name}",)) for task in _tasks(step.recipe))


def _tasks(recipe: Any) -> list[str]:
    """Return the tasks of the harness that a recipe reads by their names."""
    return recipe.tasks if hasattr(recipe, "tasks") and recipe.dataset is None else []


def _datasets(part: Any, where: str) -> Iterator[Item]:
    """Yield the hub's data sets that a recipe, or a part of one such as a text, reads."""
    dataset = getattr(part, "dataset", None)
    if isinstance(dataset, Dataset) and dataset.source == "hub":
        # A GLUE task is a config of the data set; its evaluation reads the validation splits.
        config = part.task if hasattr(part, "task") else getattr(part, "config", None)
        splits = part.split.split("+") if hasattr(part, "split") else glue_tasks.TASKS[part.task].splits.values()
        names = tuple(split.partition("[")[0] for split in splits)
        if names == ("all",):  # what the datasets library calls all splits together
            names = ()
        by = (where, f"datasets.{dataset.name}")
        yield Item("dataset", dataset.id, config, dataset.revision, names, by, data_files=dataset.files)
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, Dataset):
            yield from _datasets(value, where)


def as_json(study: Study) -> str:
    """Return what the study needs as the script of prefetch takes it."""
    return json.dumps({"items": [dataclasses.asdict(item) for item in needed(study)]})


def manifest_file(study: Study) -> Path:
    return study.root / "prefetch.json"


def environment(study: Study) -> dict[str, str]:
    """Return the environment of jobs that have no internet: the hub is off, and they know what was prefetched."""
    return {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", **pins(study)}


def pins(study: Study) -> dict[str, str]:
    """Return what of the environment tells every job of the study, also one with internet, what was prefetched."""
    return {hub_cache.MANIFEST: str(manifest_file(study).resolve())}


@functools.cache  # asked for once a job; the manifest does not change while jobs are made out
def commits(study: Study, section: str, name: str) -> str:
    """Return the commits that prefetch pinned for a recipe's tasks of the harness, as JSON by data set.

    It is the parameter that reruns a job when a commit changes. A task that asks for a revision, such as a branch, has
    that in the data set's name: id@revision.
    """
    tasks, file = set(_tasks(study.step(section, name).recipe)), manifest_file(study)
    items = read_json(file)["items"] if tasks and file.is_file() else []
    pinned = {
        "@".join(filter(None, (one["id"], one["arguments"].get("revision")))): one["revision"]
        for one in items
        if one["by_task"] and one["revision"] and tasks.intersection(one["tasks"])
    }
    return json.dumps(pinned, sort_keys=True)


def written(study: Study) -> list[Path]:
    """Return the folders of the hub's cache that the study's jobs write to, as the datasets library does."""
    return [hub_cache.roots()["datasets"]] if any(item.kind != "model" for item in needed(study)) else []


def check(study: Study, items: list[Item] | None = None) -> None:
    """Raise one UserError that names each of the items, or of all that the study needs, that the cache lacks."""
    if missing := lacking(study, needed(study) if items is None else items):
        cache = hub_cache.roots()["hub"].parent
        names = "; ".join(f"{say(item)}: {lack}" for item, lack in missing.items())
        raise UserError(
            f"{study.file}: the jobs cannot ask the hub, and its cache ({cache}) lacks what they need: {names}."
            f" Where there is internet, type: snakemake prefetch --configfile {shlex.quote(study.configfile)}"
        )


def lacking(study: Study, items: list[Item]) -> dict[Item, str]:
    """Return those of the items that are not whole in the cache as the study's manifest lists them, and why."""
    file = manifest_file(study)
    manifest = read_json(file) if items and file.is_file() else {"items": [], "tasks": []}
    roots = hub_cache.roots()
    return {item: lack for item in items if (lack := _lack(item, manifest, roots))}


def say(item: Item) -> str:
    """Return what an item is and which entries of the study need it, for a message."""
    config = f", config {item.config}" if item.config else ""
    config += f", files {', '.join(item.data_files)}" if item.data_files else ""
    revision = f" at {item.revision[:12]}" if item.revision else ""
    what = {"model": "model", "dataset": "data set", "task": "harness task"}[item.kind]
    return f"{what} {item.id}{config}{revision} ({', '.join(item.needed_by)})"


def _lack(item: Item, manifest: dict, roots: dict[str, Path]) -> str | None:
    """Return what is wrong with an item, or None if it is there; of several files, the first."""
    if item.kind == "task":
        found = [one for one in manifest["items"] if item.id in one["tasks"]]
        known = item.id in manifest["tasks"]
    else:
        alike = [
            one for one in manifest["items"] if (one["kind"], one["id"], one["by_task"]) == (item.kind, item.id, False)
        ]
        which = (item.config, item.revision, item.arguments, item.convert)
        found = [
            one
            for one in alike
            if (one["config"], one["revision"], one["arguments"], one.get("convert", False)) == which
        ]
        known = bool(found)
        if alike and not known:
            return "prefetched at another revision, config or choice of files only"
    if not known:
        return "never prefetched"
    for split in item.splits:
        if split not in found[0]["splits"]:
            return f"it has no split '{split}'.{did_you_mean(split, found[0]['splits'])}"
    return next((lack for one in found for file in one["files"] if (lack := _file_lack(file, roots))), None)


def _file_lack(file: dict, roots: dict[str, Path]) -> str | None:
    path = roots[file["root"]] / file["path"]
    if (size := hub_cache.size_of(path)) is None:
        return f"{path} is gone"
    return None if size == file["size"] else f"{path} has {size} bytes, not {file['size']}"
