"""How many heads and neurons each block keeps, and which: counts from a target, rounding, and choice by score.

What can go is a *unit*: a group (one key/value head with the query heads that read it) or a neuron of the MLP. Every
block keeps at least one of each. A target is a ratio, whose exact meaning each method says, or the number of parameters
of the model afterwards. All counting is exact: ratios are fractions, read as they are written in the config.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

from espalier.checkpoints import logical_parameters
from espalier.errors import UserError
from espalier.models.anatomy import keep, parts_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from espalier.models.anatomy import Parts

UNITS = ("groups of heads", "neurons")
GRID = 10**9  # a ratio that is searched for is a multiple of 1/GRID

Counts = dict[int, tuple[int, int]]  # block → groups and neurons that stay
Scores = dict[int, "tuple[torch.Tensor, torch.Tensor]"]  # block → scores of its groups and of its neurons
Kept = dict[int, tuple[list[int], list[int]]]  # block → groups and neurons that stay, ascending


class Target(Protocol):
    """What the recipes of all methods have."""

    ratio: float | None
    parameters: float | None
    keep_first: int
    keep_last: int
    round_to: int | None


@dataclass(frozen=True)
class Width:
    """The width of a block, and the parameters that go with a group and with a neuron (their biases included)."""

    groups: int
    neurons: int
    head_dim: int
    channels: int  # query channels of a group
    group_parameters: int
    neuron_parameters: int

    @property
    def parameters(self) -> int:
        """Number of parameters of all groups and neurons: what can be pruned of the block."""
        return self.groups * self.group_parameters + self.neurons * self.neuron_parameters


def check(recipe: Target) -> None:
    """Raise ValueError, with a sentence, for values that no model can have."""
    if (recipe.ratio is None) == (recipe.parameters is None):
        raise ValueError("exactly one of 'ratio' and 'parameters' must be given.")
    if recipe.ratio is not None and not 0 < recipe.ratio < 1:
        raise ValueError("'ratio' must lie between 0 and 1.")
    if recipe.parameters is not None and recipe.parameters <= 0:
        raise ValueError("'parameters' must be positive.")
    if recipe.keep_first < 0 or recipe.keep_last < 0:
        raise ValueError("'keep_first' and 'keep_last' must not be negative.")
    if recipe.round_to is not None and recipe.round_to < 1:
        raise ValueError("'round_to' must be at least 1.")


def widths_of(model: PreTrainedModel, recipe: Target) -> dict[int, Width]:
    """Return block → width of the blocks that may be pruned; raises UserError if there is none."""
    parts = parts_of(model)
    blocks = range(recipe.keep_first, len(parts) - recipe.keep_last)
    if not blocks:
        raise UserError(
            f"The model has {len(parts)} blocks; 'keep_first: {recipe.keep_first}' and 'keep_last: {recipe.keep_last}'"
            " leave none of them to prune."
        )
    return {block: _width(parts[block]) for block in blocks}


def _width(parts: Parts) -> Width:
    rows = [layer.weight.numel() + (layer.out_features if layer.bias is not None else 0) for layer in parts.up]
    heads = [
        layer.weight.numel() + (layer.out_features if layer.bias is not None else 0)
        for layer in (parts.query, parts.key, parts.value)
    ]
    return Width(
        groups=parts.groups,
        neurons=parts.neurons,
        head_dim=parts.head_dim,
        channels=len(parts.group_channels(0)),
        group_parameters=(sum(heads) + parts.output.weight.numel()) // parts.groups,
        neuron_parameters=(sum(rows) + parts.down.weight.numel()) // parts.neurons,
    )


def exact(ratio: float) -> Fraction:
    """Return the fraction that a config's decimal number means: 0.35 is 7/20."""
    return Fraction(str(ratio))


def removed_parameters(widths: dict[int, Width], counts: Counts) -> int:
    """Return how many parameters go with the units that do not stay."""
    return sum(
        width.parameters - counts[block][0] * width.group_parameters - counts[block][1] * width.neuron_parameters
        for block, width in widths.items()
    )


def rounded(widths: dict[int, Width], counts: Counts, round_to: int | None) -> Counts:
    """Return counts whose widths are multiples of `round_to`: the nearest (of two the larger), at least one multiple.

    The widths are those of the query, of key and value, and of the MLP; none grows beyond what it was. Without
    `round_to`, counts below 1 become 1. Raises UserError where a width is smaller than every multiple.
    """
    result = {}
    for block, width in widths.items():
        multiple = round_to or 1
        steps = (multiple // math.gcd(multiple, width.head_dim) if round_to else 1, multiple)
        wholes = (width.groups, width.neurons)
        for unit, step, whole in zip(UNITS, steps, wholes, strict=True):
            if step > whole:
                raise UserError(
                    f"'round_to: {round_to}' cannot be met: the least multiple of it takes {step} {unit}, and block"
                    f" {block} has {whole}."
                )
        result[block] = tuple(
            min(max((2 * count + step) // (2 * step) * step, step), whole // step * step)
            for count, step, whole in zip(counts[block], steps, wholes, strict=True)
        )
    return result


def share(width: Width, ratio: Fraction) -> tuple[int, int]:
    """Return `ratio` of a block's groups and of its neurons, rounded down."""
    return math.floor(width.groups * ratio), math.floor(width.neurons * ratio)


def uniform(
    model: PreTrainedModel,
    recipe: Target,
    removed: Callable[[Width, Fraction], tuple[int, int]],
    *,
    unit: str = UNITS[0],
    added: int = 0,
) -> Counts:
    """Return the counts where every block loses what `removed(width, ratio)` says: groups and neurons, rising in ratio.

    `added` is the number of parameters that the method adds to the model. For a target in parameters, the ratio is
    searched whose size is nearest. Raises UserError for a ratio at which no `unit` go from any block, and for a size
    that no ratio leads to.
    """
    widths, kind = widths_of(model, recipe), UNITS.index(unit)
    before = {block: (width.groups, width.neurons) for block, width in widths.items()}
    dense = logical_parameters(model)

    def counts(ratio: Fraction) -> Counts:
        gone = {block: removed(width, ratio) for block, width in widths.items()}
        asked = {block: tuple(n - k for n, k in zip(before[block], gone[block], strict=True)) for block in widths}
        return rounded(widths, asked, recipe.round_to)

    def goes(step: int) -> bool:
        after = counts(Fraction(step, GRID))
        return any(after[block][kind] < before[block][kind] for block in widths)

    def size(step: int) -> int:
        return dense + added - removed_parameters(widths, counts(Fraction(step, GRID)))

    steps = range(GRID)
    first = bisect_left(steps, True, key=goes)
    if first == GRID:
        raise UserError(
            f"No ratio removes {unit}: the blocks have {_most(before, kind)} at most"
            + (f", and 'round_to: {recipe.round_to}' keeps them." if recipe.round_to else ", and one stays in each.")
        )
    if recipe.ratio is not None:
        if exact(recipe.ratio) < Fraction(first, GRID):
            raise UserError(
                f"The ratio {recipe.ratio} removes no {unit} from any block (they have {_most(before, kind)} at most);"
                f" the smallest ratio that does is {math.ceil(first * 10_000 / GRID) / 10_000}."
            )
        return counts(exact(recipe.ratio))
    if not size(GRID - 1) <= recipe.parameters <= size(first):
        raise unmeetable(recipe.parameters, dense, size(GRID - 1), size(first))
    below = bisect_left(steps, -recipe.parameters, lo=first, key=lambda step: -size(step))
    step = min((max(below - 1, first), below), key=lambda step: abs(size(step) - recipe.parameters))
    return counts(Fraction(step, GRID))


def parameters_to_remove(model: PreTrainedModel, recipe: Target, added: int = 0) -> Fraction:
    """Return how many parameters units must take with them: `ratio` of all that units have, or what a size demands.

    `added` is the number of parameters that the method adds. Raises UserError for a target that is out of reach.
    """
    widths, dense = widths_of(model, recipe), logical_parameters(model)
    prunable = sum(width.parameters for width in widths.values())
    least = min(width.neuron_parameters for width in widths.values())
    most = removed_parameters(widths, rounded(widths, dict.fromkeys(widths, (0, 0)), recipe.round_to))
    if recipe.ratio is None:
        if not dense + added - most <= recipe.parameters <= dense + added - least:
            raise unmeetable(recipe.parameters, dense, dense + added - most, dense + added - least)
        return dense + added - Fraction(recipe.parameters)
    amount = exact(recipe.ratio) * prunable
    if not least <= amount <= most:
        raise UserError(
            f"The ratio {recipe.ratio} cannot be met: from {least / prunable:.2g}, where one neuron goes, to"
            f" {math.floor(10_000 * most / prunable) / 10_000}, where no block can lose more, a ratio can."
        )
    return amount


def unmeetable(target: float, dense: int, smallest: int, largest: int) -> UserError:
    """Return the error that says which sizes can be met."""
    return UserError(
        f"A size of {target:,.0f} parameters cannot be met: the model has {dense:,}, and this recipe can leave between"
        f" {smallest:,} and {largest:,}."
    )


def pooled(scores: Sequence[torch.Tensor], costs: Sequence[int], amount: float) -> list[int]:
    """Return how many units of each list stay when the lowest of all lists go, until their cost is nearest `amount`.

    A unit of list i costs `costs[i]`. The best unit of each list always stays. Equal scores go in the order of the
    lists; of two prefixes of equally near cost, the shorter one goes.
    """
    import torch

    pools = [one.sort().values[:-1] for one in scores]
    origin = torch.repeat_interleave(torch.arange(len(pools)), torch.tensor([len(pool) for pool in pools]))
    order = torch.cat(pools).argsort(stable=True)
    spent = torch.cat([torch.zeros(1, dtype=torch.long), torch.tensor(costs)[origin[order]].cumsum(0)])
    distance = (spent.double() - float(amount)).abs()
    end = int((distance == distance.min()).nonzero()[0])
    gone = torch.bincount(origin[order[:end]], minlength=len(pools))
    return [len(one) - int(count) for one, count in zip(scores, gone, strict=True)]


def pooled_counts(widths: dict[int, Width], scores: Scores, amount: float) -> Counts:
    """Return the counts when groups and neurons of all blocks compete: `pooled`, where a unit costs its parameters."""
    lists = [scores[block][kind] for kind in (0, 1) for block in widths]
    costs = [width.group_parameters for width in widths.values()]
    costs += [width.neuron_parameters for width in widths.values()]
    stay = pooled(lists, costs, amount)
    return dict(zip(widths, zip(stay[: len(widths)], stay[len(widths) :], strict=True), strict=True))


def even_scores(widths: dict[int, Width]) -> Scores:
    """Return scores under which all blocks lose about the same share: what a plan takes where the data will decide."""
    import torch

    def spread(count: int) -> torch.Tensor:
        return (torch.arange(count, dtype=torch.float64) + 0.5) / count

    return {block: (spread(width.groups), spread(width.neurons)) for block, width in widths.items()}


def choose(scores: Scores, counts: Counts) -> Kept:
    """Return the units with the highest scores of each block; of equal ones, the last. Raises UserError for a NaN."""
    kept = {}
    for block, both in scores.items():
        if not all(one.isfinite().all() for one in both):
            raise UserError(
                f"The scores of block {block} are not finite numbers: the model overflows on these windows."
            )
        pairs = zip(both, counts[block], strict=True)
        kept[block] = tuple(sorted(one.argsort(stable=True)[len(one) - count :].tolist()) for one, count in pairs)
    return kept


def shrink(model: PreTrainedModel, counts: Counts) -> None:
    """Give every block its new width, with whichever units: for a model without weights."""
    parts = parts_of(model)
    for block, (groups, neurons) in counts.items():
        keep(parts[block], range(groups), range(neurons))


def report(scores: Scores, kept: Kept) -> list[dict]:
    """Return, for every block that may be pruned, what went and all scores, to six digits, as plain JSON."""
    return [
        {
            "block": block,
            **{
                name: content
                for unit, score, stay in zip(("group", "neuron"), scores[block], kept[block], strict=True)
                for name, content in (
                    (f"{unit}s_kept", len(stay)),
                    (f"{unit}s_removed", sorted(set(range(len(score))) - set(stay))),
                    (f"{unit}_scores", [float(f"{one:.6g}") for one in score.tolist()]),
                )
            },
        }
        for block in scores
    ]


def _most(before: Counts, kind: int) -> int:
    return max(both[kind] for both in before.values())
