"""A chart as files: its points from raw results, its picture in every format, and its numbers as CSV."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from espalier import plugins, published_points, tables
from espalier.errors import UserError
from espalier.files import whole_file
from espalier.recipes import build

if TYPE_CHECKING:
    from pandas import DataFrame

EARLY = "early"  # folder, beside complete charts, of charts that still lack results
SUFFIXES = (".pdf", ".svg", ".png", ".csv")


def measured(
    figure: str, content: dict, results: list[dict], papers: Path = published_points.PAPERS
) -> tuple[DataFrame, str]:
    """Return the points of a chart of raw results, and its title; `content` is the chart's recipe.

    If it says `published: true`, the published points follow, from the folder `papers`. Raises UserError if the recipe
    or a result is not what the chart needs.
    """
    module = plugins.load("figures", figure)
    keys = {key: value for key, value in content.items() if key != "figures"}
    recipe = build(module.Recipe, keys, f"figures.{figure}")
    points = module.measured(recipe, results if getattr(module, "SAMPLES", False) else tables.frame(results))
    if getattr(recipe, "published", False):
        points = published_points.joined(points, module.published(papers))
    return points, recipe.title


def save(figure: str, points: DataFrame, title: str, prefix: Path, note: str = "") -> None:
    """Write a chart as `prefix` with each of `SUFFIXES`; `note` is the first line below it.

    Raises UserError if there is no point.
    """
    from espalier.figures import style

    if points.empty:
        raise UserError(f"There is nothing to draw in {figure}: no result matches its recipe.")
    style.save(plugins.load("figures", figure).draw(points, title, note), prefix)
    with whole_file(prefix.with_name(f"{prefix.name}.csv")) as partial:
        points.to_csv(partial, index=False)


def early(prefix: Path) -> Path:
    """Return where the chart of `prefix` is drawn while it lacks results."""
    return prefix.parent / EARLY / prefix.name


def remove_early(prefix: Path) -> None:
    """Remove the early chart of `prefix`, if there is one."""
    place = early(prefix)
    for suffix in SUFFIXES:
        place.with_name(place.name + suffix).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another chart is still early, or none was
        place.parent.rmdir()
