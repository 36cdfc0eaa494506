"""The rows of the published table of quantized variants, its numbers, and which rows differ from which.

Time is that of scoring a question (all its choices, batch 1), not of generating; memory is the mean over questions of
each question's peak. Whatever prints these numbers, the chart `quantization_tradeoff` or a table, gets them here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from espalier import paired
from espalier.figures import Estimate, mean_over_tasks, over_seeds, select, style

if TYPE_CHECKING:
    from pandas import DataFrame

    from espalier.figures.quantization_tradeoff import Recipe

ROWS = (
    "Base Model",
    "SFT Model",
    "BnB 4-bit Model",
    "BnB 8-bit Model",
    "GPTQ 4bit calib20",
    "GPTQ 4bit calib200",
    "GPTQ 4bit calib2000",
    "SmoothQuant W8A8 calib20",
    "SmoothQuant W8A8 calib200",
    "SmoothQuant W8A8 calib2000",
    "SmoothQuant W4A8 calib200",
)
# Key of the table → metric of the profile.
METRICS = {
    "avg_time_s": "time_per_question",
    "tokens_per_s": "tokens_per_second",
    "avg_peak_vram_MB": "peak_allocated_per_question",
}
KEYS = ("accuracy", *METRICS, "score_acc_over_vram")


def chains(recipe: Recipe) -> dict[str, str]:
    """Return row name → chain, in the order of `ROWS` and then of the recipe's `extra_rows`."""
    return {name: recipe.rows[name] for name in ROWS if name in recipe.rows} | recipe.extra_rows


def score(accuracy: float, peak_MB: float) -> float:
    """Return 1000 · accuracy (a fraction) / peak memory in MB of 2**20 bytes: the table's `score_acc_over_vram`."""
    return 1000.0 * accuracy / peak_MB


def values(recipe: Recipe, metrics: DataFrame) -> dict[str, dict[str, float | None]]:
    """Return row name → the published table's keys (`KEYS`), None where there is no value (out of memory)."""
    return {name: {key: found[key].value for key in KEYS} for name, (found, _) in estimates(recipe, metrics).items()}


def pairs(recipe: Recipe, results: list[dict]) -> list[dict]:
    """Return every pair of rows, each seed, on the same questions: lines of `paired.COLUMNS`, from raw results."""
    found: dict[str, list[dict]] = {}
    for name, chain in chains(recipe).items():
        for result in results:
            about = tuple(result["identity"][key] for key in ("model", "chain", "name"))
            if result["kind"] == "evaluate" and about == (recipe.model, chain, recipe.suite):
                found.setdefault(name, []).append(result)
    return paired.table(found, recipe.tasks)


def made_from(recipe: Recipe) -> dict[str, str]:
    """Return row name → the row whose model its last step began with, where the chart has that row."""
    names = {chain: name for name, chain in chains(recipe).items()}
    parents = {name: chain.rpartition("+")[0] for chain, name in names.items()}
    return {name: names[parent] for name, parent in parents.items() if parent in names}


def tests_against(lines: list[dict], others: dict[str, str]) -> dict[str, dict]:
    """Return row name → the line of `pairs` that tests it against its row of `others`; of several seeds, the largest p.

    A row is tested against rows before it alone.
    """
    found: dict[str, dict] = {}
    for line in sorted(lines, key=lambda line: line["p_value"]):
        if line["versus"] == others.get(line["row"]):
            found[line["row"]] = line
    return found


def estimates(recipe: Recipe, metrics: DataFrame) -> dict[str, tuple[dict[str, Estimate], list[dict]]]:
    """Return row name → an estimate for each of `KEYS`, and the rows of metrics that it is made of.

    A row without any result is left out. Accuracies are fractions, times seconds, memory MB of 2**20 bytes.
    """
    found = {}
    where = f"figure '{recipe.title}'"
    for name, chain in chains(recipe).items():
        about = {"model": recipe.model, "chain": chain}
        scored = select(metrics, kind="evaluate", suite=recipe.suite, **about)
        profiled = select(metrics, kind="profile", suite=recipe.workload, **about)
        if not (scored or profiled):
            continue
        accuracy = mean_over_tasks(scored, recipe.tasks, where) if scored else Estimate(outcome="missing")
        of_row = {"accuracy": accuracy}
        for key, metric in METRICS.items():
            of_row[key] = over_seeds([row for row in profiled if row["metric"] == metric], f"{where}, row '{name}'")
        of_row["avg_peak_vram_MB"] = of_row["avg_peak_vram_MB"].scaled(1 / style.MB)
        of_row["score_acc_over_vram"] = score_of(accuracy, of_row["avg_peak_vram_MB"])
        found[name] = (of_row, scored + profiled)
    return found


def score_of(accuracy: Estimate, memory: Estimate) -> Estimate:
    """Return the score of an accuracy (a fraction) and a peak in MB; where one has no value, its outcome says why."""
    if accuracy.value is None or not memory.value:
        bad = memory if accuracy.value is not None else accuracy
        return Estimate(outcome=bad.outcome if bad.outcome != "ok" else "missing")
    # Relative errors add in quadrature; memory's is near zero, so the interval is almost that of the accuracy.
    value = score(accuracy.value, memory.value)
    relative = [one.error / one.value for one in (accuracy, memory) if one.error is not None and one.value]
    return Estimate(value, value * math.hypot(*relative) if relative else None, None, accuracy.seeds, accuracy.n)
