"""Charts and tables of a report: files of a study as data for its page."""

from __future__ import annotations

import base64
import csv
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from espalier import comparisons, drawing, plugins, published_points, quantization_rows
from espalier.config import Step
from espalier.study import Study, Wanted

QUANTIZED = "quantization_tradeoff"  # the chart whose recipe the table of quantized variants has, too
NAMES = {  # columns that hold names, also where all of them look like numbers
    *("arithmetic", "chain", "certainty", "condition", "criterion", "device", "engine", "family", "file", "made_from"),
    *("metric", "model", "outcome", "panel", "quantity", "row", "seed", "series", "size", "source", "suite", "task"),
    *("unit", "variant", "versus", "why", "workload"),
}
NUMBER = re.compile(r"-?((0|[1-9]\d*)(\.\d+)?(e[+-]\d\d+)?|inf)|nan")  # as Python writes it


class Cell(NamedTuple):
    """What a table shows in one place; numbers stand on the right."""

    text: str
    number: bool = False


class Table(NamedTuple):
    """A table's columns and rows, and the columns that hold one value in all rows, as (column, value)."""

    columns: list[str]
    rows: list[list[Cell]]
    constant: list[tuple[str, str]]


class Chart(NamedTuple):
    """A chart: its picture as a data URI (None: there is none), its numbers, and what a reader must know of both."""

    name: str
    title: str
    shows: str  # one sentence
    picture: str | None
    early: bool
    there: int  # of the raw results that it plots
    wanted: int
    numbers: Table
    gaps: dict[str, int]  # outcome → how many points have it instead of a value


class Published(NamedTuple):
    """The table of published values beside ours: how many lie inside their tolerances, outside, and why none could."""

    inside: int
    outside: int
    reasons: dict[str, int]  # why a value is not judged → how many
    rows: Table
    caveat: str  # as that of Quantized


class Quantized(NamedTuple):
    """The table of quantized variants and their paired tests."""

    variants: Table
    pairs: Table
    caveat: str  # a sentence that a reader must know of how it was made ("": nothing)


def table(rows: Iterable[Mapping[str, object]]) -> Table:
    """Return rows as a table without empty columns; columns with one value in all of several rows are named once.

    A column holds numbers if all that is in it is one, and it is none of `NAMES`.
    """
    written = [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]
    columns = list(dict.fromkeys(key for row in written for key in row))
    filled = {key: [row[key] for row in written if row.get(key)] for key in columns}
    numbers = {key for key in columns if key not in NAMES and all(map(NUMBER.fullmatch, filled[key]))}
    rows = [{key: _cell(text, key in numbers) for key, text in row.items()} for row in written]
    texts = {key: {row[key].text if key in row else "" for row in rows} for key in columns}
    constant = {key: next(iter(found)) for key, found in texts.items() if len(found) == 1}
    if len(rows) < 2:
        constant = {key: value for key, value in constant.items() if not value}
    kept = [key for key in columns if key not in constant]
    cells = [[row.get(key, Cell("")) for key in kept] for row in rows]
    return Table(kept, cells, [(key, value) for key, value in constant.items() if value])


def number(value: float) -> str:
    """Return a number as people read it: four digits, thousands apart, whole numbers whole."""
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _cell(text: str, in_numbers: bool) -> Cell:
    """Return a text as it is shown; in a column of numbers a finite one is shown as people read it."""
    if in_numbers and text and math.isfinite(float(text)):
        return Cell(number(float(text)), True)
    return Cell(text)


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; none if it is not there."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def charts(study: Study, found: Mapping[Wanted, dict], fresh: bool) -> list[Chart]:
    """Return the study's charts, whole or early; `found` are the raw results that are there.

    A chart is left out unless it is known to be `fresh`, or was drawn by this recipe and code, of as many results as
    are there now, none of which is newer. That a chart is early is never known to be fresh.
    """
    there = {study.path(one) for one in found}
    return [_chart(study, figure, there, fresh) for figure in study.resolved.figures]


def _chart(study: Study, figure: str, there: set[str], fresh: bool) -> Chart:
    plotted = study.figure_results(figure)
    results = [path for path in plotted if path in there]
    early = len(results) < len(plotted)
    whole = study.figures / figure
    prefix = drawing.early(whole) if early else whole
    picture = prefix.with_name(f"{figure}.svg")
    step = study.step("figures", figure)
    shown = picture.is_file() and ((fresh and not early) or _drawn_of(picture, step, results))
    points = read(prefix.with_name(f"{figure}.csv")) if shown else []
    outcomes = Counter(point["outcome"] for point in points if point.get("outcome") not in ("ok", "", None))
    return Chart(
        name=figure,
        title=step.recipe.title or figure,
        shows=_first_line(plugins.load("figures", figure).__doc__),
        picture=_data_uri(picture) if shown else None,
        early=early,
        there=len(results),
        wanted=len(plotted),
        numbers=table(points),
        gaps=dict(outcomes.most_common()),
    )


def _drawn_of(picture: Path, step: Step, results: list[str]) -> bool:
    """Return whether a chart was drawn by this recipe and today's code, of these raw results as they are now."""
    if _older(picture, [*results, *published_points.files(step.method, step.content)]):
        return False
    return drawing.bears(picture, drawing.mark(step.method, step.recipe, len(results)))


def _data_uri(picture: Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def _older(file: Path, results: Iterable[str]) -> bool:
    """Return whether a file is older than one of the raw results that it is made of, or one of these is gone."""
    made = file.stat().st_mtime
    return any(not os.path.exists(path) or os.stat(path).st_mtime > made for path in results)


def _caveat(table: Path, fresh: bool) -> str:
    made = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(table.stat().st_mtime))
    return "" if fresh else f"Made {made}; a change of its recipe or code since then is not noticed."


def _stale(table: Path, made_of: list[str], there: set[str], more: Iterable[str] = ()) -> bool:
    """Return whether a table lacks one of the results that it is made of today, or is older than one of its files."""
    return not there.issuperset(made_of) or _older(table, [*made_of, *more])


def quantized(study: Study, found: Iterable[Wanted], fresh: bool) -> Quantized | None:
    """Return the table of quantized variants and their paired tests; None if the study has none that is up to date."""
    values, pairs = study.root / "tables/quantization.json", study.root / "tables/quantization_paired.csv"
    if QUANTIZED not in study.resolved.figures or not (values.is_file() and pairs.is_file()):
        return None
    if not fresh and _stale(values, study.figure_results(QUANTIZED), set(map(study.path, found))):
        return None
    rows = json.loads(values.read_text(encoding="utf-8"))
    named = [{"variant": name, **{key: row[key] for key in quantization_rows.KEYS}} for name, row in rows.items()]
    return Quantized(table(named), table(read(pairs)), _caveat(values, fresh))


def published(study: Study, found: Iterable[Wanted], fresh: bool) -> Published | None:
    """Return the table of published values beside ours; None if the study has none that is up to date."""
    file = study.root / "tables/published.csv"
    if not study.config.compare or not file.is_file():
        return None
    papers = comparisons.files(study.resolved)
    if not fresh and _stale(file, study.comparison_results(), set(map(study.path, found)), papers):
        return None
    rows = read(file)
    verdicts = Counter(row["inside"] for row in rows)
    reasons = Counter(row["why"] for row in rows if row["inside"] not in ("yes", "no"))
    return Published(verdicts["yes"], verdicts["no"], dict(reasons.most_common()), table(rows), _caveat(file, fresh))
