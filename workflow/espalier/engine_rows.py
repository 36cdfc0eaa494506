"""Measurements of an engine: numbers with their standard errors, and the rows that hold them."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import NamedTuple

from espalier import checkpoints
from espalier.sweep import Shape, Sweep

UNITS = {
    "latency": "s",
    "latency_median": "s",
    "latency_iqr": "s",
    "time_to_first_token": "s",
    "throughput": "tokens/s",
    "decode_throughput": "tokens/s",
    "cpu_time": "s",
    "energy_per_token": "J/token",
    "peak_allocated": "bytes",
    "peak_reserved": "bytes",
    "weights_allocated": "bytes",
    "weights_allocated_after_forward": "bytes",
    "weights_on_disk": "bytes",
    "cpu_of_others": "fraction",
}


class Number(NamedTuple):
    """A measurement's value, its standard error, how many samples it is of, and its outcome."""

    value: float | None
    stderr: float | None = None
    n: int | None = None
    outcome: str = "ok"


def row(engine: str, metric: str, number: Number, shape: Shape | None = None) -> dict:
    """Return a measurement of an engine; `shape` is that of the call, if it is of one."""
    place = shape._asdict() if shape else dict.fromkeys(Shape._fields)
    return {
        "task": "generation",
        "metric": metric,
        "unit": UNITS[metric],
        "engine": engine,
        **number._asdict(),
        **place,
    }


def weights_rows(sweep: Sweep, folder: Path) -> list[dict]:
    """Return the bytes of a model's weights: once loaded, after a first short call, and on disk."""
    sizes = {
        "weights_allocated": sweep.loaded and sweep.loaded.allocated,
        "weights_allocated_after_forward": sweep.held,
        "weights_on_disk": checkpoints.weight_bytes(folder),
    }
    return [
        row(sweep.engine, name, Number(size, outcome=sweep.outcome if size is None else "ok"))
        for name, size in sizes.items()
    ]


def mean(values: list[float]) -> Number:
    """Return the mean and its standard error (None for a single value)."""
    count, value = len(values), math.fsum(values) / len(values)
    if count == 1:
        return Number(value, None, 1)
    squares = math.fsum((one - value) ** 2 for one in values)
    return Number(value, math.sqrt(squares / (count - 1) / count), count)


def interquartile_range(values: list[float]) -> Number:
    """Return the width of the middle half of the values, between quartiles interpolated linearly."""
    if len(values) == 1:
        return Number(None, n=1, outcome="undefined: one call has no spread")
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Number(upper - lower, None, len(values))


def rate(tokens: float, seconds: list[float]) -> Number:
    """Return tokens / mean seconds; its standard error is rate · stderr(seconds) / mean(seconds), the delta method."""
    time = mean(seconds)
    if time.value <= 0:
        return Number(None, n=time.n, outcome="undefined: it took no time that could be measured")
    value = tokens / time.value
    return Number(value, None if time.stderr is None else value * time.stderr / time.value, time.n)
