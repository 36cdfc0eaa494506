"""Shapes of a workload, and prompts of fixed token ids: for time and memory the words do not matter."""

from __future__ import annotations

import random
from pathlib import Path

from espalier import checkpoints
from espalier.errors import UserError
from espalier.files import read_json


def check_shapes(input_tokens: list[int], output_tokens: list[int], batch_sizes: list[int]) -> None:
    """Raise ValueError unless each list holds different whole numbers from 1 up, at least one."""
    for key, values in (("input_tokens", input_tokens), ("output_tokens", output_tokens), ("batch_sizes", batch_sizes)):
        if not values or min(values) < 1 or len(set(values)) != len(values):
            raise ValueError(f"'{key}' must be a list of whole numbers from 1 up, none twice.")


def prompt(folder: Path, length: int, seed: int) -> list[int]:
    """Return `length` ordinary token ids of a checkpoint, drawn once: shorter prompts are its beginnings.

    Ids come from JSON alone: the vocabulary's size from config.json, the special ids from there, tokenizer.json and
    tokenizer_config.json.
    """
    weights = checkpoints.weights_folder(folder)
    config = read_json(weights / "config.json")
    if not isinstance(config.get("vocab_size"), int):
        raise UserError(f"{weights / 'config.json'} lacks the key 'vocab_size', from which prompts are drawn.")
    special = _special_ids(weights, config)
    ordinary = [token for token in range(config["vocab_size"]) if token not in special]
    return random.Random(f"prompt-{seed}").choices(ordinary, k=length)


def _special_ids(folder: Path, config: dict) -> set[int]:
    named = [config.get(f"{kind}_token_id") for kind in ("bos", "eos", "pad")]
    found = {token for one in named for token in (one if isinstance(one, list) else [one])}
    if (file := folder / "tokenizer.json").is_file():
        found |= {one["id"] for one in read_json(file).get("added_tokens") or () if one["special"]}
    if (file := folder / "tokenizer_config.json").is_file():
        added = read_json(file).get("added_tokens_decoder") or {}
        found |= {int(token) for token, one in added.items() if one.get("special")}
    return found
