"""Accuracy, time, speed, memory, and accuracy per memory of one model in many low-bit forms.

The numbers are those of a published comparison of 11 variants of a small language model; the chart is ours. Time is
the time to score a question (all its choices, batch 1), not to generate; memory is the mean over questions of each
question's peak. `score` and `row_values` define the table's numbers for everything that prints them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from espalier.errors import UserError
from espalier.figures import (
    ORIGIN_COLUMNS,
    Estimate,
    Need,
    check_names,
    mean_over_tasks,
    origin,
    over_seeds,
    read_published,
    select,
    style,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

ROWS = (
    "Base Model",
    "SFT Model",
    "BnB 4-bit Model",
    "BnB 8-bit Model",
    "GPTQ 4bit calib20",
    "GPTQ 4bit calib200",
    "GPTQ 4bit calib2000",
    "SmoothQuant W8A8 calib20",
    "SmoothQuant W8A8 calib200",
    "SmoothQuant W8A8 calib2000",
    "SmoothQuant W4A8 calib200",
)
# Family, by how a row's name starts → colour; rows of other names are grouped under "Other".
FAMILIES = {
    "Base": "#4D4D4D",
    "SFT": "#9A9A9A",
    "BnB": style.ORANGE,
    "GPTQ": style.BLUE,
    "SmoothQuant": style.GREEN,
    "Other": style.PURPLE,
}
# Key of the table → metric of the profile.
METRICS = {
    "avg_time_s": "time_per_question",
    "tokens_per_s": "tokens_per_second",
    "avg_peak_vram_MB": "peak_allocated_per_question",
}
KEYS = ("accuracy", *METRICS, "score_acc_over_vram")
Z95 = 1.959963984540054
COLUMNS = (
    "row",
    "family",
    "quantity",
    "value",
    "error",
    "low",
    "high",
    "unit",
    "seeds",
    "n",
    "outcome",
    "simulated",
    "chain",
    "bits",
    *ORIGIN_COLUMNS,
)
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
    simulated: list[str] = field(default_factory=list)  # rows whose low-bit arithmetic is computed in floating point


def needs(recipe: Recipe) -> list[Need]:
    """Return the raw results that the chart plots; raises UserError for a row that the table does not have."""
    where = f"figure '{recipe.title}'"
    check_names(recipe.rows, ROWS, f"{where}, rows")
    for name in recipe.extra_rows:
        if name in ROWS:
            raise UserError(f"{where}, extra_rows: '{name}' is a row of the table; name it under rows.")
    check_names(recipe.simulated, _chains(recipe), f"{where}, simulated")
    found = (
        Need(recipe.model, chain, kind, name)
        for chain in _chains(recipe).values()
        for kind, name in (("evaluate", recipe.suite), ("profile", recipe.workload))
    )
    return list(dict.fromkeys(found))


def score(accuracy: float, peak_MB: float) -> float:
    """Return 1000 · accuracy (a fraction) / peak memory in MB of 2**20 bytes: the table's `score_acc_over_vram`."""
    return 1000.0 * accuracy / peak_MB


def row_values(recipe: Recipe, metrics: DataFrame) -> dict[str, dict[str, float | None]]:
    """Return row name → the published table's keys (`KEYS`), None where there is no value (out of memory)."""
    return {
        name: {key: estimates[key].value for key in KEYS}
        for name, (estimates, _) in _estimates(recipe, metrics).items()
    }


def measured(recipe: Recipe, metrics: DataFrame) -> DataFrame:
    """Return one point a row and quantity, in plotted units; `error` is half of the 95% interval [`low`, `high`]."""
    needs(recipe)
    chains = _chains(recipe)
    points = []
    for name, (estimates, rows) in _estimates(recipe, metrics).items():
        bits = {row["bits"] for row in rows if row.get("bits") is not None}
        about = {
            "simulated": name in recipe.simulated,
            "chain": chains[name],
            "bits": bits.pop() if len(bits) == 1 else None,
        } | origin(rows)
        points += [_point(name, key, estimates[key], about) for key in KEYS]
    return _frame(points)


def published(folder: Path) -> DataFrame:
    """Return the published table as points; accuracy is a fraction of n questions, so its interval is known."""
    rows = read_published(
        folder / "quantization_tradeoff.csv", ("row", "correct", "n", *METRICS, "simulated", "outcome", *ORIGIN_COLUMNS)
    )
    points = []
    for row in rows.to_dict("records"):
        share, count = row["correct"] / row["n"], row["n"]
        estimates = {key: Estimate(row[key], seeds=1) for key in METRICS}
        estimates["accuracy"] = Estimate(share, math.sqrt(share * (1 - share) / count), seeds=1, n=count)
        estimates["score_acc_over_vram"] = _score(estimates)
        about = {key: row[key] for key in ("simulated", *ORIGIN_COLUMNS)} | {"chain": None, "bits": None}
        points += [_point(row["row"], key, estimates[key], about) for key in KEYS]
    return _frame(points)


def _chains(recipe: Recipe) -> dict[str, str]:
    ordered = {name: recipe.rows[name] for name in ROWS if name in recipe.rows}
    return ordered | recipe.extra_rows


def _estimates(recipe: Recipe, metrics: DataFrame) -> dict[str, tuple[dict[str, Estimate], list[dict]]]:
    found = {}
    where = f"figure '{recipe.title}'"
    for name, chain in _chains(recipe).items():
        about = {"model": recipe.model, "chain": chain}
        scored = select(metrics, kind="evaluate", suite=recipe.suite, **about)
        profiled = select(metrics, kind="profile", suite=recipe.workload, **about)
        if not (scored or profiled):
            continue
        estimates = {
            "accuracy": mean_over_tasks(scored, recipe.tasks, where) if scored else Estimate(outcome="missing")
        }
        for key, metric in METRICS.items():
            estimates[key] = over_seeds([row for row in profiled if row["metric"] == metric], f"{where}, row '{name}'")
        estimates["avg_peak_vram_MB"] = estimates["avg_peak_vram_MB"].scaled(1 / style.MB)
        estimates["score_acc_over_vram"] = _score(estimates)
        found[name] = (estimates, scored + profiled)
    return found


def _score(estimates: dict[str, Estimate]) -> Estimate:
    accuracy, memory = estimates["accuracy"], estimates["avg_peak_vram_MB"]
    if accuracy.value is None or not memory.value:
        bad = memory if accuracy.value is not None else accuracy
        return Estimate(outcome=bad.outcome if bad.outcome != "ok" else "missing")
    # Relative errors add in quadrature; memory's is near zero, so the interval is almost that of the accuracy.
    value = score(accuracy.value, memory.value)
    relative = [one.error / one.value for one in (accuracy, memory) if one.error is not None and one.value]
    return Estimate(value, value * math.hypot(*relative) if relative else None, None, accuracy.seeds, accuracy.n)


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
    for column in ("value", "error", "low", "high"):
        frame[column] = frame[column].astype("float64")
    return frame


def draw(points: DataFrame, title: str, note: str = "") -> Figure:
    """Draw five panels of horizontal bars that share their rows; hatched rows simulate their low-bit arithmetic."""
    from matplotlib.patches import Patch

    with style.styled():
        order = list(dict.fromkeys(name for name in (*ROWS, *points["row"]) if name in set(points["row"])))
        figure = style.new_figure(12.4, 0.9 + 0.27 * max(4, len(order)))
        grid = figure.subplots(1, len(KEYS), sharey=True, width_ratios=[1.1, 1, 1, 1, 1])
        devices = sorted(set(points["device"].dropna()) - {""})
        names = dict(zip(KEYS, _axis_names(devices), strict=True))
        for axes, key in zip(grid, KEYS, strict=True):
            of_key = {row["row"]: row for row in points[points["quantity"] == key].to_dict("records")}
            _draw_bars(axes, [of_key.get(name) for name in order])
            axes.set_title(names[key])
        if order:
            grid[0].set_yticks(range(len(order)), order)
            grid[0].set_ylim(len(order) - 0.4, -0.6)
        families = [family for family in FAMILIES if family in set(points["family"])]
        handles = [Patch(facecolor=FAMILIES[family], label=family) for family in families]
        if points["simulated"].astype(bool).any():
            handles.append(Patch(facecolor="white", edgecolor="#333333", hatch="////", label="simulated arithmetic"))
        footer = style.footer_lines(points, ROWS, note, column="row")
        if points["error"].notna().any():
            n = points[points["quantity"] == "accuracy"]["n"].dropna()
            footer.append(f"Whiskers: 95% interval{f' (n = {int(n.max())} questions)' if len(n) else ''}.")
        style.frame(figure, title, handles, footer)
    return figure


def _axis_names(devices: list[str]) -> tuple[str, ...]:
    memory = style.memory_label(devices, "MB")
    return "Accuracy (%)", "Time per question (s)", "Speed (tokens/s)", memory, "1000 · accuracy / MB"


def _draw_bars(axes, rows: list[dict | None]) -> None:
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    largest = max((row["high"] if row["high"] == row["high"] else row["value"] for row in rows if _has(row)), default=1)
    for place, row in enumerate(rows):
        if not _has(row):
            if row is not None and row["outcome"] == "oom":
                style.mark_gap(axes, place, horizontal=True)
            continue
        error = row["error"] if row["error"] == row["error"] else 0.0
        axes.barh(
            place,
            row["value"],
            0.72,
            color=FAMILIES[row["family"]],
            hatch="////" if row["simulated"] is True or row["simulated"] == 1 else None,
            edgecolor="white",
            linewidth=0,
            xerr=error or None,
            error_kw=style.ERROR_BAR,
        )
        text = style.number_label(row["value"])
        axes.annotate(text, (row["value"] + error, place), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_xlim(0, largest * 1.3)
    axes.locator_params(axis="x", nbins=4)


def _has(row: dict | None) -> bool:
    return row is not None and row["value"] == row["value"]
