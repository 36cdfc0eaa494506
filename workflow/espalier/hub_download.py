"""Prefetch: what a study needs of the hub goes into the hub's cache, and what was found there into the manifest.

Commits are pinned: a task of the lm-evaluation-harness, which names none, keeps the one that its first prefetch found.
Every file's checksum is compared with the hub's. Finished files stay when a prefetch ends early, and the next one goes
on from there.
"""

from __future__ import annotations

import glob
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier import folders, harness_names, hub_cache, hub_questions
from espalier.errors import UserError
from espalier.files import read_json, sha256, write_json
from espalier.hub import Item, say
from espalier.hub_files import Wanted, download, listed, tried
from espalier.hub_questions import Answer
from espalier.progress import progress

if TYPE_CHECKING:
    from datasets import DatasetBuilder


def prefetch(study: str, items: list[Item], file: Path) -> dict:
    """Download all items that are not in the cache yet, write the manifest to `file`, and return it.

    Raises UserError for what cannot be had, before anything large is downloaded where that can be known.
    """
    earlier = read_json(file) if file.is_file() else {"items": [], "tasks": []}
    _make_roots()
    known = _known(earlier)
    answers = _answers(items)
    models = {item: answers[item].files for item in items if item.kind == "model"}
    data = {item: answers[item] for item in items if item.kind == "dataset"}
    _refuse_foreign_code(models, known)
    files = [one for item in (*models, *data) for one in answers[item].files]
    _check_room(files, list(data.values()))
    sums = download(files, known)
    found = [_entry(item, files=listed(part, sums)) for item, part in models.items()]
    for item, (part, builder) in progress(data.items(), "prefetch, data sets prepared", len(data)):
        found.append(_entry(item, **_prepared(item, builder, known), downloads=listed(part, sums)))
    tasks = [item for item in items if item.kind == "task"]
    found += _of_tasks(tasks, earlier, known)
    manifest = {"study": study, "items": found, "tasks": sorted(item.id for item in tasks)}
    write_json(file, manifest)
    return manifest


def _answers(items: list[Item]) -> dict[Item, Answer]:
    """Return what the hub says of the items; raises one UserError with a line for each that cannot be had."""
    answers, refused = hub_questions.ask(items)
    if mistakes := harness_names.mistakes(items) + refused:
        raise UserError("\n".join(mistakes))
    return answers


def _entry(item: Item, **more: Any) -> dict:
    """Return an item of the manifest."""
    plain = {"arguments": item.arguments, "by_task": False, "tasks": [], "splits": []}
    return {**asdict(item), "needed_by": list(item.needed_by), **plain, **more}


def _known(earlier: dict) -> dict[tuple[str, int], str]:
    """Return the sha256 of files by path and size, from the earlier manifest; tables damaged since are removed."""
    root = hub_cache.roots()["datasets"]
    known = {}
    for item in earlier["items"]:
        files = [*item["files"], *item.get("downloads", [])]
        if "folder" in item and any(hub_cache.size_of(root / one["path"]) != one["size"] for one in item["files"]):
            shutil.rmtree(root / item["folder"], ignore_errors=True)
            files = item["downloads"]
        known |= {(one["path"], one["size"]): one["sha256"] for one in files}
    return known


def _refuse_foreign_code(models: dict[Item, list[Wanted]], known: dict) -> None:
    """Raise UserError for a model that runs code of another repository, whose newest commit would be taken."""
    trusted = {item: files for item, files in models.items() if item.trust_remote_code}
    configs = {item: one for item, files in trusted.items() for one in files if one.path == "config.json"}
    download(list(configs.values()), known)
    for item, one in configs.items():
        classes = read_json(hub_cache.roots()["hub"] / one.place).get("auto_map", {}).values()
        names = [
            name for some in classes for name in (some if isinstance(some, list) else [some]) if isinstance(name, str)
        ]
        foreign = {repository for name in names for repository in name.split("--")[:-1]} - {item.id}
        if foreign:
            raise UserError(
                f"The {say(item)} runs code of another repository, {', '.join(sorted(foreign))}, whose commit cannot be"
                " pinned: name the path of a copy of the model that holds this code, and whose config.json says so."
            )


# Room ----------------------------------------------------------------------------------------------------------------


def _make_roots() -> None:
    """Make the folders of the cache; raises UserError if one cannot be written: a home folder often has a quota."""
    folders.check_caches(hub_cache.roots().values())
    for root in hub_cache.roots().values():
        root.mkdir(parents=True, exist_ok=True)


def _check_room(files: list[Wanted], data: list[Answer]) -> None:
    """Raise UserError if the disk cannot hold what is not in the cache yet: files, and tables prepared from them."""
    roots = hub_cache.roots()
    absent = {one for one in files if not (roots["hub"] / one.place).exists()}
    # A table is about as large as its files, unless the data set says what it will be.
    tables = [
        builder.info.dataset_size or sum(one.size for one in part)
        for part, builder in data
        if not Path(builder.cache_dir).exists()
    ]
    needed = {"hub": sum(one.size for one in absent), "datasets": sum(tables)}
    disks: dict[int, tuple[int, Path]] = {}
    for root, path in roots.items():
        total, _ = disks.get(path.stat().st_dev, (0, path))
        disks[path.stat().st_dev] = total + needed[root], path
    for size, path in disks.values():
        free = shutil.disk_usage(path).free
        if size > free:
            raise UserError(
                f"The study needs {size / 1e9:.1f} GB more in the hub's cache, and the disk of {path} has"
                f" {free / 1e9:.1f} GB free: make room, or set HF_HOME to a folder on a larger disk."
            )


# Data sets -----------------------------------------------------------------------------------------------------------


def _prepared(item: Item, builder: DatasetBuilder, known: dict) -> dict:
    """Prepare a data set's tables from its files; return folder, splits and files for the manifest."""
    root = hub_cache.roots()["datasets"]
    folder = Path(builder.cache_dir)
    tried(builder.download_and_prepare, say(item))
    splits = sorted(builder.info.splits)
    hub_questions.check_splits(item, splits)
    files = []
    # Who works with a table's rows may leave more beside it, such as the datasets library itself.
    for file in sorted([folder / "dataset_info.json", *folder.glob(f"{glob.escape(builder.dataset_name)}-*.arrow")]):
        path, size = str(file.relative_to(root)), file.stat().st_size
        digest = known.get((path, size)) or sha256(file)
        files.append({"root": "datasets", "path": path, "size": size, "sha256": digest})
    return {"folder": str(folder.relative_to(root)), "splits": splits, "files": files}


def _of_tasks(tasks: list[Item], earlier: dict, known: dict) -> list[dict]:
    """Prefetch what the tasks of the harness load, by loading them; return items of the manifest."""
    found: dict[str, tuple[dict, DatasetBuilder]] = {}  # by what a task asks for
    by_task = [one for one in earlier["items"] if one["by_task"]]
    pinned = {(one["id"], one["arguments"].get("revision")): one["revision"] for one in by_task}

    def load(path: str, name: str | None = None, *, split: str | None = None, streaming: bool = False, **arguments):
        asked = {"id": path, "config": name, "arguments": hub_cache.material(arguments), "by_task": True}
        if str(asked) not in found:
            source = path, asked["arguments"].get("revision")
            if source not in pinned:
                pinned[source] = _commit(*source, task)
            item = Item("dataset", path, name, pinned[source], needed_by=task.needed_by)
            files, builder = hub_questions.data_files(item, **hub_cache.unpinned(asked["arguments"]))
            _check_room(files, [Answer(files, builder)])
            sums = download(files, known)
            entry = {**_entry(item), **asked, **_prepared(item, builder, known), "downloads": listed(files, sums)}
            found[str(asked)] = entry, builder
        entry, builder = found[str(asked)]
        entry["tasks"] = sorted({*entry["tasks"], task.id})
        entry["needed_by"] = sorted({*entry["needed_by"], *task.needed_by})
        return builder.as_streaming_dataset(split=split) if streaming else builder.as_dataset(split=split)

    if tasks:
        from espalier import harness_tasks

        with harness_tasks.only_errors():
            _, manager = harness_tasks.named([item.id for item in tasks], load)
            for task in progress(tasks, "prefetch, tasks of the harness"):
                manager.load([task.id])
    return [entry for entry, _ in found.values()]


def _commit(name: str, revision: str | None, task: Item) -> str | None:
    """Return the commit that a task's data set has now at a revision, or newest; None for files not of the hub."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as FORMATS
    from huggingface_hub import HfApi

    if name in FORMATS or Path(name).exists():  # such as json; also a data set of the hub may have no owner in its name
        return None
    asked = revision or "main"
    return tried(lambda: HfApi().dataset_info(name, revision=asked).sha, f"data set {name} of the {say(task)}")
