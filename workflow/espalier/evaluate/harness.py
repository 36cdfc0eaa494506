"""Zero- and few-shot tasks, scored by EleutherAI's lm-evaluation-harness on an already loaded model.

Each choice is scored by the sum of its tokens' log-probabilities after the context. `acc` takes the most likely choice,
`acc_norm` the one with the most log-probability a character of its text; of equals, the first. The standard error of a
fraction p is the harness's: sqrt(p (1 - p) / (n - 1)). Which special tokens open the context is the tokenizer's own
choice: Llama's put BOS there, the demo's puts nothing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.data import Dataset
from espalier.errors import UserError, did_you_mean
from espalier.measured import Measured
from espalier.progress import progress

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

    from espalier.checkpoints import Checkpoint

TAKES = ("causal-lm",)
METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class Recipe:
    """Which tasks are scored, and how."""

    tasks: list[str]
    dataset: Dataset | None = None  # its folder tasks/ holds {task}.yaml; none: the harness's own tasks, by name
    batch_size: int = 64  # it does not change the result beyond rounding
    limit: int | None = None  # score only the first questions of each task
    num_fewshot: int = 0  # solved questions put before each question

    def check(self) -> None:
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError("'tasks' must name at least one task, and none twice.")
        if self.batch_size < 1 or self.num_fewshot < 0 or (self.limit is not None and self.limit < 1):
            raise ValueError("'batch_size' and 'limit' must be at least 1, and 'num_fewshot' at least 0.")
        if self.dataset is not None and self.dataset.source == "hub":
            raise ValueError("'dataset' must be demo or local; for tasks of the hub leave it out and name the task.")


def measure(checkpoint: Checkpoint, recipe: Recipe, *, seed: int, device: str) -> Measured:
    """Return acc, and acc_norm where the task has it (unit fraction), and the outcome of every question (0 or 1).

    A name of several tasks, such as a group of the harness, gives one measurement a task.
    """
    with _quiet_and_quick():
        from lm_eval.evaluator import simple_evaluate

        tasks, manager = _local_tasks(recipe) if recipe.dataset else _named_tasks(recipe.tasks)
        try:
            found = simple_evaluate(
                model=_language_model(checkpoint, recipe.batch_size),
                tasks=tasks,
                task_manager=manager,
                num_fewshot=recipe.num_fewshot,
                limit=recipe.limit,
                bootstrap_iters=0,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except OSError as error:
            names = ", ".join(recipe.tasks)
            raise UserError(f"The data of the tasks {names} cannot be loaded: {error}.") from error
    measurements, samples = [], {}
    for task, questions in found["samples"].items():
        outcomes = {metric: [int(one[metric]) for one in questions] for metric in METRICS if metric in questions[0]}
        if not outcomes:
            raise UserError(f"The task '{task}' has neither acc nor acc_norm, and Espalier reports nothing else.")
        samples[task] = {"doc_ids": [one["doc_id"] for one in questions], **outcomes}
        measurements += [_measurement(task, metric, values) for metric, values in outcomes.items()]
    return Measured(measurements, samples)


def _measurement(task: str, metric: str, outcomes: list[int]) -> dict:
    count = len(outcomes)
    value = sum(outcomes) / count
    stderr = math.sqrt(value * (1 - value) / (count - 1)) if count > 1 else None
    return {"task": task, "metric": metric, "value": value, "stderr": stderr, "n": count, "unit": "fraction"}


def _local_tasks(recipe: Recipe) -> tuple[list[dict], Any]:
    """Return the harness's own kind of task config for each of {path}/tasks/{task}.yaml, its rows already in memory.

    Rows are handed over in memory because the datasets library would write a copy of each file to the home folder.
    Raises UserError for a task or a data file that does not exist.
    """
    import yaml
    from lm_eval.tasks import TaskManager

    folder = Path(recipe.dataset.path) / "tasks"
    known = {file.stem for file in folder.glob("*.yaml")}
    configs = []
    for task in recipe.tasks:
        if task not in known:
            raise UserError(f"There is no task '{task}' in {folder}.{did_you_mean(task, known)}")
        file = folder / f"{task}.yaml"
        try:
            config = yaml.safe_load(file.read_text(encoding="utf-8"))
            files = config.pop("dataset_kwargs")["data_files"]
        except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is not a task with dataset_kwargs.data_files ({error}).") from None
        config.pop("dataset_path", None)
        splits = {split: recipe.dataset.rows(Path(name).stem, "tasks") for split, name in files.items()}
        configs.append({**config, "task": task, "custom_dataset": _in_memory(splits)})
    return configs, TaskManager(include_defaults=False)


def _in_memory(splits: dict[str, list[dict]]):
    from datasets import Dataset as Table

    return lambda **_: {split: Table.from_list(rows) for split, rows in splits.items()}


def _named_tasks(names: list[str]) -> tuple[list[str], Any]:
    """Return the names and an index of the harness's own tasks; raises UserError for a name that it does not have."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        if name not in manager.task_index:
            raise UserError(f"The lm-evaluation-harness has no task '{name}'.{did_you_mean(name, manager.all_tasks)}")
    return names, manager


def _language_model(checkpoint: Checkpoint, batch_size: int) -> HFLM:
    """Return the loaded model as the harness takes it, with Espalier's progress lines in place of its bars."""
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        def loglikelihood(self, requests, disable_tqdm=False):
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            # The harness scores choices that differ in their last token only in one go.
            rows = len({(*context, *choice[:-1]) for _, context, choice in requests})
            self.ticks = iter(progress(range(math.ceil(rows / batch_size)), "harness, batches of choices"))
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        def _model_call(self, *arguments, **options):
            next(self.ticks, None)
            return super()._model_call(*arguments, **options)

    # In half precision the sums of log-probabilities would be too coarse to order the choices.
    options = {"softmax_dtype": "float32", "batch_size": batch_size}
    return Model(pretrained=checkpoint.model, tokenizer=checkpoint.tokenizer, **options)


@contextlib.contextmanager
def _quiet_and_quick() -> Iterator[None]:
    """Keep the harness's bars and warnings (that the model is already loaded, which is meant) out of the log.

    Its templates are compiled once, not once a question, and it does not describe the machine, which Espalier does
    itself: these are two thirds of its time on a small model.
    """
    from lm_eval import evaluator, utils
    from lm_eval.api import task

    changes = (
        (task, "tqdm", lambda questions, **_: questions),
        (utils.env, "from_string", functools.cache(utils.env.from_string)),
        (evaluator, "add_env_info", lambda results: None),
    )
    before = [getattr(place, name) for place, name, _ in changes]
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    for place, name, value in changes:
        setattr(place, name, value)
    try:
        yield
    finally:
        logger.setLevel(level)
        for (place, name, _), value in zip(changes, before, strict=True):
            setattr(place, name, value)
