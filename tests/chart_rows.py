"""Rows of a table of metrics for tests of charts, and what a chart says."""

from __future__ import annotations

import pandas as pd

COLUMNS = ["study", "model", "seed", "chain", "kind", "suite", "task", "metric", "value", "stderr", "n", "unit"]
COLUMNS += ["engine", "batch_size", "input_tokens", "output_tokens", "outcome", "parameters", "bits", "arithmetic"]
COLUMNS += ["device"]


def row(**given):
    return dict.fromkeys(COLUMNS) | {"study": "s", "model": "m", "seed": 1, "outcome": "ok", "device": "cpu"} | given


def frame(rows):
    return pd.DataFrame(rows, columns=COLUMNS)


def text_of(figure):
    from matplotlib.text import Text

    return " ".join(item.get_text() for item in figure.findobj(Text)).replace("\n", " ")
