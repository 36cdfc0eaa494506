"""Tiny random encoders of three families, each with a tokenizer of its own, saved as checkpoints of the hub are."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, BertTokenizer, RobertaTokenizer

WORDS = "red green blue robin tulip the is a has wing leaf what not good bad yes no".split()  # noqa: SIM905
LONGEST = {"bert": 24, "roberta": 22, "distilbert": 24}  # tokens: two of RoBERTa's 24 positions are for no token
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "max_position_embeddings": 24}


def encoder(folder: Path, family: str, loader=AutoModelForMaskedLM, **options) -> Path:
    """Save a tiny random model and its tokenizer into `folder`, as a checkpoint of the hub is, and return it."""
    sizes = {**SIZES, "hidden_dim" if family == "distilbert" else "intermediate_size": 48, "initializer_range": 0.2}
    if family == "roberta":
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        merges = [("Ġ" + word[:i], word[i]) for word in WORDS for i in range(len(word))]
        tokens = dict.fromkeys([*special, "Ġ", *"".join(WORDS), *("".join(pair) for pair in merges)])
        vocabulary = {token: number for number, token in enumerate(tokens)}
        tokenizer = RobertaTokenizer(vocab=vocabulary, merges=list(dict.fromkeys(merges)), add_prefix_space=True)
        sizes |= {"type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    else:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        vocabulary = {token: number for number, token in enumerate([*special, *WORDS])}
        tokenizer = BertTokenizer(vocab=vocabulary)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=len(vocabulary), **sizes, **options)
    loader.from_config(config).save_pretrained(folder)
    if family == "distilbert":  # no class is named, so that transformers takes BERT's tokenizer, which makes types
        (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
        assert "token_type_ids" in AutoTokenizer.from_pretrained(folder)("red")
    else:
        tokenizer.save_pretrained(folder)
    return folder
