"""A tiny random Llama with a byte-level tokenizer, saved as a checkpoint: built here, downloaded from nowhere."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = ("red", "blue", "cat", "dog", "sat", "ran", "mat", "the")
VOCABULARY = 257  # 256 bytes and the end token


def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "<end>"])}
    bytes_alone = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_alone, eos_token="<end>", pad_token="<end>")


def llama(folder: Path, layers: int = 2, hidden: int = 128, mlp: int = 64) -> Path:
    """Save a random Llama into `folder` and return it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from espalier import checkpoints

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=128,
            initializer_range=0.1,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=256,
            pad_token_id=256,
        )
    )
    folder.mkdir(parents=True)
    parameters = checkpoints.logical_parameters(model)
    checkpoints.save(model, tokenizer(), folder, {"task": "causal-lm", "parameters": parameters})
    return folder


def calibration(folder: Path, samples: int = 16, length: int = 32) -> dict:
    """Write documents into `folder` and return a calibration set as a resolved recipe has it."""
    import random

    draw = random.Random(0)
    folder.mkdir(parents=True)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=20))}) + "\n" for _ in range(samples)]
    (folder / "calibration.jsonl").write_text("".join(lines))
    dataset = {"name": "words", "source": "local", "path": str(folder)}
    return {"text": {"dataset": dataset, "split": "calibration"}, "samples": samples, "length": length}
