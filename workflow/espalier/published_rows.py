"""The rows of tables/published.csv: each published value that a study compares, ours, and the verdict.

`comparisons.py` has the section of the config that says what is compared; docs/metrics.md defines the columns. A model
that Espalier made, of random weights or trained here, reproduces nothing: its rows say so and hold no number
of ours.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from espalier import comparisons, drawing, plugins, tables
from espalier.comparisons import Cell, Column, Comparison
from espalier.errors import UserError, did_you_mean
from espalier.figures import Estimate, Need, mean_over_tasks, origin, over_seeds, select
from espalier.recipes import build

COLUMNS = (
    *("file", "certainty", "quantity", "condition", "model", "chain", "device", "published", "measured", "stderr"),
    *("unit", "difference", "tolerance", "inside", "why"),
)
Z95 = 1.959963984540054  # a chart's 95% interval is this many standard errors to each side
# Unit → what it measures, and how many of the smallest unit it is; MB and GB as in every table and chart.
UNITS = {
    "fraction": ("share", 1.0),
    "%": ("share", 0.01),
    "bytes": ("memory", 1.0),
    "MB": ("memory", 2.0**20),
    "MiB": ("memory", 2.0**20),
    "GB": ("memory", 2.0**30),
    "GiB": ("memory", 2.0**30),
}
# Unit of a chart's column, where its points do not say it.
UNITS_OF_COLUMNS = {"speedup": "×", "throughput": "tokens/s", "latency": "s", "value": "%"}
NAMING = (
    "quantity",
    "metric",
    "panel",
)  # columns that say what a point's column "value" holds, the first that is there
UNRELIABLE = "unreliable"


class Ours(NamedTuple):
    """What was measured for one published value; `difference` is ours − published, or the places that differ."""

    value: float | str | None
    error: float | None = None  # one standard error
    outcome: str = "ok"  # why there is no value
    difference: float | None = None
    device: str = ""
    why: str | None = None  # why there is no verdict


def lines(content: Mapping, results: list[dict], folder: Path) -> list[dict]:
    """Return the lines of the table, in the order of the entries, as dicts of `COLUMNS`.

    `content` is that of `comparisons.content`, `results` are raw results, `folder` holds the published values. Raises
    UserError for a tolerance of a quantity that a chart does not have, and for units that do not go together.
    """
    found = []
    for i, keys in enumerate(content["compare"]):
        entry, where = build(Comparison, keys, f"compare[{i}]"), f"compare[{i}]"
        if entry.figure is None:
            found += _of_values(entry, content["made"], results, folder, where)
        else:
            found += _of_figure(entry, content["figures"][entry.figure], content["made"], results, folder, where)
    return found


def _line(entry: Comparison, made: Mapping[str, str], about: dict, ours: Ours, tolerance: float | str | None) -> dict:
    """Return a line: `about` has what is known of the published value, and the models and chain that reproduce it."""
    models = about.pop("models")
    line = dict.fromkeys(COLUMNS) | about | {"model": " + ".join(models)}
    here = [f"{model} is made by Espalier ({made[model]})" for model in models if model in made]
    if here:
        return line | {"why": "; ".join(here)}
    line |= {"device": ours.device, "measured": ours.value, "stderr": ours.error, "tolerance": tolerance}
    line["difference"] = None if ours.value is None else ours.difference
    line["why"] = _why(entry, line, ours)
    if line["why"] is None:
        bound, apart = comparisons.allowed(tolerance, line["published"]), abs(ours.difference)
        line["inside"] = "yes" if apart <= bound or math.isclose(apart, bound) else "no"
    return line


def _why(entry: Comparison, line: Mapping, ours: Ours) -> str | None:
    """Return why there is no verdict, None if there is one."""
    if entry.why:
        return entry.why
    if ours.value is None:
        return "not measured" if ours.outcome in ("missing", "ok") else ours.outcome
    if str(line["certainty"]).startswith(UNRELIABLE):
        return line["certainty"]
    if ours.why:
        return ours.why
    if entry.device and not re.search(entry.device, ours.device):
        return f"other device: a verdict is for {entry.device}"
    return "no tolerance is stated for it" if line["tolerance"] is None else None


# Files of published values --------------------------------------------------------------------------------------------


def _of_values(
    entry: Comparison, made: Mapping[str, dict], results: list[dict], folder: Path, where: str
) -> Iterator[dict]:
    metrics = tables.frame(results)
    for cell in comparisons.cells(entry, where, folder):
        column = entry.columns[cell.column]
        about = {
            "file": f"{entry.values}.csv",
            "certainty": cell.row["certainty"],
            "quantity": cell.column,
            "condition": _condition(cell.selector),
            "models": [cell.model],
            "chain": cell.chain,
        }
        if column.order:
            text = cell.row[cell.column]
            ours = _order(cell, results, text.split())
            about |= {"published": text, "unit": "blocks"}
            yield _line(entry, made["evaluate"], about, ours, column.tolerance or 0.0)
        else:
            published = float(cell.row[cell.column])
            ours, unit = _measured(cell, column, metrics, published, f"{where}.columns.{cell.column}")
            about |= {"published": published, "unit": unit}
            yield _line(entry, made["profile" if column.workload else "evaluate"], about, ours, column.tolerance)


def _measured(cell: Cell, column: Column, metrics, published: float, where: str) -> tuple[Ours, str | None]:
    """Return the mean over seeds of what a column measures, in the published unit, and that unit."""
    kind, suite = ("evaluate", column.suite) if column.suite else ("profile", column.workload)
    rows = select(metrics, kind=kind, suite=suite, model=cell.model, chain=cell.chain)
    pairs = column.tasks.items()
    used = [row for row in rows if (row["task"], row["metric"]) in pairs or row["metric"] == column.metric]
    if column.tasks:
        estimate = mean_over_tasks(rows, column.tasks, where) if rows else over_seeds(rows)
    elif not used and any(row["value"] is not None for row in rows):
        known = {row["metric"] for row in rows}
        raise UserError(f"{where}.metric: '{suite}' gave no '{column.metric}'.{did_you_mean(column.metric, known)}")
    else:
        estimate = over_seeds(used or rows[:1], where)
    units = sorted({row["unit"] for row in used if row["unit"]})
    unit = column.unit or (units[0] if units else None)
    if units and unit != units[0]:
        estimate = estimate.scaled(_factor(units[0], unit, where))
    return _ours(estimate, estimate.error, published, origin(used)["device"]), unit


def _ours(estimate: Estimate, error: float | None, published: float, device: str) -> Ours:
    difference = None if estimate.value is None else estimate.value - published
    return Ours(estimate.value, error, estimate.outcome, difference, device)


def _factor(old: str, new: str, where: str) -> float:
    """Return how many of the new unit make one of the old."""
    if old not in UNITS or new not in UNITS or UNITS[old][0] != UNITS[new][0]:
        raise UserError(f"{where}: what is measured in {old} cannot be compared with a value in {new}.")
    return UNITS[old][1] / UNITS[new][1]


def _order(cell: Cell, results: list[dict], published: list[str]) -> Ours:
    """Return the order of removal that the steps recorded; of several seeds, the one that differs in most places."""
    found = []
    for result in results:
        identity = result["identity"]
        if result["kind"] == "step" and (identity["model"], identity["chain"]) == (cell.model, cell.chain):
            removed = list(map(str, result["samples"]["removed"]))
            differ = sum(ours != theirs for ours, theirs in zip(removed, published, strict=False))
            device, why = origin(tables.tidy([result]))["device"], None
            if len(removed) < len(published):
                why = f"only {len(removed)} of {len(published)} places are there"
            found.append(Ours(" ".join(removed), difference=differ, device=device, why=why))
    return max(found, key=lambda one: (one.difference, one.why is not None), default=Ours(None, outcome="missing"))


def _condition(keys: Mapping) -> str:
    """Return what identifies a published value: texts as they are, numbers with their names."""
    said = {key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in keys.items()}
    return " / ".join(said[key] if isinstance(value, str) else f"{key} {said[key]}" for key, value in keys.items())


# Charts ---------------------------------------------------------------------------------------------------------------


def _of_figure(
    entry: Comparison, content: dict, made: Mapping[str, dict], results: list[dict], folder: Path, where: str
) -> list[dict]:
    module = plugins.load("figures", entry.figure)
    content = content | {"title": entry.figure}
    needed = module.needs(build(module.Recipe, content, f"figures.{entry.figure}"))
    made = made["profile" if {need.kind for need in needed} == {"profile"} else "evaluate"]
    measured = select(drawing.measured(entry.figure, content, results)[0])
    published = select(module.published(folder))
    _check_tolerances(entry, module, published, where)
    ours: dict[tuple, list[dict]] = {}
    for point in measured:
        ours.setdefault(_key(point, module.KEYS), []).append(point)
    found = []
    for point in published:
        keys = dict(zip(module.KEYS, _key(point, module.KEYS), strict=True))
        match = _match(keys, ours.get(tuple(keys.values()), []))
        for column in module.VALUES:
            if point[column] is not None:
                found.append(_of_point(entry, made, needed, f"{entry.figure}.csv", keys, point, match, column))
    for name, summary in getattr(module, "SUMMARIES", {}).items():
        with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                (column,) = (key for key in module.VALUES if key in row)
                keys = {key: value for key, value in row.items() if key not in (column, "source", "certainty")}
                point = row | {column: float(row[column])}
                match = summary(row, measured)
                found.append(_of_point(entry, made, needed, f"{name}.csv", keys, point, match, column))
    return found


def _key(point: Mapping, keys: Sequence[str]) -> tuple:
    # A whole number may come from a column of fractions, one whose other cells are empty.
    values = (point[key] for key in keys)
    return tuple(int(value) if isinstance(value, float) and value.is_integer() else value for value in values)


def _match(keys: Mapping, points: list[dict]) -> dict:
    """Return the measured point of a published one's keys; one without numbers, with its reason, where none can be."""
    unstated = [key for key, value in keys.items() if value is None]
    if unstated:
        return {"outcome": f"the source does not state {' and '.join(unstated)}"}
    if len(points) > 1:
        return {"outcome": f"several points of this chart have these keys: {', '.join(one['chain'] for one in points)}"}
    return points[0] if points else {"outcome": "missing"}


def _of_point(
    entry: Comparison,
    made: Mapping[str, str],
    needed: list[Need],
    file: str,
    keys: Mapping,
    point: Mapping,
    match: Mapping,
    column: str,
) -> dict:
    """Return the line of one published number of a point, or of a summary; `match` is what was measured for it."""
    naming = next((key for key in NAMING if key in point), None) if column == "value" else None
    unit = point.get("unit") or UNITS_OF_COLUMNS[column]
    factor = 1.0 if match.get("unit") in (None, unit) else _factor(match["unit"], unit, entry.figure)
    estimate, error = Estimate(match.get(column), outcome=match["outcome"]).scaled(factor), _error(match, column)
    about = {
        "file": file,
        "certainty": point["certainty"],
        "quantity": point[naming] if naming else column,
        "condition": _condition({key: value for key, value in keys.items() if key != naming and value is not None}),
        "models": _models(match, needed, made),
        "chain": match.get("chain"),
        "published": point[column],
        "unit": unit,
    }
    ours = _ours(estimate, error and error * factor, point[column], match.get("device") or "")._replace(
        why=match.get("why")
    )
    return _line(entry, made, about, ours, _tolerance(entry, [about["quantity"], *map(str, keys.values()), column]))


def _error(point: Mapping, column: str) -> float | None:
    """Return one standard error of a point's number, spread over seeds included; charts write it in three ways."""
    if column != "value":
        return point.get(f"{column}_error")
    error = point.get("error")
    return error / Z95 if error is not None and "low" in point else error


def _models(match: Mapping, needed: list[Need], made: Mapping[str, str]) -> list[str]:
    """Return the models behind a measured point; of one that is not there, its chart's, if these are one or all made.

    A chart's points say their model only where the chart has several.
    """
    if "model" in match:
        return match["model"].split(" + ")
    if "chain" in match:
        return sorted({need.model for need in needed if match["chain"] in ("", need.chain)})
    models = {need.model for need in needed}
    return sorted(models) if len(models) == 1 or models <= made.keys() else []


def _tolerance(entry: Comparison, names: list[str]) -> float | str | None:
    """Return the tolerance of a published number that has these names, the most telling one first."""
    if not isinstance(entry.tolerance, dict):
        return entry.tolerance
    return next((entry.tolerance[name] for name in names if name in entry.tolerance), None)


def _check_tolerances(entry: Comparison, module: ModuleType, published: list[dict], where: str) -> None:
    """Refuse a tolerance of something that no published value of the chart is named after."""
    known = {str(point[key]) for point in published for key in module.KEYS} | {*module.VALUES}
    for name in entry.tolerance if isinstance(entry.tolerance, dict) else ():
        if name not in known:
            raise UserError(f"{where}.tolerance: {entry.figure} has no '{name}'.{did_you_mean(name, known)}")
