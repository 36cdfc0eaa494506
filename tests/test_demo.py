"""What the demo's charts claim, on a finished demo (`make demo`, then `pytest -m demo`): the numbers mean something."""

from __future__ import annotations

import csv
import itertools
import json
import math

import pytest

from conftest import ROOT

pytestmark = pytest.mark.demo

CHANCE = {
    "boolq": 1 / 2, "piqa": 1 / 2, "winogrande": 1 / 2, "hellaswag": 1 / 4, "arc_easy": 1 / 4, "arc_challenge": 1 / 4,
    "openbookqa": 1 / 4,
}  # fmt: skip
NORMALISED = ("hellaswag", "arc_challenge", "openbookqa")  # scored by acc_norm, the others by acc
BLOCKS = ("dense", *(f"dense+depth-{removed}" for removed in (2, 3, 4, 5)))


@pytest.fixture(scope="module")
def metrics() -> list[dict]:
    with (ROOT / "results/demo/tables/metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def values(metrics: list[dict], chain: str, suite: str) -> dict[tuple[str, str], tuple[float, float]]:
    """Return (task, metric) → (value, standard error) of one variant of the decoder."""
    return {
        (row["task"], row["metric"]): (float(row["value"]), float(row["stderr"] or "nan"))
        for row in metrics
        if (row["model"], row["chain"], row["suite"]) == ("tiny-llama", chain, suite)
    }


def mean_accuracy(metrics: list[dict], chain: str) -> tuple[float, float]:
    """Return the unweighted mean over the seven tasks and its standard error."""
    found = values(metrics, chain, "zero-shot")
    chosen = [found[task, "acc_norm" if task in NORMALISED else "acc"] for task in CHANCE]
    return sum(value for value, _ in chosen) / 7, math.sqrt(sum(error**2 for _, error in chosen)) / 7


def perplexity(metrics: list[dict], chain: str) -> float:
    ((value, _),) = values(metrics, chain, "heldout").values()
    return value


@pytest.mark.parametrize("task", CHANCE)
def test_the_original_is_well_above_chance(metrics, task):
    found = values(metrics, "dense", "zero-shot")
    value, error = found[task, "acc_norm" if task in NORMALISED else "acc"]
    assert value > CHANCE[task] + 3 * error
    assert value > CHANCE[task] + 0.1


def test_accuracy_falls_with_the_blocks_removed(metrics):
    means = [mean_accuracy(metrics, chain) for chain in BLOCKS]
    (whole, error), (least, other) = means[0], means[-1]
    assert whole - least > 3 * math.hypot(error, other)
    for (more, first), (fewer, second) in itertools.pairwise(means):
        assert fewer < more + math.hypot(first, second), "no step up beyond noise"


def test_perplexity_rises_with_the_blocks_removed(metrics):
    found = [perplexity(metrics, chain) for chain in BLOCKS]
    assert found == sorted(found)


@pytest.mark.parametrize("blocks", [4, 5])
def test_lora_recovers_a_part(metrics, blocks):
    (before, first), (after, second) = (mean_accuracy(metrics, f"dense+depth-{blocks}{lora}") for lora in ("", "+lora"))
    assert after > before + math.hypot(first, second)
    assert after < mean_accuracy(metrics, "dense+sft")[0], "the original with the same extra steps is the control"


def test_continued_pretraining_recovers_a_part_of_a_model_that_lost_most_of_its_blocks(metrics):
    (before, first), (after, second) = (mean_accuracy(metrics, f"dense+depth-5{cpt}") for cpt in ("", "+cpt"))
    assert after > before + 3 * math.hypot(first, second)
    assert perplexity(metrics, "dense+depth-5+cpt") < perplexity(metrics, "dense+depth-5")


def test_widths_are_pruned_to_the_size_of_three_blocks(metrics):
    size = {row["chain"]: float(row["value"]) for row in metrics if row["metric"] == "parameters"}
    for chain in ("dense+llm-pruner+lora", "dense+flap"):
        assert size[chain] == pytest.approx(size["dense+depth-3+lora"], rel=0.01)
        assert size[chain] < size["dense"]


@pytest.mark.parametrize("chain", ["dense+llm-pruner+lora", "dense+flap"])
def test_width_pruning_costs_something_and_leaves_something(metrics, chain):
    (whole, error), (pruned, other) = mean_accuracy(metrics, "dense+sft"), mean_accuracy(metrics, chain)
    assert pruned < whole + math.hypot(error, other)
    assert pruned > sum(CHANCE.values()) / 7 + 5 * other


def test_blocks_are_removed_in_the_order_of_their_scores():
    with (ROOT / "figures/demo/block_importance.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    panels = {row["panel"] for row in rows}
    assert len(panels) == 4
    for panel in panels - {"Perplexity, greedy"}:
        found = [row for row in rows if row["panel"] == panel]
        scores = {int(row["block"]): float(row["score"]) for row in found}
        removed = {float(row["removal"]): int(row["block"]) for row in found if row["removal"]}
        assert [removed[place] for place in sorted(removed)] == sorted(scores, key=scores.get)[:3]
    greedy = [row for row in rows if row["panel"] == "Perplexity, greedy" and row["removal"]]
    at_removal = [float(row["score_at_removal"]) for row in sorted(greedy, key=lambda row: float(row["removal"]))]
    assert at_removal == sorted(at_removal), "each removal costs more than the one before"


def test_accuracy_falls_with_bits(metrics):
    whole, error = mean_accuracy(metrics, "dense+sft")
    two, other = mean_accuracy(metrics, "dense+sft+gptq-w2")
    assert whole - two > 2 * math.hypot(error, other)
    four, _ = mean_accuracy(metrics, "dense+sft+gptq-w4-n200")
    assert abs(whole - four) < whole - two


def test_memory_falls_with_blocks_and_bits(metrics):
    peak = {
        row["chain"]: float(row["value"])
        for row in metrics
        if row["suite"] == "memory" and row["metric"] == "peak_allocated"
    }
    assert peak["dense"] > peak["dense+depth-2+lora"] > peak["dense+depth-4+lora"] > peak["dense+depth-5+lora"]
    for chain in ("dense", "dense+depth-2+lora", "dense+depth-4+lora", "dense+depth-5+lora"):
        assert peak[f"{chain}+gptq-w4"] < peak[chain]


def test_teachers_learn_every_glue_task(metrics):
    scores = {
        (row["task"], row["metric"]): float(row["value"])
        for row in metrics
        if row["model"] == "tiny-bert" and row["kind"] == "evaluate"
    }
    assert scores["cola", "mcc"] > 0.6
    assert scores["stsb", "pearson"] > 0.8
    assert scores["mnli_mismatched", "accuracy"] > 0.6
    for task in ("mnli", "mrpc", "qnli", "qqp", "rte", "sst2"):
        assert scores[task, "accuracy"] > 0.75


def test_glue_scores_fall_with_bits_and_rise_with_the_budget():
    with (ROOT / "figures/demo/glue_bits.csv").open(newline="") as stream:
        average = {
            (row["series"], int(row["bits"])): (float(row["value"]), float(row["error"]))
            for row in csv.DictReader(stream)
            if row["panel"] == "Ave. 8 Tasks"
        }
    teacher, error = average["teacher", 32]
    for bits in (2, 1):
        assert average["Budget-C", bits][0] > average["Budget-A", bits][0]
    for budget in ("Budget-A", "Budget-C"):
        assert average[budget, 2][0] > average[budget, 1][0]
        # A student may pass its teacher by chance, as the two-bit one under Budget-C nearly does.
        assert teacher + error > average[budget, 2][0]
    assert teacher > average["Budget-C", 1][0]


def test_students_are_stored_in_their_bits(metrics):
    found = {
        (row["chain"], row["metric"]): float(row["value"])
        for row in metrics
        if row["suite"] == "glue-cola" and row["unit"] == "bytes"
    }
    assert len(found) == 10
    for metric in ("weights_on_disk", "weights_allocated"):
        dense, two, one = (found[f"dense+cola{behind}", metric] for behind in ("", "+cola-2bit-c", "+cola-1bit-c"))
        # Of 853,000 weights 32,000 are in float32: positions, norms, biases, pooler and head.
        assert one < 0.09 * dense
        assert one < two < 0.13 * dense


def test_the_quantization_table_has_the_published_keys(metrics):
    table = json.loads((ROOT / "results/demo/tables/quantization.json").read_text())
    assert set(table) >= {"Base Model", "SFT Model", "BnB 4-bit Model", "BnB 8-bit Model", "GPTQ 4bit calib20"}
    assert table["Base Model"]["accuracy"] == pytest.approx(mean_accuracy(metrics, "dense")[0])
    assert table["BnB 4-bit Model"]["avg_peak_vram_MB"] < table["Base Model"]["avg_peak_vram_MB"]
