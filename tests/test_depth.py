"""Depth pruning against its formula written out naively, exact counts, and a bit-exact round trip."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from espalier import checkpoints
from espalier.data import Calibration, Dataset, Text
from espalier.errors import UserError
from espalier.prune import depth

WORDS = ["the", "red", "fox", "sees", "a", "blue", "bird", "and", "eats", "green", "leaves", "in", "old", "woods"]


@pytest.fixture
def parent(tmp_path):
    """A random Llama of four blocks with a word-level tokenizer, saved."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    folder = tmp_path / "parent"
    folder.mkdir()
    checkpoints.save(
        model, wrapped, folder, {"task": "causal-lm", "parameters": sum(p.numel() for p in model.parameters())}
    )
    return folder


@pytest.fixture
def calibration(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    lines = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 12)) for i in range(1, 20)]
    (data / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return Calibration(Text(Dataset("words", "local", path=str(data)), "text"), samples=5, length=16)


def naive_perplexity(model, windows, removed) -> float:
    """exp(mean of -log p(next token)), one window and one token at a time, on a copy without the blocks."""
    model = copy.deepcopy(model)
    model.model.layers = torch.nn.ModuleList(b for i, b in enumerate(model.model.layers) if i not in removed)
    losses = []
    for window in windows:
        logits = model(input_ids=torch.tensor([window]), use_cache=False).logits[0]
        for position in range(len(window) - 1):
            losses.append(-torch.log_softmax(logits[position], -1)[window[position + 1]].item())
    return math.exp(sum(losses) / len(losses))


def prune(parent, tmp_path, **recipe):
    output = tmp_path / "pruned"
    output.mkdir()
    return output, depth.apply(parent, output, depth.Recipe(**recipe), seed=0, device="cpu")


def test_one_shot_scores_and_order(parent, calibration, tmp_path):
    _, report = prune(parent, tmp_path, blocks=2, calibration=calibration, batch_size=2)
    whole = checkpoints.load(parent, device="cpu")
    windows = calibration.token_ids(whole.tokenizer)
    expected = {block: naive_perplexity(whole.model, windows, {block}) for block in range(4)}
    assert report["scores"] == [pytest.approx(expected, rel=1e-5)]
    assert report["original_perplexity"] == pytest.approx(naive_perplexity(whole.model, windows, set()), rel=1e-5)
    assert report["removed"] == sorted(expected, key=expected.get)[:2]
    assert len({round(score, 3) for score in expected.values()}) == 4, (
        "the scores must differ for the order to be tested"
    )


def test_greedy_scores_again(parent, calibration, tmp_path):
    _, report = prune(parent, tmp_path, blocks=2, calibration=calibration, schedule="greedy")
    whole = checkpoints.load(parent, device="cpu")
    windows = calibration.token_ids(whole.tokenizer)
    first = report["removed"][0]
    expected = {block: naive_perplexity(whole.model, windows, {first, block}) for block in range(4) if block != first}
    assert report["scores"][1] == pytest.approx(expected, rel=1e-5)
    assert report["removed"][1] == min(expected, key=expected.get)


def test_pruned_checkpoint_equals_the_model_without_the_blocks(parent, calibration, tmp_path):
    from transformers import AutoModelForCausalLM

    output, report = prune(parent, tmp_path, blocks=1, calibration=calibration)
    whole = checkpoints.load(parent, device="cpu").model
    plain = AutoModelForCausalLM.from_pretrained(output).eval()  # plain transformers, nothing of ours
    ids = torch.arange(12).remainder(len(WORDS))[None]
    whole.model.layers = torch.nn.ModuleList(b for i, b in enumerate(whole.model.layers) if i not in report["removed"])
    torch.testing.assert_close(plain(ids).logits, whole(ids, use_cache=False).logits, rtol=0, atol=0)
    cached = plain.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(cached, plain.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False))
    block = sum(p.numel() for p in plain.model.layers[0].parameters())
    assert checkpoints.describe(output)["parameters"] == checkpoints.describe(parent)["parameters"] - block


def test_a_pruned_model_of_a_local_folder_is_the_pruned_one(parent, calibration, tmp_path):
    """The parent is a pointer; what is saved must not point there too."""
    pointer = tmp_path / "pointer"
    pointer.mkdir()
    reference = {"path": str(parent), "id": None, "revision": None, "task": "causal-lm", "dtype": "bfloat16"}
    checkpoints.refer(pointer, {**reference, "trust_remote_code": False})
    output, report = prune(pointer, tmp_path, blocks=2, calibration=calibration)
    loaded = checkpoints.load(output, device="cpu")
    assert len(loaded.model.model.layers) == report["blocks"] - 2 == 2
    info = checkpoints.describe(output)
    assert info["format"] == "transformers"
    assert info["bits"] == 16
    assert info["parameters"] == checkpoints.logical_parameters(loaded.model)


def test_kept_blocks_stay(parent, calibration, tmp_path):
    _, report = prune(parent, tmp_path, blocks=1, calibration=calibration, keep_first=2, keep_last=1)
    assert report["removed"] == [2]
    assert set(report["scores"][0]) == {2}


def test_too_many_blocks(parent, calibration, tmp_path):
    with pytest.raises(UserError, match="has 4 blocks, of which 1 may be removed; the recipe removes 2"):
        prune(parent, tmp_path, blocks=2, calibration=calibration, keep_first=2, keep_last=1)
