"""Supervised fine-tuning against losses, steps of AdamW and gradients written out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from espalier import checkpoints, full_training, instructions, training
from espalier.errors import UserError
from espalier.recipes import build
from espalier.token_loss import TokenLoss
from espalier.tune import sft
from training_runs import data, write
from training_runs import recipe as recipe_of

LOSS = TokenLoss(256, "cpu", autocast=False)


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("parent") / "model", hidden=32)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> dict:
    return data(tmp_path_factory.mktemp("data"))


def recipe(dataset: dict, **options) -> sft.Recipe:
    values = recipe_of("sft", dataset, **options)
    return build(sft.Recipe, {key: value for key, value in values.items() if key != "tune"}, "recipe")


def by_hand(model, items: list[dict]) -> torch.Tensor:
    """Return the mean loss over the learned tokens of all items, one row and one token at a time."""
    losses = []
    for item in items:
        logits = model(input_ids=torch.tensor([item["input_ids"]])).logits[0].double()
        for position, label in enumerate(item["labels"]):
            if label != training.UNSEEN:
                losses.append(-logits[position - 1].log_softmax(0)[label])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_first_step_is_adamw_on_the_loss_by_hand(parent, dataset, tmp_path, decay):
    """With one step, AdamW moves each weight by the rate times g / (|g| + eps), after a decay of matrices."""
    chosen = recipe(dataset, steps=1, warmup_steps=0, validation_samples=0, weight_decay=decay, max_gradient_norm=0.5)
    report = sft.apply(parent, tmp_path, chosen, seed=3, device="cpu")
    model = checkpoints.load(parent, "cpu").model
    items, _ = instructions.examples(tiny.tokenizer(), chosen)
    first = [items[i] for i in next(training.batches(len(items), 5, 1, seed=3))]
    loss = by_hand(model, first)
    assert report["losses"] == [pytest.approx(loss.item(), abs=2e-5)]
    loss.backward()
    gradients = {name: one.grad.double() for name, one in model.named_parameters()}
    norm = math.sqrt(sum((one**2).sum().item() for one in gradients.values()))
    assert norm > 0.5
    trained = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, before in model.named_parameters():
        gradient = gradients[name] * 0.5 / norm
        decayed = before.detach().double() * (1 - 5.0e-3 * decay * (before.ndim == 2))
        expected = decayed - 5.0e-3 * gradient / (gradient.abs() + 1e-8)
        # Where a gradient is nearly nothing, its sign is rounding.
        clear = gradient.abs() > 1e-6
        assert clear.any()
        torch.testing.assert_close(trained[name].double()[clear], expected[clear], rtol=0, atol=1e-5)


def test_two_steps_of_adamw_with_the_schedule():
    """Moments, bias corrections and decay of several steps, in float64."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(3, 2))
    gradients = [torch.randn(3, 2) for _ in range(4)]
    optimizer = training.adamw([weight], 0.1, 0.3, 0.9)
    expected, first, second = weight.detach().double(), 0.0, 0.0
    for step, gradient in enumerate(gradients, 1):
        rate = 0.1 * training.warmup_then_cosine(step - 1, 4, 2)
        training.set_learning_rate(optimizer, rate)
        weight.grad = gradient
        optimizer.step()
        first = 0.9 * first + 0.1 * gradient.double()
        second = 0.9 * second + 0.1 * gradient.double() ** 2
        update = (first / (1 - 0.9**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-8)
        expected = expected * (1 - rate * 0.3) - rate * update
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_checkpointed_gradients_are_the_gradients(parent, dataset):
    items, _ = instructions.examples(tiny.tokenizer(), recipe(dataset))
    found, forwards = [], []
    for checkpointing in (False, True):
        model = full_training.load(parent, "cpu", "sdpa", checkpointing, seed=0).model.train()
        count = 0

        def counted(*_):
            nonlocal count
            count += 1

        model.model.layers[0].mlp.register_forward_pre_hook(counted)
        training.backward(model, items[:6], LOSS, 4)
        found.append({name: one.grad for name, one in model.named_parameters()})
        forwards.append(count)
    assert forwards == [2, 4]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_training_learns_and_keeps_the_best(parent, dataset, tmp_path, schedule):
    chosen = recipe(dataset, steps=40, learning_rate=2.0e-2, schedule=schedule, validate_every=3)
    report = sft.apply(parent, tmp_path, chosen, seed=0, device="cpu")
    best = min(report["validation"], key=lambda one: one["loss"])
    assert report["kept_step"] == best["step"]
    assert report["losses"][-1] < 0.3 * report["losses"][0]
    assert report["validation"][-1]["step"] == 40
    assert report["trained_parameters"] == checkpoints.describe(parent)["parameters"]
    items, _ = instructions.examples(tiny.tokenizer(), chosen)
    _, validation = instructions.split_rows(items, 6, seed=0)
    with torch.no_grad():
        loss = by_hand(AutoModelForCausalLM.from_pretrained(tmp_path), validation)
    assert loss.item() == pytest.approx(best["loss"], rel=1e-4)


def test_best_weights_come_back_when_later_ones_are_worse(parent, dataset, tmp_path, monkeypatch):
    seen, losses = [], iter([3.0, 2.0, 1.0, 1.5, 1.0])

    def loss(model, *_):
        seen.append({name: one.detach().clone() for name, one in model.named_parameters()})
        return next(losses)

    monkeypatch.setattr(training, "mean_loss", loss)
    report = sft.apply(parent, tmp_path, recipe(dataset, steps=5, validate_every=1), seed=0, device="cpu")
    assert report["kept_step"] == 3
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(saved[name], one) for name, one in seen[2].items())
    assert not all(torch.equal(seen[2][name], one) for name, one in seen[4].items())


def test_bfloat16_products_and_result(parent, dataset, tmp_path):
    chosen = recipe(dataset, steps=4, autocast=True, dtype="bfloat16", gradient_checkpointing=True)
    report = sft.apply(parent, tmp_path, chosen, seed=0, device="cpu")
    (tmp_path / "32").mkdir()
    exact = sft.apply(parent, tmp_path / "32", recipe(dataset, steps=4), seed=0, device="cpu")
    assert report["losses"] != exact["losses"]
    assert report["losses"] == pytest.approx(exact["losses"], rel=0.02)
    assert checkpoints.describe(tmp_path)["bits"] == 16
    assert checkpoints.load(tmp_path, "cpu").model.dtype is torch.bfloat16


MISTAKES = {
    "no rows": ([], {}, "has no rows"),
    "another column": ([{"prompt": "a", "answer": "b"}], {}, "has no column 'response'"),
    "all set aside": ([{"prompt": "a", "response": "b"}], {"validation_samples": 1}, "leaves none to train"),
    "all cut": ([{"prompt": "long prompt", "response": "b"}], {"cutoff": 4, "validation_samples": 0}, "leaves none"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_refusals(parent, tmp_path, mistake):
    rows, options, message = MISTAKES[mistake]
    dataset = data(tmp_path)
    write(tmp_path / "train.jsonl", rows)
    with pytest.raises(UserError, match=message):
        sft.apply(parent, tmp_path / "out", recipe(dataset, **options), seed=0, device="cpu")


def test_packed_weights_are_refused(dataset, tmp_path):
    checkpoints.write_description(tmp_path, {"task": "causal-lm", "parameters": 1, "format": "bitsandbytes"})
    with pytest.raises(UserError, match="before quantization"):
        sft.apply(tmp_path, tmp_path, recipe(dataset), seed=0, device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 1.0}, "exactly one of 'steps' and 'epochs'"),
        ({"micro_batch": 0}, "at least 1"),
        ({"cutoff": 1}, "'cutoff' must be at least 2"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
    ],
)
def test_recipes_that_make_no_sense(dataset, options, message):
    with pytest.raises(UserError, match=message):
        recipe(dataset, **options)
