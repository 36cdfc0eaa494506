"""McNemar's exact test against scipy's, against all outcomes counted one by one, and by hand; what it refuses."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest
import scipy.stats

from espalier import paired
from espalier.errors import UserError
from test_bad_input import result

# Only the one right, only the other → p by hand: 2 · (ways to be at least as far to one side) / 2^n, at most 1.
BY_HAND = {
    (0, 0): 1.0,
    (0, 1): 1.0,
    (5, 0): 2 * 1 / 32,
    (0, 6): 2 * 1 / 64,
    (3, 3): 1.0,
    (3, 4): 1.0,
    (1, 9): 2 * (1 + 10) / 1024,
    (2, 10): 2 * (1 + 12 + 66) / 4096,
}


@pytest.mark.parametrize("counts", BY_HAND, ids=str)
def test_by_hand(counts):
    assert paired.p_value(*counts) == paired.p_value(*counts[::-1]) == BY_HAND[counts]


def test_against_every_outcome_counted():
    """Of all ways in which n fair coins can fall, the share that is at least as uneven as what was found."""
    for count in range(1, 11):
        falls = [sum(fall) for fall in itertools.product((0, 1), repeat=count)]
        for right in range(count + 1):
            uneven = sum(abs(2 * other - count) >= abs(2 * right - count) for other in falls)
            assert paired.p_value(right, count - right) == Fraction(uneven, len(falls))


@pytest.mark.parametrize("counts", [(7, 30), (100, 140), (0, 900), (499, 501), (4000, 4400)], ids=str)
def test_against_scipy(counts):
    assert paired.p_value(*counts) == pytest.approx(scipy.stats.binomtest(counts[0], sum(counts), 0.5).pvalue, rel=1e-9)


TASKS = {"t": "acc", "u": "acc_norm"}


def evaluation(chain, seed=0, recipe=None, **outcomes):
    """A raw result whose task t has outcomes by acc, and u by acc_norm; acc of u is a distraction."""
    samples = {
        task: {
            "doc_ids": list(range(len(found))),
            TASKS[task]: found,
            **({"acc": [1] * len(found)} if task == "u" else {}),
        }
        for task, found in outcomes.items()
    }
    identity = {"study": "s", "model": "m", "seed": seed, "chain": chain, "name": "suite"}
    return result(identity=identity, samples=samples, recipe=recipe or {"limit": None})


def test_counts_of_every_pair_and_seed():
    draw = random.Random(0)
    made = {
        (name, seed): {task: [draw.randint(0, 1) for _ in range(n)] for task, n in (("t", 30), ("u", 11))}
        for name in "abc"
        for seed in (0, 1)
        if (name, seed) != ("b", 1)
    }
    rows = {
        name: [evaluation(name, seed, **made[name, seed]) for seed in (0, 1) if (name, seed) in made] for name in "abc"
    }
    lines = paired.table(rows, TASKS)
    assert [tuple(line) for line in lines] == [paired.COLUMNS] * len(lines)
    assert [(line["row"], line["versus"], line["seed"]) for line in lines] == [
        ("b", "a", 0), ("c", "a", 0), ("c", "a", 1), ("c", "b", 0)
    ]  # fmt: skip
    for line in lines:
        counts = {(1, 1): 0, (1, 0): 0, (0, 1): 0, (0, 0): 0}
        for task in TASKS:
            one, other = made[line["row"], line["seed"]][task], made[line["versus"], line["seed"]][task]
            for place in range(len(one)):
                counts[one[place], other[place]] += 1
        assert [line[key] for key in ("both", "only_row", "only_versus", "neither")] == list(counts.values())
        assert line["n"] == 41
        assert line["p_value"] == paired.p_value(counts[1, 0], counts[0, 1])


def test_questions_are_matched_by_their_ids():
    one, other = evaluation("a", t=[1, 0, 0], u=[1]), evaluation("b", t=[1, 0, 0], u=[1])
    other["samples"]["t"] = {"doc_ids": [2, 1, 0], "acc": [0, 0, 1]}
    line = paired.table({"a": [one], "b": [other]}, TASKS)[0]
    assert (line["both"], line["neither"]) == (2, 2)


REFUSED = {
    "another number of questions": (evaluation("b", t=[1, 0], u=[1]), "only one has question 2 of the task 't'"),
    "other ids": ({**evaluation("b", t=[1, 0, 1], u=[1])}, "only one has question 2 of the task 't'"),
    "another prompt": (evaluation("b", t=[1, 0, 1], u=[1], recipe={"limit": 3}), "their recipes differ in 'limit'"),
    "no such task": (evaluation("b", t=[1, 0, 1]), "no outcome of each question for 'acc_norm' of the task 'u'"),
    "a question twice": (evaluation("b", t=[1, 0, 1], u=[1]), "has question 1 of the task 't' twice"),
}
REFUSED["other ids"][0]["samples"]["t"]["doc_ids"] = [0, 1, 7]
REFUSED["a question twice"][0]["samples"]["t"]["doc_ids"] = [0, 1, 1]


@pytest.mark.parametrize("name", REFUSED)
def test_other_questions_are_refused(name):
    other, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        paired.table({"a": [evaluation("a", t=[1, 0, 0], u=[1])], "b": [other]}, TASKS)


def test_a_misspelt_metric_is_named():
    with pytest.raises(UserError, match=r"of m, seed 0, a has no outcome .* Did you mean 'acc'"):
        paired.table({"a": [evaluation("a", t=[1])]}, {"t": "ac"})
