"""What all charts share before anything is drawn: which results they need, and how rows of metrics become points.

A figure module holds `Recipe`, `needs`, `measured`, `published` and `draw`. `measured` gets the table of metrics, or
the raw results if the module says `SAMPLES = True`. A point carries the number in the units that are plotted, and its
error bar, so that the CSV beside a chart holds all that the chart shows:

    value   mean over seeds
    stderr  standard error within one seed (which questions were drawn, or how a timing repeats); the root mean square
            over seeds, because seeds share their questions and averaging does not shrink this part
    spread  sample standard deviation over seeds; empty for one seed
    error   the error bar: sqrt(stderr² + spread² / seeds)
    seeds   how many seeds have a value
    outcome "ok", or why there is no value ("oom", "unavailable: reason", "failed: reason", "missing: what")
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from espalier.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from pandas import DataFrame

ESTIMATE_COLUMNS = ("value", "stderr", "spread", "error", "seeds", "n", "outcome")
ORIGIN_COLUMNS = ("device", "source", "certainty")
MEASURED = "measured"


class Need(NamedTuple):
    """One raw result that a chart plots: `name` is of the suite (kind "evaluate"), workload ("profile") or step."""

    model: str
    chain: str
    kind: str
    name: str


class Estimate(NamedTuple):
    """One number with its uncertainty, averaged over seeds; see the module's docstring."""

    value: float | None = None
    stderr: float | None = None
    spread: float | None = None
    seeds: int = 0
    n: int | None = None
    outcome: str = "ok"

    @property
    def error(self) -> float | None:
        """Half the error bar, one standard error; None where nothing is known about it."""
        if self.stderr is None and self.spread is None:
            return None
        return math.hypot(self.stderr or 0.0, (self.spread or 0.0) / math.sqrt(max(self.seeds, 1)))

    def scaled(self, factor: float) -> Estimate:
        """Return the estimate in another unit: `factor` new units make one of the old."""
        numbers = {key: None if (v := getattr(self, key)) is None else v * factor for key in _NUMBERS}
        return self._replace(**numbers)

    def columns(self, prefix: str = "") -> dict:
        """Return the estimate as columns of a point, named `ESTIMATE_COLUMNS`."""
        return {prefix + key: getattr(self, key) for key in ESTIMATE_COLUMNS}


_NUMBERS = ("value", "stderr", "spread")


def check_names(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise UserError, opened by `where`, for the first name that is not one of `known`."""
    known = list(known)
    for name in names:
        if name not in known:
            raise UserError(f"{where}: there is no '{name}' in this chart.{did_you_mean(name, known)}")


def select(metrics: DataFrame, **wanted: object) -> list[dict]:
    """Return the rows whose columns equal `wanted`, as dicts with None for an empty cell."""
    keep = None
    for column, value in wanted.items():
        same = metrics[column] == value
        keep = same if keep is None else keep & same
    rows = metrics if keep is None else metrics[keep]
    return [{key: _plain(value) for key, value in row.items()} for row in rows.to_dict("records")]


def _plain(value: object) -> object:
    # A missing cell is NaN, None or pandas' NA, by dtype; only NaN differs from itself and NA cannot be compared.
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return None
    return None if isinstance(value, float) and math.isnan(value) else value


def over_seeds(rows: Sequence[Mapping], where: str = "") -> Estimate:
    """Average rows of one metric of one variant, one row a seed.

    Seeds without a value (out of memory) are left out of the average; with none left, the outcome is the first row's.
    Raises UserError if a seed has two rows: two different things would stand for one point.
    """
    seen: dict[object, Mapping] = {}
    for row in rows:
        if row.get("seed") in seen:
            raise UserError(
                f"{where or 'A chart'}: seed {row.get('seed')} has two values of '{row.get('metric')}' for one point "
                f"(engines {seen[row.get('seed')].get('engine')} and {row.get('engine')}); plot one of them."
            )
        seen[row.get("seed")] = row
    good = [row for row in rows if row.get("value") is not None]
    if not good:
        first = rows[0].get("outcome") if rows else None
        return Estimate(outcome="missing" if first in (None, "", "ok") else str(first))
    values = [float(row["value"]) for row in good]
    errors = [float(row["stderr"]) for row in good if row.get("stderr") is not None]
    counts = [int(row["n"]) for row in good if row.get("n") is not None]
    mean = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else None
    stderr = math.sqrt(math.fsum(e * e for e in errors) / len(errors)) if len(errors) == len(values) else None
    return Estimate(mean, stderr, spread, len(values), max(counts, default=None))


def mean_of(rows: Sequence[Mapping]) -> dict:
    """Return the unweighted mean of one seed's rows of different tasks: stderr = sqrt(Σ stderr²) / k.

    The tasks' questions differ, so their errors are independent. Without all values there is no mean: the outcome
    says why.
    """
    bad = [row for row in rows if row.get("value") is None]
    if bad:
        return {"value": None, "stderr": None, "n": None, "outcome": bad[0].get("outcome") or "missing"}
    errors, counts = [row.get("stderr") for row in rows], [row.get("n") for row in rows]
    return {
        "value": math.fsum(row["value"] for row in rows) / len(rows),
        "stderr": None if None in errors else math.sqrt(math.fsum(e * e for e in errors)) / len(rows),
        "n": None if None in counts else int(sum(counts)),
        "outcome": "ok",
    }


def mean_over_tasks(rows: Sequence[Mapping], tasks: Mapping[str, str], where: str) -> Estimate:
    """Average `tasks` (task → metric) within each seed, then over seeds; `rows` are one variant's rows of one suite.

    Raises UserError if the suite has no such task, or the task no such metric; without any value (the whole evaluation
    ran out of memory) the outcome says so.
    """
    if all(row.get("value") is None for row in rows):
        return over_seeds(rows[:1])
    for task, metric in tasks.items():
        metrics = {row["metric"] for row in rows if row["task"] == task}
        if not metrics:
            names = sorted({str(row["task"]) for row in rows})
            raise UserError(f"{where}: the suite has no task '{task}'.{did_you_mean(task, names)}")
        if metric not in metrics:
            raise UserError(f"{where}: the task '{task}' has no metric '{metric}'.{did_you_mean(metric, metrics)}")
    found = {(row["seed"], row["task"], row["metric"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows}, key=str)
    missing = {"value": None, "outcome": "missing"}
    return over_seeds(
        [{"seed": seed} | mean_of([found.get((seed, *item), missing) for item in tasks.items()]) for seed in seeds],
        where,
    )


def origin(rows: Sequence[Mapping]) -> dict:
    """Return the columns that say where measured numbers come from: devices, the study, "measured"."""
    devices = sorted({str(row["device"]) for row in rows if row.get("device")})
    studies = sorted({str(row["study"]) for row in rows if row.get("study")})
    return {"device": " + ".join(devices), "source": " + ".join(studies), "certainty": MEASURED}


def parameters_of(rows: Sequence[Mapping]) -> float | None:
    """Return the parameter count of the rows' variant; the mean where pruning chose other widths with another seed."""
    counts = [float(row["parameters"]) for row in rows if row.get("parameters") is not None]
    return math.fsum(counts) / len(counts) if counts else None


def read_published(file: Path, columns: Sequence[str]) -> DataFrame:
    """Return a CSV of reference/papers with `columns` in this order; a column that it lacks is empty, outcome "ok"."""
    import pandas as pd

    points = pd.read_csv(file, dtype={"outcome": "object"})
    for column in columns:
        if column not in points:
            points[column] = "ok" if column == "outcome" else None
    points["outcome"] = points["outcome"].fillna("ok")
    return points[list(columns)]
