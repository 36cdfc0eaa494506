"""FLAP (An et al. 2024, arXiv 2312.11983): heads and neurons whose activations fluctuate least go; their mean stays.

Observed are the inputs X of the output layer of attention and of the MLP's last layer, in the dense model, at every
token of every sample. Input channel j of such a layer, with weights W, is measured by the metric

  WIFV  Var(X_j) · ‖W_:,j‖²        weighted input feature variance, the fluctuation
  IFV   Var(X_j)                   input feature variance
  WIFN  mean over output rows i of |W_ij| · ‖X_j‖₂    weighted input feature norm

and attention's metric is squared, as in the published code. A structure says who competes:

  UL-UM  in every block, the same share of the groups of heads and of the neurons goes
  UL-MM  in every block, `attention_ratio` of the groups goes, and of the neurons what is then missing
  AL-MM  the same shares of the model, but blocks compete: groups with groups, neurons with neurons
  AL-AM  groups and neurons of all blocks compete; a group costs as many neurons as weigh the same (512/3 in LLaMA)

UL: a group's score is the sum of its channels. AL: the channels of each layer are standardised first (mean 0, standard
deviation 1), and a group's score is the mean of its channels. Baseline bias compensation: what the removed channels
gave on average, W mean(X) over these channels, is added to the layer's bias, which is made where there was none.

Where the published code differs: its running variance leaves out the first sample and is not exactly a variance, and at
its threshold one unit more goes than comes nearest to the target. With grouped-query attention, heads go in groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from espalier import checkpoints
from espalier.data import Calibration
from espalier.errors import UserError
from espalier.models import footprint, widths
from espalier.models.anatomy import adopt, keep, parts_of
from espalier.models.input_moments import observed
from espalier.models.streaming import BlockStream
from espalier.progress import progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from espalier.models.anatomy import Parts
    from espalier.models.input_moments import Moments

TAKES = ("causal-lm",)
CHANGES_WIDTHS = True


@dataclass(frozen=True)
class Recipe:
    """How much to remove, what measures a channel, and who competes with whom."""

    calibration: Calibration
    ratio: float | None = None  # share removed of the parameters of heads and neurons; UL-UM: of their numbers
    parameters: float | None = None  # the model's size afterwards, new biases included; in place of ratio
    metric: Literal["WIFV", "IFV", "WIFN"] = "WIFV"  # what measures a channel
    structure: Literal["UL-UM", "UL-MM", "AL-MM", "AL-AM"] = "AL-AM"  # same or adaptive share by layer, and by module
    attention_ratio: float | None = None  # UL-MM, AL-MM: share of the groups of heads that goes, rounded down
    keep_first: int = 0  # blocks at the start that stay whole
    keep_last: int = 0  # blocks at the end that stay whole
    round_to: int | None = None  # kept widths of attention and MLP become the nearest multiples of this
    batch_size: int = 8  # calibration windows a forward pass

    def check(self) -> None:
        widths.check(self)
        if self.batch_size < 1:
            raise ValueError("'batch_size' must be at least 1.")
        if (self.attention_ratio is not None) != STRUCTURES[self.structure].manual:
            manual = ", ".join(name for name, structure in STRUCTURES.items() if structure.manual)
            raise ValueError(f"'attention_ratio' must be given for the structures {manual}, and for no other.")
        if self.attention_ratio is not None and not 0 <= self.attention_ratio < 1:
            raise ValueError("'attention_ratio' must be at least 0 and less than 1.")


def plan(model: PreTrainedModel, recipe: Recipe) -> bool:
    """Shrink a model on the meta device to the size that the recipe leads to; return whether that is exact.

    It is for UL; for AL, which units are lowest decides it within half a group of heads, and within the rounding of
    each block. Raises UserError for a target that cannot be met.
    """
    structure, parts = STRUCTURES[recipe.structure], parts_of(model)
    even = widths.even_scores(widths.widths_of(model, recipe))
    for block, (groups, neurons) in structure.counts(model, recipe, even).items():
        for layer in (parts[block].output, parts[block].down):
            _add_to_bias(layer, layer.weight.new_zeros(layer.out_features))
        keep(parts[block], range(groups), range(neurons))
    return structure.exact


def peak_bytes(model: PreTrainedModel, recipe: Recipe) -> int:
    """Return the most bytes on the device: one block at work on a batch, or the embeddings."""
    size = model.dtype.itemsize
    return footprint.peak_bytes(model, recipe.calibration, recipe.batch_size, copies=1, itemsize=size)


def apply(parent: Path, output: Path, recipe: Recipe, *, seed: int, device: str) -> dict:
    """Write the parent without its lowest heads and neurons into `output`; return all scores and what went."""
    import torch

    windows = torch.tensor(recipe.calibration.token_ids(checkpoints.load_tokenizer(parent)))
    plan(checkpoints.skeleton(parent), recipe)
    checkpoint = checkpoints.load(parent, device="cpu")
    model = checkpoint.model
    stream = BlockStream(model, windows, device, recipe.batch_size)
    parts, structure = parts_of(model), STRUCTURES[recipe.structure]
    wanted = widths.widths_of(model, recipe)
    scores: widths.Scores = {}
    means: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with torch.no_grad():
        hidden = stream.enter()
        for block in progress(range(max(wanted) + 1), "observing blocks"):
            one = parts[block]
            with stream.resident(block), observed(one.output, one.down) as inputs:
                hidden = stream.run(block, hidden)
            if block in wanted:
                scores[block] = structure.scores(*channel_metrics(one, inputs, recipe.metric), one.groups)
                means[block] = inputs[0].mean, inputs[1].mean
    kept = widths.choose(scores, structure.counts(model, recipe, scores))
    for block, (groups, neurons) in kept.items():
        one = parts[block]
        channels = [channel for group in groups for channel in one.group_channels(group)]
        for layer, mean, stay in zip((one.output, one.down), means[block], (channels, neurons), strict=True):
            compensate(layer, mean, stay)
        keep(one, groups, neurons)
    adopt(model)
    parameters = checkpoints.logical_parameters(model)
    checkpoints.save(model, checkpoint.tokenizer, output, {**checkpoint.info, "parameters": parameters})
    return {"blocks": widths.report(scores, kept)}


METRICS: dict[str, Callable[[torch.Tensor, Moments], torch.Tensor]] = {
    "WIFV": lambda weight, inputs: inputs.variance() * weight.double().square().sum(0),
    "IFV": lambda weight, inputs: inputs.variance(),
    "WIFN": lambda weight, inputs: inputs.norm() * weight.double().abs().mean(0),
}


def channel_metrics(parts: Parts, inputs: tuple[Moments, Moments], metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the metric of each input channel of the output layer, squared, and of `down` (float64)."""
    return METRICS[metric](parts.output.weight, inputs[0]).square(), METRICS[metric](parts.down.weight, inputs[1])


def compensate(layer: torch.nn.Linear, mean: torch.Tensor, kept: list[int]) -> None:
    """Add W mean(X) over the input channels that are not kept to the layer's bias. `mean`: of each channel."""
    lost = mean.clone()
    lost[kept] = 0
    _add_to_bias(layer, layer.weight.detach().to(lost.dtype) @ lost)


def _add_to_bias(layer: torch.nn.Linear, amount: torch.Tensor) -> None:
    import torch

    bias = amount if layer.bias is None else amount + layer.bias.detach()
    layer.bias = torch.nn.Parameter(bias.to(layer.weight.dtype), layer.weight.requires_grad)


def _summed(attention: torch.Tensor, mlp: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    return attention.view(groups, -1).sum(1), mlp


def _standardised(attention: torch.Tensor, mlp: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    def standard(metric: torch.Tensor) -> torch.Tensor:
        # Where no channel differs from another, none is better.
        return (metric - metric.mean()) / metric.std() if (metric != metric[0]).any() else metric * 0

    return standard(attention).view(groups, -1).mean(1), standard(mlp)


def _same_shares(model: PreTrainedModel, recipe: Recipe, scores: widths.Scores) -> widths.Counts:
    return widths.uniform(model, recipe, widths.share, added=_new_biases(model, recipe))


def _same_manual_shares(model: PreTrainedModel, recipe: Recipe, scores: widths.Scores) -> widths.Counts:
    share = widths.exact(recipe.attention_ratio)
    whole = widths.widths_of(model, recipe)
    _check_manual(recipe, max(width.groups for width in whole.values()))

    def removed(width: widths.Width, ratio: Fraction) -> tuple[int, int]:
        groups = min(math.floor(width.groups * share), width.groups - 1)
        missing = ratio * width.parameters - groups * width.group_parameters
        return groups, min(max(math.floor(missing / width.neuron_parameters), 0), width.neurons)

    if recipe.ratio is not None:
        for width in whole.values():
            groups, neurons = removed(width, widths.exact(recipe.ratio))
            _check_fit(recipe, groups, neurons, width.neurons)
    return widths.uniform(model, recipe, removed, unit=widths.UNITS[1], added=_new_biases(model, recipe))


def _adaptive_manual_shares(model: PreTrainedModel, recipe: Recipe, scores: widths.Scores) -> widths.Counts:
    whole = widths.widths_of(model, recipe)
    amount = widths.parameters_to_remove(model, recipe, _new_biases(model, recipe))
    every = sum(width.groups for width in whole.values())
    _check_manual(recipe, every)
    wanted = math.floor(every * widths.exact(recipe.attention_ratio))
    heads = widths.pooled([scores[block][0] for block in whole], [1] * len(whole), wanted)
    gone = [width.groups - stay for width, stay in zip(whole.values(), heads, strict=True)]
    amount -= sum(one * width.group_parameters for one, width in zip(gone, whole.values(), strict=True))
    costs = [width.neuron_parameters for width in whole.values()]
    _check_fit(recipe, sum(gone), math.floor(amount / max(costs)), sum(width.neurons for width in whole.values()))
    neurons = widths.pooled([scores[block][1] for block in whole], costs, amount)
    return widths.rounded(whole, dict(zip(whole, zip(heads, neurons, strict=True), strict=True)), recipe.round_to)


def _adaptive_shares(model: PreTrainedModel, recipe: Recipe, scores: widths.Scores) -> widths.Counts:
    whole = widths.widths_of(model, recipe)
    amount = widths.parameters_to_remove(model, recipe, _new_biases(model, recipe))
    return widths.rounded(whole, widths.pooled_counts(whole, scores, amount), recipe.round_to)


def _new_biases(model: PreTrainedModel, recipe: Recipe) -> int:
    parts = parts_of(model)
    layers = [layer for block in widths.widths_of(model, recipe) for layer in (parts[block].output, parts[block].down)]
    return sum(layer.out_features for layer in layers if layer.bias is None)


def _check_manual(recipe: Recipe, groups: int) -> None:
    if recipe.attention_ratio and widths.exact(recipe.attention_ratio) * groups < 1:
        raise UserError(
            f"'attention_ratio: {recipe.attention_ratio}' removes no group of heads of {groups}; the smallest that does"
            f" is {math.ceil(10_000 / groups) / 10_000}."
        )


def _check_fit(recipe: Recipe, groups: int, neurons: int, there: int) -> None:
    if not 0 < neurons < there:
        heads = f"{groups} groups of heads"
        why = f"beside {heads}, all {there:,} neurons" if neurons > 0 else f"{heads} alone weigh as much as what"
        raise UserError(
            f"The target cannot be met with 'attention_ratio: {recipe.attention_ratio}': {why} would have to go; choose"
            f" a {'larger' if neurons > 0 else 'smaller'} one."
        )


class Structure(NamedTuple):
    """How channels become scores, how many units stay by these, and whether that is known without the data."""

    scores: Callable
    counts: Callable
    exact: bool
    manual: bool


STRUCTURES = {
    "UL-UM": Structure(_summed, _same_shares, exact=True, manual=False),
    "UL-MM": Structure(_summed, _same_manual_shares, exact=True, manual=True),
    "AL-MM": Structure(_standardised, _adaptive_manual_shares, exact=False, manual=True),
    "AL-AM": Structure(_standardised, _adaptive_shares, exact=False, manual=False),
}
