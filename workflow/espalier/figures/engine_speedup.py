"""Decode speed-up of inference engines over HF, and our engine's tokens per second.

Reproduces Fig. 10 of FlashDecoding++ (Hong et al. 2023): bars by context length, grouped by batch size; diamonds are
"Ours" on the right axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from espalier.engine_headlines import ours_over
from espalier.figures import (
    ORIGIN_COLUMNS,
    Estimate,
    Need,
    check_names,
    origin,
    over_seeds,
    read_published,
    select,
    style,
)
from espalier.published_points import apart, handle, joined, mark

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

BASELINE, DIAMONDS = "HF", "Ours"
PUBLISHED_MARKERS = {"speedup": "o", "token/s": "D"}
SERIES = {
    "HF": "#C8C8C8",
    "HF compiled": "#8E7CC3",
    "vLLM": "#6B6B6B",
    "FlashDecoding": "#3B82D0",
    "DeepSpeed": "#1B3A78",
    "TensorRT-LLM": "#A6D3F0",
    "OpenPPL": "#E0A526",
    "Ours": "#D7261E",
}
NOT_IN_THE_PAPER = ("HF compiled",)
NO_BASELINE = "no baseline: HF has no number at this condition"
CONDITION = ("batch_size", "input_tokens")
COLUMNS = (
    "panel",
    "series",
    "model",
    "chain",
    "workload",
    *CONDITION,
    "speedup",
    "speedup_error",
    "throughput",
    "throughput_error",
    "seeds",
    "outcome",
    "engine",
    *ORIGIN_COLUMNS,
)
# What identifies a point, measured or published, and what is compared of it.
KEYS, VALUES = ("panel", "series", "input_tokens", "batch_size"), ("speedup", "throughput")
# File of the paper's own averages → the same of measured points.
SUMMARIES = {"engine_speedup_headlines": ours_over}
PUBLISHED_TITLE = "FlashDecoding++: decode speed-up over HF (published)"


@dataclass(frozen=True)
class Panel:
    """One panel: one variant of one model, run by each engine's workload."""

    title: str  # stands above
    model: str  # name of a model
    chain: str  # variant of the model
    series: dict[str, str]  # name of `SERIES` → workload


@dataclass(frozen=True)
class Recipe:
    """What the chart plots: "decode_throughput" (tokens/s) of each workload, all its batch sizes and contexts."""

    title: str  # stands above
    panels: list[Panel]  # one a model and device
    published: bool = False  # published values beside the measured ones


def needs(recipe: Recipe) -> list[Need]:
    """Return the raw results that the chart plots; raises UserError for a series that the chart does not have."""
    for panel in recipe.panels:
        check_names(panel.series, SERIES, f"figure '{recipe.title}', panel '{panel.title}'")
    found = (
        Need(panel.model, panel.chain, "profile", workload)
        for panel in recipe.panels
        for workload in panel.series.values()
    )
    return list(dict.fromkeys(found))


def measured(recipe: Recipe, metrics: DataFrame) -> DataFrame:
    """Return one point a panel, series and condition: tokens per second, and their ratio to HF's at the same condition.

    Without HF's number at a condition there is no ratio: `speedup` is empty and the outcome says so. An engine without
    its result is one point without a condition.
    """
    import pandas as pd

    needs(recipe)
    points = []
    for panel in recipe.panels:
        where = f"figure '{recipe.title}', panel '{panel.title}'"
        found = {
            series: _by_condition(
                select(
                    metrics,
                    kind="profile",
                    suite=workload,
                    metric="decode_throughput",
                    model=panel.model,
                    chain=panel.chain,
                )
            )
            for series, workload in panel.series.items()
        }
        baseline = {key: over_seeds(rows, where) for key, rows in found.get(BASELINE, {}).items()}
        for series, conditions in found.items():
            for condition, rows in (conditions or {(None, None): []}).items():
                throughput = over_seeds(rows, where)
                speedup = _ratio(throughput, baseline.get(condition), series == BASELINE)
                points.append(
                    {"panel": panel.title, "series": series, "model": panel.model, "chain": panel.chain}
                    | {"workload": panel.series[series]}
                    | dict(zip(CONDITION, condition, strict=True))
                    | {"speedup": speedup.value, "speedup_error": speedup.error}
                    | {"throughput": throughput.value, "throughput_error": throughput.error}
                    | {"seeds": throughput.seeds, "outcome": speedup.outcome}
                    | {"engine": " + ".join(sorted({str(row["engine"]) for row in rows if row["engine"]}))}
                    | origin(rows)
                )
    return pd.DataFrame(points, columns=list(COLUMNS))


def _by_condition(rows: list[dict]) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in CONDITION), []).append(row)
    return dict(sorted(groups.items(), key=lambda item: tuple(-1 if part is None else part for part in item[0])))


def _ratio(throughput: Estimate, baseline: Estimate | None, itself: bool) -> Estimate:
    if throughput.value is None:
        return Estimate(outcome=throughput.outcome)
    if baseline is None or not baseline.value:
        return Estimate(outcome=NO_BASELINE)
    if itself:
        return Estimate(1.0, None, None, throughput.seeds)
    value = throughput.value / baseline.value
    parts = [one.error / one.value for one in (throughput, baseline) if one.error is not None and one.value]
    return Estimate(value, value * math.hypot(*parts) if parts else None, None, throughput.seeds)


def published(folder: Path) -> DataFrame:
    """Return the few values that are known of Fig. 10, read off by a machine (±20%), without their batch sizes.

    The paper's own averages are in `engine_speedup_headlines.csv`.
    """
    return read_published(folder / "engine_speedup.csv", COLUMNS)


def draw(points: DataFrame, title: str, note: str = "") -> Figure:
    """Draw one panel a model and device; an engine that ran out of memory leaves a gap marked OOM.

    Published speed-ups beside measured ones are white circles, published tokens per second white diamonds.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    points, others, said = apart(points)
    both = joined(points, others) if len(others) else points
    with style.styled():
        names = list(dict.fromkeys(both["panel"])) or [""]
        most = max(len(_clusters(both[both["panel"] == name])) for name in names)
        across = min(len(names), 3 if most <= 6 and len(names) != 4 else 2)
        down = -(-len(names) // across)
        width = 3.2 + 0.26 * min(most, 16)
        figure = style.new_figure(max(5.6, across * width), 2.3 * down)
        grid = figure.subplots(down, across, squeeze=False).ravel()
        for axes, name in zip(grid, names, strict=False):
            axes.set_title(name)
            _draw_panel(axes, points[points["panel"] == name], others[others["panel"] == name])
        for axes in grid[len(names) :]:
            axes.set_visible(False)
        drawn = [name for name in SERIES if name in _present(both)]
        handles = [Patch(facecolor=SERIES[name], label=name) for name in drawn]
        if points[points["series"] == DIAMONDS]["throughput"].notna().any():
            label = f"{DIAMONDS} (token/s)"
            handles.append(
                Line2D([], [], marker="D", color=SERIES[DIAMONDS], mec="black", mew=0.6, ms=4.5, ls="", label=label)
            )
        handles += [handle(f"published {word}", marker) for word, marker in _kinds(others)]
        known = [name for name in SERIES if name not in NOT_IN_THE_PAPER]
        footer = [*style.footer_lines(points, known, note), "Labels under the bars: context length in tokens."]
        baseline = points[(points["series"] == BASELINE) & points["throughput"].notna()]
        if any(_has_numbers(points[points["panel"] == name]) for name in baseline["panel"]):
            footer.append(f"Above the bars of {BASELINE}: its tokens/s.")
        if (points["outcome"] == NO_BASELINE).any():
            footer.append("Where HF has no result there is no bar: a speed-up needs its baseline.")
        if points["speedup_error"].notna().any():
            footer.append("Error bars: one standard error of the ratio.")
        style.frame(figure, title, handles, footer + said)
    return figure


def _present(points: DataFrame) -> list[str]:
    """Return the series that take a place in the chart, in order: one that cannot run here takes none."""
    placed = points[points["speedup"].notna() | points["throughput"].notna() | (points["outcome"] == "oom")]
    return [name for name in SERIES if name in set(placed["series"])]


def _condition(row: dict) -> tuple[int | None, int]:
    """Return a point's (batch size, context); a batch size that is not known is None."""
    batch = row["batch_size"]
    return (None if batch is None or batch != batch else int(batch)), int(row["input_tokens"])


def _clusters(points: DataFrame) -> list[tuple[int | None, int]]:
    """Return a panel's conditions in drawing order."""
    placed = points.dropna(subset=["input_tokens"]).to_dict("records")
    return sorted({_condition(row) for row in placed}, key=lambda pair: (pair[0] or 0, pair[1]))


def _has_numbers(points: DataFrame) -> bool:
    """Whether a panel's bars are so wide, or the baseline's so much alone, that numbers above it cover nothing."""
    bars = len(_present(points))
    return (bars == 1 and not _crowded(points)) or bars * len(_clusters(points)) <= 16


def _crowded(points: DataFrame) -> bool:
    """Return whether a panel has too many bars for numbers above them."""
    return len(_clusters(points)) * len(_present(points)) > 40


def _kinds(others: DataFrame) -> list[tuple[str, str]]:
    """Return the words and markers of what is drawn of published values."""
    shown = {"speedup": others["speedup"], "token/s": others[others["series"] == DIAMONDS]["throughput"]}
    return [(word, marker) for word, marker in PUBLISHED_MARKERS.items() if shown[word].notna().any()]


def _draw_panel(axes, points: DataFrame, others: DataFrame) -> None:
    both = joined(points, others) if len(others) else points
    clusters, present = _clusters(both), _present(both)
    if not clusters or not present:
        style.say_empty(axes, "No results")
        return
    style.say_lacking(axes, style.lacking(points, lambda row: row["series"]))
    batches = list(dict.fromkeys(batch for batch, _ in clusters))
    # A gap of 0.6 clusters parts the batch sizes.
    centre = {pair: place + 0.6 * batches.index(pair[0]) for place, pair in enumerate(clusters)}
    width = 0.84 / max(len(present), 4 if len(clusters) < 3 else 2)
    crowded, numbers = _crowded(both), _has_numbers(both)
    error_style = style.ERROR_BAR | {"capsize": 0 if crowded else 1.5, "elinewidth": 0.6}
    diamonds, published = [], []

    def at(row: dict) -> float:
        return centre[_condition(row)] + (present.index(row["series"]) - (len(present) - 1) / 2) * width

    for row in points.dropna(subset=["input_tokens"]).to_dict("records"):
        if row["series"] not in present:
            continue
        x = at(row)
        if row["outcome"] == "oom":
            style.mark_gap(axes, x, row["outcome"], fontsize=5 if crowded else 6)
        elif row["speedup"] == row["speedup"] and row["speedup"] is not None:
            error = row["speedup_error"] if row["speedup_error"] == row["speedup_error"] else None
            colour = SERIES[row["series"]]
            axes.bar(x, row["speedup"], width * 0.94, color=colour, yerr=error, error_kw=error_style)
            if row["series"] == BASELINE and row["throughput"] == row["throughput"] and numbers:
                axes.text(
                    x, 1.03, f"{row['throughput']:.0f}", ha="center", va="bottom", fontsize=6.5, color=style.MUTED
                )
        if row["series"] == DIAMONDS and row["throughput"] == row["throughput"] and row["throughput"] is not None:
            diamonds.append((x, row["throughput"]))
    for row in others.to_dict("records"):
        if row["speedup"] == row["speedup"]:
            mark(axes, at(row), row["speedup"], SERIES[row["series"]], PUBLISHED_MARKERS["speedup"])
        if row["series"] == DIAMONDS and row["throughput"] == row["throughput"]:
            published.append((at(row) + 0.2, row["throughput"]))  # beside the series' circle
    axes.axhline(1, color="#777777", linewidth=0.7, linestyle="--", zorder=0.5)
    axes.set_ylabel("Speedup")
    axes.set_ylim(0, max(2.0, 1.15 * axes.get_ylim()[1]))
    axes.yaxis.set_major_formatter("{x:.1f}")  # as wide whatever the ticks are, or the layout would not settle
    axes.grid(axis="y")
    room = 2.5 if _clusters(points) == [] else 0.6  # few published values alone would be far from their labels
    axes.set_xlim(min(centre.values()) - room, max(centre.values()) + room)
    axes.set_xticks(list(centre.values()), [style.length_label(context) for _, context in clusters])
    axes.tick_params(axis="x", length=2, labelsize=7.5 if len(clusters) > 8 else 8.5)
    for batch in batches:
        places = [place for pair, place in centre.items() if pair[0] == batch]
        text = f"batch size {batch}" if batch else "not stated" if len(batches) > 1 else "batch size not stated"
        middle = (places[0] + places[-1]) / 2
        axes.text(middle, -0.14, text, transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=8)
    if diamonds or published:
        _draw_diamonds(axes, diamonds, published, 14 if crowded else 24)


def _draw_diamonds(
    axes, diamonds: list[tuple[float, float]], published: list[tuple[float, float]], size: float
) -> None:
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    if diamonds:
        right.scatter(
            *zip(*diamonds, strict=True), marker="D", s=size, color=SERIES[DIAMONDS], edgecolor="black", linewidth=0.6
        )
    for x, throughput in published:
        mark(right, x, throughput, SERIES[DIAMONDS], PUBLISHED_MARKERS["token/s"])
    right.set_ylim(0, 1.2 * max(throughput for _, throughput in (*diamonds, *published)))
    right.set_ylabel("Throughput (tokens/s)")
