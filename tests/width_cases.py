"""What the tests of width pruning share: tiny parents, one way to prune, and two slow and plain references."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

import families
import tiny
from espalier import checkpoints, recipes
from espalier.data import Calibration
from espalier.models.anatomy import parts_of

LLAMAS = {"mha": {"num_key_value_heads": 4}, "gqa": {"num_key_value_heads": 2}}
ARCHITECTURES = ("opt", "glm", "qwen3")  # biases; gate and up in one matrix; head size not hidden size / heads


def parent(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **options) -> Path:
    """Save a tiny random model, its biases too, with a byte-level tokenizer and return its folder."""
    folder.mkdir()
    model = families.tiny(family, **{"vocab_size": tiny.VOCABULARY, **options}).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    save(model, folder)
    return folder


def save(model, folder: Path) -> None:
    info = {"task": "causal-lm", "parameters": checkpoints.logical_parameters(model)}
    checkpoints.save(model, tiny.tokenizer(), folder, info)


def calibration(folder: Path, **sizes) -> Calibration:
    return recipes.build(Calibration, tiny.calibration(folder, **{"samples": 6, "length": 12, **sizes}), "calibration")


def prune(method, source: Path, output: Path, **recipe) -> list[dict]:
    """Run a method and return its report, block by block."""
    output.mkdir()
    built = method.Recipe(**recipe)
    built.check()
    return method.apply(source, output, built, seed=0, device="cpu")["blocks"]


def dense(source: Path):
    """Return a parent in float64."""
    return checkpoints.load(source, device="cpu").model.double()


def windows(source: Path, sets: Calibration) -> torch.Tensor:
    return torch.tensor(sets.token_ids(checkpoints.load_tokenizer(source)))


def inputs_of(model, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return, for each block, the inputs of the output layer and of `down`: tokens × channels, window by window."""
    seen: list[tuple[list, list]] = [([], []) for _ in parts_of(model)]
    handles = [
        layer.register_forward_pre_hook(lambda _, given, into=into: into.append(given[0].detach().flatten(0, -2)))
        for both, parts in zip(seen, parts_of(model), strict=True)
        for into, layer in zip(both, (parts.output, parts.down), strict=True)
    ]
    with torch.no_grad():
        for window in ids:
            model(input_ids=window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return [(torch.cat(heads), torch.cat(mlp)) for heads, mlp in seen]


def mask(parts, groups: list[int], neurons: list[int]) -> None:
    """Silence groups and neurons of a block: what they give is multiplied by zero."""
    with torch.no_grad():
        for group in groups:
            for channel in parts.group_channels(group):
                parts.output.weight[:, channel] = 0
        for neuron in neurons:
            parts.down.weight[:, neuron] = 0


def masked(model, report: list[dict]):
    """Return a copy of a dense model in which the units that a report says went are silent."""
    model = copy.deepcopy(model)
    for entry in report:
        mask(parts_of(model)[entry["block"]], entry["groups_removed"], entry["neurons_removed"])
    return model


def lowest(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda unit: scores[unit])[:count])


def random_ids() -> torch.Tensor:
    return torch.randint(0, 255, (2, 16), generator=torch.Generator().manual_seed(1))


def check_saved(method, source: Path, output: Path, exact: bool = True, **recipe) -> None:
    """Assert that a pruned checkpoint loads, saves again bit for bit, and has the size that the plan says."""
    model = checkpoints.load(output, device="cpu").model
    counted = checkpoints.logical_parameters(model)
    assert counted == checkpoints.describe(output)["parameters"] < checkpoints.describe(source)["parameters"]
    again = output.with_name("again")
    again.mkdir()
    save(model, again)
    states = [checkpoints.load(folder, device="cpu").model.state_dict() for folder in (output, again)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    skeleton = checkpoints.skeleton(source)
    assert method.plan(skeleton, method.Recipe(**recipe)) is exact
    if exact:
        assert checkpoints.logical_parameters(skeleton) == counted
