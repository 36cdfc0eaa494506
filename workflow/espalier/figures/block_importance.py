"""Every block's score, and the order in which depth pruning removes blocks.

One panel a variant: a bar a block, as high as its score in the first scan; removed blocks carry their place in the
order. A dot is the score at which a block went, where pruning was greedy and scored the blocks again. Shortened LLaMA
(Kim et al. 2024, arXiv 2402.02834) shows such scores in its appendix; of the published orders only the order is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from espalier import chains
from espalier.figures import MEASURED, ORIGIN_COLUMNS, Need, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame, Series

SAMPLES = True  # `measured` gets the raw results: scores are samples of a step, and not in metrics.csv
STEP = "depth"  # the method whose steps it plots
LABELS = {
    "magnitude": "Σ |W|",
    "taylor": "Σ |W · gradient|",
    "perplexity": "Perplexity without the block",
    "block-influence": "Block influence",
    "random": "Random number",
}
KEPT, REMOVED = "#B8C4D6", "#2C6FBB"
FAR = 5  # a score beyond this many medians would press all others flat: its bar is cut off and says its height
COLUMNS = (
    *("panel", "chain", "seed", "criterion", "block", "score", "removal", "score_at_removal", "outcome"),
    *ORIGIN_COLUMNS,
)
PUBLISHED_TITLE = "Shortened LLaMA: the blocks that each criterion removes first (published)"


@dataclass(frozen=True)
class Recipe:
    """What the chart plots: the scores of depth-pruned variants of one model."""

    title: str  # stands above the chart
    model: str  # name of a model
    panels: dict[str, str]  # title of a panel → chain that ends in a step of depth pruning


def needs(recipe: Recipe) -> list[Need]:
    """Return the steps whose scores are plotted."""
    return [
        Need(recipe.model, chain, "step", chains.split(chain)[1] or chains.DENSE) for chain in recipe.panels.values()
    ]


def measured(recipe: Recipe, results: list[dict]) -> DataFrame:
    """Return one point a panel, seed and block, from the raw results of the steps; one without block is missing."""
    import pandas as pd

    points, found = [], {}
    for result in results:
        identity = result["identity"]
        if identity["model"] == recipe.model:
            found[identity["chain"], identity["seed"]] = result
    for panel, chain in recipe.panels.items():
        for seed in sorted({seed for _, seed in found}):
            if (chain, seed) in found:
                points += _points(panel, found[chain, seed])
            else:
                about = {"panel": panel, "chain": chain, "seed": seed, "outcome": style.MISSING}
                points.append(about | {"certainty": MEASURED})
    return pd.DataFrame(points, columns=list(COLUMNS))


def _points(panel: str, result: dict) -> list[dict]:
    identity, found = result["identity"], result["samples"]
    scans = [{int(block): score for block, score in scan.items()} for scan in found["scores"]]
    greedy = len(scans) > 1
    rows = []
    for block in range(found["blocks"]):
        place = found["removed"].index(block) if block in found["removed"] else None
        rows.append(
            {"panel": panel, "chain": identity["chain"], "seed": identity["seed"], "criterion": found["criterion"]}
            | {"block": block, "score": scans[0].get(block), "removal": None if place is None else place + 1}
            | {"score_at_removal": scans[place].get(block) if greedy and place is not None else None, "outcome": "ok"}
            | {"device": result["provenance"]["device"]["name"], "source": identity["study"], "certainty": MEASURED}
        )
    return rows


def published(folder: Path) -> DataFrame:
    """Return the published orders of removal; their scores were not published."""
    import pandas as pd

    points = []
    for row in pd.read_csv(folder / "shortened_llama_block_orders.csv").to_dict("records"):
        removed = [int(block) for block in row["first_blocks_removed"].split()]
        criterion = {"PPL": "perplexity"}.get(row["criterion"], row["criterion"].lower())
        about = {"panel": f"{row['model']}, {row['criterion']}", "criterion": criterion, "outcome": "ok"}
        about |= {key: row[key] for key in ("source", "certainty")}
        points += [about | {"block": block, "removal": place} for place, block in enumerate(removed, 1)]
    return pd.DataFrame(points, columns=list(COLUMNS))


def draw(points: DataFrame, title: str, note: str = "") -> Figure:
    """Draw one panel a variant, and one a seed where there are several."""
    from matplotlib.patches import Patch

    with style.styled():
        panels = list(points.groupby(["panel", "seed"], sort=False, dropna=False))
        columns = 1 if len(panels) < 3 else 2
        rows = max(1, -(-len(panels) // columns))
        blocks = int(points["block"].max()) + 1 if len(points) else 1
        figure = style.new_figure(min(6.0, 0.12 * blocks + 2.6) * columns, 1.8 * rows)
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        seeds = points["seed"].nunique() > 1
        for place, ((panel, seed), found) in zip(axes, panels, strict=False):
            if found["block"].isna().all():
                style.say_empty(place, "No result")
            else:
                _draw_panel(place, found, blocks)
            place.set_title(f"{panel}, seed {seed}" if seeds else panel)
        for place in axes[len(panels) :]:
            style.say_empty(place, "" if panels else "No results in this study")
        footer = style.footer_lines(points, [], note, column="panel")
        scored = points["score"].notna().any()
        footer.append("Numbers: the order of removal." + ("" if scored else " The scores were not published."))
        if scored:
            footer.append("Axes start near the lowest score; a bar with an arrow goes on to the score written in it.")
        handles = [Patch(facecolor=REMOVED, label="removed"), Patch(facecolor=KEPT, label="kept")]
        if points["score_at_removal"].notna().any():
            footer.append("Dots: the score at which a block went, in the scan before its removal.")
        style.frame(figure, title, handles if scored else (), footer)
    return figure


def _draw_panel(axes: Axes, points: DataFrame, blocks: int) -> None:
    removal, at_removal = (points[name].astype("float64") for name in ("removal", "score_at_removal"))
    scores = points["score"].astype("float64")
    scored = scores.notna().any()
    heights = scores.fillna(0) if scored else removal.notna().astype("float64")
    low, high = _limits(scores, at_removal) if scored else (0.0, 1.3)
    axes.bar(points["block"], heights, 0.8, color=[KEPT if math.isnan(place) else REMOVED for place in removal])
    axes.plot(points["block"], at_removal, linestyle="none", marker="o", markersize=3, color=style.VERMILION)
    for block, height, dot, place in zip(points["block"], heights, at_removal, removal, strict=True):
        if height > high:
            _write(axes, f"{style.number_label(height)} ↑", block, 0.86 * high + 0.14 * low, -2)
        if not math.isnan(place):
            _write(axes, f"{place:.0f}", block, min(high, max(height, 0.0 if math.isnan(dot) else dot)), 2)
    axes.set(xlabel="Block", xlim=(-0.7, blocks - 0.3), ylim=(low, high))
    axes.locator_params(axis="x", integer=True)
    if scored:
        criterion = points["criterion"].iloc[0]
        axes.set_ylabel(LABELS.get(criterion, criterion))
    else:
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)


def _limits(scores: Series, at_removal: Series) -> tuple[float, float]:
    """Return the ends of the score axis: from near the lowest, past all that is not far from the rest."""
    near = scores[scores <= FAR * scores.median()]
    low, high = near.min(), max([near.max(), *at_removal.dropna()])
    reach = (high - low) or abs(high) or 1.0
    return max(0.0, low - 0.35 * reach), high + 0.2 * reach


def _write(axes: Axes, text: str, block: int, height: float, offset: int) -> None:
    look = {"textcoords": "offset points", "ha": "center", "fontsize": 6.5}
    axes.annotate(text, (block, height), (0, offset), va="bottom" if offset > 0 else "top", **look)
