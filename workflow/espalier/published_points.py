"""Published values beside measured ones in one chart: which are drawn, how they look, and what the chart says of them.

A chart whose recipe says `published: true` gets the points of `published(folder)` after its own; its CSV holds both,
told apart by the column `certainty`. What is measured is drawn as ever. A published value is a white diamond with a
core of its series' colour; an unreliable one is not drawn over measured ones at all.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.errors import UserError
from espalier.figures import MEASURED, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from pandas import DataFrame

PAPERS = Path(__file__).parents[2] / "reference" / "papers"
LABEL = "published"
EDGE = "#222222"
FAR = 2.5  # a published value beyond this many times the largest measured one would press all bars flat


def files(figure: str, content: Mapping[str, Any]) -> list[str]:
    """Return the file of published values that a chart of this recipe shows beside its own, if it shows any."""
    return [os.path.relpath(PAPERS / f"{figure}.csv")] if content.get("published") else []


def check(recipe: object, plotted: Iterable[str], made_here: Collection[str], where: str) -> None:
    """Raise UserError, opened by `where`, if published values would stand beside a model that the study makes itself.

    `plotted` are the chart's models, `made_here` those that the study makes.
    """
    for model in sorted(plotted) if getattr(recipe, "published", False) else ():
        if model in made_here:
            raise UserError(
                f"{where}.published: published values are of real weights, and '{model}' is made by Espalier:"
                " leave this key out, or say false."
            )


def joined(measured: DataFrame, published: DataFrame) -> DataFrame:
    """Return the points of both, the measured ones first, each number as it was: no whole number becomes a fraction."""
    import pandas as pd

    kinds = zip(measured.columns, measured.dtypes, published[measured.columns].dtypes, strict=True)
    mixed = {column: "object" for column, one, other in kinds if one != other}
    return pd.concat([measured.astype(mixed), published.astype(mixed)], ignore_index=True)


def apart(points: DataFrame) -> tuple[DataFrame, DataFrame, list[str]]:
    """Return what a chart draws as ever, the published points beside that, and what its footer says of these.

    Points of one kind alone, measured or published, are all drawn as ever.
    """
    measured = points["certainty"] == MEASURED
    if measured.all() or not measured.any():
        return points, points.iloc[:0], []
    known = points[~measured & (points["outcome"] == "ok")]
    unreliable = known["certainty"].astype(str).str.startswith("unreliable")
    return points[measured].infer_objects(), known[~unreliable].infer_objects(), _said(known, unreliable)


def _said(known: DataFrame, unreliable) -> list[str]:
    drawn, left_out = (list(_counted(known[some])) for some in (~unreliable, unreliable))
    lines = [f"Published, not measured here: {source}; {certainty}." for source, certainty, _ in drawn]
    for source, certainty, count in left_out:
        what = f"{count} published {'value' if count == 1 else 'values'}"
        lines.append(f"Not drawn: {what} of {source}; {certainty}.")
    return lines


def _counted(points: DataFrame) -> Iterable[tuple[str, str, int]]:
    for (source, certainty), found in points.groupby(["source", "certainty"], sort=False):
        yield source, certainty, len(found)


def mark(axes: Axes, x: float, y: float, colour: str, marker: str = "D", size: float = 4.0) -> None:
    """Draw one published value of the series that has this colour; `size` is its width in points."""
    look = {"marker": marker, "linestyle": "none", "zorder": 5, "clip_on": False}
    axes.plot([x], [y], markersize=size, markerfacecolor="white", markeredgecolor=EDGE, markeredgewidth=0.7, **look)
    axes.plot([x], [y], markersize=0.5 * size, markerfacecolor=colour, markeredgewidth=0, **look)


def mark_far(axes: Axes, value: str, place: float, colour: str) -> None:
    """Say at the right end of a panel of lying bars that the published value at `place` lies beyond it."""
    look = {"transform": axes.get_yaxis_transform(), "va": "center", "ha": "right", "fontsize": 6.5}
    axes.text(0.955, place, value, color=style.MUTED, **look)
    mark(axes, axes.get_xlim()[1], place, colour, marker=">")


def handle(label: str = LABEL, marker: str = "D") -> Line2D:
    """Return the legend's entry of published values."""
    from matplotlib.lines import Line2D

    look = {"markerfacecolor": "white", "markeredgecolor": EDGE, "markeredgewidth": 0.7, "markersize": 5}
    return Line2D([], [], linestyle="none", marker=marker, label=label, **look)
