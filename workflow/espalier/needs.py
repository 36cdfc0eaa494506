"""What a job needs, from the size of its model: main memory and minutes, for the profiles that submit jobs.

A profile calls `memory` and `minutes`, which return the text of an expression. Snakemake evaluates it for each job, and
once more inside the job, with `wildcards` and `attempt` in scope. The Snakefile sets `study`, below.

All variants of a model are taken to be as large as the dense one, which none exceeds: a parent must be loaded whole. A
rule whose jobs are about no one model (it has no wildcard `model`) needs `base` alone. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier import chains, group_sizes, model_configs, plugins, shapes
from espalier.config import Model
from espalier.study import Study, Wanted

study: Study | None = None  # set by the Snakefile

# Keys of a recipe of `pretrain` that config.json knows by another name.
CONFIG_NAMES = {
    "vocabulary": "vocab_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "max_tokens": "max_position_embeddings",
    "weights_dtype": "dtype",
}
# What a method of `pretrain` trains, where its sizes name no architecture: by the task that it gives.
ARCHITECTURES = {"causal-lm": "llama", "masked-lm": "bert"}
# How wide a weight is taken to be while only a shape is known that names no dtype: decoders are published in 16 bits.
PUBLISHED_BYTES = {"causal-lm": 2, "masked-lm": 4, "sequence-classification": 4}


@dataclass(frozen=True)
class Size:
    """How large a dense model is."""

    parameters: int
    bytes: int  # of all weights, in the dtype in which they are loaded
    source: str  # how it is known: "weight files", "shape", or "assumed"


# For a model of the hub whose files are not there yet, and for an architecture whose parameters are not counted here.
ASSUMED = Size(8_000_000_000, 16_000_000_000, "assumed")


def memory(base: float, weights: float = 0, most: int | None = None) -> str:
    """Return an expression for `mem_mb`: `base` MB and `weights` times the size of the model's weights.

    Attempt n gets n times as much, but never more than `most` MB.
    """
    return _expression("megabytes", base=base, weights=weights, most=most)


def minutes(base: float, billions: float = 0, most: int | None = None) -> str:
    """Return an expression for `runtime`: `base` minutes and `billions` minutes for each 10^9 parameters of the model.

    Attempt n gets n times as long, but never more than `most` minutes.
    """
    return _expression("duration", base=base, billions=billions, most=most)


def megabytes(wildcards: Mapping, attempt: int, *, base: float, weights: float = 0, most: int | None = None) -> int:
    """Return the megabytes (10^6 bytes) of main memory of a job, as `memory` says."""
    found = _model_of(wildcards)
    return _grown(base + weights * (found.bytes / 1e6 if found else 0), attempt, most)


def duration(wildcards: Mapping, attempt: int, *, base: float, billions: float = 0, most: int | None = None) -> int:
    """Return the minutes of a job, as `minutes` says."""
    found = _model_of(wildcards)
    return _grown(base + billions * (found.parameters / 1e9 if found else 0), attempt, most)


def size(of: Study, model: str) -> Size:
    """Return how large a model of a study is; `ASSUMED` where that cannot be known yet.

    A local model and one in the hub's cache are measured by the headers of their weight files, which may hold a tied
    matrix twice; until these are there, or converted, they are counted from their config.json, or the `shape` that
    their entry names. One that the study makes itself is counted from its shape, with the largest vocabulary that it
    allows.
    """
    try:
        return _known(of, model)
    except LookupError:
        entry = of.resolved.models[model]
    try:
        config = config_of(of, model)
        count = parameters(config)
    except (LookupError, TypeError):  # also for a config.json of an unknown kind
        if entry.shape is None:
            return ASSUMED
        config = shapes.read(entry.shape)
        count = parameters(config)
    dtype = _dtype(entry, config)
    return Size(count, count * (_width(dtype) if dtype else PUBLISHED_BYTES[entry.task]), "shape")


def parameters(config: Mapping[str, Any]) -> int:
    """Return the number of parameters of the model of a config.json, tied ones once.

    Exact for llama, mistral, qwen2, qwen3, glm, opt and, as a masked language model, bert; other decoders are counted
    as llama, which is near. Raises KeyError for a config that leaves a size to its class's default.
    """
    return {"bert": _bert, "opt": _opt}.get(config["model_type"], _llama)(config)


def config_of(of: Study, model: str) -> dict[str, Any]:
    """Return what the config.json of a model says, or will say of the sizes of one that the study makes itself.

    Raises LookupError for a model of the hub that is not in the cache and has no shape.
    """
    entry = of.resolved.models[model]
    if not entry.pretrain:
        written = _weights_folder(of, model) / "config.json"
        return _json(written if written.is_file() else model_configs.file_of(entry))
    step = of.resolved.pretrained[model]
    own = {key: getattr(step.recipe, name, None) for name, key in CONFIG_NAMES.items()}
    default = {
        "model_type": ARCHITECTURES[plugins.load("pretrain", step.method).GIVES],
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    sizes = group_sizes.sizes_of(entry, step)
    stated = {key: value for key, value in own.items() if value is not None}
    return {**({} if "model_type" in sizes else default), **sizes, **stated}


def _expression(function: str, **arguments: float | None) -> str:
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items() if value is not None)
    return f"__import__('{__name__}').needs.{function}(wildcards, attempt, {given})"


def _grown(value: float, attempt: int, most: int | None) -> int:
    return min(math.ceil(value * attempt), math.inf if most is None else most)


def _model_of(wildcards: Mapping) -> Size | None:
    model = wildcards.get("model")
    if model is None:
        return None
    if study is None:
        raise RuntimeError("espalier.needs.study must be set before a job's needs are asked for")
    return size(study, model)


@functools.cache  # a LookupError is not kept: a model of the hub may arrive while this process runs
def _known(of: Study, model: str) -> Size:
    entry, config = of.resolved.models[model], config_of(of, model)
    if entry.pretrain:
        count = parameters(config)
        return Size(count, count * _width(config["dtype"]), "shape")
    stored = [_header(file) for file in _weight_files(_weights_folder(of, model))]
    count = sum(values for values, _ in stored)
    dtype = _dtype(entry, config)
    return Size(count, count * _width(dtype) if dtype else sum(held for _, held in stored), "weight files")


def _dtype(entry: Model, config: Mapping[str, Any]) -> str | None:
    """Return the dtype in which a model is loaded: its entry's, or its config.json's; None where neither names one."""
    return entry.dtype if entry.dtype != "auto" else config.get("dtype") or config.get("torch_dtype")


def _weights_folder(of: Study, model: str) -> Path:
    """Return the folder of a model's safetensors: its own, or the study's, where they are converted."""
    entry = of.resolved.models[model]
    if not entry.convert:
        return model_configs.folder(entry)
    return Path(of.path(Wanted(model, entry.seeds[0], chains.DENSE, "step", chains.DENSE))).parent / "model"


def _weight_files(folder: Path) -> list[Path]:
    """Return a checkpoint's safetensors files. Raises LookupError unless all are there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(_json(index)["weight_map"].values())
        files = [folder / name for name in sorted(names)]
    else:
        whole = folder / "model.safetensors"
        files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    if not files or not all(file.is_file() for file in files):
        raise LookupError(f"{folder} does not hold all weights")
    return files


def _header(file: Path) -> tuple[int, int]:
    """Return the number of values of a safetensors file, and their bytes, from the JSON that opens it.

    Raises LookupError for a damaged one: the job that reads it says what is wrong.
    """
    try:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
        return (
            sum(math.prod(tensor["shape"]) for tensor in tensors),
            max(tensor["data_offsets"][1] for tensor in tensors),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
        raise LookupError(f"{file} is damaged") from error


def _json(file: Path) -> dict:
    """Return what a JSON file says. Raises LookupError for a missing or damaged one."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LookupError(f"{file} is damaged") from error


def _width(dtype: str) -> int:
    """Return the bytes of a value: 2 for bfloat16."""
    return int(re.search(r"\d+", dtype)[0]) // 8


def _llama(config: Mapping[str, Any]) -> int:
    """Pre-norm blocks of attention and a gated MLP, with RMS norms."""
    hidden, neurons, kind = config["hidden_size"], config["intermediate_size"], config["model_type"]
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    queries, keys = heads * width, (config.get("num_key_value_heads") or heads) * width
    attention = 2 * hidden * queries + 2 * hidden * keys
    if kind == "qwen2" or config.get("attention_bias"):
        attention += queries + 2 * keys + (0 if kind in ("qwen2", "glm") else hidden)
    if kind == "qwen3":
        attention += 2 * width  # norms of queries and keys
    mlp = 3 * hidden * neurons + (2 * neurons + hidden if config.get("mlp_bias") else 0)
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return embeddings + config["num_hidden_layers"] * (attention + mlp + 2 * hidden) + hidden


def _opt(config: Mapping[str, Any]) -> int:
    hidden, neurons, embedded = config["hidden_size"], config["ffn_dim"], config["word_embed_proj_dim"]
    bias, norm = int(config.get("enable_bias", True)), 2 * hidden
    block = 4 * (hidden * hidden + bias * hidden) + 2 * hidden * neurons + bias * (neurons + hidden) + 2 * norm
    embeddings = config["vocab_size"] * embedded * (1 if config.get("tie_word_embeddings", True) else 2)
    positions = (config["max_position_embeddings"] + 2) * hidden
    projections = 2 * hidden * embedded if embedded != hidden else 0
    last = norm if config.get("do_layer_norm_before", True) else 0
    return embeddings + positions + projections + config["num_hidden_layers"] * block + last


def _bert(config: Mapping[str, Any]) -> int:
    """With tied embeddings and the head of a masked language model, and without a pooler."""
    hidden, neurons, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    norm, segments = 2 * hidden, config.get("type_vocab_size", 2)
    embeddings = (vocabulary + config["max_position_embeddings"] + segments) * hidden + norm
    block = 4 * (hidden * hidden + hidden) + 2 * hidden * neurons + neurons + hidden + 2 * norm
    head = hidden * hidden + hidden + norm + vocabulary
    return embeddings + config["num_hidden_layers"] * block + head
