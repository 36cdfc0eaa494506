"""A model of a real architecture and size whose weights are random: for measurements of time and memory alone.

Neither depends on the values of weights, so they can be measured where the real weights are not to be had. Its accuracy
means nothing, and so its description, which every raw result of it and of its children holds, says `weights: random`.
The shapes in reference/shapes are the architecture's numbers of published config.json files.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from espalier.errors import UserError, did_you_mean
from espalier.files import read_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

GIVES = "causal-lm"
SHAPES = Path(__file__).parents[3] / "reference" / "shapes"
VOCABULARY = 257  # 256 bytes and the end token
STANDARD_DEVIATION = 0.02  # of the matrices


@dataclass(frozen=True)
class Recipe:
    """Which architecture and size, by exactly one of shape and config."""

    shape: str | None = None  # name of a file of reference/shapes, without .json
    config: dict | None = None  # what a model's config.json would say: model_type, hidden_size …
    weights_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # in which weights are drawn and saved
    layers: int | None = None  # transformer blocks; by default as many as the shape or the config says
    positions: int | None = None  # tokens that fit the context; by default as many as the shape or the config says

    def check(self) -> None:
        if (self.shape is None) == (self.config is None):
            raise ValueError("exactly one of the keys 'shape' and 'config' must say which model this is.")
        known = [file.stem for file in SHAPES.glob("*.json")]
        if self.shape is not None and self.shape not in known:
            raise ValueError(f"there is no shape '{self.shape}' in reference/shapes.{did_you_mean(self.shape, known)}")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("'config' must say the 'model_type', such as llama.")
        if self.layers is not None and self.layers < 1:
            raise ValueError("'layers' must be at least 1.")
        if self.positions is not None and self.positions < 1:
            raise ValueError("'positions' must be at least 1.")


def reads(recipe: Recipe) -> list[str]:
    """Return the files whose content the recipe refers to: an edit to the shape makes the model anew."""
    return [os.path.relpath(SHAPES / f"{recipe.shape}.json")] if recipe.shape else []


def sizes(recipe: Recipe) -> dict:
    """Return what the model's config.json will say."""
    return read_json(SHAPES / f"{recipe.shape}.json") if recipe.shape else recipe.config


def apply(parent: Path | None, output: Path, recipe: Recipe, *, seed: int, device: str) -> dict:
    """Save a model with random weights, drawn by the seed on the device, and a tokenizer of single bytes.

    There is no parent. Returns the number of parameters, and that the weights are random.
    """
    import torch

    from espalier import checkpoints

    if parent is not None:
        raise ValueError("random_weights makes a model from nothing and takes no parent")
    model, _ = skeleton(recipe)
    fill(model.to_empty(device=device), torch.Generator(device).manual_seed(seed))
    parameters = checkpoints.logical_parameters(model)
    info = {"task": "causal-lm", "parameters": parameters, "weights": "random"}
    checkpoints.save(model, byte_tokenizer(model.config.max_position_embeddings), output, info)
    return {"parameters": parameters, "weights": "random"}


def skeleton(recipe: Recipe) -> tuple[PreTrainedModel, bool]:
    """Return the model on the meta device, shapes without weights, and True: its size is exact.

    Raises UserError for a config of which no model can be made.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    content = dict(sizes(recipe))
    # The tokens are those of the tokenizer that this model has, not of the one that the architecture came with.
    content |= {"bos_token_id": None, "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 1}
    if recipe.layers is not None:
        content["num_hidden_layers"] = recipe.layers
    if recipe.positions is not None:
        content["max_position_embeddings"] = recipe.positions
    try:
        config = AutoConfig.for_model(content.pop("model_type"), **content)
        if config.vocab_size < VOCABULARY:
            raise ValueError(
                f"'vocab_size' is {config.vocab_size}, and the tokenizer of single bytes has {VOCABULARY} tokens."
            )
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, recipe.weights_dtype)), True
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"No model can be made of the config: {reason}") from error


def fill(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Draw a model's weights in place: matrices from a normal distribution; norms are 1, biases 0."""
    import torch

    model.tie_weights()  # taking them off the meta device has parted tied ones
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, STANDARD_DEVIATION, generator=generator)
            else:
                weight.fill_(float(name.endswith("weight")))


def byte_tokenizer(length: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the 256 bytes and the end token, for texts of at most `length` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", model_max_length=length
    )
