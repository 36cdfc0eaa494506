"""Models of random weights: the sizes that a shape or a config gives them, also divided by a number, and the weights.

What `pretrain: random-weights` and `pretrain: random-encoder` share. Their recipes have the keys shape, config,
weights_dtype, layers and narrow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from espalier import shapes
from espalier.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STANDARD_DEVIATION = 0.02  # of the matrices
WIDTH = 64  # narrowed widths are its multiples
HEAD = 32  # channels of a head of a narrowed model
MLP_WIDTHS = ("intermediate_size", "ffn_dim")  # OPT has the second name
NARROWED = ("hidden_size", *MLP_WIDTHS, "word_embed_proj_dim")
ENCODERS = ("bert",)  # model types of the encoders that can be made


def check(recipe: Any, encoder: bool) -> None:
    """Raise ValueError for keys that do not go together, and for an architecture that is, or is not, an encoder."""
    if (recipe.shape is None) == (recipe.config is None):
        raise ValueError("exactly one of the keys 'shape' and 'config' must say which model this is.")
    if recipe.shape is not None:
        shapes.check(recipe.shape)
    content = _content(recipe)
    if "model_type" not in content:
        raise ValueError("'config' must say the 'model_type', such as llama.")
    if (content["model_type"] in ENCODERS) != encoder:
        right = "random-weights" if encoder else "random-encoder"
        kind = "no encoder that can be made" if encoder else "an encoder"
        raise ValueError(f"'{content['model_type']}' is {kind}: 'pretrain: {right}' may be meant.")
    if recipe.layers is not None and recipe.layers < 1:
        raise ValueError("'layers' must be at least 1.")
    if recipe.narrow < 1:
        raise ValueError("'narrow' must be at least 1.")
    if recipe.narrow > 1:
        for key in ("vocab_size", "hidden_size", "num_attention_heads"):
            if key not in content:
                raise ValueError(f"'narrow' divides what 'config' says, and that lacks '{key}'.")
        if not any(key in content for key in MLP_WIDTHS):
            raise ValueError(f"'narrow' divides what 'config' says, and that lacks {' or '.join(MLP_WIDTHS)}.")


def reads(recipe: Any) -> list[str]:
    """Return the files whose content a recipe refers to: an edit to the shape makes the model anew."""
    return [str(shapes.file_of(recipe.shape))] if recipe.shape else []


def sizes(recipe: Any, vocabulary: int) -> dict:
    """Return what a model's config.json will say of its sizes; `vocabulary` is the least that a narrowed one has."""
    content = _content(recipe)
    if recipe.narrow > 1:
        content = narrowed(content, recipe.narrow, vocabulary)
    return content if recipe.layers is None else {**content, "num_hidden_layers": recipe.layers}


def narrowed(config: Mapping[str, Any], by: int, vocabulary: int) -> dict:
    """Return a config.json whose widths are divided by a number.

    Widths become the nearest multiple of 64, heads 32 channels wide; heads of keys and values keep their ratio to those
    of queries, as far as they divide them. The vocabulary becomes a multiple of 64 that holds `vocabulary` tokens.
    Layers and positions stay.
    """
    new = {key: WIDTH * max(1, round(config[key] / by / WIDTH)) for key in NARROWED if key in config}
    heads = new["num_attention_heads"] = new["hidden_size"] // HEAD
    if (shared := config.get("num_key_value_heads")) is not None:
        most = max(1, heads * shared // config["num_attention_heads"])
        new["num_key_value_heads"] = next(count for count in range(most, 0, -1) if heads % count == 0)
    if config.get("head_dim") is not None:
        new["head_dim"] = HEAD
    new["vocab_size"] = WIDTH * math.ceil(max(config["vocab_size"] / by, vocabulary) / WIDTH)
    return {**config, **new}


def skeleton(config: Mapping[str, Any], loader: str, dtype: str, vocabulary: int = 0) -> PreTrainedModel:
    """Return the model of a config.json on the meta device; `loader` is transformers' class, such as AutoModel.

    Raises UserError for a config of which no model can be made, or that has fewer than `vocabulary` tokens.
    """
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    content = dict(config)
    try:
        made = transformers.AutoConfig.for_model(content.pop("model_type"), **content)
        if made.vocab_size < vocabulary:
            raise ValueError(f"'vocab_size' is {made.vocab_size}, and the model's tokenizer has {vocabulary} tokens.")
        with torch.device("meta"):
            return getattr(transformers, loader).from_config(made, dtype=getattr(torch, dtype))
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"No model can be made of the config: {reason}") from error


def make(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path, task: str, *, seed: int, device: str
) -> dict:
    """Draw the weights of a model of the meta device on `device` and save it; return its parameters for the report.

    The description says `weights: random`, which children take over.
    """
    import torch

    from espalier import checkpoints

    fill(model.to_empty(device=device), torch.Generator(device).manual_seed(seed))
    known = {"parameters": checkpoints.logical_parameters(model), "weights": "random"}
    checkpoints.save(model, tokenizer, output, {"task": task, **known})
    return known


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


def _content(recipe: Any) -> dict:
    return shapes.read(recipe.shape) if recipe.shape else recipe.config
