"""An encoder of random weights: its tokenizer reads any text, and it goes the whole way of a published BERT."""

from __future__ import annotations

import pytest
import torch

from espalier import checkpoints, plugins
from espalier.demo import dataset
from espalier.errors import UserError
from espalier.pretrain import random_encoder
from espalier.pretrain.random_encoder import Recipe
from espalier.recipes import build

WORLD = dataset.Recipe(
    pretrain_documents=1,
    instruct_pairs=1,
    calibration_documents=1,
    heldout_documents=1,
    encoder_texts=1,
    items_per_task=1,
    glue_train=40,
    glue_validation=10,
)
TINY = {"shape": "bert-base-uncased", "narrow": 12, "layers": 2}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    return folder, random_encoder.apply(None, folder, Recipe(**TINY), seed=0, device="cpu")


def test_checkpoint_says_what_it_is(dense):
    folder, report = dense
    checkpoint = checkpoints.load(folder, device="cpu")
    # 768 / 12 = 64 channels, 3072 / 12 = 256 neurons, 30522 / 12 = 2543.5 words, up to a multiple of 64.
    hidden, neurons, words = 64, 256, 2560
    block = 4 * (hidden**2 + hidden) + 2 * hidden * neurons + neurons + hidden + 4 * hidden
    head = hidden**2 + hidden + 2 * hidden + words
    parameters = (words + 512 + 2 + 2) * hidden + 2 * block + head
    assert report == {"parameters": parameters, "weights": "random"}
    expected = {"format": "transformers", "task": "masked-lm", "bits": 32, **report}
    assert checkpoints.describe(folder) == expected
    assert checkpoints.logical_parameters(checkpoint.model) == parameters
    words = checkpoint.model.get_input_embeddings().weight
    assert (words.dtype, words.std().item()) == (torch.float32, pytest.approx(0.02, rel=0.03))
    assert checkpoint.model.get_output_embeddings().weight is words


def test_tokenizer_reads_any_text_one_character_a_token(dense):
    tokenizer = checkpoints.load_tokenizer(dense[0])
    single, pair = tokenizer("A robin, 7 猫"), tokenizer("a", "bc")
    assert tokenizer.convert_ids_to_tokens(single["input_ids"]) == (
        ["[CLS]", "a", "r", "##o", "##b", "##i", "##n", ",", "7", "[UNK]", "[SEP]"]
    )
    assert tokenizer.convert_ids_to_tokens(pair["input_ids"]) == ["[CLS]", "a", "[SEP]", "b", "##c", "[SEP]"]
    assert pair["token_type_ids"] == [0, 0, 0, 1, 1, 1]
    assert tokenizer.mask_token == "[MASK]"
    assert tokenizer.model_max_length == 512


@pytest.mark.parametrize("task", ["cola", "stsb"])
@pytest.mark.parametrize("bits", [1, 2])
def test_it_is_fine_tuned_compressed_and_evaluated(dense, world, tmp_path, task, bits):
    given = {"task": task, "dataset": world}
    chain = [
        ("tune", "classify", {"steps": 2, "batch_size": 8}),
        ("quantize", "xtc", {"bits": bits, "steps": 2, "batch_size": 8, "augmentation": 1}),
    ]
    parent = dense[0]
    for kind, method, keys in chain:
        module = plugins.load(kind, method)
        (tmp_path / method).mkdir()
        module.apply(parent, tmp_path / method, build(module.Recipe, keys | given, "recipe"), seed=0, device="cpu")
        parent = tmp_path / method
        assert checkpoints.describe(parent)["weights"] == "random"  # which every raw result of it shows
    glue = plugins.load("evaluate", "glue")
    student = checkpoints.load(parent, device="cpu")
    assert student.info["format"] == "packed"
    measured = glue.measure(student, build(glue.Recipe, given, "suite"), seed=0, device="cpu")
    assert {one["n"] for one in measured.measurements if one["unit"] == "fraction"} == {10}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict:
    """The demo's generated data, and very little of it."""
    folder = tmp_path_factory.mktemp("world")
    dataset.write(folder, WORLD)
    return {"name": "world", "source": "demo", "path": str(folder)}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({}, "exactly one of the keys 'shape' and 'config'"),
        ({"shape": "bert-base"}, "there is no shape 'bert-base' in .* Did you mean 'bert-base-uncased'"),
        ({"shape": "llama-7b"}, "'llama' is no encoder that can be made: 'pretrain: random-weights' may be meant"),
        ({"config": {"model_type": "roberta"}}, "'roberta' is no encoder that can be made"),
        ({**TINY, "layers": 0}, "'layers' must be at least 1"),
        ({**TINY, "narrow": 0}, "'narrow' must be at least 1"),
        ({"config": {"model_type": "bert"}, "narrow": 2}, "'narrow' divides what 'config' says, and that lacks 'vocab"),
    ],
)
def test_what_is_asked_for_must_make_sense(recipe, message):
    with pytest.raises(UserError, match=f"models.x: .*{message}"):
        build(Recipe, recipe, "models.x")


def test_vocabulary_must_hold_the_characters():
    config = {"model_type": "bert", "vocab_size": 88, "hidden_size": 16, "num_attention_heads": 2}
    with pytest.raises(UserError, match="'vocab_size' is 88, and the model's tokenizer has 89 tokens"):
        random_encoder.skeleton(Recipe(config=config))
