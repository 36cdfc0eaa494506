"""Trains the demo's encoder from nothing: a WordPiece tokenizer and a small BERT, on masked words (Devlin et al. 2019).

Sentences come mostly in pairs that say one thing twice, so that a masked word can be found in the other sentence. Each
head starts with its key projection equal to its query projection, which makes it look for words like its own: without
that start a model of this size does not learn to compare two sentences in the seconds it is given.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from espalier import word_pieces
from espalier.data import Dataset
from espalier.progress import progress
from espalier.word_pieces import MASK, PAD

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import BertForMaskedLM, PreTrainedTokenizerFast

STEPS_A_REPORT = 25


GIVES = "masked-lm"


@dataclass(frozen=True)
class Recipe:
    """The model's sizes and how it is trained."""

    dataset: Dataset
    split: str = "encoder"  # rows of `text` and `pair`, which may be empty
    vocabulary: int = 1000  # at most
    hidden: int = 128  # width of the residual stream
    layers: int = 4  # transformer blocks
    heads: int = 4  # attention heads; they divide hidden
    mlp: int = 512  # neurons of each block
    max_tokens: int = 64  # of a sentence or a pair
    batch: int = 64  # rows an optimizer step
    steps: int = 320  # optimizer steps
    lr: float = 2e-3  # peak learning rate
    masked: float = 0.25  # share of the words
    warmup: float = 0.1  # share of the steps

    def check(self) -> None:
        if self.hidden % self.heads:
            raise ValueError("'heads' must divide 'hidden'.")
        if self.vocabulary < word_pieces.LEAST:
            raise ValueError("'vocabulary' must leave room for every character.")
        if min(self.steps, self.batch, self.layers) < 1 or not 0 < self.masked < 1:
            raise ValueError("'steps', 'batch' and 'layers' must be at least 1 and 'masked' between 0 and 1.")


def sizes(recipe: Recipe) -> dict:
    """Return the widths of the layers, named as in a config.json."""
    return {
        "hidden_size": recipe.hidden,
        "intermediate_size": recipe.mlp,
        "num_hidden_layers": recipe.layers,
    }


def apply(parent: Path | None, output: Path, recipe: Recipe, *, seed: int, device: str) -> dict:
    """Train the encoder and save it into `output`; return the loss curve and the seconds taken.

    There is no parent. The result follows from the seed, bit by bit on one CPU thread.
    """
    import torch

    from espalier import checkpoints

    if parent is not None:
        raise ValueError("demo_encoder trains from nothing and takes no parent")
    device = checkpoints.pick_device(device)
    rows = recipe.dataset.rows(recipe.split)
    texts, pairs = [row["text"] for row in rows], [row["pair"] for row in rows]
    tokenizer = train_tokenizer([f"{text} {pair}" for text, pair in zip(texts, pairs, strict=True)], recipe)
    torch.manual_seed(seed)
    model = new_model(recipe, len(tokenizer)).to(device)
    encoded = [tokenizer(text, pair) if pair else tokenizer(text) for text, pair in zip(texts, pairs, strict=True)]
    started = time.perf_counter()
    losses = _train(model, tokenizer, encoded, recipe, seed, device)
    seconds = time.perf_counter() - started
    model.eval().cpu()
    parameters = checkpoints.logical_parameters(model)
    checkpoints.save(model, tokenizer, output, {"task": "masked-lm", "parameters": parameters})
    return {
        "parameters": parameters,
        "vocabulary": len(tokenizer),
        "texts": len(rows),
        "seconds": round(seconds, 2),
        "losses": losses,
    }


def skeleton(recipe: Recipe) -> tuple[BertForMaskedLM, bool]:
    """Return the model on the meta device, shapes without weights, and False: the text may give fewer tokens."""
    import torch

    with torch.device("meta"):
        return new_model(recipe, recipe.vocabulary), False


def train_tokenizer(documents: list[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer with BERT's template for one or two sentences.

    The vocabulary is every character, as a start and as a continuation, and the most frequent words. (The library's
    own WordPiece trainer breaks ties by the order of a hash map, so two runs of it differ.)
    """
    counts = Counter(word for document in documents for word in word_pieces.words(document) if len(word) > 1)
    frequent = sorted(counts, key=lambda word: (-counts[word], word))
    return word_pieces.tokenizer(frequent, recipe.vocabulary, recipe.max_tokens)


def new_model(recipe: Recipe, vocabulary: int) -> BertForMaskedLM:
    """The untrained model, each head's keys equal to its queries, and without dropout: its training is short."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.mlp,
        max_position_embeddings=recipe.max_tokens,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PAD,
        attn_implementation="eager",
    )
    model = BertForMaskedLM(config)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.self.key.weight.copy_(layer.attention.self.query.weight)
    return model


def _train(
    model: BertForMaskedLM,
    tokenizer: PreTrainedTokenizerFast,
    encoded: list,
    recipe: Recipe,
    seed: int,
    device: str,
) -> list[dict]:
    """Train in place; return the mean loss of each `STEPS_A_REPORT` steps."""
    import torch
    from torch.nn.functional import cross_entropy

    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / (recipe.warmup * recipe.steps + 1e-9), (1 - step / recipe.steps) / 0.7),
    )
    losses: list[dict] = []
    total = torch.zeros((), device=device)
    model.train()
    for step in (bar := progress(range(1, recipe.steps + 1), "training the encoder")):
        chosen = torch.randint(len(encoded), (recipe.batch,), generator=generator).tolist()
        inputs = tokenizer.pad([encoded[index] for index in chosen], return_tensors="pt")
        words = inputs["input_ids"]
        masked = (torch.rand(words.shape, generator=generator) < recipe.masked) & (words > MASK)
        labels = words[masked].to(device)
        inputs["input_ids"] = torch.where(masked, MASK, words)
        inputs = inputs.to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            states = model.bert(**inputs).last_hidden_state
            logits = model.cls(states[masked.to(device)])
        loss = cross_entropy(logits.float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        total += loss.detach()
        if step % STEPS_A_REPORT == 0 or step == recipe.steps:
            steps = step - (losses[-1]["step"] if losses else 0)
            losses.append({"step": step, "loss": round(total.item() / steps, 4)})
            bar.note(f"loss {losses[-1]['loss']:.3f}")
            total.zero_()
    return losses
