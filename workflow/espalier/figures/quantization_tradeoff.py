"""Accuracy, time, speed, memory, and accuracy per memory of one model in many low-bit forms.

The numbers are those of a published comparison of 11 variants of a small language model (`quantization_rows.py`); the
chart is ours. Each row is tested against Base Model, or else the first row, and against the row whose model it was made
from: the rows of the published table are quantized from SFT Model, so that its gain is in the first test (`paired.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from espalier import tables
from espalier.errors import UserError
from espalier.figures import (
    ORIGIN_COLUMNS,
    Estimate,
    Need,
    check_names,
    origin,
    read_published,
    style,
)
from espalier.published_points import FAR, apart, handle, joined, mark, mark_far
from espalier.quantization_rows import KEYS as QUANTITIES
from espalier.quantization_rows import METRICS, ROWS, chains, estimates, made_from, pairs, score_of, tests_against

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

SAMPLES = True  # `measured` gets the raw results: a paired test needs the outcome of each question
# Family, by how a row's name starts → colour; rows of other names are grouped under "Other".
FAMILIES = {
    "Base": "#4D4D4D",
    "SFT": "#9A9A9A",
    "BnB": style.ORANGE,
    "GPTQ": style.BLUE,
    "SmoothQuant": style.GREEN,
    "AWQ": style.VERMILION,
    "RTN": style.SKY,
    "Other": style.PURPLE,
}
Z95 = 1.959963984540054
SIGNIFICANT = 0.05
# What a result says that its products are computed in → what the chart says of it.
ARITHMETIC = {
    "float": "weights multiplied as they are stored",
    "unpacked": "stored in few bits, unpacked to floating point for each product",
    "integer": "products of integers",
    "simulated": "rounded values computed in floating point",
}
# Columns of an accuracy's paired test → those of `paired.COLUMNS`.
PAIRED = {"versus": "versus", "only_this": "only_row", "only_other": "only_versus", "p_value": "p_value"}
COLUMNS = (
    *("row", "family", "quantity", "value", "stderr", "error", "low", "high", "unit", "seeds", "n", "outcome"),
    *("arithmetic", "chain", "bits", *PAIRED, "made_from", "p_value_made_from", *ORIGIN_COLUMNS),
)
# What identifies a point, measured or published, and what is compared of it.
KEYS, VALUES = ("row", "quantity"), ("value",)


class Lanes(NamedTuple):
    """Where a row's values lie, as distances from its middle in rows, and how high it is."""

    measured: float
    height: float  # of a bar
    published: float
    inches: float  # of the whole row


ONE_LANE, TWO_LANES = Lanes(0, 0.72, 0, 0.27), Lanes(-0.14, 0.5, 0.28, 0.34)
PUBLISHED_TITLE = "Quantization of a 1 B model (published)"


@dataclass(frozen=True)
class Recipe:
    """What the chart plots; rows stand in the order of `ROWS`, then of `extra_rows`."""

    title: str  # stands above the chart
    model: str  # name of a model
    suite: str  # name of the suite that scores the tasks
    tasks: dict[str, str]  # task → metric: the accuracy is the unweighted mean of these
    workload: str  # profile that scores questions
    rows: dict[str, str]  # name of `ROWS` → chain
    extra_rows: dict[str, str] = field(default_factory=dict)  # any other name → chain
    published: bool = False  # published values beside the measured ones


def needs(recipe: Recipe) -> list[Need]:
    """Return the raw results that the chart plots; raises UserError for a row that the table does not have."""
    where = f"figure '{recipe.title}'"
    check_names(recipe.rows, ROWS, f"{where}, rows")
    for name in recipe.extra_rows:
        if name in ROWS:
            raise UserError(f"{where}, extra_rows: '{name}' is a row of the table; name it under rows.")
    found = (
        Need(recipe.model, chain, kind, name)
        for chain in chains(recipe).values()
        for kind, name in (("evaluate", recipe.suite), ("profile", recipe.workload))
    )
    return list(dict.fromkeys(found))


def measured(recipe: Recipe, results: list[dict]) -> DataFrame:
    """Return one point a row and quantity, in plotted units; `error` is half of the 95% interval [`low`, `high`].

    An accuracy has the paired test against `versus`, the first row: how many questions only this row and only the other
    gets right, and p; and p against `made_from`, the row whose model was quantized. Of several seeds it is the one with
    the largest p.
    """
    needs(recipe)
    lines = pairs(recipe, results)
    first = dict.fromkeys(chains(recipe), lines[0]["versus"] if lines else "")
    tests, parents = tests_against(lines, first), tests_against(lines, made_from(recipe))
    points = []
    found = estimates(recipe, tables.frame(results))
    for name in chains(recipe):
        of_row, rows = found.get(name, (dict.fromkeys(QUANTITIES, Estimate(outcome=style.MISSING)), []))
        bits = {row["bits"] for row in rows if row.get("bits") is not None}
        about = {
            "arithmetic": " + ".join(sorted({row["arithmetic"] for row in rows})) or None,
            "chain": chains(recipe)[name],
            "bits": bits.pop() if len(bits) == 1 else None,
        } | origin(rows)
        points += [_point(name, key, of_row[key], about) for key in QUANTITIES]
        if name in tests:
            points[-len(QUANTITIES)] |= {column: tests[name][key] for column, key in PAIRED.items()}
        if name in parents:
            points[-len(QUANTITIES)] |= {
                "made_from": parents[name]["versus"],
                "p_value_made_from": parents[name]["p_value"],
            }
    return _frame(points)


def published(folder: Path) -> DataFrame:
    """Return the published table as points; accuracy is a fraction of n questions, so its interval is known.

    The outcome of each question was not published, so there is no paired test.
    """
    rows = read_published(
        folder / "quantization_tradeoff.csv", ("row", "correct", "n", *METRICS, "simulated", "outcome", *ORIGIN_COLUMNS)
    )
    points = []
    for row in rows.to_dict("records"):
        share, count = row["correct"] / row["n"], row["n"]
        of_row = {key: Estimate(row[key], seeds=1) for key in METRICS}
        of_row["accuracy"] = Estimate(share, math.sqrt(share * (1 - share) / count), seeds=1, n=count)
        of_row["score_acc_over_vram"] = score_of(of_row["accuracy"], of_row["avg_peak_vram_MB"])
        about = {key: row[key] for key in ORIGIN_COLUMNS} | {"arithmetic": "simulated" if row["simulated"] else None}
        points += [_point(row["row"], key, of_row[key], about) for key in QUANTITIES]
    return _frame(points)


def _point(name: str, key: str, estimate: Estimate, about: dict) -> dict:
    estimate, unit = {
        "accuracy": (estimate.scaled(100), "%"),
        "avg_time_s": (estimate, "s"),
        "tokens_per_s": (estimate, "tokens/s"),
        "avg_peak_vram_MB": (estimate, "MB"),
        "score_acc_over_vram": (estimate, "1000 · accuracy / MB"),
    }[key]
    error = None if estimate.error is None else Z95 * estimate.error
    return about | {
        "row": name,
        "family": next((family for family in FAMILIES if name.startswith(family)), "Other"),
        "quantity": key,
        "value": estimate.value,
        "stderr": estimate.stderr,
        "error": error,
        "low": None if error is None else estimate.value - error,
        "high": None if error is None else estimate.value + error,
        "unit": unit,
        "seeds": estimate.seeds,
        "n": estimate.n,
        "outcome": estimate.outcome,
    }


def _frame(points: list[dict]) -> DataFrame:
    import pandas as pd

    frame = pd.DataFrame(points, columns=list(COLUMNS))
    numbers = dict.fromkeys(("value", "stderr", "error", "low", "high", "p_value", "p_value_made_from"), "float64")
    return frame.astype(numbers | dict.fromkeys(("seeds", "n", "only_this", "only_other"), "Int64"))


def draw(points: DataFrame, title: str, note: str = "") -> Figure:
    """Draw five panels that share their rows: accuracies as dots with 95% intervals on an axis of their own, then bars.

    Hatched rows and hollow dots simulate their low-bit arithmetic; a star marks an accuracy that differs from that of
    the first row, a dagger one that differs from that of the row it was made from. Published values beside measured
    ones lie below them in their row.
    """
    from matplotlib.patches import Patch

    points, others, said = apart(points)
    both = joined(points, others) if len(others) else points
    with style.styled():
        order = list(dict.fromkeys(name for name in (*ROWS, *both["row"]) if name in set(both["row"])))
        lanes = TWO_LANES if len(others) else ONE_LANE
        figure = style.new_figure(13.4, 0.9 + lanes.inches * max(4, len(order)))
        grid = figure.subplots(1, len(QUANTITIES), sharey=True, width_ratios=[1.5, 1, 1, 1, 1])
        other = _compared_with(points, order)
        devices = sorted(set(points["device"].dropna()) - {""})
        names = dict(zip(QUANTITIES, _axis_names(devices), strict=True))
        for axes, key in zip(grid, QUANTITIES, strict=True):
            here = points[points["quantity"] == key]
            of_key = {row["row"]: row for row in here.to_dict("records")}
            beside = {row["row"]: row for row in others[others["quantity"] == key].to_dict("records")}
            rows = [[found.get(name) for name in order] for found in (of_key, beside)]
            (_draw_dots if key == "accuracy" else _draw_bars)(axes, *rows, lanes)
            if key == "accuracy" and other in of_key:
                _draw_band(axes, of_key[other])
            axes.set_title(names[key])
            style.say_lacking(axes, style.lacking(style.having_place(here), lambda row: row["row"]))
        words_said = [word for word in ARITHMETIC if points["arithmetic"].str.contains(word, na=False).any()]
        if order:
            words = points.drop_duplicates("row").set_index("row")["arithmetic"].dropna()
            _name_rows(grid[0], order, [words.get(name, "") for name in order])
        families = [
            family for family in FAMILIES if family in {*style.having_place(points)["family"], *others["family"]}
        ]
        handles = [Patch(facecolor=FAMILIES[family], label=family) for family in families]
        if "simulated" in words_said:
            handles.append(Patch(facecolor="white", edgecolor="#333333", hatch="////", label="simulated arithmetic"))
        handles += [handle()] * bool(len(others))
        footer = style.footer_lines(points, ROWS, note, column="row") + _about_intervals(points, other)
        if len(words_said) > 1:
            meanings = "; ".join(f"{word}: {ARITHMETIC[word]}" for word in words_said)
            footer.append(f"Grey words, how products are computed: {meanings}.")
        style.frame(figure, title, handles, footer + said + _about_simulated(others))
    return figure


def _about_simulated(others: DataFrame) -> list[str]:
    names = list(dict.fromkeys(others[others["arithmetic"] == "simulated"]["row"]))
    return [f"Simulated arithmetic in the published table: {', '.join(names)}."] if names else []


def _compared_with(points: DataFrame, order: list[str]) -> str | None:
    """Return the row that all others are compared with: that of the tests, or else the first."""
    return next(iter(points["versus"].dropna()), order[0] if order else None)


def _about_intervals(points: DataFrame, other: str | None) -> list[str]:
    accuracies = points[(points["quantity"] == "accuracy") & points["error"].notna()]
    if accuracies.empty:
        return []
    count = accuracies["n"].max()
    lines = [f"Whiskers: 95% interval (n = {count} questions); the grey band is that of {other}."]
    tested = accuracies["p_value"].dropna()
    test = f"at p < {SIGNIFICANT} (McNemar's exact test on the same questions)."
    parents = " and ".join(dict.fromkeys(name for name in accuracies["made_from"].dropna() if name != other))
    if len(tested):
        lines.append(f"* differs from {other}{parents and f', † from {parents}, of which it was made,'} {test}")
    elif len(accuracies) > 1:
        lines.append("Rows whose dots lie within each other's whiskers cannot be told apart by these numbers.")
    return lines


def _axis_names(devices: list[str]) -> tuple[str, ...]:
    memory = style.memory_label(devices, "MB")
    return "Accuracy (%)", "Time per question (s)", "Speed (tokens/s)", memory, "1000 · accuracy / MB"


def _name_rows(axes: Axes, order: list[str], words: list[str]) -> None:
    """Write each row's name, and between name and axis in small grey letters how its products are computed."""
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.tick_params(axis="y", pad=5 + (6 + 3.9 * max(map(len, words)) if any(words) else 0))
    for place, word in enumerate(words):
        look = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center", "fontsize": 7}
        axes.text(-0.02, place, word, color=style.MUTED, **look)


def _draw_dots(axes: Axes, rows: list[dict | None], others: list[dict | None], lanes: Lanes) -> None:
    """Draw accuracies as dots with whiskers; bars from zero would hide intervals of a few percent."""
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    shown = [row for row in (*rows, *others) if _has(row)]
    ends = [row[end] for row in shown for end in ("value", "low", "high") if row[end] == row[end]]
    low, high = (min(ends), max(ends)) if ends else (0, 100)
    room = (high - low) or 1
    axes.set_xlim(low - 0.06 * room, high + 0.24 * room)
    for place, row in enumerate(rows):
        if not _has(row):
            _draw_gap(axes, place + lanes.measured, row)
            continue
        error = row["error"] if row["error"] == row["error"] else 0.0
        colour = FAMILIES[row["family"]]
        axes.errorbar(
            row["value"],
            place + lanes.measured,
            xerr=error or None,
            fmt="o",
            markersize=5.5,
            color=colour,
            markerfacecolor="white" if _simulated(row) else colour,
            **style.ERROR_BAR | {"ecolor": colour},
        )
        tests = {"*": row["p_value"], "†": row["p_value_made_from"] if row["made_from"] != row["versus"] else 1.0}
        sign = " ".join(["", *(sign for sign, p in tests.items() if p < SIGNIFICANT)])
        _write(axes, style.number_label(row["value"]) + sign, row["value"] + error, place + lanes.measured)
    for place, row in enumerate(others):
        if _has(row):
            whisker = {"color": style.MUTED, "linewidth": 0.7, "zorder": 2}
            axes.plot([row["low"], row["high"]], [place + lanes.published] * 2, **whisker)
            mark(axes, row["value"], place + lanes.published, FAMILIES[row["family"]])
    axes.locator_params(axis="x", nbins=5)


def _draw_band(axes: Axes, row: dict) -> None:
    if row["error"] == row["error"]:
        axes.axvspan(row["low"], row["high"], color=FAMILIES["Base"], alpha=0.12, linewidth=0, zorder=0)


def _draw_bars(axes: Axes, rows: list[dict | None], others: list[dict | None], lanes: Lanes) -> None:
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    values = [row["value"] for row in others if _has(row)]
    ends = [row["high"] if row["high"] == row["high"] else row["value"] for row in rows if _has(row)]
    far = FAR * max(ends) if ends else math.inf
    largest = max([*ends, *(value for value in values if value <= far)], default=1)
    for place, row in enumerate(rows):
        if not _has(row):
            _draw_gap(axes, place + lanes.measured, row)
            continue
        error = row["error"] if row["error"] == row["error"] else 0.0
        axes.barh(
            place + lanes.measured,
            row["value"],
            lanes.height,
            color=FAMILIES[row["family"]],
            hatch="////" if _simulated(row) else None,
            edgecolor="white",
            linewidth=0,
            xerr=error or None,
            error_kw=style.ERROR_BAR,
        )
        _write(axes, style.number_label(row["value"]), row["value"] + error, place + lanes.measured)
    axes.set_xlim(0, largest * 1.3)
    for place, row in enumerate(others):
        if _has(row) and row["value"] > far:
            mark_far(axes, style.number_label(row["value"]), place + lanes.published, FAMILIES[row["family"]])
        elif _has(row):
            mark(axes, row["value"], place + lanes.published, FAMILIES[row["family"]])
    axes.locator_params(axis="x", nbins=4)


def _write(axes: Axes, text: str, right: float, place: float) -> None:
    axes.annotate(text, (right, place), (3, 0), textcoords="offset points", va="center", fontsize=7)


def _draw_gap(axes: Axes, place: float, row: dict | None) -> None:
    if row is not None:
        style.mark_gap(axes, place, row["outcome"], horizontal=True)


def _simulated(row: dict) -> bool:
    return "simulated" in str(row["arithmetic"])


def _has(row: dict | None) -> bool:
    return row is not None and row["value"] == row["value"]
