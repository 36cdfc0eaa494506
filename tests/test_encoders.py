"""What is found of an encoder, and an encoder of some of its layers, against each architecture's modules by name."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from encoder_cases import FAMILIES, classifier
from espalier.errors import UserError
from espalier.models import encoders

LAYERS, HEADS = 4, 2
BERT = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
# Where transformers has the layers, and the linear layers of each: queries and keys first.
PARTS = {
    "bert": ("bert.encoder.layer", BERT),
    "roberta": ("roberta.encoder.layer", BERT),
    "distilbert": (
        "distilbert.transformer.layer",
        (*(f"attention.{one}_lin" for one in ("q", "k", "v", "out")), "ffn.lin1", "ffn.lin2"),
    ),
}
# What each architecture computes after its last layer, of hidden states batch × tokens × channels.
HEADS_OF = {
    "bert": lambda model, hidden: model.classifier(model.bert.pooler(hidden)),
    "roberta": lambda model, hidden: model.classifier(hidden),
    "distilbert": lambda model, hidden: model.classifier(model.pre_classifier(hidden[:, 0]).relu()),
}


def batch() -> dict[str, torch.Tensor]:
    """Return two rows of token ids; the second is padded."""
    ids = torch.tensor([[2, 30, 31, 40, 61, 3], [2, 50, 51, 3, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def mask_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what is added to attention scores, batch × 1 × 1 × key: nothing, or the lowest number for padding."""
    return (1.0 - inputs["attention_mask"][:, None, None].float()) * torch.finfo(torch.float32).min


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_linear_layers_are_found(family):
    model = classifier(family, layers=LAYERS)
    where, parts = PARTS[family]
    layers = list(encoders.layers_of(model))
    assert [model.get_submodule(f"{where}.{i}") for i in range(LAYERS)] == layers
    found = encoders.linear_layers(model)
    assert list(found) == [f"{where}.{i}.{part}" for i in range(LAYERS) for part in parts]
    inside = [one for layer in layers for one in layer.modules() if isinstance(one, torch.nn.Linear)]
    assert list(found.values()) == inside == [model.get_submodule(name) for name in found]
    layout = encoders.layout_of(model)
    assert (layout.query, layout.key) == parts[:2]


@pytest.mark.parametrize("family", FAMILIES)
def test_word_embeddings_are_found(family):
    model = classifier(family)
    name, table = encoders.word_embeddings(model)
    assert name == f"{family}.embeddings.word_embeddings"
    assert table is model.get_submodule(name)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_what_the_softmax_gets(family, attention):
    plain = classifier(family, layers=LAYERS, attn_implementation="eager")
    model = classifier(family, layers=LAYERS, attn_implementation=attention)
    inputs, recorded = batch(), encoders.AttentionScores(model)
    expected = plain(**inputs, output_attentions=True).attentions
    for _ in range(2):  # what was taken is forgotten
        model(**inputs)
        scores = recorded.taken()
        assert [tuple(one.shape) for one in scores] == [(2, HEADS, 6, 6)] * LAYERS
        for one, shares in zip(scores, expected, strict=True):
            assert torch.allclose((one + mask_of(inputs)).softmax(-1), shares, atol=1e-6)
    assert max((one.max() - one.min()).item() for one in scores) > 1, "the scores hardly differ"


@torch.no_grad()
@pytest.mark.parametrize("kept", [[1, 3], [0], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_layers_compute_what_the_teachers_do_one_after_another(family, kept, tmp_path):
    teacher = classifier(family, labels=3, layers=LAYERS, attn_implementation="eager")
    inputs = batch()
    before = teacher(**inputs).logits
    student = copy.deepcopy(teacher)
    encoders.keep_layers(student, kept)

    states = [teacher.base_model.embeddings(inputs["input_ids"])]
    for number in kept:
        layer = teacher.get_submodule(f"{PARTS[family][0]}.{number}")
        states.append(layer(states[-1], mask_of(inputs)))
    logits = HEADS_OF[family](teacher, states[-1])

    found = student(**inputs, output_hidden_states=True)
    assert torch.equal(found.logits, logits)
    assert torch.equal(logits, before) is (len(kept) == LAYERS)
    assert len(found.hidden_states) == len(kept) + 1
    assert all(map(torch.equal, found.hidden_states, states))
    assert torch.equal(teacher(**inputs).logits, before), "the teacher keeps its layers"
    student.save_pretrained(tmp_path)
    opened = type(student).from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(opened(**inputs).logits, logits)


def test_a_layer_that_there_is_not_is_refused():
    model = classifier("bert", layers=LAYERS)
    with pytest.raises(UserError, match="has 4 layers, 0 to 3: there is no layer 4"):
        encoders.keep_layers(model, [0, 4])
    assert len(encoders.layers_of(model)) == LAYERS


def test_an_unknown_architecture_is_refused():
    unknown = SimpleNamespace(config=SimpleNamespace(model_type="albert"))
    with pytest.raises(UserError, match="An encoder of the type 'albert' is not known; bert, roberta, distilbert are"):
        encoders.layout_of(unknown)
