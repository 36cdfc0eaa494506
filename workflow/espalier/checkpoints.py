"""Checkpoints: folders that say themselves how they are loaded, and the one loader for every later stage.

A checkpoint folder holds what its library writes (config.json, safetensors, tokenizer) and `espalier.json`:
  format       transformers | bitsandbytes | gptqmodel | compressed-tensors | packed (packed_loading.py) |
               reference (a pointer to a local folder or a hub model)
  task         causal-lm | masked-lm | sequence-classification
  parameters   logical number of parameters: quantization leaves it as it was
  bits         bits a weight of the transformer blocks
  arithmetic   float | unpacked | integer | simulated: what products are computed in (docs/metrics.md); none is float
  kernel       of gptqmodel: a name of gptq_loading.KERNELS, or auto
A checkpoint without `espalier.json` is an ordinary transformers checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from espalier import gptq_loading, hub_cache, lowbit_loading, memory, packed_loading, pickled_weights
from espalier.errors import UserError, first_line
from espalier.files import read_json, sha256, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DESCRIPTION = "espalier.json"
TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
}
# Formats that are read into layers of models/.
OWN_LAYERS = {"compressed-tensors": lowbit_loading, "packed": packed_loading}
# What a description says of how and where a checkpoint is stored, and not of the model.
STORAGE = ("format", "path", "id", "revision", "dtype", "bits", "arithmetic", "kernel")


class TooLarge(UserError):
    """Memory ran out while a checkpoint was loaded."""


@dataclass
class Checkpoint:
    """A model ready to run on `device`, its tokenizer, what espalier.json says, and where it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: dict
    folder: Path
    device: str


def describe(folder: Path) -> dict:
    """Return what the checkpoint's `espalier.json` says (no torch); raises UserError if the folder is not one."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"The checkpoint folder {folder} does not exist.")
    return read_json(folder / DESCRIPTION)


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, info: dict, **storage: object
) -> None:
    """Write model, tokenizer and description into `folder`; `info` needs task and parameters.

    `info` may be the parent's with changes; `storage` says what `STORAGE` names, where it is not plain transformers.
    """
    for name, weight in model.named_parameters():
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            # bitsandbytes does so on CPUs with AVX512-BF16, and what it then saves is damaged.
            raise ValueError(f"the weight {name} was repacked by a forward pass; save a 4-bit model before it")
    if model.can_generate():
        try:
            model.generation_config.validate(strict=True)
        except ValueError:
            # Published models set a temperature without saying that they sample; saving it as it is would be refused.
            model.generation_config.do_sample = True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_description(folder, {**inherited(info), "bits": 8 * model.dtype.itemsize, **storage})


def refuse_quantized(folder: Path, method: str) -> None:
    """Raise UserError if a checkpoint's weights are quantized: `method` needs those that are not."""
    found = describe(folder)["format"]
    if found not in ("transformers", "reference"):
        raise UserError(f"{folder} is quantized already ({found}): {method} needs an unquantized parent.")


def inherited(info: dict) -> dict:
    """Return what a checkpoint takes over from its parent's description: not how and where that is stored."""
    return {key: value for key, value in info.items() if key not in STORAGE}


def write_description(folder: Path, info: dict) -> None:
    """Write `espalier.json`; a missing format is transformers, missing bits are those of the saved weights."""
    info = {"format": "transformers", "bits": 32, **info}
    missing = {"task", "parameters"} - set(info)
    if missing:
        raise ValueError(f"a checkpoint's description needs {sorted(missing)}")
    write_json(Path(folder) / DESCRIPTION, info)


def refer(folder: Path, reference: dict) -> dict:
    """Write a pointer to a local folder or a hub model into `folder`, once it is known to be there and whole.

    `reference` has path, or id and revision; task; dtype; trust_remote_code; and convert, if weights in PyTorch's own
    format are to be written into `folder` as safetensors, which then is a checkpoint of its own. A hub model is
    downloaded into the hub's cache. Returns the checksums of the weight files. Raises UserError for a model that is
    missing or damaged.
    """
    convert = reference.get("convert", False)
    if reference["path"]:
        source = Path(reference["path"]).resolve()
        if not (source / "config.json").is_file():
            raise UserError(f"{source} is not a checkpoint folder: it has no config.json.")
    else:
        source = _download(reference["id"], reference["revision"], convert)
    if quantized := read_json(source / "config.json").get("quantization_config"):
        raise UserError(
            f"{source} is quantized already ({quantized.get('quant_method')}). Name the model that it was made from,"
            " and quantize that by a recipe: then what is measured is known."
        )
    if lack := hub_cache.lack_of_weights([file.name for file in source.iterdir()], convert):
        raise UserError(f"{source} {lack}")
    info = {key: reference[key] for key in ("id", "revision", "task", "dtype", "trust_remote_code")}
    if reference["path"] and (source / DESCRIPTION).is_file():  # that its weights are random stays true of them
        info = {**inherited(read_json(source / DESCRIPTION)), **info}
    if convert:
        weights = pickled_weights.files(source)
        pickled_weights.copy_rest(source, folder, reference["trust_remote_code"])
        info |= {"format": "transformers"}
    else:
        weights = sorted(source.glob("*.safetensors"))
        info |= {"format": "reference", "path": str(source) if reference["path"] else None}
    write_description(folder, {**info, "parameters": 0})
    model = skeleton(folder)
    if convert:
        pickled_weights.convert(weights, folder, tied=getattr(model.config, "tie_word_embeddings", False))
    sizes = [_sizes(file) for file in sorted((folder if convert else source).glob("*.safetensors"))]
    if not (count := sum(values for values, _ in sizes)):
        raise UserError(f"{source} holds no matrices of floating-point numbers.")
    bits = 8 * sum(size for _, size in sizes) / count
    # Counted by the model: the files may hold a tied weight twice, and buffers.
    write_description(folder, {**info, "parameters": logical_parameters(model), "bits": bits})
    return {"sha256": {file.name: sha256(file) for file in weights}}


def pick_device(device: str = "auto") -> str:
    """Return cuda or cpu; `auto` takes CUDA where there is one."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load(folder: Path, device: str = "auto", task: str | None = None, **options) -> Checkpoint:
    """Load a checkpoint in evaluation mode.

    `task` overrides the task that the checkpoint names (an encoder gets a new head: pass `num_labels`). `options` go to
    from_pretrained; with a `device_map` among them the model stays where that puts it. Raises UserError for a missing,
    damaged or unsupported checkpoint.
    """
    folder = Path(folder)
    info = describe(folder)
    device = pick_device(device)
    source, revision = _source(folder, info)
    task = task or info["task"]
    if task not in TASKS:
        raise UserError(f"{folder / DESCRIPTION}: the task '{task}' is not one of {', '.join(TASKS)}.")
    tokenizer = load_tokenizer(folder)
    with _loading(source):
        know_pruned(source)
        if info["format"] == "gptqmodel":
            kernel = info.get("kernel", "auto")
            trust = info.get("trust_remote_code", False)
            model = gptq_loading.load(source, weights_dtype(folder), device, kernel, trust_remote_code=trust, **options)
        else:
            model = _load_transformers(source, revision, task, info, device, options)
    model.eval()
    if info["format"] == "bitsandbytes" and device == "cpu":
        import torch

        if torch.backends.cpu.get_cpu_capability() != "AVX512":  # bitsandbytes then multiplies float32 copies
            info = {**info, "arithmetic": "unpacked"}
    return Checkpoint(model, tokenizer, info, folder, device)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return a checkpoint's tokenizer, with a padding token. Raises UserError where there is none."""
    source, revision = _source(folder, describe(folder))
    with _loading(source):
        from transformers import AutoTokenizer

        know_pruned(source)  # a tokenizer is looked up by its model's class: of an unknown one it would ask the user
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def skeleton(folder: Path) -> PreTrainedModel:
    """Return a checkpoint's model on the meta device: all shapes and no weights, from its config.json alone."""
    info = describe(folder)
    source, revision = _source(folder, info)
    with _loading(source):
        import torch
        import transformers

        know_pruned(source)
        trust = info.get("trust_remote_code", False)
        config = transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust)
        with torch.device("meta"):
            return getattr(transformers, TASKS[info["task"]]).from_config(config, trust_remote_code=trust)


def weights_folder(folder: Path) -> Path:
    """Return the folder that holds the weights: the checkpoint's own, or the one that a reference points to."""
    info = describe(folder)
    if info["format"] != "reference":
        return Path(folder)
    return Path(info["path"]) if info["path"] else _download(info["id"], info["revision"])


def weights_dtype(folder: Path) -> str:
    """Return the dtype in which a checkpoint computes: what its description says, else what its config.json says."""
    stated = describe(folder).get("dtype")
    if stated not in (None, "auto"):
        return stated
    config = read_json(weights_folder(folder) / "config.json")
    return config.get("dtype") or config.get("torch_dtype") or "float32"


def weight_bytes(folder: Path) -> int:
    """Return the size of a checkpoint's weight files on disk."""
    return sum(file.stat().st_size for file in weights_folder(folder).glob("*.safetensors"))


def logical_parameters(model: PreTrainedModel) -> int:
    """Return the number of parameters of a model whose weights are not packed, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _source(folder: Path, info: dict) -> tuple[str | Path, str | None]:
    """Return what from_pretrained gets for a checkpoint: a folder, or a hub id with its revision."""
    if info["format"] == "reference":
        return info["path"] or info["id"], info["revision"]
    return Path(folder), None


@contextlib.contextmanager
def _loading(source: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, MemoryError, *_safetensors_error()) as error:
        kind = TooLarge if memory.is_out_of_memory(error) else UserError
        raise kind(f"The checkpoint {source} cannot be loaded: {first_line(error)}.") from error


def know_pruned(source: str | Path) -> None:
    """Make the class of a width-pruned checkpoint known to transformers: Espalier's own, not the one carried there."""
    file = Path(source) / "config.json"
    if not file.is_file():  # a hub model: a pruned checkpoint is a folder
        return
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not read_json, which would advise to delete what may be the user's own model
        raise UserError(f"The checkpoint {source} cannot be loaded: its config.json is damaged ({error}).") from None
    for name in config.get("architectures") or ():
        if name.startswith("Pruned"):
            from espalier.models import pruned

            getattr(pruned, name)


def _download(name: str, revision: str, convert: bool = False) -> Path:
    import httpx
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    offline = hub_cache.switched_off()
    options = {"allow_patterns": hub_cache.model_files(convert), "local_files_only": offline}
    try:
        if convert and not offline:  # safetensors would not be downloaded, and so not be seen
            # The cache may hold the model; if not, the download says the same again.
            with contextlib.suppress(httpx.TransportError, HfHubHTTPError):
                if lack := hub_cache.lack_of_weights(HfApi().list_repo_files(name, revision=revision), convert):
                    raise UserError(f"The model {name}, revision {revision}, {lack}")
        return Path(snapshot_download(name, revision=revision, **options))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, httpx.HTTPError) as error:
        advice = " Run `snakemake prefetch` where there is internet." if offline else ""
        reason = f"cannot be downloaded: {first_line(error)}.{advice}"
        raise UserError(f"The model {name}, revision {revision}, {reason}") from error


def _sizes(file: Path) -> tuple[int, int]:
    """Return how many values the matrices of floating-point numbers in a safetensors file have, and their bytes.

    Norms and buffers may have another dtype. From the header alone; refuses a truncated file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            slices = [tensors.get_slice(key) for key in tensors.keys()]  # noqa: SIM118
            slices = [part for part in slices if "F" in part.get_dtype() and len(part.get_shape()) > 1]
            counts = [math.prod(part.get_shape()) for part in slices]
            bits = [int(re.search(r"\d+", part.get_dtype())[0]) for part in slices]
    except SafetensorError as error:
        raise UserError(f"{file} is damaged: {first_line(error)}.") from error
    return sum(counts), sum(count * width for count, width in zip(counts, bits, strict=True)) // 8


def _load_transformers(source, revision, task: str, info: dict, device: str, options: dict):
    import transformers

    options = {"dtype": info.get("dtype", "auto"), **options}
    if info["format"] == "bitsandbytes":
        options["device_map"] = {"": device}
    loader = getattr(transformers, TASKS[task])
    if info["format"] in OWN_LAYERS:
        model, found = OWN_LAYERS[info["format"]].load(loader, source, device, **options)
    else:
        trust = info.get("trust_remote_code", False)
        model, found = loader.from_pretrained(
            source, revision=revision, trust_remote_code=trust, output_loading_info=True, **options
        )
    if task == info["task"] and found["missing_keys"]:  # transformers would make them up
        raise ValueError(f"its files lack weights of the model, such as {min(found['missing_keys'])}")
    return model if "device_map" in options else model.to(device)


def _safetensors_error() -> tuple[type[Exception], ...]:
    from safetensors import SafetensorError

    return (SafetensorError,)
