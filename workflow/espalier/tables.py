"""The tidy rows that tables and charts are made of, read from raw results and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from espalier import chains
from espalier.errors import UserError
from espalier.files import read_json
from espalier.results import VERSION, path_of

if TYPE_CHECKING:
    import pandas

SCHEMA = Path(__file__).parents[1] / "schemas" / "result.schema.json"
MUCH = 0.1  # of all cores' time: a timing beside more work of others than this is doubtful
COLUMNS = (
    *("study", "model", "seed", "chain", "kind", "suite", "task", "metric", "value", "stderr", "n", "unit"),
    *("engine", "batch_size", "input_tokens", "output_tokens", "outcome", "parameters", "bits", "arithmetic", "device"),
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
            row |= {"arithmetic": checkpoint.get("arithmetic", "float")}
            row |= {"device": _device(result["provenance"]["device"])}
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
        if result["kind"] == "step" and identity["chain"] == chains.DENSE:
            name += f" of {identity['model']}"  # each model comes from a place of its own
        facts = {"device": origin["device"]["name"], "code": origin.get("code")}
        facts |= origin["packages"]
        for fact, value in facts.items():
            seen.setdefault((name, fact), {}).setdefault(str(value), []).append(about)
    for (name, fact), values in sorted(seen.items()):
        if len(values) > 1:
            parts = "; ".join(
                f"{value} ({len(who)} results, such as {who[0]})" for value, who in sorted(values.items())
            )
            warnings.append(f"{name} mixes results of different {fact}: {parts}.")
    return warnings


def disturbed(results: Iterable[dict]) -> list[str]:
    """Return warnings about timings beside which others had much of the CPU's time, or the same run another job."""
    warnings = []
    for result in results:
        identity = result["identity"]
        about = f"{identity['model']}/{identity['chain']}, {result['kind']} '{identity['name']}'"
        for one in result["measurements"]:
            if one["metric"] == "cpu_of_others" and (one["value"] or 0) > MUCH:
                warnings.append(f"{about}: others had {one['value']:.0%} of the CPU's time while it was timed.")
        if jobs := result["samples"].get("shared_with"):
            warnings.append(f"{about}: it was timed beside other jobs of the same run: {'; '.join(jobs)}.")
    return warnings


def _device(device: dict) -> str:
    return f"CPU: {device['name']}" if device["kind"] == "cpu" else device["name"]


def _order(row: dict) -> tuple:
    conditions = (row["engine"] or "", row["input_tokens"] or 0, row["output_tokens"] or 0, row["batch_size"] or 0)
    identity = (row["study"], row["model"], row["seed"], row["chain"], row["kind"], row["suite"])
    return *identity, *conditions, row["task"], row["metric"]


@cache
def _validator():
    from jsonschema import Draft202012Validator

    return Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def _validate(result: object, path: Path) -> None:
    if isinstance(result, dict) and result.get("version", VERSION) != VERSION:
        problem = f"its format version is {result['version']}, and this Espalier reads {VERSION}"
    else:
        error = next(iter(sorted(_validator().iter_errors(result), key=lambda error: list(map(str, error.path)))), None)
        if error is None:
            return
        problem = f"{'.'.join(map(str, error.path)) or 'the whole'}: {error.message[:200]}"
    raise UserError(f"{path} is not a raw result of Espalier ({problem}). Delete it, and the workflow makes it again.")
