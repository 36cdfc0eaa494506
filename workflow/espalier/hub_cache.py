"""Models and data sets of the hub as jobs read them: over the internet, or, with the hub switched off, as prefetched.

With the hub switched off (HF_HUB_OFFLINE=1) the datasets library alone would read whatever revision of a data set it
prepared last. So jobs read the folder that the study's manifest names, which `snakemake prefetch` wrote; where that
lies they learn from the environment. A task of the lm-evaluation-harness names no commit: with the hub on, too, it
gets the manifest's.
"""

from __future__ import annotations

import fnmatch
import glob
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.errors import UserError, did_you_mean
from espalier.files import read_json

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, DatasetDict, IterableDataset

MANIFEST = "ESPALIER_PREFETCH"  # the environment variable that names the study's manifest
PLAIN_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]  # of a model: data that any program can read
PICKLED_FILES = ["pytorch_model.bin", "pytorch_model-*.bin"]  # weights in PyTorch's own format
NO_SAFETENSORS = (
    "no safetensors weights; other formats can run code when loaded and are refused. Where they are pytorch_model*.bin,"
    " `convert: true` in the model's entry has them written as safetensors, and runs nothing that they hold."
)
# What does not change the rows that load_dataset returns.
IMMATERIAL = ("token", "cache_dir", "download_mode", "trust_remote_code", "num_proc", "keep_in_memory")


def switched_off() -> bool:
    """Return whether the hub may not be asked, which HF_HUB_OFFLINE=1 says."""
    from huggingface_hub import constants

    return constants.is_offline_mode()


def roots() -> dict[str, Path]:
    """Return the cache's two folders: `hub` has files as they are on the hub, `datasets` has prepared tables."""
    from huggingface_hub import constants

    datasets = os.environ.get("HF_DATASETS_CACHE") or os.path.join(constants.HF_HOME, "datasets")
    return {"hub": Path(constants.HF_HUB_CACHE), "datasets": Path(os.path.expanduser(datasets))}


def snapshot(kind: str, name: str, revision: str) -> str:
    """Return the folder of a model's or dataset's files at a commit, below the root `hub`."""
    return f"{kind}s--{name.replace('/', '--')}/snapshots/{revision}"


def model_files(convert: bool) -> list[str]:
    """Return the patterns of the files of a model that are read; `convert` takes weights in PyTorch's own format."""
    return [*PLAIN_FILES, "*.py", *(PICKLED_FILES if convert else ["*.safetensors"])]


def lack_of_weights(files: Iterable[str], convert: bool) -> str | None:
    """Return why a model with these files, named from its top, cannot be read, as "has …."; None if it can."""
    top = [name for name in files if "/" not in name]
    if any(name.endswith(".safetensors") for name in top):
        return "has safetensors weights: leave out the key 'convert' of its entry." if convert else None
    if not convert:
        return f"has {NO_SAFETENSORS}"
    if any(fnmatch.fnmatch(name, pattern) for name in top for pattern in PICKLED_FILES):
        return None
    return "has neither safetensors weights nor pytorch_model*.bin, which the key 'convert' of its entry asks for."


def size_of(file: Path) -> int | None:
    """Return a file's bytes; None if it is not there."""
    try:
        return os.stat(file).st_size
    except OSError:
        return None


def open_dataset(
    name: str, config: str | None, split: str, revision: str, streaming: bool = False, files: Sequence[str] = ()
) -> Dataset | IterableDataset:
    """Return a split of a data set at a commit; with `files`, of these alone, which are the split train.

    Raises OSError or ValueError of the datasets library, or UserError.
    """
    if switched_off():
        wanted = {"id": name, "config": config, "revision": revision, "arguments": arguments_of(files)}
        builder = _prefetched({**wanted, "by_task": False})
    elif files:
        builder = builder_of_files(name, revision, files)
    else:
        builder = builder_of(name, config, revision)
    return _read(builder, split, streaming)


def arguments_of(files: Sequence[str]) -> dict[str, Any]:
    """Return what `datasets.load_dataset` gets to read only these files of a data set, as the manifest holds it."""
    return {"data_files": list(files)} if files else {}


def open_named(
    path: str, name: str | None = None, *, split: str | None = None, streaming: bool = False, **arguments: Any
) -> Dataset | DatasetDict | IterableDataset:
    """Stand in for `datasets.load_dataset` in a task of the harness: the commit is the one that prefetch found.

    With the hub on, what was never prefetched is read as the task says.
    """
    wanted = {"id": path, "config": name, "arguments": material(arguments), "by_task": True}
    if switched_off():
        return _read(_prefetched(wanted), split, streaming)
    if (found := _listed(wanted)) is None:
        from datasets.load import load_dataset  # what datasets itself has of this name is replaced at this moment

        return load_dataset(path, name, split=split, streaming=streaming, **arguments)
    return _read(builder_of(path, name, found["revision"], **unpinned(wanted["arguments"])), split, streaming)


def material(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `datasets.load_dataset` that say which rows are meant, as plain JSON."""
    given = {key: value for key, value in arguments.items() if value is not None and key not in IMMATERIAL}
    return json.loads(json.dumps(given, default=str, sort_keys=True))


def unpinned(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of `datasets.load_dataset` without the revision, in whose place a commit is given."""
    return {key: value for key, value in arguments.items() if key != "revision"}


def builder_of(name: str, config: str | None, revision: str | None, **arguments: Any) -> DatasetBuilder:
    """Return the builder of a data set at a commit; raises OSError where the hub cannot be asked for that commit.

    Without the hub the datasets library would take the revision that it prepared last, whatever was asked for.
    """
    from datasets import load_dataset_builder

    builder = load_dataset_builder(name, config, revision=revision, **arguments)
    if revision is not None and builder.hash != revision:
        raise ConnectionError(f"the hub does not answer, and revision {revision} is not in the cache")
    return builder


def builder_of_files(name: str, revision: str, files: Sequence[str]) -> DatasetBuilder:
    """Return the builder of some files of a data set at a commit, all as the split train; each may be a pattern.

    Raises UserError for one that matches nothing: the datasets library passes over a pattern of several.
    """
    try:
        builder = builder_of(name, None, revision, **arguments_of(files))
    except FileNotFoundError:
        _check_files(name, revision, files)
        raise
    _check_files(name, revision, filter(glob.has_magic, files))
    return builder


def _check_files(name: str, revision: str, files: Iterable[str]) -> None:
    from datasets.data_files import resolve_pattern
    from huggingface_hub import HfApi

    for file in files:
        try:
            resolve_pattern(file, f"hf://datasets/{name}@{revision}")
        except FileNotFoundError:
            near = did_you_mean(file, HfApi().list_repo_files(name, repo_type="dataset", revision=revision))
            near = near if "Did you mean" in near else ""  # the others may be thousands
            raise UserError(f"The data set {name} at {revision[:12]} has no file '{file}'.{near}") from None


def _read(builder: DatasetBuilder, split: str | None, streaming: bool) -> Dataset | DatasetDict | IterableDataset:
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _prefetched(wanted: dict[str, Any]) -> DatasetBuilder:
    """Return the builder of the prepared folder of the first data set in the manifest that is what is `wanted`."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    if MANIFEST not in os.environ:
        raise UserError(
            f"The data set {wanted['id']} cannot be read while HF_HUB_OFFLINE is set, because {MANIFEST} does not name"
            " the study's results/STUDY/prefetch.json, which `snakemake prefetch` writes."
        )
    if (found := _listed(wanted)) is None:
        raise UserError(
            f"The data set {wanted['id']} (config {wanted['config']}) is not in {os.environ[MANIFEST]}: run"
            " `snakemake prefetch` where there is internet."
        )
    name, config, version, commit = Path(found["folder"]).parts
    return Cache(
        cache_dir=str(datasets.config.HF_DATASETS_CACHE),
        repo_id=found["id"],
        dataset_name=name.rpartition("___")[2],
        config_name=config,
        version=version,
        hash=commit,
    )


def _listed(wanted: dict[str, Any]) -> dict[str, Any] | None:
    """Return the first data set in the study's manifest that is what is `wanted`; None without one."""
    file = os.environ.get(MANIFEST)
    if file is None or not Path(file).is_file():
        return None
    items = [item for item in read_json(Path(file))["items"] if item["kind"] == "dataset"]
    return next((item for item in items if all(item[key] == value for key, value in wanted.items())), None)
