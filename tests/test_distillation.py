"""The loss of a student against loops over rows, layers, heads and tokens in float64, one unpadded row at a time."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import pad

from encoder_cases import FAMILIES, classifier
from espalier import glue_tasks
from espalier.distillation import Distillation, mean_square
from espalier.models import encoders

HEADS = 2
ROWS = [[2, 30, 31, 40, 3], [2, 50, 3], [2, 60, 61, 62, 63, 64, 65, 3]]
ITEMS = [{"inputs": {"input_ids": row}} for row in ROWS]
TOKENIZER = SimpleNamespace(pad_token_id=0)
# In each family's layer, where queries and keys are.
PROJECTIONS = {
    "bert": lambda model, i: [getattr(model.bert.encoder.layer[i].attention.self, one) for one in ("query", "key")],
    "roberta": lambda model, i: [
        getattr(model.roberta.encoder.layer[i].attention.self, one) for one in ("query", "key")
    ],
    "distilbert": lambda model, i: [
        getattr(model.distilbert.transformer.layer[i].attention, one) for one in ("q_lin", "k_lin")
    ],
}


def student_of(teacher, family: str, kept: list[int], noise: float = 0.1):
    """Return a new model that has the weights of the teacher's layers `kept`, and all of them a little changed."""
    student = classifier(family, teacher.config.num_labels, len(kept), attn_implementation="eager")
    weights = {}
    for name in student.state_dict():
        source = name
        for own, number in enumerate(kept):
            if f"layer.{own}." in name:
                source = name.replace(f"layer.{own}.", f"layer.{number}.")
        weights[name] = teacher.state_dict()[source]
    draw = torch.Generator().manual_seed(3)
    student.load_state_dict({k: one + noise * torch.randn(one.shape, generator=draw) for k, one in weights.items()})
    return student


def distillation(teacher, student, layers: list[int], autocast: bool = False) -> Distillation:
    return Distillation(teacher, student, layers, TOKENIZER, "cpu", autocast)


def product(one: list[float], other: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(one, other, strict=True))


def scores(model, family: str, layer: int, hidden: list[list[float]]) -> list:
    """Return heads × queries × keys: what a layer's attention computes of its inputs before the softmax."""
    projected = [
        [[product(x, row) + b for row, b in zip(one.weight.tolist(), one.bias.tolist(), strict=True)] for x in hidden]
        for one in PROJECTIONS[family](model, layer)
    ]
    width = len(projected[0][0]) // HEADS
    parts = [[[one[h * width : (h + 1) * width] for one in tokens] for h in range(HEADS)] for tokens in projected]
    return [
        [[product(q, k) / math.sqrt(width) for k in keys] for q in queries]
        for queries, keys in zip(*parts, strict=True)
    ]


def flat(nested) -> list[float]:
    return [nested] if isinstance(nested, float) else [value for part in nested for value in flat(part)]


def of_logits(found: list[float], target: list[float]) -> float:
    """Return the mean over labels of the soft cross-entropy at temperature 1, or the squared error of one output."""
    if len(found) == 1:
        return (found[0] - target[0]) ** 2
    chances = [math.exp(one) / math.fsum(map(math.exp, target)) for one in target]
    logs = [one - math.log(math.fsum(map(math.exp, found))) for one in found]
    return -product(chances, logs) / len(found)


@torch.no_grad()
def by_loops(teacher, student, family: str, kept: list[int], rows: list[list[int]]) -> float:
    """Return the loss of rows that each go through both models alone."""
    logits, squares = [], {}
    for row in rows:
        ids = torch.tensor([row])
        target, found = (model.eval()(ids, output_hidden_states=True) for model in (teacher, student))
        logits.append(of_logits(found.logits[0].double().tolist(), target.logits[0].double().tolist()))
        theirs, own = ([one[0].double().tolist() for one in out.hidden_states] for out in (target, found))
        assert len(own) == len(kept) + 1
        pairs = {("hidden", 0): (own[0], theirs[0])}
        for i, number in enumerate(kept):
            pairs["hidden", i + 1] = own[i + 1], theirs[number + 1]
            of_student, of_teacher = scores(student, family, i, own[i]), scores(teacher, family, number, theirs[number])
            pairs["attention", i] = of_student, of_teacher
        for term, (one, other) in pairs.items():
            squares.setdefault(term, []).extend((x - y) ** 2 for x, y in zip(flat(one), flat(other), strict=True))
    return math.fsum(logits) / len(rows) + math.fsum(math.fsum(one) / len(one) for one in squares.values())


@pytest.mark.parametrize("labels", [1, 2, 3])
@pytest.mark.parametrize(("family", "kept"), [("bert", [1, 3]), ("roberta", [0, 1, 2]), ("distilbert", [2])])
def test_the_loss_is_that_of_the_loops(family, kept, labels):
    """Whatever the student's mode and its implementation of attention; the teacher has dropout, which is off."""
    teacher = classifier(family, labels, layers=max(kept) + 1, dropout=0.5, seed=1).train()
    student = student_of(teacher, family, kept)
    expected = by_loops(copy.deepcopy(teacher), student, family, kept, ROWS)
    objective = distillation(teacher, student, kept)
    found = [objective.loss(student.train(), ITEMS, len(ITEMS)).item() for _ in range(2)]
    assert found == [pytest.approx(expected, rel=1e-5)] * 2
    assert expected > 0.1


def test_a_student_of_fewer_layers_is_taken_from_the_teacher_itself():
    """As xtc makes it: a copy from which layers are removed has the loss of a model that never had them."""
    teacher = classifier("bert", layers=4)
    student, other = copy.deepcopy(teacher), student_of(teacher, "bert", [1, 3], noise=0.0)
    encoders.keep_layers(student, [1, 3])
    losses = [distillation(teacher, one, [1, 3]).loss(one, ITEMS, 3).item() for one in (student, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family, monkeypatch):
    teacher = classifier(family)
    student = student_of(teacher, family, [0, 1])
    objective, short = distillation(teacher, student, [0, 1]), glue_tasks.pad
    expected = objective.loss(student, ITEMS, 3)
    expected.backward()
    gradients = [one.grad.clone() for one in student.parameters() if one.grad is not None]
    student.zero_grad()
    monkeypatch.setattr(glue_tasks, "pad", lambda *given: {k: pad(v, (0, 7)) for k, v in short(*given).items()})
    found = objective.loss(student, ITEMS, 3)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    longer = [one.grad for one in student.parameters() if one.grad is not None]
    for one, gradient in zip(longer, gradients, strict=True):
        assert torch.allclose(one, gradient, rtol=1e-4, atol=1e-6)


def test_the_student_alone_learns_and_the_teacher_stays_in_evaluation_mode():
    teacher = classifier("bert", dropout=0.5).train()
    student = copy.deepcopy(teacher)
    before = copy.deepcopy(teacher.state_dict())
    objective = distillation(teacher, student, [0, 1])
    student.train()
    objective.loss(student, ITEMS, 3).backward()
    assert not teacher.training
    assert student.training
    assert [one.grad for one in teacher.parameters()] == [None] * len(before)
    assert [name for name, one in student.named_parameters() if one.grad is None] == []
    assert all(torch.equal(one, before[name]) for name, one in teacher.state_dict().items())


@pytest.mark.parametrize("labels", [1, 2])
def test_of_equal_models_only_the_entropy_of_their_logits_is_left(labels):
    teacher = classifier("bert", labels, dropout=0.5)
    student = copy.deepcopy(teacher)
    loss = distillation(teacher, student, [0, 1]).loss(student, ITEMS, 3)
    with torch.no_grad():
        logits = [teacher(torch.tensor([row])).logits[0].double().tolist() for row in ROWS]
    assert loss.item() == pytest.approx(math.fsum(of_logits(one, one) for one in logits) / 3, rel=1e-6)
    assert (loss.item() == 0) is (labels == 1)


def test_a_part_of_a_batch_has_its_share_of_the_mean():
    teacher = classifier("bert")
    student = student_of(teacher, "bert", [0, 1])
    objective = distillation(teacher, student, [0, 1])
    assert [objective.weight(item) for item in ITEMS] == [1, 1, 1]
    alone = objective.loss(student, ITEMS[:2], 2).item()
    assert objective.loss(student, ITEMS[:2], 8).item() == pytest.approx(alone / 4, rel=1e-6)


def test_under_autocast_the_loss_is_near():
    teacher = classifier("bert")
    student = student_of(teacher, "bert", [0, 1])
    copies = copy.deepcopy((teacher, student))
    exact = distillation(teacher, student, [0, 1]).loss(student, ITEMS, 3)
    objective = distillation(*copies, [0, 1], autocast=True)
    near = objective.loss(copies[1], ITEMS, 3)
    assert near.dtype == torch.float32
    assert near.item() == pytest.approx(exact.item(), rel=0.02)
    assert near.item() != exact.item()


def test_differences_of_16_bits_are_taken_in_32():
    draw = torch.Generator().manual_seed(0)
    found, target = (torch.randn(3, 4, generator=draw).bfloat16() for _ in range(2))
    counted = torch.tensor([[True], [False], [True]]).expand(3, 4)
    expected = (found.double() - target.double())[[0, 2]].square().mean()
    assert mean_square(found, target, counted).item() == pytest.approx(expected.item(), rel=1e-6)
