"""A chart as files: its points from raw results, its picture in every format, and its numbers as CSV."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from espalier import plugins, published_points, tables
from espalier.errors import UserError
from espalier.files import whole_file
from espalier.provenance import code_version
from espalier.recipes import as_dict, build

if TYPE_CHECKING:
    from pandas import DataFrame

EARLY = "early"  # folder, beside complete charts, of charts that still lack results
SUFFIXES = (".pdf", ".svg", ".png", ".csv")
SCRIPT = Path(__file__).parents[1] / "scripts" / "draw_figure.py"
MARK = "mark"  # attribute of points: what their chart is marked with


def measured(
    figure: str, content: dict, results: list[dict], papers: Path = published_points.PAPERS
) -> tuple[DataFrame, str]:
    """Return the points of a chart of raw results, which carry its `mark`, and its title; `content` is its recipe.

    If it says `published: true`, the published points follow, from the folder `papers`. Raises UserError if the recipe
    or a result is not what the chart needs.
    """
    module = plugins.load("figures", figure)
    keys = {key: value for key, value in content.items() if key != "figures"}
    recipe = build(module.Recipe, keys, f"figures.{figure}")
    points = module.measured(recipe, results if getattr(module, "SAMPLES", False) else tables.frame(results))
    if getattr(recipe, "published", False):
        points = published_points.joined(points, module.published(papers))
    points.attrs[MARK] = mark(figure, recipe, len(results))
    return points, recipe.title


def mark(figure: str, recipe: object, results: int) -> str:
    """Return the id of a chart in its SVG: one for each recipe, number of raw results, and code that draws them."""
    code = code_version(SCRIPT, plugins.modules(plugins.load("figures", figure), recipe))
    made_of = json.dumps([figure, as_dict(recipe), results, code])
    return f"made-of-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"


def bears(picture: Path, mark: str) -> bool:
    """Return whether an SVG is a chart with this mark."""
    return f'id="{mark}"' in picture.read_text(encoding="utf-8")


def save(figure: str, points: DataFrame, title: str, prefix: Path, note: str = "") -> None:
    """Write a chart as `prefix` with each of `SUFFIXES`; `note` is the first line below it.

    Raises UserError if there is no point.
    """
    from espalier.figures import style

    if points.empty:
        raise UserError(f"There is nothing to draw in {figure}: no result matches its recipe.")
    chart = plugins.load("figures", figure).draw(points, title, note)
    chart.set_gid(points.attrs.get(MARK))
    style.save(chart, prefix)
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
