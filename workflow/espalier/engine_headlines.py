"""The averages that FlashDecoding++ (Hong et al. 2023) prints, of our points: how much faster Ours is than others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

OURS = "Ours"
HARDWARE = "A100 and RTX 3090"  # that the paper measures on


def ours_over(row: Mapping[str, str], points: Sequence[Mapping]) -> dict:
    """Return the mean (or maximum) of the ratios of decoded tokens/s, Ours / the engine `against`, as a point.

    `row` is one of engine_speedup_headlines.csv. Each condition (panel, batch size, context) that both have gives one
    ratio. Only points of the row's hardware count. `why` says what is not as in the paper: other devices, or conditions
    of this chart that are left out. The errors of two throughputs are independent, and so are those of different
    conditions.
    """
    parts = (HARDWARE if row["hardware"] == "all" else row["hardware"]).split(" and ")
    here = [point for point in points if any(part in point["device"] for part in parts)]
    lacking = [part for part in parts if not any(part in point["device"] for point in here)]
    why = f"other devices: this is of {' and '.join(parts)}" if lacking else None
    ours, theirs = (_by_condition(here or points, name) for name in (OURS, row["against"]))
    ratios = [_ratio(ours[condition], theirs[condition]) for condition in ours if condition in theirs]
    wanted = {_condition(point) for point in here or points if point["input_tokens"] is not None}
    if why is None and len(ratios) < len(wanted):
        why = f"of {len(ratios)} of this chart's {len(wanted)} conditions"
    if not ratios:
        return {"speedup": None, "outcome": f"missing: no condition has both {OURS} and {row['against']}"}
    if row["statistic"] == "maximum":
        value, error = max(ratios, key=lambda ratio: ratio[0])
    else:
        errors = [error for _, error in ratios]
        value = math.fsum(value for value, _ in ratios) / len(ratios)
        error = None if None in errors else math.hypot(*errors) / len(errors)
    used = [group[condition] for condition in ours if condition in theirs for group in (ours, theirs)]
    about = {key: " + ".join(sorted({point[key] for point in used})) for key in ("model", "chain", "device")}
    return about | {"speedup": value, "speedup_error": error, "outcome": "ok", "why": why}


def _by_condition(points: Sequence[Mapping], series: str) -> dict[tuple, Mapping]:
    return {_condition(point): point for point in points if point["series"] == series and point["throughput"]}


def _condition(point: Mapping) -> tuple:
    return point["panel"], point["batch_size"], point["input_tokens"]


def _ratio(ours: Mapping, theirs: Mapping) -> tuple[float, float | None]:
    value = ours["throughput"] / theirs["throughput"]
    errors = [one["throughput_error"] and one["throughput_error"] / one["throughput"] for one in (ours, theirs)]
    return value, None if None in errors else value * math.hypot(*errors)
