"""What every training loop shares: the order of batches, the schedule, gradients, and when it stops."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from espalier import checkpoints, training
from espalier.errors import UserError
from espalier.recipes import build
from espalier.token_loss import TokenLoss
from espalier.training_state import Saving
from espalier.tune import lora


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


# Gradients ------------------------------------------------------------------------------------------------------------


def rows(count: int, length: int) -> list[dict]:
    """Return random rows; the first token of each is not learned."""
    ids = torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": [training.UNSEEN, *row[1:]]} for row in ids]


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: one.grad for name, one in model.named_parameters() if one.requires_grad}


def plain_gradients(model, items: list[dict], at_once: int) -> dict[str, torch.Tensor]:
    """Return the gradient of the mean over all learned tokens, without any scale."""
    objective = TokenLoss(256, "cpu", autocast=False)
    for start in range(0, len(items), at_once):
        objective.loss(model, items[start : start + at_once], sum(map(objective.weight, items))).backward()
    return gradients(model)


def adapted(folder, dtype: torch.dtype):
    """Return a tiny model in `dtype` with a float32 adapter."""
    dataset = {"name": "d", "source": "local", "path": "d"}
    recipe = build(lora.Recipe, {"dataset": dataset, "steps": 1, "dropout": 0.0}, "recipe")
    return lora.adapted(checkpoints.load(folder, "cpu", dtype=dtype).model, recipe, seed=0)


def test_gradients_of_a_float16_model_do_not_underflow(tmp_path):
    folder, items = tiny.llama(tmp_path / "model", hidden=32), rows(64, 101)
    half = adapted(folder, torch.float16)
    training.backward(half, items, TokenLoss(256, "cpu", autocast=False), 64)
    exact = adapted(folder, torch.float16).double()
    expected = plain_gradients(exact, items, 64)
    for name, value in gradients(half).items():
        error = (value.double() - expected[name]).norm()
        assert error <= 5e-3 * expected[name].norm(), name


def test_the_scale_changes_no_bit_in_float32(tmp_path):
    folder, items = tiny.llama(tmp_path / "model", hidden=32), rows(7, 12)
    models = [checkpoints.load(folder, "cpu", dtype=torch.float32).model for _ in range(2)]
    training.backward(models[0], items, TokenLoss(256, "cpu", autocast=False), 3)
    found, expected = gradients(models[0]), plain_gradients(models[1], items, 3)
    assert len(found) > 10
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


# When it stops --------------------------------------------------------------------------------------------------------


class Square:
    """The square of a single weight; `trouble` is called with the weight, the loss and whether it is learned from."""

    def __init__(self, trouble):
        self.trouble = trouble

    def weight(self, item: int) -> int:
        return 1

    def loss(self, model, items: list, total: int) -> torch.Tensor:
        return self.trouble(model.weight, (model.weight**2).sum() * len(items) / total, model.training)


def fit(objective: Square, saving: Saving) -> None:
    torch.manual_seed(0)
    plan = training.Plan(4, 0.1, 0, 0.0, 1.0, micro_batch=2, validate_every=2)
    source = training.Rows(list(range(6)), 2, 4, seed=0)
    training.fit(
        torch.nn.Linear(1, 1, bias=False),
        source,
        objective,
        plan,
        device="cpu",
        label="x",
        validation=[1, 2],
        saving=saving,
    )


# What a loss becomes at its second time.
TROUBLES = {
    "The loss of step 2 is nan": lambda weight, loss: loss * math.nan,
    "The loss of step 2 is inf": lambda weight, loss: loss / 0,
    "The gradient's norm of step 2 is nan": lambda weight, loss: loss + (weight * 0).sqrt().sum(),
    "The validation loss of step 2 is nan": lambda weight, loss: loss * math.nan,
}


@pytest.mark.parametrize("message", TROUBLES)
def test_what_is_not_finite_ends_it_and_is_not_saved(tmp_path, message):
    learned = []

    def trouble(weight, loss, learning):
        learned.append(learning)
        now = not learning if "validation" in message else sum(learned) == 2
        return TROUBLES[message](weight, loss) if now else loss

    saving = Saving(tmp_path / "state", 0, {})
    with pytest.raises(UserError, match=f"{message}: lower 'learning_rate', or look for NaN in the parent's weights"):
        fit(Square(trouble), saving)
    assert sum(learned) == 2
    assert len(torch.load(saving.file, weights_only=True)["losses"]) == 1


@pytest.mark.parametrize("during", ["learning", "validation"])
def test_a_signal_at_any_time_stops_it_after_that_step(tmp_path, during):
    saving, learned = Saving(tmp_path / "state", 600, {}), []

    def trouble(weight, loss, learning):
        learned.append(learning)
        saving.stopped |= sum(learned) == 2 and learning is (during == "learning")
        return loss

    with pytest.raises(UserError, match="after step 2 of 4"):
        fit(Square(trouble), saving)
    assert len(torch.load(saving.file, weights_only=True)["losses"]) == 2
