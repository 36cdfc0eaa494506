"""What every evaluation and profile returns."""

from __future__ import annotations

from typing import NamedTuple


class Measured(NamedTuple):
    """Measurements for the tidy table, and every raw sample behind them.

    A measurement has task, metric, value, stderr, n and unit, may have engine, batch_size, input_tokens and
    output_tokens, and has an outcome where it is not "ok". A profile also says what it measured, as the checkpoint's
    description, and `made_with`: packages, python, device and threads, for the result's provenance.
    """

    measurements: list[dict]
    samples: dict
    checkpoint: dict | None = None
    made_with: dict | None = None
