"""A model of a real architecture and size whose weights are random: for measurements of time and memory alone.

Neither depends on the values of weights, so they can be measured where the real weights are not to be had. Its accuracy
means nothing, and so its description, which every raw result of it and of its children holds, says `weights: random`.
The shapes in reference/shapes are the architecture's numbers of published config.json files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from espalier import random_models

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

GIVES = "causal-lm"
RANDOM = True  # its accuracies mean nothing
VOCABULARY = 257  # 256 bytes and the end token
END = VOCABULARY - 1


@dataclass(frozen=True)
class Recipe:
    """Which architecture and size, by exactly one of shape and config."""

    shape: str | None = None  # name of a file of reference/shapes, without .json
    config: dict | None = None  # what a model's config.json would say: model_type, hidden_size …
    weights_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # in which weights are drawn and saved
    layers: int | None = None  # transformer blocks; by default as many as the shape or the config says
    positions: int | None = None  # tokens that fit the context; by default as many as the shape or the config says
    narrow: int = 1  # every width is divided by this, to a multiple of 64; heads are then 32 channels wide

    def check(self) -> None:
        random_models.check(self, encoder=False)
        if self.positions is not None and self.positions < 1:
            raise ValueError("'positions' must be at least 1.")


def reads(recipe: Recipe) -> list[str]:
    """Return the files whose content the recipe refers to: an edit to the shape makes the model anew."""
    return random_models.reads(recipe)


def sizes(recipe: Recipe) -> dict:
    """Return what the model's config.json will say of its sizes."""
    content = random_models.sizes(recipe, VOCABULARY)
    return content if recipe.positions is None else {**content, "max_position_embeddings": recipe.positions}


def real_shape(recipe: Recipe) -> bool:
    """Return whether the model has a published one's whole shape, in 16 bits, and so its time and memory."""
    whole = recipe.shape is not None and recipe.layers is None and recipe.narrow == 1
    return whole and recipe.weights_dtype != "float32"


def apply(parent: Path | None, output: Path, recipe: Recipe, *, seed: int, device: str) -> dict:
    """Save a model with random weights, drawn by the seed on the device, and a tokenizer of single bytes.

    There is no parent. Returns the number of parameters, and that the weights are random.
    """
    if parent is not None:
        raise ValueError("random_weights makes a model from nothing and takes no parent")
    model, _ = skeleton(recipe)
    tokenizer = byte_tokenizer(model.config.max_position_embeddings)
    return random_models.make(model, tokenizer, output, GIVES, seed=seed, device=device)


def skeleton(recipe: Recipe) -> tuple[PreTrainedModel, bool]:
    """Return the model on the meta device, shapes without weights, and True: its size is exact.

    Raises UserError for a config of which no model can be made.
    """
    # The tokens are those of the tokenizer that this model has, not of the one that the architecture came with.
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END)
    config = {**sizes(recipe), **tokens}
    return random_models.skeleton(config, "AutoModelForCausalLM", recipe.weights_dtype, VOCABULARY), True


def byte_tokenizer(length: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the 256 bytes and the end token, for texts of at most `length` tokens.

    The end token opens a text, too, as GPT-2's does, where an evaluation asks for that; the tokenizer never adds it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>", pad_token="<end>", model_max_length=length
    )
