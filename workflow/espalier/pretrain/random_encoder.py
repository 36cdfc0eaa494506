"""A BERT of a real architecture and size whose weights are random: for measurements of time and memory alone.

Fine-tuned and compressed it goes the way of a published BERT (Devlin et al. 2019, arXiv 1810.04805). Its description,
which every raw result of it and of its children holds, says `weights: random`. The tokenizer knows the characters alone
and needs no text; rows of the word embeddings beyond them are there, as in the architecture, and never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from espalier import random_models, word_pieces

if TYPE_CHECKING:
    from transformers import BertForMaskedLM

GIVES = "masked-lm"
RANDOM = True  # its accuracies mean nothing


@dataclass(frozen=True)
class Recipe:
    """Which architecture and size, by exactly one of shape and config."""

    shape: str | None = None  # name of a file of reference/shapes, without .json
    config: dict | None = None  # what a BERT's config.json would say: model_type, hidden_size …
    weights_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # in which weights are drawn and saved
    layers: int | None = None  # transformer blocks; by default as many as the shape or the config says
    narrow: int = 1  # every width is divided by this, to a multiple of 64; heads are then 32 channels wide

    def check(self) -> None:
        random_models.check(self, encoder=True)


def reads(recipe: Recipe) -> list[str]:
    """Return the files whose content the recipe refers to: an edit to the shape makes the model anew."""
    return random_models.reads(recipe)


def sizes(recipe: Recipe) -> dict:
    """Return what the model's config.json will say of its sizes."""
    return random_models.sizes(recipe, word_pieces.LEAST)


def apply(parent: Path | None, output: Path, recipe: Recipe, *, seed: int, device: str) -> dict:
    """Save a BERT with random weights, drawn by the seed on the device, and a tokenizer of single characters.

    There is no parent. Returns the number of parameters, and that the weights are random.
    """
    if parent is not None:
        raise ValueError("random_encoder makes a model from nothing and takes no parent")
    model, _ = skeleton(recipe)
    tokenizer = word_pieces.tokenizer((), word_pieces.LEAST, model.config.max_position_embeddings)
    return random_models.make(model, tokenizer, output, GIVES, seed=seed, device=device)


def skeleton(recipe: Recipe) -> tuple[BertForMaskedLM, bool]:
    """Return the model on the meta device, shapes without weights, and True: its size is exact.

    Raises UserError for a config of which no model can be made.
    """
    config = {**sizes(recipe), "pad_token_id": word_pieces.PAD}
    return random_models.skeleton(config, "AutoModelForMaskedLM", recipe.weights_dtype, word_pieces.LEAST), True
