"""Peak memory and mean accuracy against model size, each with and without GPTQ; other ways of pruning beside it.

Reproduces the two bar charts of Shortened LLaMA (Kim et al. 2024, arXiv 2402.02834): how much memory a depth-pruned
model saves next to quantization, and what either costs in accuracy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from espalier.errors import UserError
from espalier.figures import (
    ESTIMATE_COLUMNS,
    ORIGIN_COLUMNS,
    Estimate,
    Need,
    check_names,
    mean_over_tasks,
    origin,
    over_seeds,
    parameters_of,
    read_published,
    select,
    style,
)
from espalier.published_points import apart, handle, joined, mark

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

SERIES = {
    "LLM-Pruner": "#E69F00",
    "FLAP": "#CC79A7",
    "Ours without retraining": "#A9C8EC",
    "Ours": "#2C6FBB",
    "Ours + GPTQ": "#2A9D8F",
    "Original": "#000000",
    "Original + GPTQ": "#8C8C8C",
}
NEAR = 1.02  # sizes that differ by less stand side by side: methods that prune widths meet a size only nearly
MISSING = Estimate(outcome=style.MISSING)
BAR = 0.56  # share of a bar's place that is the bar's where published values stand beside bars
COLUMNS = ("panel", "series", "size", "parameters", "chain", *ESTIMATE_COLUMNS, "unit", *ORIGIN_COLUMNS)
# What identifies a point, measured or published, and what is compared of it.
KEYS, VALUES = ("panel", "series", "size"), ("value",)
PUBLISHED_TITLE = "Shortened LLaMA: memory and accuracy by model size (published)"


@dataclass(frozen=True)
class Memory:
    """The condition of the workload at which peak memory is plotted."""

    batch_size: int  # prompts at once
    input_tokens: int  # length of the prompts
    output_tokens: int  # new tokens a prompt


@dataclass(frozen=True)
class Recipe:
    """What the chart plots; its bars stand at the parameter count of each chain."""

    title: str  # stands above the chart
    model: str  # name of a model
    suite: str  # evaluation whose tasks are averaged
    workload: str  # profile that holds peak memory ("peak_allocated")
    memory: Memory  # which of the workload's shapes is plotted
    tasks: dict[str, str]  # task → metric: the accuracy is the unweighted mean of these
    series: dict[str, list[str]]  # name of `SERIES` → chains, one a size
    published: bool = False  # published values beside the measured ones


def needs(recipe: Recipe) -> list[Need]:
    """Return the raw results that the chart plots; raises UserError for a series that the chart does not have."""
    check_names(recipe.series, SERIES, f"figure '{recipe.title}', series")
    found = (
        Need(recipe.model, chain, kind, name)
        for chains in recipe.series.values()
        for chain in chains
        for kind, name in (("evaluate", recipe.suite), ("profile", recipe.workload))
    )
    return list(dict.fromkeys(found))


def measured(recipe: Recipe, metrics: DataFrame) -> DataFrame:
    """Return one point a panel and chain: memory in MB or GB, accuracy in percent; "missing" without its result.

    Raises UserError if two chains of a series have the same size, or if a task is not in the suite.
    """
    import pandas as pd

    needs(recipe)
    where = f"figure '{recipe.title}'"
    points, sizes = [], {}
    for series, chains in recipe.series.items():
        for chain in chains:
            about = {"model": recipe.model, "chain": chain}
            scored = select(metrics, kind="evaluate", suite=recipe.suite, **about)
            profiled = select(metrics, kind="profile", suite=recipe.workload, metric="peak_allocated", **about)
            condition = vars(recipe.memory).items()
            at = [row for row in profiled if all(row[key] == value for key, value in condition)]
            if profiled and not at:
                asked = ", ".join(f"{key} {value}" for key, value in condition)
                raise UserError(f"{where}: workload '{recipe.workload}' has no row with {asked}.")
            parameters = parameters_of(scored + at)
            size = "?" if parameters is None else style.parameters_label(parameters)
            other = chain if parameters is None else sizes.setdefault((series, size), chain)
            if other != chain:
                raise UserError(f"{where}: '{other}' and '{chain}' of series '{series}' are both {size}; keep one.")
            place = {"series": series, "size": size, "parameters": parameters, "chain": chain}
            estimate = over_seeds(at, where)
            points.append({"panel": "memory", **place, **estimate.columns(), "unit": "bytes", **origin(at)})
            estimate = mean_over_tasks(scored, recipe.tasks, where).scaled(100) if scored else MISSING
            points.append({"panel": "accuracy", **place, **estimate.columns(), "unit": "%", **origin(scored)})
    return _in_plotted_units(pd.DataFrame(points, columns=list(COLUMNS)), recipe.published)


def _in_plotted_units(points: DataFrame, published: bool) -> DataFrame:
    memory = points["panel"] == "memory"
    unit, size = style.memory_unit(points.loc[memory, "value"].max() if memory.any() else None)
    if published:  # whose unit this is
        unit, size = "GB", style.GB
    for column in ("value", "stderr", "spread", "error"):
        points[column] = points[column].astype("float64")
        points.loc[memory, column] /= size
    points.loc[memory, "unit"] = unit
    return points


def published(folder: Path) -> DataFrame:
    """Return the bars of the paper's two charts; accuracy is read off, and has no error bar."""
    points = read_published(folder / "size_tradeoff.csv", COLUMNS)
    points["size"] = [style.parameters_label(count) for count in points["parameters"]]
    return points


def draw(points: DataFrame, title: str, note: str = "") -> Figure:
    """Draw both panels; a bar without a value is a gap, marked OOM if memory ran out.

    Faded bars come from an unreliable source. Published values beside measured ones stand to the right of their bars.
    """
    points, others, said = apart(points)
    both = joined(points, others) if len(others) else points
    with style.styled():
        bars = int(both["panel"].value_counts().max()) if len(both) else 0
        figure = style.new_figure(max(8.6, 1.8 + 0.58 * bars), 2.9)
        left, right = figure.subplots(1, 2)
        memory, accuracy = (points[points["panel"] == panel] for panel in ("memory", "accuracy"))
        beside = {panel: others[others["panel"] == panel] for panel in ("memory", "accuracy")}
        unit = memory["unit"].iloc[0] if len(memory) else "GB"
        devices = sorted(set((memory if memory["value"].notna().any() else points)["device"].dropna()) - {""})
        _draw_bars(left, memory, beside["memory"])
        left.set(ylabel=style.memory_label(devices, unit), xlabel="Parameters")
        if len(others):
            left.set_ylim(bottom=0)  # where no bar stands, too
        _draw_bars(right, accuracy, beside["accuracy"])
        right.set(ylabel="Average Accuracy (%)", xlabel="Parameters")
        footer = style.footer_lines(points, list(SERIES), note)
        shown = both[both["panel"] == "accuracy"].infer_objects()
        if shown["value"].notna().any():
            lower, highest = _lower_limit(shown), _highest(shown)
            right.set_ylim(lower, highest + 0.16 * (highest - lower))
            if lower:
                footer.append(f"The accuracy axis starts at {lower:g}%.")
        if accuracy["error"].notna().any():
            footer.append("Error bars: one standard error of the unweighted mean over tasks (and over seeds).")
        drawn = [name for name in SERIES if name in set(style.having_place(both)["series"])]
        handles = [_swatch(name) for name in drawn] + [handle()] * bool(len(others))
        style.frame(figure, title, handles, footer + said)
    return figure


def _draw_bars(axes, points: DataFrame, others: DataFrame) -> None:
    both = joined(points, others).infer_objects() if len(others) else points
    groups = _groups(both.assign(beside=[False] * len(points) + [True] * len(others)))
    if not groups or (both["outcome"] == style.MISSING).all():
        style.say_empty(axes, "No results")
        return
    style.say_lacking(axes, style.lacking(points, _name))
    axes.grid(axis="y")
    places = [_places(group) for group in groups]
    most = max(2, *(len(group) for group in places))
    width = (0.8 if most < 4 else 0.9) / most
    share, upright = (BAR, False) if len(others) else (1.0, most < 3)
    for position, group in enumerate(places):
        for slot, rows in enumerate(group):
            x = position + (slot - (len(group) - 1) / 2) * width
            for row in rows:
                if row["beside"]:
                    mark(axes, x + width * share / 2, row["value"], SERIES[row["series"]])
                else:
                    _draw_bar(axes, x - width * (1 - share) / 2, width * share, row, upright=upright, of=len(points))
    axes.set_xticks(range(len(groups)), [_size_label(group) for group in groups])
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.margins(y=0.12)


def _draw_bar(axes, x: float, width: float, row: dict, *, upright: bool, of: int) -> None:
    if math.isnan(row["value"]):
        style.mark_gap(axes, x, row["outcome"])
        return
    faded = str(row["certainty"]).startswith("unreliable")
    error = 0.0 if row["error"] is None or math.isnan(row["error"]) else row["error"]
    axes.bar(
        x,
        row["value"],
        width * 0.94,
        color=SERIES[row["series"]],
        alpha=0.35 if faded else 1.0,
        yerr=error or None,
        error_kw=style.ERROR_BAR | ({"ecolor": "#999999"} if row["series"] == "Original" else {}),
    )
    axes.annotate(
        f"{row['value']:.1f}" if row["unit"] == "%" else _short(row["value"]),
        (x, row["value"] + error),
        (0, 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
        rotation=0 if upright else 90,  # beside each other they would overlap
        fontsize=6 if of > 14 else 7,
    )


def _places(group: DataFrame) -> list[list[dict]]:
    """Return the places of a size from left to right: a bar, published values of its series, or both."""
    rows = sorted(group.to_dict("records"), key=lambda row: (list(SERIES).index(row["series"]), row["beside"]))
    places: list[list[dict]] = []
    for row in rows:
        same = [place for place in places if row["beside"] and place[0]["series"] == row["series"]]
        if same:
            min(same, key=lambda place: abs(place[0]["parameters"] - row["parameters"])).append(row)
        else:
            places.append([row])
    return places


def _groups(points: DataFrame) -> list[DataFrame]:
    """Return the points of each size, the smallest first; sizes that are nearly the same are one group.

    A variant whose size is not known, because neither of its results is there, is in none.
    """
    points = points[(points["outcome"] != style.MISSING) | points["parameters"].notna()]
    order = points.groupby("size")["parameters"].min().sort_values(na_position="first")
    groups: list[list[str]] = []
    for size, parameters in order.items():
        if groups and parameters < NEAR * order[groups[-1][0]]:
            groups[-1].append(size)
        else:
            groups.append([size])
    return [points[points["size"].isin(sizes)] for sizes in groups]


def _name(row: dict) -> str:
    return f"{row['series']} ({row['chain']})" if row["size"] == "?" else f"{row['series']} {row['size']}"


def _size_label(group: DataFrame) -> str:
    sizes = group["size"].unique()
    return sizes[0] if len(sizes) == 1 else f"≈ {style.parameters_label(group['parameters'].mean())}"


def _short(value: float) -> str:
    text = style.number_label(value)
    return text.rstrip("0").rstrip(".") if "." in text else text


def _highest(points: DataFrame) -> float:
    return (points["value"] + points["error"].astype("float64").fillna(0)).max()


def _lower_limit(points: DataFrame) -> float:
    # As in the paper, a multiple of 2.5 below the smallest bar; differences of a few points would vanish from zero.
    low = (points["value"] - points["error"].astype("float64").fillna(0)).min()
    span = max(points["value"].max() - low, 2.5)
    return max(0.0, 2.5 * math.floor((low - 0.2 * span) / 2.5))


def _swatch(name: str):
    from matplotlib.patches import Patch

    return Patch(facecolor=SERIES[name], label=name)
