"""Time, speed and memory of scoring multiple-choice questions, one question at a time.

Each choice of a question is one forward pass of batch 1 over the question's context and the choice, and its score is
the sum of its tokens' log-probabilities. The lm-evaluation-harness renders the questions, so they are those behind an
accuracy. The time of a question is that of all its choices; text is cut into tokens beforehand. The peak memory of a
question is taken in runs of their own: the mean over some of the questions, and the largest of these and the question
with the longest choice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from espalier import checkpoints, cli, harness_tasks, memory, provenance
from espalier.data import Dataset
from espalier.errors import UserError
from espalier.measured import Measured
from espalier.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAKES = ("causal-lm",)
TIMED = True  # so its jobs have the machine to themselves
UNITS = {
    "time_per_question": "s",
    "tokens_per_second": "tokens/s",
    "peak_allocated_per_question": "bytes",
    "max_peak_allocated_per_question": "bytes",
    "peak_reserved_per_question": "bytes",
    "max_peak_reserved_per_question": "bytes",
    "weights_allocated": "bytes",
    "weights_allocated_after_forward": "bytes",
    "weights_on_disk": "bytes",
}


@dataclass(frozen=True)
class Recipe:
    """Which questions are scored."""

    tasks: list[str]  # names of tasks
    dataset: Dataset | None = None  # its folder tasks/ holds {task}.yaml; none: the harness's own tasks, by name
    questions: int = 100  # the first ones of each task
    warmup: int = 4  # questions scored before the clock runs
    memory_questions: int = 8  # questions of which the memory is measured, spread over all

    def check(self) -> None:
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError("'tasks' must name at least one task, and none twice.")
        if self.questions < 1 or self.memory_questions < 1 or self.warmup < 0:
            raise ValueError("'questions' and 'memory_questions' must be at least 1, and 'warmup' at least 0.")


class Question(NamedTuple):
    """One question: for each choice the token ids of context and choice, and how many of them are the choice's."""

    task: str
    doc_id: int
    choices: list[tuple[list[int], int]]

    @property
    def tokens(self) -> int:
        """The tokens that the model reads: the last one of each choice is only predicted."""
        return sum(len(ids) - 1 for ids, _ in self.choices)

    @property
    def longest(self) -> int:
        """The tokens of the longest choice, whose forward pass takes the most memory."""
        return max(len(ids) for ids, _ in self.choices)


def measure(folder: Path, recipe: Recipe, *, seed: int, device: str, environment: None = None) -> Measured:
    """Return mean time a question, tokens a second, peak memory a question; and every single timing and peak.

    The model is loaded in this process, on `device`, which may be auto; no engine takes part that has an
    environment of its own.
    """
    cli.import_lightly()
    checkpoint = checkpoints.load(folder, device=device)
    device = checkpoint.device
    rows = [
        _row("weights_allocated", memory.allocated_bytes(device)),
        _row("weights_on_disk", checkpoints.weight_bytes(folder)),
    ]
    questions = read_questions(recipe, checkpoint.tokenizer)
    measured, samples = measure_questions(questions, lambda one: score(checkpoint.model, one, device), recipe, device)
    return Measured(rows + measured, samples, checkpoint.info, provenance.made_with(device))


def measure_questions(
    questions: list[Question],
    answer: Callable[[Question], object],
    recipe: Recipe,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[dict], dict]:
    """Return rows and samples for `answer`, called with one question at a time; "oom" rows where memory runs out."""
    try:
        for question in questions[: recipe.warmup]:
            answer(question)
        seconds = []
        for question in progress(questions, "scoring, questions"):
            started = clock()
            answer(question)
            seconds.append(clock() - started)
        held = memory.allocated_bytes(device)
        chosen = sorted({i * len(questions) // recipe.memory_questions for i in range(recipe.memory_questions)})
        longest = max(range(len(questions)), key=lambda i: questions[i].longest)
        peaks = {
            i: memory.peaks(lambda i=i: answer(questions[i]), device, held)
            for i in progress(sorted({*chosen, longest}), "scoring, memory of questions")
        }
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
        names = ["time_per_question", "tokens_per_second", "weights_allocated_after_forward"]
        names += [f"{which}peak_{kind}_per_question" for kind in memory.kinds(device) for which in ("", "max_")]
        return [_row(name, None) | {"outcome": "oom"} for name in names], {}
    tokens = [question.tokens for question in questions]
    rows = [
        _row("time_per_question", *_mean(seconds)),
        _row("tokens_per_second", *_ratio(tokens, seconds)),
        _row("weights_allocated_after_forward", held),
    ]
    by_kind = {kind: [peak[kind] for peak in peaks.values()] for kind in memory.kinds(device)}
    for kind, values in by_kind.items():
        rows.append(_row(f"peak_{kind}_per_question", *_mean([peaks[i][kind] for i in chosen])))
        rows.append(_row(f"max_peak_{kind}_per_question", max(values), n=len(values)))
    samples = {
        "task": [question.task for question in questions],
        "doc_id": [question.doc_id for question in questions],
        "choices": [len(question.choices) for question in questions],
        "tokens": tokens,
        "seconds": seconds,
        "memory": {
            "question": list(peaks),
            "in_mean": [i in chosen for i in peaks],
            **{f"peak_{kind}": values for kind, values in by_kind.items()},
        },
    }
    return rows, samples


def score(model, question: Question, device: str) -> list[float]:
    """Return the log-probability of each choice, given the context."""
    import torch

    scores = []
    with torch.inference_mode():
        for ids, length in question.choices:
            tokens = torch.tensor(ids, device=device)
            logits = model(tokens[None, :-1]).logits[0, -length:].float()
            chosen = logits.log_softmax(-1).gather(-1, tokens[-length:, None])
            scores.append(chosen.sum().item())  # waits for the device
    return scores


def read_questions(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """Return the first questions of each task, as token ids."""
    with harness_tasks.only_errors():
        names, manager = harness_tasks.load(recipe.tasks, recipe.dataset)
        questions = []
        for name, task in manager.load(names)["tasks"].items():
            task.build_all_requests(limit=recipe.questions)
            found: dict[int, list] = {}
            for request in sorted(task.instances, key=lambda one: (one.doc_id, one.idx)):
                if request.request_type != "loglikelihood":
                    raise UserError(f"The task '{name}' is not multiple choice: it asks for {request.request_type}.")
                found.setdefault(request.doc_id, []).append(encode(tokenizer, *request.args))
            questions += [Question(name, doc_id, choices) for doc_id, choices in found.items()]
    return questions


def encode(tokenizer: PreTrainedTokenizerBase, context: str, choice: str) -> tuple[list[int], int]:
    """Return the token ids of both together, and how many belong to the choice; an empty context is the end token.

    Spaces at the context's end go to the choice, as in the harness, because tokens begin with their space.
    """
    stripped = context.rstrip()
    context, choice = stripped, context[len(stripped) :] + choice
    if not context:
        ids = tokenizer(choice, add_special_tokens=False)["input_ids"]
        return [tokenizer.eos_token_id, *ids], len(ids)
    whole, before = tokenizer(context + choice)["input_ids"], tokenizer(context)["input_ids"]
    return whole, max(1, len(whole) - len(before))


def _mean(values: list[float]) -> tuple[float, float | None, int]:
    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return mean, None, 1
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count), count


def _ratio(tokens: list[int], seconds: list[float]) -> tuple[float, float | None, int]:
    """Return Σ tokens / Σ seconds and its standard error, that of a ratio of means over questions."""
    count, ratio = len(tokens), sum(tokens) / math.fsum(seconds)
    if count == 1:
        return ratio, None, 1
    residual = math.fsum((token - ratio * second) ** 2 for token, second in zip(tokens, seconds, strict=True))
    return ratio, math.sqrt(residual / (count - 1) / count) * count / math.fsum(seconds), count


def _row(metric: str, value, stderr=None, n=None) -> dict:
    return {"task": "scoring", "metric": metric, "value": value, "stderr": stderr, "n": n, "unit": UNITS[metric]}
