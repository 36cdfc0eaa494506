"""The tidy rows that tables and charts are made of, read from raw results and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from espalier.errors import UserError
from espalier.files import read_json
from espalier.results import IDENTITY, VERSION, path_of

if TYPE_CHECKING:
    import pandas

COLUMNS = (
    *("study", "model", "seed", "chain", "kind", "suite", "task", "metric", "value", "stderr", "n", "unit"),
    *("engine", "batch_size", "input_tokens", "output_tokens", "outcome", "parameters", "bits", "device"),
)


def read(path: Path) -> dict:
    """Read a raw result; raises UserError for one that is damaged or whose path disagrees with its identity."""
    result = read_json(path)
    _validate(result, path)
    identity = result["identity"]
    expected = path_of(Path(), kind=result["kind"], **identity)
    if Path(path).parts[-len(expected.parts) :] != expected.parts:
        raise UserError(f"{path} says that it is {expected}: a raw result was moved or copied by hand. Put it back.")
    return result


def tidy(results: Iterable[dict]) -> list[dict]:
    """Return one row a measurement, with the columns of metrics.csv, sorted by identity."""
    rows = []
    for result in results:
        identity, checkpoint = result["identity"], result["checkpoint"]
        for measurement in result["measurements"]:
            row = dict.fromkeys(COLUMNS)
            row |= {key: identity[key] for key in ("study", "model", "seed", "chain")}
            row |= {"kind": result["kind"], "suite": identity["name"], "outcome": "ok"}
            row |= {key: checkpoint.get(key) for key in ("parameters", "bits")}
            row |= {"device": result["provenance"]["device"]["name"]}
            rows.append(row | measurement)
    return sorted(rows, key=_order)


def frame(results: Iterable[dict]) -> pandas.DataFrame:
    """Return the tidy rows of raw results as a data frame with fixed columns and types."""
    import pandas

    table = pandas.DataFrame(tidy(results), columns=list(COLUMNS))
    whole = ("seed", "n", "batch_size", "input_tokens", "output_tokens", "parameters")
    return table.astype(dict.fromkeys(whole, "Int64") | dict.fromkeys(("value", "stderr", "bits"), "float64"))


def incomparable(results: Iterable[dict]) -> list[str]:
    """Return warnings where results of different devices, library versions or code would stand in one table."""
    warnings = []
    results = list(results)
    seen: dict[tuple, dict[str, list[str]]] = {}
    for result in results:
        origin, identity = result["provenance"], result["identity"]
        about = f"{identity['model']}/{identity['chain']}"
        name = f"{result['kind']} '{identity['name']}'"
        facts = {"device": origin["device"]["name"], "code": origin.get("code")}
        facts |= {package: version for package, version in origin["packages"].items()}
        for fact, value in facts.items():
            seen.setdefault((name, fact), {}).setdefault(str(value), []).append(about)
    for (name, fact), values in sorted(seen.items()):
        if len(values) > 1:
            parts = "; ".join(f"{value} ({len(who)} results, such as {who[0]})" for value, who in sorted(values.items()))
            warnings.append(f"{name} mixes results of different {fact}: {parts}.")
    return warnings


def _order(row: dict) -> tuple:
    conditions = (row["engine"] or "", row["input_tokens"] or 0, row["output_tokens"] or 0, row["batch_size"] or 0)
    identity = (row["study"], row["model"], row["seed"], row["chain"], row["kind"], row["suite"])
    return *identity, *conditions, row["task"], row["metric"]


def _validate(result: object, path: Path) -> None:
    keys = ("version", "kind", "identity", "recipe", "checkpoint", "measurements", "samples", "provenance")
    if not isinstance(result, dict) or any(key not in result for key in keys):
        missing = [key for key in keys if not isinstance(result, dict) or key not in result]
        raise UserError(f"{path} is not a raw result of Espalier: it lacks {', '.join(missing)}. Delete it to remake it.")
    if result["version"] != VERSION:
        raise UserError(f"{path} has format version {result['version']}, this Espalier reads {VERSION}. Delete it to remake it.")
    for key in IDENTITY:
        if key not in result["identity"]:
            raise UserError(f"{path}: the identity lacks '{key}'. Delete the file to remake it.")
    for measurement in result["measurements"]:
        unknown = set(measurement) - set(COLUMNS)
        if unknown or not {"task", "metric", "value", "unit"} <= set(measurement):
            raise UserError(f"{path}: a measurement has the wrong keys: {sorted(measurement)}. Delete the file to remake it.")
