"""How large every variant of a study will be, from shapes alone: no weights are there."""

from __future__ import annotations

import copy
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from espalier import chains, checkpoints, model_configs, plugins, random_models
from espalier.errors import UserError
from espalier.files import read_json
from espalier.study import Study

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Size:
    """The size of one variant. A field is a column of the CSV file."""

    model: str
    chain: str
    parameters: int  # tied ones once; quantization leaves the number as it was
    exact: bool  # False: data or text decide, and the number is near or, of a vocabulary, the most
    share_of_dense: float
    gb_at_16_bit: float  # weights, 10^9 bytes
    peak_gb: float | None  # of a prune step on its device, by arithmetic, with 16-bit weights


def of_study(study: Study) -> list[Size]:
    """Return the size of every variant that the study makes, parents before children, by model.

    Raises UserError, opened by file, model and chain, for a size that cannot be met, and for a model whose config
    cannot be read.
    """
    sizes = []
    for model in study.resolved.models:
        wanted = {parent for one in study.wanted if one.model == model for parent in chains.ancestors(one.chain)}
        found: dict[str, tuple[PreTrainedModel, bool]] = {}
        for chain in sorted(wanted, key=lambda chain: chain.split("+")):
            try:
                found[chain], peak = _variant(study, model, chain, found)
            except UserError as error:
                raise UserError(f"{study.file}: {model}, chain '{chain}': {error}") from None
            shapes, exact = found[chain]
            parameters = checkpoints.logical_parameters(shapes)
            share = parameters / checkpoints.logical_parameters(found[chains.DENSE][0])
            sizes.append(
                Size(model, chain, parameters, exact, share, parameters * 2 / 1e9, None if peak is None else peak / 1e9)
            )
    return sizes


def _variant(
    study: Study, model: str, chain: str, found: dict[str, tuple[PreTrainedModel, bool]]
) -> tuple[tuple[PreTrainedModel, bool], int | None]:
    """Return a variant's shapes, whether they are exact, and the peak in bytes of the prune step that makes it."""
    parent, token = chains.split(chain)
    if token is None:
        return _dense(study, model), None
    shapes, exact = found[parent]
    step = study.step("recipes", token)
    module = plugins.load(step.kind, step.method)
    if step.kind != "prune":
        # Another task means another head, whose size the data may decide.
        return (shapes, exact and not hasattr(module, "GIVES")), None
    smaller = copy.deepcopy(shapes)
    known = module.plan(smaller, step.recipe)
    return (smaller, exact and known), module.peak_bytes(shapes, step.recipe)


def _dense(study: Study, model: str) -> tuple[PreTrainedModel, bool]:
    """Return a model's shapes, in 16 bit, without weights, and whether they are exact."""
    import torch

    entry = study.resolved.models[model]
    if model in study.resolved.pretrained:
        step = study.resolved.pretrained[model]
        shapes, exact = plugins.load("pretrain", step.method).skeleton(step.recipe)
    elif model_configs.stand_in(entry):
        config = read_json(model_configs.file_of(entry))
        shapes, exact = random_models.skeleton(config, checkpoints.TASKS[entry.task], "bfloat16"), True
    else:
        with tempfile.TemporaryDirectory() as folder:
            pointer = {**json.loads(study.reference(model)), "format": "reference", "parameters": 0}
            checkpoints.write_description(Path(folder), pointer)
            shapes, exact = checkpoints.skeleton(Path(folder)), True
    return shapes.to(torch.bfloat16), exact
