"""Latency against throughput over batch sizes, for an original model and three ways of pruning it.

Reproduces the line charts of Shortened LLaMA (Kim et al. 2024, arXiv 2402.02834): one row a model, one panel for each
pair of output and input length; points are labelled M1, M4, … by batch size, up to where memory ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from espalier.figures import ORIGIN_COLUMNS, Need, check_names, origin, over_seeds, parameters_of, select, style
from espalier.figures import read_published as _read
from espalier.published_points import apart, handle, joined, mark

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

# Name → colour, marker, marker size, as in the paper.
SERIES = {
    "Original": ("#D62728", "x", 5.0),
    "LLM-Pruner": ("#1F4FD8", "+", 6.5),
    "FLAP": ("#2CA02C", "o", 4.0),
    "Ours": ("#7B2CBF", "*", 7.0),
}
QUANTITIES = ("latency", "throughput")
CONDITION = ("input_tokens", "output_tokens", "batch_size")
COLUMNS = (
    "row",
    "series",
    "model",
    "chain",
    "parameters",
    *CONDITION,
    "latency",
    "latency_error",
    "throughput",
    "throughput_error",
    "seeds",
    "outcome",
    "engine",
    *ORIGIN_COLUMNS,
)
# What identifies a point, measured or published, and what is compared of it.
KEYS, VALUES = ("row", "series", *CONDITION), QUANTITIES
PUBLISHED_TITLE = "Shortened LLaMA: latency and throughput (published)"


@dataclass(frozen=True)
class Row:
    """One row of panels: a model and the chain of each series."""

    title: str  # stands above
    model: str  # name of a model
    series: dict[str, str | list[str]]  # name of `SERIES` → chain, or chains of several sizes, each a line
    workload: str | None = None  # in place of the chart's, such as the same one with another engine


@dataclass(frozen=True)
class Recipe:
    """What the chart plots: "latency" (s) and "throughput" (tokens/s) of one workload, all its conditions."""

    title: str  # stands above
    workload: str  # name of a workload of the method generation
    rows: list[Row]  # one a model
    published: bool = False  # published values beside the measured ones


def needs(recipe: Recipe) -> list[Need]:
    """Return the raw results that the chart plots; raises UserError for a series that the chart does not have."""
    for row in recipe.rows:
        check_names(row.series, SERIES, f"figure '{recipe.title}', row '{row.title}'")
    found = (
        Need(row.model, chain, "profile", row.workload or recipe.workload)
        for row in recipe.rows
        for _, chain in _lines(row)
    )
    return list(dict.fromkeys(found))


def _lines(row: Row) -> list[tuple[str, str]]:
    """Return (series, chain) of every line of a row."""
    return [
        (series, chain)
        for series, chains in row.series.items()
        for chain in ([chains] if isinstance(chains, str) else chains)
    ]


def measured(recipe: Recipe, metrics: DataFrame) -> DataFrame:
    """Return one point a row, series and condition: latency in seconds, throughput in tokens per second.

    A line without its result is one point without a condition.
    """
    import pandas as pd

    needs(recipe)
    points = []
    for row in recipe.rows:
        for series, chain in _lines(row):
            workload = row.workload or recipe.workload
            found = select(metrics, kind="profile", suite=workload, model=row.model, chain=chain)
            found = [item for item in found if item["metric"] in QUANTITIES]
            conditions = {tuple(item[key] for key in CONDITION) for item in found} or {(None, None, None)}
            for condition in sorted(conditions, key=_order):
                here = [item for item in found if tuple(item[key] for key in CONDITION) == condition]
                where = f"figure '{recipe.title}', row '{row.title}'"
                latency, throughput = (
                    over_seeds([item for item in here if item["metric"] == name], where) for name in QUANTITIES
                )
                bad = [one.outcome for one in (latency, throughput) if one.outcome != "ok"]
                reasons = [outcome for outcome in bad if outcome != "missing"] or bad
                points.append(
                    {"row": row.title, "series": series, "model": row.model, "chain": chain}
                    | {"parameters": parameters_of(here)}
                    | dict(zip(CONDITION, condition, strict=True))
                    | {"latency": latency.value, "latency_error": latency.error}
                    | {"throughput": throughput.value, "throughput_error": throughput.error}
                    | {"seeds": min(latency.seeds, throughput.seeds), "outcome": reasons[0] if reasons else "ok"}
                    | {"engine": " + ".join(sorted({str(item["engine"]) for item in here if item["engine"]}))}
                    | origin(here)
                )
    return pd.DataFrame(points, columns=list(COLUMNS))


def _order(condition: tuple) -> tuple:
    return tuple(-1 if number is None else number for number in condition)


def published(folder: Path) -> DataFrame:
    """Return the two described ends of each line. They are unreliable: see the folder's README."""
    return _read(folder / "latency_throughput.csv", COLUMNS)


def draw(points: DataFrame, title: str, note: str = "") -> Figure:
    """Draw one row of panels a model, throughput on a log2 axis shared by all; unreliable lines are dotted.

    A batch size that ran out of memory breaks its line and is named in the corner of its panel. Published values beside
    measured ones have no line.
    """
    points, others, said = apart(points)
    both = joined(points, others) if len(others) else points
    with style.styled():
        rows = list(dict.fromkeys(both["row"])) or [""]
        placed = both.dropna(subset=["input_tokens", "output_tokens"])
        panels = sorted(
            {(int(o), int(i)) for o, i in zip(placed["output_tokens"], placed["input_tokens"], strict=True)}
        )
        panels = panels or [(0, 0)]
        figure = style.new_figure(max(5.6, 3.1 * len(panels)), 2.75 * len(rows))
        parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
        wanted, limits = [], _limits(both)
        for part, row in zip(parts, rows, strict=True):
            part.suptitle(row, x=0.008, ha="left", fontsize=10, fontweight="bold")
            here, beside = points[points["row"] == row], others[others["row"] == row]
            grid = part.subplots(1, len(panels), squeeze=False)[0]
            for axes, (output, given) in zip(grid, panels, strict=True):
                inside = (here["output_tokens"] == output) & (here["input_tokens"] == given)
                published = (beside["output_tokens"] == output) & (beside["input_tokens"] == given)
                wanted += _draw_panel(axes, here[inside], beside[published], limits)
                axes.set_title(f"{given} Input Tokens, {output} Output Tokens" if output else "")
                if axes.lines:
                    style.say_lacking(axes, style.lacking(here[inside | here["input_tokens"].isna()], _name))
            first = next((axes for axes in grid if axes.lines), None)
            if first is not None:
                first.set_ylabel("Throughput (tokens/s)")
            handles = _legend(here, row) + [handle()] * bool(len(beside))
            if handles:
                part.legend(handles=handles, loc="outside lower center", ncols=min(4, len(panels) * 2))
        footer = style.footer_lines(points, list(SERIES), note)
        if points["batch_size"].notna().any():
            footer.append("M1, M4, …: batch size. Error bars, where visible: one standard error.")
        style.frame(figure, title, (), footer + said)
        style.label_sparsely(figure, _most_wanted_first(wanted))
    return figure


def _name(row: dict) -> str:
    size = row["parameters"]
    if size is None or size != size:
        return f"{row['series']} ({row['chain']})"
    return f"{row['series']} {style.parameters_label(size)}"


def _limits(points: DataFrame) -> tuple[float, float] | None:
    values = points["throughput"].astype("float64").dropna()
    return (float(values.min()) / 1.6, float(values.max()) * 1.6) if len(values) else None


def _draw_panel(axes, points: DataFrame, others: DataFrame, limits: tuple[float, float] | None) -> list[tuple]:
    """Draw one panel; return the labels it would like: (axes, x, y, text, colour, rank)."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    if others.empty and not (points["latency"].notna() & points["throughput"].notna()).any():
        style.say_empty(axes, _wrap(_why_empty(set(points["outcome"]))))
        return []
    labels, gaps = [], []
    for name, shade, line in _shaded(points):
        colour, marker, size = SERIES[name]
        line = line.sort_values(["batch_size", "latency"])
        unreliable = line["certainty"].astype(str).str.startswith("unreliable").all()
        x, y = line["latency"].astype("float64"), line["throughput"].astype("float64")
        axes.errorbar(
            x,
            y,
            xerr=line["latency_error"].astype("float64").fillna(0),
            yerr=line["throughput_error"].astype("float64").fillna(0),
            color=colour,
            marker=marker,
            markersize=size,
            linestyle=":" if unreliable else "-",
            markerfacecolor="none" if marker == "o" else colour,
            alpha=(0.6 if unreliable else 1.0) * shade,
            elinewidth=0.6,
            zorder=3,
        )
        good = [
            row for row in line.to_dict("records") if row["outcome"] == "ok" and row["batch_size"] == row["batch_size"]
        ]
        labels += [
            (
                axes,
                row["latency"],
                row["throughput"],
                f"M{int(row['batch_size'])}",
                colour,
                _rank(place, len(good), name),
            )
            for place, row in enumerate(good if shade == 1 else ())
            if row["batch_size"] is not None
        ]
        oom = line[line["outcome"] == "oom"]["batch_size"].dropna()
        gaps += [f"{name} M{int(oom.min())}{'+' if len(oom) > 1 else ''}"] if len(oom) else []
    for row in others.to_dict("records"):
        mark(axes, row["latency"], row["throughput"], SERIES[row["series"]][0])
        # A label without text keeps the others off it.
        labels.append((axes, row["latency"], row["throughput"], "", style.MUTED, (9,)))
    axes.set_yscale("log", base=2)
    axes.grid(True)
    axes.yaxis.set_major_locator(LogLocator(base=2, numticks=9))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))
    axes.set(xlabel="Latency (s)")
    axes.margins(x=0.16)
    axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
    if limits:
        axes.set_ylim(*limits)
    if gaps:
        axes.text(
            0.985,
            0.02,
            "OOM: " + "\n".join(gaps),
            transform=axes.transAxes,
            ha="right",
            va="bottom",
            fontsize=6.5,
            color=style.GAP,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0},
            zorder=4,
        )
    return labels


def _shaded(points: DataFrame) -> Iterator[tuple[str, float, DataFrame]]:
    """Yield (series, opacity, points) of each line; of several sizes of a series the largest is the darkest."""
    for name in SERIES:
        found = points[points["series"] == name].sort_values("parameters", ascending=False, kind="stable")
        lines = [line for _, line in found.groupby("chain", sort=False, dropna=False)]
        for place, line in enumerate(lines):
            yield name, 1.0 - 0.75 * place / max(1, len(lines) - 1), line


def _rank(place: int, count: int, series: str) -> tuple:
    # The ends of each line say most, then every second point; "Ours" before the others.
    ends = 0 if place in (0, count - 1) else 1 + place % 2
    return ends, list(SERIES)[::-1].index(series), place


def _most_wanted_first(labels: list[tuple]) -> list[tuple]:
    return [label[:5] for label in sorted(labels, key=lambda label: label[5])]


def _why_empty(outcomes: set[str]) -> str:
    if outcomes == {"oom"}:
        return "All points: out of memory"
    words = {"oom": "out of memory"}
    reasons = sorted({words.get(one, one.partition(":")[2].strip().rstrip(".") or "no results") for one in outcomes})
    return f"{'Several reasons: ' * (len(reasons) > 1)}{'; '.join(reasons) or 'no results'}"


def _wrap(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text[:1].upper() + text[1:], 32))


def _legend(points: DataFrame, row: str) -> list:
    from matplotlib.lines import Line2D

    handles = []
    placed = points[points["throughput"].notna() | (points["outcome"] == "oom")]
    for name, shade, line in _shaded(placed):
        colour, marker, size = SERIES[name]
        counts = line["parameters"].dropna()
        label = f"{row} (original)" if name == "Original" and row else name
        label += f" {style.parameters_label(counts.iloc[0])}" if len(counts) else ""
        face = "none" if marker == "o" else colour
        look = {"color": colour, "marker": marker, "markersize": size, "markerfacecolor": face, "alpha": shade}
        handles.append(Line2D([], [], label=label, **look))
    return handles
