"""GLUE scores of 32-, 2- and 1-bit encoders under training budgets A and C, next to their teacher.

Reproduces the six line charts of XTC (Wu et al. 2022, arXiv 2206.01859). All scores are plotted as percentages.

The average is over the 8 GLUE tasks without WNLI, each counting once: a task's score is the mean of its GLUE metrics
(MRPC and QQP: accuracy and F1; STS-B: Pearson and Spearman; MNLI: accuracy, matched and mismatched; the others have
one metric). It is drawn only where all eight are present.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from espalier.errors import UserError
from espalier.figures import (
    ESTIMATE_COLUMNS,
    ORIGIN_COLUMNS,
    Estimate,
    Need,
    check_names,
    mean_of,
    origin,
    over_seeds,
    read_published,
    select,
    style,
)
from espalier.published_points import apart, handle, mark

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

TEACHER, BUDGETS = "teacher", ("Budget-A", "Budget-C")
BESIDE = {"Budget-A": 0.16, "Budget-C": 0.28, "teacher": 0.4}  # how far to the right a published value stands
# Name → colour, line, marker, as in the paper.
SERIES = {
    "Budget-A": ("#1F77B4", "-", "o"),
    "Budget-C": ("#FF7F0E", "--", "^"),
    "teacher": ("#000000", "", "s"),
}
AVERAGE = "Ave. 8 Tasks"
# Panel → task of the recipe, task and metric of the results, axis label.
PANELS = {
    "CoLA": ("cola", ("cola", "mcc"), "Mcc"),
    "MNLI": ("mnli", ("mnli", "accuracy"), "Acc."),
    "QNLI": ("qnli", ("qnli", "accuracy"), "Acc."),
    "QQP": ("qqp", ("qqp", "accuracy"), "Acc."),
    "STS-B": ("stsb", ("stsb", "pearson"), "Pearson"),
    AVERAGE: (None, None, "GLUE Scores"),
}
# The 8 tasks → the (task, metric) pairs whose mean is the task's score in the average.
SCORES = {
    "cola": (("cola", "mcc"),),
    "mnli": (("mnli", "accuracy"), ("mnli_mismatched", "accuracy")),
    "mrpc": (("mrpc", "accuracy"), ("mrpc", "f1")),
    "qnli": (("qnli", "accuracy"),),
    "qqp": (("qqp", "accuracy"), ("qqp", "f1")),
    "rte": (("rte", "accuracy"),),
    "sst2": (("sst2", "accuracy"),),
    "stsb": (("stsb", "pearson"), ("stsb", "spearman")),
}
COLUMNS = ("panel", "metric", "series", "bits", *ESTIMATE_COLUMNS, "chain", *ORIGIN_COLUMNS)
# What identifies a point, measured or published, and what is compared of it.
KEYS, VALUES = ("panel", "series", "bits"), ("value",)
PUBLISHED_TITLE = "XTC: BERT on GLUE at 32, 2 and 1 bits (published)"


@dataclass(frozen=True)
class Recipe:
    """What the chart plots: for each task its suite, the teacher's chain, and each student's chain."""

    title: str  # stands above the chart
    model: str | dict[str, str]  # name of an encoder; or, where each task has a teacher of its own, task → model
    suite: dict[str, str]  # task → suite
    teacher: dict[str, str]  # task → chain
    students: dict[str, dict[int | str, dict[str, str]]] = field(default_factory=dict)  # budget → bits → task → chain
    published: bool = False  # published values beside the measured ones


def needs(recipe: Recipe) -> list[Need]:
    """Return the raw results that the chart plots.

    Raises UserError for an unknown budget or task, and for a task without a suite or a model.
    """
    where = f"figure '{recipe.title}'"
    check_names(recipe.students, BUDGETS, f"{where}, students")
    check_names(recipe.suite, SCORES, f"{where}, suite")
    if isinstance(recipe.model, dict):
        check_names(recipe.model, SCORES, f"{where}, model")
    for budget, by_bits in recipe.students.items():
        for bits in by_bits:
            if not str(bits).isdigit():
                raise UserError(f"{where}, students.{budget}: '{bits}' is not a number of bits, such as 2.")
    found = []
    for series, bits, chains in _variants(recipe):
        check_names(chains, SCORES, f"{where}, {series} at {bits} bits")
        check_names(chains, recipe.suite, f"{where}, {series} at {bits} bits, a task without an entry under suite")
        if isinstance(recipe.model, dict):
            check_names(chains, recipe.model, f"{where}, {series} at {bits} bits, a task without an entry under model")
        found += [Need(_model(recipe, task), chain, "evaluate", recipe.suite[task]) for task, chain in chains.items()]
    return list(dict.fromkeys(found))


def _model(recipe: Recipe, task: str) -> str:
    return recipe.model[task] if isinstance(recipe.model, dict) else recipe.model


def _variants(recipe: Recipe) -> list[tuple[str, int, dict[str, str]]]:
    students = [
        (budget, int(bits), recipe.students[budget][bits])
        for budget in recipe.students
        for bits in sorted(recipe.students[budget], key=int, reverse=True)
    ]
    return [(TEACHER, 32, recipe.teacher), *students]


def measured(recipe: Recipe, metrics: DataFrame) -> DataFrame:
    """Return one point a panel, series and bit width, times 100; an average without all tasks names what it lacks.

    A point without its result is "missing".

    Standard errors: two metrics of one task share their questions, so their errors are averaged as if they moved
    together (the cautious choice); the tasks of the average are independent.
    """
    import pandas as pd

    needs(recipe)
    points = []
    for series, bits, chains in _variants(recipe):
        rows = {
            task: select(metrics, kind="evaluate", model=_model(recipe, task), chain=chain, suite=recipe.suite[task])
            for task, chain in chains.items()
        }
        _check_bits(series, bits, rows)
        for panel, (task, item, label) in PANELS.items():
            if not (chains if task is None else task in chains):
                continue
            here = [row for found in rows.values() for row in found] if task is None else rows[task]
            if task is None:
                estimate, chain = _average(rows), ""
            elif not here:
                estimate, chain = Estimate(outcome=style.MISSING), chains[task]
            else:
                of_item = [row for row in here if (row["task"], row["metric"]) == item]
                # A run that failed as a whole has one row without a metric: its outcome stands for all.
                estimate = (
                    over_seeds(of_item, panel) if of_item else Estimate(outcome=here[0]["outcome"] or style.MISSING)
                )
                chain = chains[task]
            about = {"panel": panel, "metric": label, "series": series, "bits": bits, "chain": chain}
            points.append(about | estimate.scaled(100).columns() | origin(here))
    return pd.DataFrame(points, columns=list(COLUMNS))


def _check_bits(series: str, bits: int, rows: Mapping[str, list[dict]]) -> None:
    """Refuse a student that the recipe plots at another number of bits than its weights have."""
    for task, found in rows.items() if series != TEACHER else ():
        for row in found:
            if row["bits"] not in (None, bits):
                raise UserError(
                    f"figures.glue_bits: students.{series}.{bits}.{task}: '{row['chain']}' has weights of"
                    f" {row['bits']:g} bits, not {bits}."
                )


def _average(rows: Mapping[str, list[dict]]):
    """Average the 8 tasks' scores within each seed, then over seeds."""
    missing = [
        task
        for task, parts in SCORES.items()
        if any(not any((row["task"], row["metric"]) == part for row in rows.get(task, [])) for part in parts)
    ]
    if missing:
        return over_seeds([{"value": None, "outcome": f"missing: {', '.join(missing)}"}])
    seeds = sorted({row["seed"] for found in rows.values() for row in found}, key=str)
    return over_seeds([{"seed": seed} | mean_of([_score(rows[task], task, seed) for task in SCORES]) for seed in seeds])


def _score(rows: list[dict], task: str, seed: object) -> dict:
    parts = []
    for part in SCORES[task]:
        parts += [row for row in rows if (row["task"], row["metric"]) == part and row["seed"] == seed][:1]
    if len(parts) < len(SCORES[task]) or any(row["value"] is None for row in parts):
        return {"value": None, "outcome": f"missing: {task}"}
    errors = [row["stderr"] for row in parts]
    return {
        "value": sum(row["value"] for row in parts) / len(parts),
        "stderr": None if None in errors else sum(errors) / len(errors),
        "n": parts[0]["n"],
        "outcome": "ok",
    }


def published(folder: Path) -> DataFrame:
    """Return the points of the paper's six charts, read off; both budgets start at the teacher's score."""
    return read_published(folder / "glue_bits.csv", COLUMNS)


def draw(points: DataFrame, title: str, note: str = "") -> Figure:
    """Draw six panels; a panel without results says what is missing.

    A student's line starts at the teacher's square where it has no 32-bit point of its own: it was trained from there.
    Published values beside measured ones stand to the right of their bits, without a line.
    """
    points, others, said = apart(points)
    with style.styled():
        figure = style.new_figure(13.2, 2.35)
        grid = figure.subplots(1, len(PANELS))
        bits = sorted({int(value) for value in (*points["bits"], *others["bits"])} | {32, 2, 1}, reverse=True)
        expected = {(str(row["series"]), int(row["bits"])) for row in points.to_dict("records")}
        for axes, panel in zip(grid, PANELS, strict=True):
            beside = others[others["panel"] == panel]
            _draw_panel(axes, points[points["panel"] == panel], beside, panel, bits, expected)
        drawn = [name for name in SERIES if name in {*style.having_place(points)["series"], *others["series"]}]
        footer = style.footer_lines(points, list(SERIES), note)
        if points["error"].notna().any():
            footer.append("Error bars: one standard error (sampling of questions, and spread over seeds).")
        handles = [_handle(name) for name in drawn] + [handle()] * bool(len(others))
        style.frame(figure, title, handles, footer + said)
    return figure


def _draw_panel(
    axes, points: DataFrame, others: DataFrame, panel: str, bits: list[int], expected: set[tuple[str, int]]
) -> None:
    from matplotlib.ticker import MaxNLocator

    good = points[points["value"].notna()]
    axes.set_title(panel)
    if good.empty and others.empty:
        style.say_empty(axes, _why_empty(points, panel))
        return
    place = {value: index for index, value in enumerate(bits)}
    axes.grid(axis="y")
    teacher = good[(good["series"] == TEACHER) & (good["bits"] == 32)]
    for name, (colour, line, marker) in SERIES.items():
        own = points[points["series"] == name].sort_values("bits", ascending=False)
        if own["value"].isna().all():
            continue
        # A point without a value breaks the line.
        x, y = [place[int(value)] for value in own["bits"]], list(own["value"])
        error = own["error"].astype("float64").fillna(0)
        size = 6.5 if name == TEACHER else 5
        if line and 0 not in x and len(teacher):
            axes.plot([0, *x[:1]], [teacher["value"].iloc[0], *y[:1]], color=colour, linestyle=line, zorder=2)
        # The teacher lies under the students' first points, which coincide with it in the paper.
        order = 2.5 if name == TEACHER else 3
        axes.errorbar(
            x,
            y,
            error if error.any() else None,
            color=colour,
            linestyle=line,
            marker=marker,
            markersize=size,
            elinewidth=0.9,
            capsize=2,
            zorder=order,
        )
    for row in others.to_dict("records"):
        mark(axes, place[int(row["bits"])] + BESIDE[row["series"]], row["value"], SERIES[row["series"]][0])
    axes.set_xticks(range(len(bits)), [str(value) for value in bits])
    axes.set(xlabel="bit", ylabel=PANELS[panel][2], xlim=(-0.35, len(bits) - (0.65 if others.empty else 0.45)))
    axes.margins(y=0.14)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], min_n_ticks=4))
    said = points[points["value"].notna() | points["outcome"].astype(str).str.startswith(style.MISSING)]
    present = set(zip(said["series"], said["bits"].astype(int), strict=True))
    absent = sorted(expected - present, key=lambda item: (list(SERIES).index(item[0]), -item[1]))
    names = [_name({"series": name, "bits": value}) for name, value in absent]
    style.say_lacking(axes, style.lacking(points, _name, names))


def _name(row: dict) -> str:
    name = TEACHER if row["series"] == TEACHER else f"{row['series']} {int(row['bits'])}-bit"
    _, _, tasks = str(row.get("outcome", "")).partition(f"{style.MISSING}: ")
    return f"{name} (without {tasks})" if tasks else name


def _why_empty(points: DataFrame, panel: str) -> str:
    if (points["outcome"] == "oom").any():
        return "Out of memory"
    lacking = {
        task.strip()
        for outcome in points["outcome"].astype(str)
        if outcome.startswith("missing:")
        for task in outcome.partition(":")[2].split(",")
    }
    if panel == AVERAGE and lacking:
        return "No average without\n" + ",\n".join(
            ", ".join(sorted(lacking)[start : start + 4]) for start in range(0, len(lacking), 4)
        )
    return f"No results: {panel}"


def _handle(name: str):
    from matplotlib.lines import Line2D

    colour, line, marker = SERIES[name]
    return Line2D([], [], color=colour, linestyle=line, marker=marker, markersize=5.5, label=name)
