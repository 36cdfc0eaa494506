"""Prompts and responses as training samples: token ids, and which of them are learned."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Literal, Protocol

from espalier.data import Dataset
from espalier.errors import UserError, did_you_mean
from espalier.training import UNSEEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
ALPACA_PAIRED = ", paired with an input that provides further context"


class Source(Protocol):
    """The keys of a recipe that say where prompts and responses come from and how they are joined."""

    dataset: Dataset
    split: str
    config: str | None
    template: Literal["plain", "alpaca"]
    separator: str
    end_token: bool
    cutoff: int


def examples(tokenizer: PreTrainedTokenizerBase, source: Source) -> tuple[list[dict], int]:
    """Return {"input_ids", "labels"} of each row, and how many rows were dropped because the cut left no response.

    Prompt and response are tokenized together; the response's tokens are those after as many as the prompt has alone,
    which is how the evaluation harness divides them too. The end token follows a response that was not cut, unless the
    recipe leaves it out. Raises UserError for a dataset without rows or without the template's columns.
    """
    dataset = source.dataset
    rows = dataset.rows(source.split, source.config)
    columns = ("prompt", "response") if source.template == "plain" else ("instruction", "input", "output")
    for column in columns:
        if rows and column not in rows[0]:
            raise UserError(
                f"The dataset '{dataset.name}', split '{source.split}', has no column '{column}', which the"
                f" template '{source.template}' needs.{did_you_mean(column, rows[0])}"
            )
    if not rows:
        raise UserError(f"The dataset '{dataset.name}', split '{source.split}', has no rows.")
    pairs = [_pair(row, source) for row in rows]
    prompts = tokenizer([prompt for prompt, _ in pairs], verbose=False)["input_ids"]
    wholes = tokenizer([prompt + response for prompt, response in pairs], verbose=False)["input_ids"]
    items, end = [], [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for prompt, whole in zip(prompts, wholes, strict=True):
        # Some tokenizers put the end token after every text by themselves, the prompt alone included.
        prompt = prompt[:-1] if end and prompt[-1:] == end else prompt
        whole = whole[:-1] if end and whole[-1:] == end else whole
        whole += end if source.end_token else []
        whole = whole[: source.cutoff]
        # The first token of a text is never predicted, so a response without a prompt loses it.
        learned = max(1, len(prompt))
        if len(whole) > learned:
            items.append({"input_ids": whole, "labels": [UNSEEN] * learned + whole[learned:]})
    return items, len(rows) - len(items)


def split_rows(items: list[dict], validation: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Return the training rows and `validation` rows drawn by the seed. Raises UserError if none is left to train."""
    if validation >= len(items):
        raise UserError(
            f"The recipe sets {validation} of {len(items)} usable rows aside for validation and leaves none to train:"
            " lower 'validation_samples'."
        )
    chosen = set(random.Random(f"validation-{seed}").sample(range(len(items)), validation))
    return [one for i, one in enumerate(items) if i not in chosen], [items[i] for i in sorted(chosen)]


def _pair(row: dict, source: Source) -> tuple[str, str]:
    if source.template == "plain":
        return row["prompt"], source.separator + row["response"]
    given = row["input"]
    prompt = ALPACA.format(
        paired=ALPACA_PAIRED if given else "",
        instruction=row["instruction"],
        input=f"### Input:\n{given}\n\n" if given else "",
    )
    return prompt, row["output"]
