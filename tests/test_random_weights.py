"""Random weights of a real shape, also a narrowed one: exact counts, and checkpoints that say what they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from espalier import checkpoints, needs, shapes
from espalier.config import Model
from espalier.errors import UserError
from espalier.pretrain import random_encoder, random_weights
from espalier.pretrain.random_weights import Recipe, skeleton
from espalier.recipes import build, fields_of
from espalier.study import Study

PARAMETERS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "vicuna-13b": 13_015_864_320,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3-8b": 8_030_261_248,
    "opt-6.7b": 6_658_473_984,
    "chatglm2-6b": 6_243_584_000,
    "qwen3-0.6b": 596_049_920,
    "tinyllama-1.1b": 1_100_048_384,
    "bert-base-uncased": 109_514_298,  # with the head of a masked language model, tied to the words
}
ENCODERS = ("bert-base-uncased",)
TINY = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {"model_type": "llama", "intermediate_size": 24, "max_position_embeddings": 32, **TINY}
OPT = {"model_type": "opt", "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32, **TINY}
TIED = {**LLAMA, "tie_word_embeddings": True}


def test_every_shape_has_the_published_number_of_parameters():
    assert {file.stem for file in shapes.FOLDER.glob("*.json")} == PARAMETERS.keys()
    for shape, parameters in PARAMETERS.items():
        method = random_encoder if shape in ENCODERS else random_weights
        model, exact = method.skeleton(method.Recipe(shape=shape))
        assert (shape, checkpoints.logical_parameters(model), exact) == (shape, parameters, True)
        assert next(model.parameters()).is_meta


def made(folder, seed=0, **recipe):
    folder.mkdir()
    return random_weights.apply(None, folder, Recipe(**recipe), seed=seed, device="cpu")


@pytest.mark.parametrize("config", [LLAMA, OPT, TIED], ids=["llama", "opt", "tied"])
def test_checkpoint_has_random_matrices_and_neutral_norms(tmp_path, config):
    report = made(tmp_path / "model", config=config, weights_dtype="float16")
    checkpoint = checkpoints.load(tmp_path / "model", device="cpu")
    assert checkpoints.inherited(checkpoint.info)["weights"] == "random"  # a child has it too
    assert checkpoint.info["bits"] == 16
    assert report["parameters"] == checkpoint.info["parameters"] == checkpoints.logical_parameters(checkpoint.model)
    matrices = [one for one in checkpoint.model.parameters() if one.ndim > 1]
    assert torch.cat([one.flatten() for one in matrices]).float().std().item() == pytest.approx(0.02, rel=0.03)
    assert len({one.flatten()[0].item() for one in matrices}) > len(matrices) // 2
    for name, one in checkpoint.model.named_parameters():
        assert one.dtype == torch.float16
        if one.ndim == 1:
            assert torch.equal(one, torch.full_like(one, float(not name.endswith("bias")))), name
    tied = config["model_type"] == "opt" or config.get("tie_word_embeddings", False)
    embedded, head = checkpoint.model.get_input_embeddings().weight, checkpoint.model.get_output_embeddings().weight
    assert (embedded is head) == tied


def test_the_model_computes_and_its_tokenizer_reads_any_text(tmp_path):
    made(tmp_path / "model", config=LLAMA, weights_dtype="float32")
    checkpoint = checkpoints.load(tmp_path / "model", device="cpu")
    ids = checkpoint.tokenizer("Süße 猫!", return_tensors="pt")["input_ids"]
    assert ids.shape[1] == len("Süße 猫!".encode())
    assert checkpoint.tokenizer.decode(ids[0]) == "Süße 猫!"
    config = checkpoint.model.config
    assert checkpoint.tokenizer.eos_token_id == config.eos_token_id == 256
    assert checkpoint.tokenizer.bos_token_id == config.bos_token_id == 256  # which it never adds by itself: see above
    assert checkpoint.model(input_ids=ids).logits.isfinite().all()


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
def test_a_longer_context_than_the_architecture_had_can_be_asked_for(tmp_path, config):
    """Such as 32k tokens in a shape of 2048, whose time and memory are those of that context."""
    made(tmp_path / "model", config=config, positions=70, layers=1, weights_dtype="float32")
    model = checkpoints.load(tmp_path / "model", device="cpu").model
    assert (model.config.max_position_embeddings, model.config.num_hidden_layers) == (70, 1)
    assert model(input_ids=torch.zeros(1, 70, dtype=torch.long)).logits.isfinite().all()


def test_weights_follow_from_the_seed(tmp_path):
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        made(tmp_path / name, seed, config=LLAMA)
        weights.append(checkpoints.load(tmp_path / name, device="cpu").model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not any(torch.equal(weights[0][key], weights[2][key]) for key in weights[0] if "proj" in key)


def test_layers_shorten_a_shape():
    block = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    for layers in (1, 5):
        model, _ = skeleton(Recipe(shape="llama-7b", layers=layers))
        assert checkpoints.logical_parameters(model) == PARAMETERS["llama-7b"] - (32 - layers) * block
    assert len(skeleton(Recipe(shape="qwen3-0.6b", layers=3))[0].config.layer_types) == 3


# By hand: width / narrow to the nearest multiple of 64, heads of 32 channels, words / narrow up to a multiple of 64.
@pytest.mark.parametrize(
    ("shape", "narrow", "expected"),
    [
        ("llama-7b", 32, {"hidden": 128, "neurons": 320, "heads": 4, "shared": 4, "words": 1024}),  # 344, 1000
        ("llama-7b", 3, {"hidden": 1344, "neurons": 3648, "heads": 42, "shared": 42, "words": 10688}),  # 1365.3, 3669.3
        ("llama-3-8b", 32, {"hidden": 128, "neurons": 448, "heads": 4, "shared": 1, "words": 4032}),  # 4008
        ("llama-3-8b", 5, {"hidden": 832, "neurons": 2880, "heads": 26, "shared": 2, "words": 25664}),  # 6.5 heads
        ("opt-6.7b", 32, {"hidden": 128, "neurons": 512, "heads": 4, "shared": None, "words": 1600}),  # 1571
        ("chatglm2-6b", 32, {"hidden": 128, "neurons": 448, "heads": 4, "shared": 1, "words": 2048}),  # 428, 2032
        ("chatglm2-6b", 2, {"hidden": 2048, "neurons": 6848, "heads": 64, "shared": 4, "words": 32512}),
        ("qwen3-0.6b", 16, {"hidden": 64, "neurons": 192, "heads": 2, "shared": 1, "words": 9536}),  # 9496
        ("qwen3-0.6b", 1000, {"hidden": 64, "neurons": 64, "heads": 2, "shared": 1, "words": 320}),  # 257 tokens
        ("bert-base-uncased", 4, {"hidden": 192, "neurons": 768, "heads": 6, "shared": None, "words": 7680}),  # 7630
        ("bert-base-uncased", 500, {"hidden": 64, "neurons": 64, "heads": 2, "shared": None, "words": 128}),  # 89
    ],
)
def test_narrow_divides_every_width(shape, narrow, expected):
    method = random_encoder if shape in ENCODERS else random_weights
    recipe = method.Recipe(shape=shape, narrow=narrow, layers=2)
    model, _ = method.skeleton(recipe)
    full, config = shapes.read(shape), model.config
    found = {
        "hidden": config.hidden_size,
        "neurons": config.ffn_dim if "ffn_dim" in full else config.intermediate_size,
        "heads": config.num_attention_heads,
        "shared": getattr(config, "num_key_value_heads", None),
        "words": config.vocab_size,
    }
    assert found == expected
    assert getattr(config, "head_dim", 32) == config.hidden_size // config.num_attention_heads == 32
    assert (config.num_hidden_layers, config.max_position_embeddings) == (2, full["max_position_embeddings"])
    assert getattr(config, "word_embed_proj_dim", config.hidden_size) == config.hidden_size
    narrowed = method.sizes(recipe)  # what a study's plans see
    assert {key: getattr(config, key) for key in narrowed if key not in ("model_type", "rope_theta")} == {
        key: value for key, value in narrowed.items() if key not in ("model_type", "rope_theta")
    }
    assert needs.parameters(narrowed) == checkpoints.logical_parameters(model)


def test_narrow_of_one_leaves_a_shape_as_it_is():
    assert random_weights.sizes(Recipe(shape="qwen3-0.6b")) == shapes.read("qwen3-0.6b")


@pytest.mark.parametrize("shape", ["llama-3-8b", "opt-6.7b", "chatglm2-6b", "qwen3-0.6b", "mistral"])
def test_a_narrowed_model_is_loaded_and_computes(tmp_path, shape):
    mistral = shapes.read("llama-3-8b") | {"model_type": "mistral", "sliding_window": 16}
    source = {"config": mistral} if shape == "mistral" else {"shape": shape}
    made(tmp_path / "model", **source, narrow=64, layers=1, positions=40, weights_dtype="float32")
    checkpoint = checkpoints.load(tmp_path / "model", device="cpu")
    assert checkpoint.model.config.hidden_size == 64
    ids = checkpoint.tokenizer("What is read?", return_tensors="pt")["input_ids"]
    assert checkpoint.model(input_ids=ids).logits.isfinite().all()


def test_every_key_of_the_recipe_reaches_it_from_a_study():
    """A model's entry holds the keys of its source too: one name must not mean both, but for `shape`."""
    for method, keys in (
        (random_weights, {"shape": "llama-7b", "narrow": 2, "layers": 3, "positions": 70}),
        (random_encoder, {"shape": "bert-base-uncased", "narrow": 2, "layers": 3}),
    ):
        assert fields_of(method.Recipe).keys() & fields_of(Model).keys() == {"shape"}
        name = method.__name__.rpartition(".")[2].replace("_", "-")
        made = Study({"study": "s", "models": {"a": {"pretrain": name, **keys}}, "figures": {}}, "s.yaml")
        assert made.step("pretrained", "a").recipe == method.Recipe(**keys)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({}, "exactly one of the keys 'shape' and 'config'"),
        ({"shape": "llama-7b", "config": LLAMA}, "exactly one of the keys 'shape' and 'config'"),
        ({"shape": "lama-7b"}, "there is no shape 'lama-7b' in reference/shapes. Did you mean 'llama-7b'?"),
        ({"config": {"hidden_size": 16}}, "'config' must say the 'model_type'"),
        ({"shape": "llama-7b", "layers": 0}, "'layers' must be at least 1"),
        ({"shape": "llama-7b", "narrow": 0}, "'narrow' must be at least 1"),
        ({"config": {"model_type": "llama"}, "narrow": 2}, "'narrow' divides what 'config' says, and that lacks 'voc"),
        ({"config": {"model_type": "llama", **TINY}, "narrow": 2}, "that lacks intermediate_size or ffn_dim"),
        ({"shape": "bert-base-uncased"}, "'bert' is an encoder: 'pretrain: random-encoder' may be meant"),
        ({"shape": "llama-7b", "weights_dtype": "int8"}, "weights_dtype: 'int8' (str) is not a choice"),
    ],
)
def test_what_is_asked_for_must_make_sense(recipe, message):
    with pytest.raises(UserError) as error:
        build(Recipe, recipe, "models.x")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 256}, "'vocab_size' is 256, and the model's tokenizer has 257 tokens."),
        ({"model_type": "lama"}, "lama"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 3}, "is not a multiple of the number of attention heads (3)."),
    ],
)
def test_config_of_which_no_model_can_be_made(change, message):
    with pytest.raises(UserError, match=r"^No model can be made of the config: ") as error:
        skeleton(Recipe(config=LLAMA | change))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_shape_is_an_input_of_its_model():
    models = {"a": {"pretrain": "random-weights", "shape": "opt-6.7b"}}
    models["b"] = {"pretrain": "random-weights", "config": {"model_type": "llama"}}
    made = Study({"study": "s", "models": models, "figures": {}}, "s.yaml")
    assert [Path(file).resolve() for file in made.data("pretrained", "a")] == [shapes.FOLDER / "opt-6.7b.json"]
    assert made.data("pretrained", "b") == []
