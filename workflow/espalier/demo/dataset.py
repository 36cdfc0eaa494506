"""Writes the demo's whole dataset folder from a seed.

    pretrain.jsonl     {"text"}              documents that the decoder is trained on
    instruct.jsonl     {"prompt","response"} answered training questions; prompt + response is the text
    calibration.jsonl  {"text"}              documents for calibration, drawn afresh from the training distribution
    heldout.jsonl      {"text"}              unseen documents of the same distribution, for perplexity
    encoder.jsonl      {"text","pair"}       sentences for the encoder's masked-word pretraining (pair may be empty)
    tasks/             lm-evaluation-harness tasks: one .jsonl and one .yaml each
    glue/              the eight GLUE tasks: train.jsonl and validation.jsonl (MNLI: matched and mismatched)
    summary.json       the recipe, and the number of rows of each file

What evaluations read is made first and registered; whatever is made for training and repeats it is dropped and drawn
again. Harness items are asked in wordings that training never uses for the same thing (see `questions`). Of the GLUE
tasks' sentences a share is reserved: validation rows hold these alone, the training rows of every task and the
encoder's text none of them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .glue_tasks import COLUMNS, example, unlabelled
from .harness_tasks import task_yaml
from .questions import QUESTIONS, evaluation_items
from .statements import WEIGHTED_TASKS, document
from .vocabulary import Held, World, normal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

RESERVED = 64  # of 256 sentences of the GLUE tasks
DRAWS = 500  # for one validation row; one pair of sentences in 16 is reserved


@dataclass(frozen=True)
class Recipe:
    """How much to generate."""

    seed: int = 0  # of the world and of everything drawn from it
    pretrain_documents: int = 24000  # of four paragraphs, about 65 tokens together
    instruct_pairs: int = 8000  # questions with answers, for fine-tuning
    calibration_documents: int = 3000  # more than 2000 samples of 64 tokens
    heldout_documents: int = 200  # unseen documents, for perplexity
    encoder_texts: int = 16000  # sentences and pairs for the encoder's pretraining
    items_per_task: int = 200  # of each of the seven zero-shot tasks
    glue_train: int = 8000  # rows a task
    glue_validation: int = 600  # rows a split


def write(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Write the dataset into `folder` (made if missing); return what summary.json holds."""
    world, held = World(recipe.seed), Held()
    rows: dict[str, int] = {}

    def save(name: str, records: Iterable[dict[str, Any]]) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(record) for record in records]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        rows[name] = len(lines)

    for task in QUESTIONS:
        items = evaluation_items(world, task, recipe.items_per_task)
        for item in items:
            held.add(item.text)
        save(f"tasks/{task}.jsonl", (_numbered(task, item.record, index) for index, item in enumerate(items)))
        (folder / "tasks" / f"{task}.yaml").write_text(task_yaml(task), encoding="utf-8")
    for task in COLUMNS:
        for split in ("validation_matched", "validation_mismatched") if task == "mnli" else ("validation",):
            save(f"glue/{task}/{split}.jsonl", _glue_validation(world, held, task, split, recipe.glue_validation))
    save("heldout.jsonl", _heldout(world, held, recipe.heldout_documents))

    for task in COLUMNS:
        save(f"glue/{task}/train.jsonl", _glue_train(world, held, task, recipe.glue_train))
    save("pretrain.jsonl", _documents(world, held, "pretrain", recipe.pretrain_documents))
    save("calibration.jsonl", _documents(world, held, "calibration", recipe.calibration_documents))
    save("instruct.jsonl", _instruct(world, held, recipe.instruct_pairs))
    save("encoder.jsonl", _encoder(world, held, recipe.encoder_texts))

    summary = {"recipe": asdict(recipe), "rows": rows}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _numbered(task: str, record: dict[str, Any], index: int) -> dict[str, Any]:
    """The record with the number or name that the real task's rows carry, where they carry one."""
    if task in ("piqa", "winogrande"):
        return record
    if task == "boolq":
        return {**record, "idx": index}
    if task == "hellaswag":
        return {"ind": index, **record}
    return {"id": f"{task}-{index}", **record}


def _glue_row(task: str, inputs: tuple[str, ...], label: float, index: int) -> dict[str, Any]:
    return {**dict(zip(COLUMNS[task], inputs, strict=True)), "label": label, "idx": index}


def _reserved(world: World, inputs: tuple[str, ...]) -> list[bool]:
    """Whether each sentence is for validation rows alone: its words and the seed decide, whatever else is drawn.

    A sentence that stands twice is followed by a draw of the pair: rows of one sentence would else be kept too often.
    """
    forms = [normal(sentence) for sentence in inputs]
    asked = [*dict.fromkeys(forms), " | ".join(forms)][: len(forms)]
    return [hashlib.sha256(f"{world.seed}/{form}".encode()).digest()[0] < RESERVED for form in asked]


def _glue_validation(world: World, held: Held, task: str, split: str, count: int) -> Iterator[dict[str, Any]]:
    rng, index = world.stream(f"glue/{task}/{split}"), 0
    for _ in range(DRAWS * count):
        if index == count:
            break
        inputs, label = example(task, split, rng)
        if all(_reserved(world, inputs)) and held.add(*inputs):
            yield _glue_row(task, inputs, label, index)
            index += 1
    if index < count:
        raise ValueError(f"The demo language has only {index} different rows for {task}/{split}, not {count}.")


def _glue_train(world: World, held: Held, task: str, count: int) -> Iterator[dict[str, Any]]:
    rng, index = world.stream(f"glue/{task}/train"), 0
    while index < count:
        inputs, label = example(task, "train", rng)
        if _may_train(world, held, inputs):
            yield _glue_row(task, inputs, label, index)
            index += 1


def _may_train(world: World, held: Held, inputs: tuple[str, ...]) -> bool:
    return not any(_reserved(world, inputs)) and not held.holds(*inputs)


def _heldout(world: World, held: Held, count: int) -> Iterator[dict[str, Any]]:
    rng = world.stream("heldout")
    while count:
        text = document(world, rng)
        if held.add(text):
            yield {"text": text}
            count -= 1


def _documents(world: World, held: Held, purpose: str, count: int) -> Iterator[dict[str, Any]]:
    rng = world.stream(purpose)
    while count:
        text = document(world, rng)
        if not held.holds(text):
            yield {"text": text}
            count -= 1


def _instruct(world: World, held: Held, count: int) -> Iterator[dict[str, Any]]:
    rng = world.stream("instruct")
    while count:
        question = QUESTIONS[rng.choice(WEIGHTED_TASKS)](world, rng, held=False)
        if not held.holds(question.text):
            yield {"prompt": question.prompt, "response": f" {question.response}"}
            count -= 1


def _encoder(world: World, held: Held, count: int) -> Iterator[dict[str, Any]]:
    rng = world.stream("encoder")
    while count:
        inputs = unlabelled(rng)
        if _may_train(world, held, inputs):
            text, *rest = inputs
            yield {"text": text, "pair": rest[0] if rest else ""}
            count -= 1
