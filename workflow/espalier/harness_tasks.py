"""Tasks of EleutherAI's lm-evaluation-harness: from a local dataset's folder, or the harness's own, by name."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from espalier import hub_cache
from espalier.data import Dataset
from espalier.errors import UserError, did_you_mean


def load(names: list[str], dataset: Dataset | None) -> tuple[list, Any]:
    """Return what the harness's evaluator takes as tasks, and its task manager.

    With a dataset, its folder tasks/ holds {task}.yaml and the rows; without one the names are the harness's own.
    Raises UserError for a task or a data file that does not exist.
    """
    return _local(names, dataset) if dataset else named(names)


def scored_texts(names: list[str], dataset: Dataset | None, limit: int | None) -> list[str]:
    """Return every text that tasks score: each context with each of its choices, without solved examples before it.

    `limit`: only of the first questions of each task. Raises UserError for a task or data that cannot be loaded.
    """
    with only_errors():
        found, manager = load(names, dataset)
        try:
            tasks = manager.load(found)["tasks"].values()
        except OSError as error:
            raise UserError(f"The data of the tasks {', '.join(names)} cannot be loaded: {error}.") from error
        for task in tasks:
            task.set_config(key="num_fewshot", value=0)
            task.build_all_requests(limit=limit)
        requests = [request for task in tasks for request in task.instances]
    return ["".join(part for part in request.args if isinstance(part, str)) for request in requests]


def _local(names: list[str], dataset: Dataset) -> tuple[list[dict], Any]:
    # Rows are handed over in memory because the datasets library would write a copy of each file to the home folder.
    import yaml
    from lm_eval.tasks import TaskManager

    folder = Path(dataset.path) / "tasks"
    known = {file.stem for file in folder.glob("*.yaml")}
    configs = []
    for task in names:
        if task not in known:
            raise UserError(f"There is no task '{task}' in {folder}.{did_you_mean(task, known)}")
        file = folder / f"{task}.yaml"
        try:
            config = yaml.safe_load(file.read_text(encoding="utf-8"))
            files = config.pop("dataset_kwargs")["data_files"]
        except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is not a task with dataset_kwargs.data_files ({error}).") from None
        config.pop("dataset_path", None)
        splits = {split: dataset.rows(Path(name).stem, "tasks") for split, name in files.items()}
        configs.append({**config, "task": task, "custom_dataset": _in_memory(splits)})
    return configs, TaskManager(include_defaults=False)


def _in_memory(splits: dict[str, list[dict]]):
    from datasets import Dataset as Table

    return lambda **_: {split: Table.from_list(rows) for split, rows in splits.items()}


def named(names: list[str], load: Callable = hub_cache.open_named) -> tuple[list[str], Any]:
    """Return the names of the harness's own tasks, and its task manager, which has tasks read their data by `load`."""
    from lm_eval.tasks import TaskManager

    class Manager(TaskManager):
        def load(self, task_list):
            with _loading_by(load):
                return super().load(task_list)

    manager = Manager()
    for name in names:
        if name not in manager.task_index:
            raise UserError(f"The lm-evaluation-harness has no task '{name}'.{did_you_mean(name, manager.all_tasks)}")
    return names, manager


@contextlib.contextmanager
def _loading_by(load: Callable) -> Iterator[None]:
    """Have tasks call `load` where they would call `datasets.load_dataset`."""
    import datasets

    usual = datasets.load_dataset
    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = usual


@contextlib.contextmanager
def only_errors() -> Iterator[None]:
    """Keep the harness's warnings (such as that the model is loaded already, which is meant) and bars out of logs."""
    import lm_eval.api.task as building

    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, building.tqdm
    logger.setLevel(logging.ERROR)
    building.tqdm = lambda questions, **_: questions
    try:
        yield
    finally:
        logger.setLevel(level)
        building.tqdm = bar
