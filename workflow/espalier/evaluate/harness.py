"""Zero- and few-shot tasks, scored by EleutherAI's lm-evaluation-harness on an already loaded model.

Each choice is scored by the sum of its tokens' log-probabilities after the context. `acc` takes the most likely choice,
`acc_norm` the one with the most log-probability a character of its text; of equals, the first. The standard error of a
fraction p is the harness's: sqrt(p (1 - p) / (n - 1)). Which special tokens open the context is the tokenizer's own
choice: Llama's put BOS there, the demo's puts nothing.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from espalier import harness_tasks
from espalier.data import Dataset
from espalier.errors import UserError
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

    tasks: list[str]  # names of tasks
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


def passages(recipe: Recipe) -> list[str]:
    """Return each question with each of its choices, as they are scored."""
    return harness_tasks.scored_texts(recipe.tasks, recipe.dataset, recipe.limit)


def measure(checkpoint: Checkpoint, recipe: Recipe, *, seed: int, device: str) -> Measured:
    """Return acc, and acc_norm where the task has it (unit fraction), and the outcome of every question (0 or 1).

    A name of several tasks, such as a group of the harness, gives one measurement a task.
    """
    with harness_tasks.only_errors(), _quick():
        from lm_eval.evaluator import simple_evaluate

        tasks, manager = harness_tasks.load(recipe.tasks, recipe.dataset)
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
def _quick() -> Iterator[None]:
    """Spare the harness two thirds of its time on a small model.

    Its templates are compiled once, not once a question, and it does not describe the machine, which Espalier does.
    """
    from lm_eval import evaluator, utils

    compiled, described = utils.env.from_string, evaluator.add_env_info
    utils.env.from_string = functools.cache(compiled)
    evaluator.add_env_info = lambda results: None
    try:
        yield
    finally:
        utils.env.from_string, evaluator.add_env_info = compiled, described
