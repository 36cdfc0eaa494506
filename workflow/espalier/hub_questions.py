"""What the hub says of models and data sets before anything of them is downloaded: all that is wrong, at once.

`snakemake prefetch` asks about all that a study needs. A run whose jobs ask the hub themselves asks about what they
read and the cache lacks.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from espalier import harness_names, hub, hub_cache
from espalier.errors import UserError, did_you_mean
from espalier.files import read_json
from espalier.hub import Item, say
from espalier.hub_errors import explained
from espalier.hub_files import Wanted, tried
from espalier.progress import progress

if TYPE_CHECKING:
    from datasets import DatasetBuilder
    from huggingface_hub import RepoFile

    from espalier.study import Study

SIDE_BY_SIDE = 8  # questions
SHOWN = (".", "readme", "license")  # how files begin that a page shows
ATTEMPTS = 2  # before the hub counts as silent


class Answer(NamedTuple):
    """What the hub says of a model or a data set."""

    files: list[Wanted]  # that are to be downloaded; of a task's data set, which the harness opens, unknown
    builder: DatasetBuilder | None = None  # of a data set of the study


def refusals(study: Study, items: list[Item]) -> list[str]:
    """Return a sentence about each of the items that the cache lacks and that jobs could not download.

    If the cache lacks nothing, the hub is not asked.
    """
    _, mistakes = ask([item for item in _things(list(hub.lacking(study, items))) if not _cached(item)])
    return mistakes


def ask(items: list[Item]) -> tuple[dict[Item, Answer], list[str]]:
    """Return what the hub says of models and data sets, and a sentence about each that cannot be had.

    Of a task of the harness the data sets are asked for as far as the harness's files name them. If the hub does not
    answer at all, or not to this token, that is said once.
    """
    asked = _things(items)
    if asked and (error := _silence()):
        return {}, [str(explained(error, say(asked[0])))]
    if any(item.kind == "dataset" for item in asked):
        import datasets  # noqa: F401 (not by several threads at once)
    answers, mistakes = {}, []
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        jobs = {item: pool.submit(_of_model if item.kind == "model" else _of_data_set, item) for item in asked}
        for item, job in progress(jobs.items(), "questions to the hub", len(jobs)):
            try:
                answers[item] = job.result()
            except UserError as error:
                mistakes.append(str(error))
    return answers, list(dict.fromkeys(mistakes))


def _silence() -> Exception | None:
    """Return the error where the hub does not answer at all; None where it answers, whatever it says."""
    import httpx
    from huggingface_hub import constants, get_session

    silence = None
    for _ in range(ATTEMPTS):
        try:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            return None
        except httpx.TransportError as error:
            silence = error
    return silence


def _things(items: list[Item]) -> list[Item]:
    """Return models and data sets; in place of tasks the data sets of the hub that these name, at no revision."""
    by_tasks: dict[str, set[str]] = {}
    for item in items:
        if item.kind == "task":
            for name in harness_names.data_sets(item.id):
                if "/" in name:  # a file's format, such as json, has none
                    by_tasks.setdefault(name, set()).update(item.needed_by)
    named = [Item("dataset", name, needed_by=tuple(sorted(by_tasks[name]))) for name in sorted(by_tasks)]
    return [item for item in items if item.kind != "task"] + named


# What the cache holds ------------------------------------------------------------------------------------------------


def _cached(item: Item) -> bool:
    """Return whether the cache holds a model's weights, or a data set's tables, though no manifest says so."""
    roots = hub_cache.roots()
    if item.kind == "dataset":  # tables lie in {name}/{config}/{version}/{commit}, the name in other letters
        tables = roots["datasets"].glob(f"*/*/*/{item.revision or '*'}/dataset_info.json")
        return not item.data_files and any(_fits(item, file) for file in tables)
    folder = roots["hub"] / hub_cache.snapshot("model", item.id, item.revision)
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    indexes = folder.glob(f"*.{'bin' if item.convert else 'safetensors'}.index.json")
    shards = {name for file in indexes for name in read_json(file)["weight_map"].values()}
    return "config.json" in files and shards <= files and hub_cache.lack_of_weights(files, item.convert) is None


def _fits(item: Item, file: Path) -> bool:
    """Return whether tables, which the file describes, are of an item's config and have its splits."""
    if item.revision is None:
        return _plain(file.parents[3].name) == _plain(item.id)
    info = read_json(file)
    return item.config in (None, info["config_name"]) and info["splits"].keys() >= set(item.splits)


def _plain(name: str) -> str:
    """Return a data set's name without all that differs between the hub and the cache."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


# What the hub says ---------------------------------------------------------------------------------------------------


def _of_model(item: Item) -> Answer:
    """Return the files of a model; raises UserError for one that cannot be had or read."""
    from huggingface_hub import HfApi, RepoFile
    from huggingface_hub.utils import filter_repo_objects

    def ask() -> dict[str, RepoFile]:
        tree = HfApi().list_repo_tree(item.id, recursive=True, revision=item.revision)
        return {one.path: one for one in tree if isinstance(one, RepoFile)}

    files = tried(ask, say(item))
    tried(lambda: _ask_for_access(item, "config.json"), say(item))
    if lack := hub_cache.lack_of_weights(files, item.convert):
        raise UserError(f"The {say(item)} {lack}")
    chosen = filter_repo_objects(files, allow_patterns=hub_cache.model_files(item.convert))
    return Answer([_wanted(item, files[path]) for path in chosen])


def _of_data_set(item: Item) -> Answer:
    """Return the files and the builder of a data set; raises UserError for one, or a split, that cannot be had."""
    from huggingface_hub import HfApi

    if item.revision is None:
        info = tried(lambda: HfApi().dataset_info(item.id, revision="main"), say(item))
        tried(lambda: _ask_for_access(item, *(one.rfilename for one in info.siblings)), say(item))
        return Answer([])
    answer = data_files(item)
    tried(lambda: _ask_for_access(item, *(one.path for one in answer.files)), say(item))
    check_splits(item, answer.builder.config.data_files or answer.builder.info.splits or item.splits)
    return answer


def check_splits(item: Item, known: Iterable[str]) -> None:
    """Raise UserError for a split of a data set that is read by its name and is not known."""
    known = sorted(map(str, known))
    if missing := [split for split in item.splits if split not in known]:
        named = ", ".join(f"'{split}'" for split in missing)
        raise UserError(f"The {say(item)} has no split {named}.{did_you_mean(missing[0], known)}")


def _ask_for_access(item: Item, *paths: str) -> None:
    """Ask for the first of some files that is not for all, without its content.

    Anyone may list what a gated repository holds, and perhaps read what is shown on its page.
    """
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.errors import RemoteEntryNotFoundError

    path = min(paths, key=lambda path: (path.lower().startswith(SHOWN), path), default="README.md")
    url = hf_hub_url(item.id, path, repo_type=item.kind, revision=item.revision or "main")
    with contextlib.suppress(RemoteEntryNotFoundError):
        HfApi().get_hf_file_metadata(url=url)


def data_files(item: Item, **arguments: Any) -> Answer:
    """Return the files of the hub that a data set is prepared from, and its builder."""
    from huggingface_hub import HfApi

    if item.revision is not None:
        tried(lambda: _ask_for_card(item), say(item))

    def open_it() -> DatasetBuilder:
        if item.data_files:
            return hub_cache.builder_of_files(item.id, item.revision, item.data_files)
        return hub_cache.builder_of(item.id, item.config, item.revision, **arguments)

    builder = tried(open_it, say(item))
    start = f"hf://datasets/{item.id}@{item.revision}/"
    sources = (str(one) for files in (builder.config.data_files or {}).values() for one in files)
    paths = sorted({one.removeprefix(start) for one in sources if one.startswith(start)})

    def ask() -> list[Wanted]:
        parts = (paths[i : i + 500] for i in range(0, len(paths), 500))
        options = {"revision": item.revision, "repo_type": "dataset"}
        found = [one for part in parts for one in HfApi().get_paths_info(item.id, part, **options)]
        return [_wanted(item, one) for one in found]

    return Answer(tried(ask, say(item)), builder)


def _ask_for_card(item: Item) -> None:
    """Read the data set's README, as the datasets library would: but its own errors do not say what the hub said.

    Whether the hub gives it is asked first: a download tries for minutes where the hub does not answer.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    _ask_for_access(item, "README.md")
    with contextlib.suppress(RemoteEntryNotFoundError):
        hf_hub_download(item.id, "README.md", repo_type="dataset", revision=item.revision)


def _wanted(item: Item, file: RepoFile) -> Wanted:
    digest, size = (file.lfs.sha256, file.lfs.size) if file.lfs else (None, file.size)
    return Wanted(item.kind, item.id, item.revision, file.path, size, digest, file.blob_id, say(item))
