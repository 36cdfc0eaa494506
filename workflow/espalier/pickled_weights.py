"""Weights in PyTorch's own format, pytorch_model.bin or its parts, written as safetensors; nothing in them is run.

Such a file is a pickle, which may hold code. torch.load(weights_only=True) builds tensors and plain containers from it
and refuses all else.
"""

from __future__ import annotations

import fnmatch
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from espalier import hub_cache
from espalier.errors import UserError, first_line
from espalier.files import read_json, write_json
from espalier.progress import progress

if TYPE_CHECKING:
    import torch

WHOLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
LARGEST = 5_000_000_000  # bytes of weights in a file that is written, unless one tensor has more


def files(source: Path) -> list[Path]:
    """Return the files of a folder that hold its weights, as transformers chooses them: the whole, or all parts.

    Raises UserError where there are none, or one is missing.
    """
    if (source / WHOLE).is_file():
        return [source / WHOLE]
    if not (source / INDEX).is_file():
        raise UserError(f"{source} has neither {WHOLE} nor {INDEX}.")
    try:
        names = sorted(set(read_json(source / INDEX)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{source / INDEX} does not say which file holds which weight.") from None
    for name in names:
        if not any(fnmatch.fnmatch(name, pattern) for pattern in hub_cache.PICKLED_FILES) or Path(name).name != name:
            raise UserError(f"{source / INDEX} names the file {name!r}, which is no part of {WHOLE}.")
        if not (source / name).is_file():
            raise UserError(f"{source} lacks the file {name}, which its {INDEX} names.")
    return [source / name for name in names]


def copy_rest(source: Path, folder: Path, code: bool) -> None:
    """Copy what a checkpoint has beside its weights: config and tokenizer, and only with `code` Python files."""
    for pattern in [*hub_cache.PLAIN_FILES, *(["*.py"] if code else [])]:
        for file in source.glob(pattern):
            if file.is_file() and not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)


def convert(sources: list[Path], folder: Path, tied: bool) -> None:
    """Write the weights of `sources` into `folder` as safetensors, each as it is, part after part.

    Of one tensor with several names the first is written if the model has `tied` weights: transformers gives it the
    others. Memory holds at most one file that is read (where that is no zip archive, which could be mapped) and one
    that is written. Raises UserError for a file that is damaged, or holds more than weights.
    """
    written: list[tuple[Path, list[str]]] = []
    size = 0
    for source in progress(sources, "files converted", len(sources)):
        for part in _parts(_distinct(_load(source), tied)):
            written.append((folder / f"part-{len(written):05}.safetensors", list(part)))
            size += sum(tensor.nbytes for tensor in part.values())
            _save(part, written[-1][0])
    if not size:
        raise UserError(f"{sources[0]} holds no weights.")
    if len(written) == 1:
        written[0][0].rename(folder / "model.safetensors")
        return
    places = {}
    for number, (file, names) in enumerate(written, 1):
        target = file.rename(folder / f"model-{number:05}-of-{len(written):05}.safetensors")
        places |= dict.fromkeys(names, target.name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": places})


def _load(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file by name; they are mapped to memory where the file's format allows it."""
    import torch

    with file.open("rb") as stream:
        archive = stream.read(4) == b"PK\x03\x04"  # PyTorch 1.6 and later
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=archive)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes can end in any
        wanted = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if wanted:
            raise UserError(
                f"{file} is refused, and nothing in it was run: it holds more than weights, and asks for {wanted[1]}."
            ) from None
        reason = str(error).rpartition("WeightsUnpickler error:")[2]
        raise UserError(f"{file} is damaged, or holds no weights: {first_line(Exception(reason))}.") from None
    if not isinstance(state, Mapping):
        raise UserError(f"{file} holds no weights by name, but a {type(state).__name__}.")
    for name, tensor in state.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
        if not isinstance(name, str) or not plain:
            raise UserError(f"{file} holds more than weights: {name!r} is no plain tensor.")
    return {name: tensor.detach() for name, tensor in state.items()}


def _distinct(state: dict[str, torch.Tensor], tied: bool) -> dict[str, torch.Tensor]:
    """Return tensors without further names of one, if they are `tied`; else these get values of their own."""
    found, seen = {}, set()
    for name, tensor in state.items():
        values = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        repeated = tensor.numel() > 0 and values in seen
        seen.add(values)
        if not (repeated and tied):
            found[name] = tensor.clone() if repeated else tensor
    return found


def _parts(tensors: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield tensors in their order, as many together as a file may hold."""
    part: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if part and sum(one.nbytes for one in part.values()) + tensor.nbytes > LARGEST:
            yield part
            part = {}
        part[name] = tensor
    if part:
        yield part


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    for name, one in tensors.items():
        # What is transposed, or a slice of a larger tensor, cannot be written as it lies in memory.
        if not one.is_contiguous() or one.untyped_storage().nbytes() != one.nbytes:
            tensors[name] = one.clone(memory_format=torch.contiguous_format)
    try:
        save_file(tensors, file, {"format": "pt"})
    except SafetensorError as error:
        raise UserError(f"{file} could not be written: {first_line(error)}.") from error
