"""The section `compare` of a study: which published values stand beside which measured ones, and what must be measured.

An entry names a file of reference/papers, its columns and its rows, or a chart of the study that has published points.
What is found wrong here is found by a dry-run. The table itself is made by `published_rows.py`.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from espalier import chains, checkpoints, glue_tasks, plugins
from espalier.errors import UserError, did_you_mean
from espalier.figures import Need
from espalier.provenance import code_version
from espalier.published_points import PAPERS
from espalier.recipes import as_dict, fields_of

if TYPE_CHECKING:
    from espalier.config import Resolved, Step

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_published_table.py"
ORDERED = "depth"  # the method whose steps record an order of removal
RELATIVE = re.compile(r"\d+(\.\d+)? ?%")
Rows = dict[str, dict[str, dict[str, str | int | float]]]  # model → chain → column of the file → what it holds
LOOKS = ("figures", "title", "published")  # keys of a chart that no number depends on


@dataclass(frozen=True)
class Column:
    """What measures a column of published values here, and how near it must come."""

    suite: str | None = None  # name of a suite; exactly one of suite, workload and order says what is measured
    workload: str | None = None  # name of a workload
    order: bool = False  # true: the order in which the chain's last step, of depth pruning, removed blocks
    metric: str | None = None  # of the suite or workload
    tasks: dict[str, str] = field(default_factory=dict)  # in place of metric: task → metric, their unweighted mean
    unit: Literal["%", "MB", "MiB", "GB", "GiB"] | None = None  # of the published value; none: the metric's own
    tolerance: float | str | None = None  # largest difference, in that unit, or relative ("1%"); order: places (0)

    def check(self) -> None:
        if (self.suite is not None) + (self.workload is not None) + self.order != 1:
            raise ValueError("a column needs exactly one of the keys 'suite', 'workload' and 'order: true'.")
        if self.order and (self.metric or self.tasks or self.unit or isinstance(self.tolerance, str)):
            raise ValueError("beside 'order' there is at most 'tolerance', a number of places.")
        if not self.order and (self.metric is None) == (not self.tasks):
            raise ValueError("a column needs exactly one of the keys 'metric' and 'tasks'.")
        if self.workload and self.tasks:
            raise ValueError("'tasks' belong to a suite; of a workload say 'metric'.")
        _check_tolerance(self.tolerance)


@dataclass(frozen=True)
class Comparison:
    """Published values of a file (values) or of a chart (figure), to be set beside what is measured here."""

    values: str | None = None  # a file of reference/papers, without .csv
    columns: dict[str, Column] = field(default_factory=dict)  # of values: column of the file → what measures it here
    rows: Rows = field(default_factory=dict)  # of values: model → chain → column of the file → what picks the row
    figure: str | None = None  # in place of values: a chart of this study, by the name of its module
    tolerance: float | str | dict[str, float | str] | None = None  # of figure: one, or by panel, quantity, series …
    device: str | None = None  # regular expression that the name of our device must hold for a verdict
    why: str | None = None  # why nothing is judged: each value is listed with this sentence, and without a verdict

    def check(self) -> None:
        if (self.values is None) == (self.figure is None):
            raise ValueError("a comparison needs exactly one of the keys 'values' and 'figure'.")
        if self.figure is not None and (self.columns or self.rows):
            raise ValueError("'columns' and 'rows' belong to 'values': a chart has its own.")
        if self.values is not None and not (self.columns and self.rows):
            raise ValueError("'values' needs 'columns' and 'rows'.")
        if self.values is not None and self.tolerance is not None:
            raise ValueError("beside 'values', 'tolerance' is a key of each column.")
        unsaid = [name for name, column in self.columns.items() if column.tolerance is None and not column.order]
        if self.figure is not None and self.tolerance is None:
            unsaid.append(self.figure)
        if unsaid and self.why is None:
            raise ValueError(f"'{unsaid[0]}' needs 'tolerance', or the comparison 'why' nothing is judged.")
        tolerances = self.tolerance.values() if isinstance(self.tolerance, dict) else [self.tolerance]
        for tolerance in tolerances:
            _check_tolerance(tolerance)
        try:
            re.compile(self.device or "")
        except re.error as error:
            raise ValueError(f"'device' is no regular expression: {error}.") from None


def _check_tolerance(tolerance: float | str | None) -> None:
    good = tolerance is None or (
        RELATIVE.fullmatch(tolerance) if isinstance(tolerance, str) else 0 <= tolerance < math.inf
    )
    if not good:
        raise ValueError(f"the tolerance {tolerance!r} is neither a number from 0 nor a percentage such as '1%'.")


def allowed(tolerance: float | str, published: float) -> float:
    """Return the largest difference that a tolerance allows, in the unit of the published value."""
    if isinstance(tolerance, str):
        return abs(published) * float(tolerance.removesuffix("%")) / 100
    return tolerance


class Cell(NamedTuple):
    """One published value of a file, and the variant that is to reproduce it."""

    model: str
    chain: str
    column: str
    selector: dict  # column → value that pick the row
    row: dict[str, str]  # of the file


def cells(entry: Comparison, where: str, folder: Path = PAPERS) -> list[Cell]:
    """Return the published values that an entry with `values` names; empty cells of the file are left out.

    Raises UserError, opened by `where`, for a file or column that does not exist, a column that holds no numbers (or
    no order), and keys that pick no row or several.
    """
    names = [file.stem for file in folder.glob("*.csv")]
    if entry.values not in names:
        raise UserError(
            f"{where}.values: there is no '{entry.values}' in reference/papers.{did_you_mean(entry.values, names)}"
        )
    with (folder / f"{entry.values}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for name, column in entry.columns.items():
        _check_column_name(name, rows[0], entry.values, f"{where}.columns")
        pattern = r"\d+( \d+)*" if column.order else r"-?\d+(\.\d+)?"
        odd = [row[name] for row in rows if row[name] and not re.fullmatch(pattern, row[name])]
        if odd:
            what = "order of blocks" if column.order else "number"
            raise UserError(f"{where}.columns.{name}: '{odd[0]}' in {entry.values}.csv is no {what}.")
    picked = [
        (model, chain, selector, _pick(rows, selector, entry.values, f"{where}.rows.{model}.{chain}"))
        for model, of_model in entry.rows.items()
        for chain, selector in of_model.items()
    ]
    return [
        Cell(model, chain, name, selector, row)
        for model, chain, selector, row in picked
        for name in entry.columns
        if row[name]
    ]


def _pick(rows: list[dict], selector: Mapping, name: str, where: str) -> dict:
    found = rows
    for key, value in selector.items():
        _check_column_name(key, rows[0], name, where)
        here = [row for row in found if _same(row[key], value)]
        if not here:
            raise UserError(
                f"{where}: no such row of {name}.csv has {key} '{value}'.{did_you_mean(value, _column(found, key))}"
            )
        found = here
    if len(found) > 1:
        differ = [key for key in rows[0] if len(_column(found, key)) > 1]
        keys = f"; say {' or '.join(differ[:3])}, too" if differ else ""
        raise UserError(f"{where}: {len(found)} rows of {name}.csv are meant{keys}.")
    return found[0]


def _column(rows: list[dict], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _same(text: str, value: str | float) -> bool:
    if isinstance(value, str):
        return text == value
    try:
        return float(text) == value
    except ValueError:
        return False


def _check_column_name(name: str, known: Iterable[str], file: str, where: str) -> None:
    if name not in known:
        raise UserError(f"{where}: {file}.csv has no column '{name}'.{did_you_mean(name, known)}")


def needs(resolved: Resolved, file: str) -> Iterator[tuple[Need, str]]:
    """Yield the raw results that the entries with `values` compare, each with what opens a message about it.

    For a chart nothing is measured beyond what it plots. Raises UserError for every mistake of the section but a name
    of a model, chain, suite or workload in a row, which whoever resolves the need finds.
    """
    for i, entry in enumerate(resolved.config.compare):
        where = f"{file}: compare[{i}]"
        if entry.figure is not None:
            _check_figure(entry.figure, resolved, f"{where}.figure")
            continue
        for name, column in entry.columns.items():
            _check_scored(column, resolved, f"{where}.columns.{name}")
        for cell in cells(entry, where):
            column = entry.columns[cell.column]
            if column.order:
                yield _step(cell, resolved, f"{where}.rows.{cell.model}"), where
            else:
                kind = "evaluate" if column.suite else "profile"
                yield Need(cell.model, cell.chain, kind, column.suite or column.workload), where


def _step(cell: Cell, resolved: Resolved, where: str) -> Need:
    token = chains.split(cell.chain)[1]
    recipe = resolved.recipes.get(token)
    if token is None or (recipe and recipe.method != ORDERED):
        end = recipe.method if recipe else chains.DENSE
        raise UserError(f"{where}: an order is recorded by steps of '{ORDERED}', and '{cell.chain}' ends in '{end}'.")
    return Need(cell.model, cell.chain, "step", token)


def _check_figure(figure: str, resolved: Resolved, where: str) -> None:
    if figure not in resolved.figures:
        raise UserError(f"{where}: this study has no chart '{figure}'.{did_you_mean(figure, resolved.figures)}")
    if not hasattr(plugins.load("figures", figure), "KEYS"):
        raise UserError(f"{where}: '{figure}' has no published points that measured ones could be compared with.")


def _check_scored(column: Column, resolved: Resolved, where: str) -> None:
    """Refuse a suite or workload that does not exist, and tasks and metrics that it is known not to have."""
    if column.order:
        return
    kind, name = ("suite", column.suite) if column.suite else ("workload", column.workload)
    steps = getattr(resolved, f"{kind}s")
    if name not in steps:
        raise UserError(f"{where}: there is no {kind} '{name}'.{did_you_mean(name, steps)}")
    tasks, metrics = _scored(steps[name])
    if column.metric and kind == "suite" and len(tasks) > 1:
        raise UserError(f"{where}: the suite '{name}' scores {len(tasks)} tasks: say under 'tasks' which are meant.")
    for task in column.tasks if tasks else ():
        if task not in tasks:
            raise UserError(f"{where}.tasks: the suite '{name}' has no task '{task}'.{did_you_mean(task, tasks)}")
    for metric in filter(None, (column.metric, *column.tasks.values())):
        if metrics and metric not in metrics:
            raise UserError(f"{where}: the {kind} '{name}' has no metric '{metric}'.{did_you_mean(metric, metrics)}")


def _scored(step: Step) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the tasks and metrics of a suite or workload, as far as its recipe and method say; empty: not known."""
    kind, _ = fields_of(type(step.recipe)).get("task", (None, None))
    if kind == glue_tasks.Name:
        task = glue_tasks.TASKS[step.recipe.task]
        return tuple(task.splits), task.metrics
    module = plugins.load(step.kind, step.method)
    return tuple(getattr(step.recipe, "tasks", ())), tuple(getattr(module, "METRICS", getattr(module, "UNITS", ())))


# What the job that makes the table depends on -------------------------------------------------------------------------


def charts(resolved: Resolved) -> list[str]:
    """Return the charts whose points are compared."""
    return sorted({entry.figure for entry in resolved.config.compare if entry.figure is not None})


def content(resolved: Resolved) -> str:
    """Return what the table compares as JSON: the entries, their charts' recipes, and the models made here."""
    figures = {
        name: {key: value for key, value in resolved.figures[name].content.items() if key not in LOOKS}
        for name in charts(resolved)
    }
    made = {kind: made_here(resolved, {kind}) for kind in ("evaluate", "profile")}
    return json.dumps({"compare": [as_dict(one) for one in resolved.config.compare], "figures": figures, "made": made})


def made_here(resolved: Resolved, kinds: Collection[str]) -> dict[str, str]:
    """Return model → what made it, of those that Espalier made, whose results of these kinds reproduce nothing.

    Time and memory do not depend on the values of weights: for a profile alone, random ones will do, if the model has a
    published one's whole shape (`real_shape` of its method).
    """
    made = {}
    for name, step in resolved.pretrained.items():
        real_shape = getattr(plugins.load("pretrain", step.method), "real_shape", lambda recipe: False)
        if set(kinds) != {"profile"} or not real_shape(step.recipe):
            made[name] = f"pretrain: {step.method}"
    for name, entry in resolved.models.items():
        if entry.path and (Path(entry.path) / checkpoints.DESCRIPTION).is_file():
            made[name] = f"path: {entry.path}"
    return made


def files(resolved: Resolved) -> list[str]:
    """Return the files of published values that are compared, relative to the working folder."""
    names = {entry.values or entry.figure for entry in resolved.config.compare}
    for name in charts(resolved):
        names |= set(getattr(plugins.load("figures", name), "SUMMARIES", ()))
    return [os.path.relpath(PAPERS / f"{name}.csv") for name in sorted(names)]


def code(resolved: Resolved) -> str:
    """Return the code version of the table's job, with the modules of the charts that it takes points from."""
    return code_version(SCRIPT, [plugins.module_name("figures", name, "compare") for name in charts(resolved)])
