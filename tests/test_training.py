"""What every training loop shares: the order of batches and the schedule."""

from __future__ import annotations

import math

import pytest

from espalier import training


def test_batches_take_every_sample_once_a_pass_in_a_seeded_order():
    drawn = list(training.batches(10, 4, 7, seed=3))
    assert [len(batch) for batch in drawn] == [4, 4, 2, 4, 4, 2, 4]
    first, second = [*drawn[0], *drawn[1], *drawn[2]], [*drawn[3], *drawn[4], *drawn[5]]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first != list(range(10))
    assert drawn == list(training.batches(10, 4, 7, seed=3)) != list(training.batches(10, 4, 7, seed=4))


def test_learning_rate_warms_up_and_falls_to_nothing():
    factors = [training.warmup_then_linear(step, 10, 4) for step in range(10)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert training.warmup_then_linear(0, 3, 0) == 1


def test_cosine_falls_as_half_a_cosine():
    factors = [training.warmup_then_cosine(step, 10, 4) for step in range(10)]
    falling = [0.5 + 0.5 * math.cos(math.pi * i / 6) for i in range(6)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, *falling])
    assert training.warmup_then_cosine(10, 10, 4) == pytest.approx(0)


def test_rows_go_on_where_they_were():
    items = [{"row": i} for i in range(10)]
    first, second = (training.Rows(items, 4, 9, seed=1) for _ in range(2))
    drawn = [first.take() for _ in range(9)]
    second.seek(5)
    assert second.position() == 5
    assert [second.take() for _ in range(4)] == drawn[5:]
    assert first.fingerprint() == second.fingerprint() != training.Rows(items[1:], 4, 9, seed=1).fingerprint()
