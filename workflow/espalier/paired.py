"""Whether two variants of a model answer differently: McNemar's exact test on the same questions.

McNemar 1947 (Psychometrika 12), in its exact form: of the questions that only one of two variants gets right, each
variant would get half if they were equally good, so their number is binomial with probability 1/2. Questions that both
get right, or both wrong, say nothing. All questions of all tasks are pooled and count once each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from espalier.errors import UserError, did_you_mean

COLUMNS = ("row", "versus", "seed", "n", "both", "only_row", "only_versus", "neither", "p_value")


def p_value(only_one: int, only_other: int) -> float:
    """Return min(1, 2 · P(X ≤ min(b, c))), X ~ Binomial(b + c, 1/2): two-sided, from whole numbers.

    `only_one` (b) and `only_other` (c) count the questions that only the one and only the other variant gets right.
    """
    count = only_one + only_other
    ways = tail = 1
    for right in range(min(only_one, only_other)):
        ways = ways * (count - right) // (right + 1)  # C(count, right + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**count)


def table(rows: Mapping[str, Sequence[dict]], tasks: Mapping[str, str]) -> list[dict]:
    """Return a line (`COLUMNS`) for each row, each row before it, and each seed that has results of both.

    `rows` are names and their raw results of one suite, one result a seed; `tasks` gives each task's metric. Raises
    UserError for two results that were not asked the same questions.
    """
    by_seed = {name: {result["identity"]["seed"]: result for result in results} for name, results in rows.items()}
    right = {
        (name, seed): _outcomes(result, tasks) for name, found in by_seed.items() for seed, result in found.items()
    }
    names = list(rows)
    lines = []
    for place, name in enumerate(names):
        for versus in names[:place]:
            for seed in sorted(by_seed[name].keys() & by_seed[versus].keys()):
                _check_same(by_seed[name][seed], by_seed[versus][seed], right[name, seed], right[versus, seed])
                counts = _counts(right[name, seed], right[versus, seed])
                lines.append({"row": name, "versus": versus, "seed": seed} | counts)
    return lines


def _counts(one: Mapping[tuple, bool], other: Mapping[tuple, bool]) -> dict:
    pairs = [(value, other[question]) for question, value in one.items()]
    only_one, only_other = pairs.count((True, False)), pairs.count((False, True))
    return {
        "n": len(pairs),
        "both": pairs.count((True, True)),
        "only_row": only_one,
        "only_versus": only_other,
        "neither": pairs.count((False, False)),
        "p_value": p_value(only_one, only_other),
    }


def _outcomes(result: dict, tasks: Mapping[str, str]) -> dict[tuple[str, object], bool]:
    """Return (task, id of the question) → whether it was answered right by the task's metric."""
    outcomes = {}
    for task, metric in tasks.items():
        samples = result["samples"].get(task, {})
        if metric not in samples or "doc_ids" not in samples:
            known = sorted(samples.keys() - {"doc_ids"}) if samples else result["samples"]
            raise UserError(
                f"{_name(result)} has no outcome of each question for '{metric}' of the task '{task}', which a paired"
                f" test needs.{did_you_mean(metric if samples else task, known)}"
            )
        for question, value in zip(samples["doc_ids"], samples[metric], strict=True):
            if (task, question) in outcomes:
                raise UserError(f"{_name(result)} has question {question} of the task '{task}' twice.")
            outcomes[task, question] = bool(value)
    return outcomes


def _check_same(one: dict, other: dict, first: Mapping[tuple, bool], second: Mapping[tuple, bool]) -> None:
    recipes = one["recipe"], other["recipe"]
    keys = sorted(key for key in recipes[0].keys() | recipes[1].keys() if recipes[0].get(key) != recipes[1].get(key))
    differing = sorted(first.keys() ^ second.keys(), key=str)
    if differing:
        task, question = differing[0]
        reason = f"only one has question {question} of the task '{task}'"
    elif keys:
        reason = f"their recipes differ in '{keys[0]}'"
    else:
        return
    raise UserError(
        f"{_name(one)} and {_name(other)} cannot be compared question by question: {reason}. Delete the older one, and"
        " the workflow makes it again."
    )


def _name(result: dict) -> str:
    identity = result["identity"]
    return f"The result '{identity['name']}' of {identity['model']}, seed {identity['seed']}, {identity['chain']}"
