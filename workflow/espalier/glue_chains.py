"""GLUE tasks that do not go together, found from a study's config: before any job runs, without torch.

A step or suite is for a GLUE task if its recipe has a key `task` of the type `glue_tasks.Name`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from espalier import checkpoints, glue_tasks
from espalier.config import Model, Step
from espalier.data import local_file
from espalier.errors import UserError
from espalier.files import read_json
from espalier.recipes import fields_of


def check(name: str, model: Model, steps: Sequence[Step], where: str) -> None:
    """Raise UserError, opened by `where`, if a step or the suite of a chain is for another task than what it gets.

    `steps` are those of the chain, and the suite behind them. A local classifier is known by its config.json, and by
    its description where it has one; what the hub holds is known only to the job that loads it.
    """
    local = Path(model.path) if model.path and model.task == "sequence-classification" else None
    trained, trainer = (_trained_for(local), f"models.{name}") if local else (None, "")
    for step, task in _with_task(steps):
        this = f"{where}: {_say(step)}"
        if trained not in (None, task):
            raise UserError(f"{this} is for GLUE task {task}, but {trainer} is for {trained}.")
        if local:
            glue_tasks.check_labels(_outputs(local), task, f"{this}: the model models.{name} ({local})")
        trained, trainer = task, _say(step)


def check_data(steps: Sequence[Step], where: str) -> None:
    """Raise UserError, opened by `where`, if a dataset lacks the task, or a split of it, that a step reads.

    Of the hub's data sets nothing is known here but that named files hold no task.
    """
    for step, task in _with_task(steps):
        dataset = step.recipe.dataset
        if dataset.files:
            raise UserError(
                f"{where}: {_say(step)}: the dataset '{dataset.name}' names its files, and a GLUE task is a config of a"
                " data set of the hub: leave out its key 'files'."
            )
        splits = [step.recipe.split] if hasattr(step.recipe, "split") else glue_tasks.TASKS[task].splits.values()
        for split in splits if dataset.source == "local" else ():
            try:
                local_file(dataset, split, glue_tasks.folder(dataset, task))
            except UserError as error:
                raise UserError(f"{where}: {_say(step)}: {error}") from None


def _with_task(steps: Sequence[Step]) -> Iterator[tuple[Step, str]]:
    for step in steps:
        kind, _ = fields_of(type(step.recipe)).get("task", (None, None))
        if kind == glue_tasks.Name:
            yield step, step.recipe.task


def _say(step: Step) -> str:
    return f"{'suites' if step.kind == 'evaluate' else 'recipes'}.{step.name}"


def _trained_for(folder: Path) -> str | None:
    file = folder / checkpoints.DESCRIPTION
    return read_json(file).get("glue_task") if file.is_file() else None


def _outputs(folder: Path) -> dict[int, str]:
    """Return the names of a classifier's outputs; transformers writes them unless they are LABEL_0 and LABEL_1."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        unnamed = {number: f"LABEL_{number}" for number in range(config.get("num_labels", 2))}
        return {int(number): name for number, name in (config.get("id2label") or unnamed).items()}
    except (OSError, ValueError, AttributeError) as error:  # read_json would advise to delete what is the user's own
        raise UserError(f"{file} is damaged ({error}).") from None
