"""Tiny random classifiers of the three encoder families, made here, with a tokenizer and the rows of a task."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

FAMILIES = ("bert", "roberta", "distilbert")
WORDS = "red green blue robin tulip the is a has wing leaf which color what not good bad yes no".split()  # noqa: SIM905


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Return the demo's tokenizer for a few words; only BERT tells two sentences of a pair apart."""
    from espalier.pretrain.demo_encoder import train_tokenizer

    made = train_tokenizer([" ".join(WORDS)], SimpleNamespace(vocabulary=200, max_tokens=32))
    if family != "bert":
        made.model_input_names = ["input_ids", "attention_mask"]
    return made


def classifier(
    family: str, labels: int = 2, layers: int = 2, dropout: float = 0.0, seed: int = 0, **options
) -> PreTrainedModel:
    """Return a random classifier in evaluation mode: 32 channels, 2 heads, 48 neurons a layer."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    if family == "distilbert":
        sizes |= {"hidden_dim": 48, "dropout": dropout, "attention_dropout": dropout, "seq_classif_dropout": dropout}
    else:
        sizes |= {"intermediate_size": 48, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    words = {"vocab_size": len(tokenizer(family)), "max_position_embeddings": 40, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **sizes, **words, num_labels=labels, initializer_range=0.2)
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(config, **options).eval()


def checkpoint(folder: Path, family: str, task: str | None = None, **options) -> Path:
    """Save a random classifier, said to be of a GLUE task if one is given, into `folder` and return it."""
    from espalier import checkpoints

    model = classifier(family, **options)
    info = {"task": "sequence-classification", "parameters": checkpoints.logical_parameters(model)}
    checkpoints.save(model, tokenizer(family), folder, info | ({"glue_task": task} if task else {}))
    return folder


def dataset(folder: Path, count: int = 40) -> dict:
    """Write random rows of cola and stsb into `folder`; return it as a resolved dataset."""
    draw = random.Random(0)

    def words() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(2, 9)))

    rows = {
        "cola": [{"sentence": words(), "label": i % 2} for i in range(count)],
        "stsb": [{"sentence1": words(), "sentence2": words(), "label": draw.uniform(0, 5)} for _ in range(count)],
    }
    for task, some in rows.items():
        (folder / task).mkdir(parents=True)
        (folder / task / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return {"name": "words", "source": "local", "path": str(folder)}


def batch() -> dict:
    """Return a padded batch as every family takes it."""
    import torch

    ids = torch.randint(5, 100, (4, 11), generator=torch.Generator().manual_seed(0))
    ids[1, 6:] = ids[3, 2:] = 0
    return {"input_ids": ids, "attention_mask": ids.ne(0).long()}


def save_logits(cases: list[tuple[str, dict]], output: str, threads: int) -> None:
    """Save what checkpoints, loaded with options, say of `batch()`: to be called in a process of its own."""
    import torch

    from espalier import checkpoints

    torch.set_num_threads(threads)
    with torch.no_grad():
        found = [checkpoints.load(Path(folder), "cpu", **options).model(**batch()).logits for folder, options in cases]
    torch.save(found, output)
