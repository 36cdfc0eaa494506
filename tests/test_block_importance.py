"""The chart of block scores shows what the step reported."""

from __future__ import annotations

from espalier.figures import Need, block_importance
from espalier.recipes import build
from test_figures import PAPERS, text_of


def depth_step(chain, scans, removed, criterion="perplexity"):
    """A raw result of a step of depth pruning on four blocks; JSON has made text of the blocks' numbers."""
    scores = [{str(block): score for block, score in scan.items()} for scan in scans]
    return {
        "identity": {"study": "s", "model": "m", "seed": 0, "chain": chain, "name": "cut"},
        "samples": {"criterion": criterion, "blocks": 4, "scores": scores, "removed": removed},
        "provenance": {"device": {"name": "cpu"}},
    }


def test_block_scores_and_order_of_removal():
    greedy = depth_step("dense+cut", [{1: 5.0, 2: 4.0, 3: 9.0}, {1: 6.0, 3: 8.0}], [2, 1])
    recipe = build(
        block_importance.Recipe, {"title": "B", "model": "m", "panels": {"Greedy": "dense+cut"}}, "figures.b"
    )
    points = block_importance.measured(recipe, [greedy, depth_step("dense+other", [{0: 1.0}], [0])])
    rows = points.astype(object).where(points.notna(), None)
    assert rows[["block", "score", "removal", "score_at_removal"]].values.tolist() == [
        [0, None, None, None],  # a block that must stay has no score
        [1, 5.0, 2, 6.0],
        [2, 4.0, 1, 4.0],
        [3, 9.0, None, None],
    ]
    drawn = block_importance.draw(points, "Title")
    bars = drawn.axes[0].patches
    assert [bar.get_height() for bar in bars] == [0, 5, 4, 9]
    assert len({bar.get_facecolor() for bar in bars[1:3]}) == 1
    assert bars[1].get_facecolor() != bars[3].get_facecolor()
    assert "Perplexity without the block" in text_of(drawn)
    assert block_importance.needs(recipe) == [Need("m", "dense+cut", "step", "cut")]


def test_published_orders_are_those_of_the_paper():
    points = block_importance.published(PAPERS)
    first = points[points["panel"] == "LLaMA-7B, PPL"].sort_values("removal")["block"].tolist()
    assert first[:5] == [24, 26, 25, 10, 27]
    assert "The scores were not published." in text_of(block_importance.draw(points, "Title"))
