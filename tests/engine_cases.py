"""What the tests of engines share: loading one as a worker does it, and prompts."""

from __future__ import annotations

from pathlib import Path

import torch

import tiny
from espalier import plugins
from espalier.worker import Load

HF_ENGINES = ["hf", "hf-compiled", "flash-decoding"]
LONG, SHORT, NEW = 600, 7, 5  # tokens: of a prompt longer than any engine's split of the keys, of another, generated
CONTEXT = LONG + 40


def loaded(engine: str, folder: Path, device: str = "cpu", seed: int = 0):
    made = plugins.load("engines", engine).Engine()
    torch.manual_seed(seed)
    made.load(Load(folder, device, threads=1, max_tokens=CONTEXT, max_batch=3, seed=seed))
    return made


def prompts(length: int, rows: int = 3) -> list[list[int]]:
    draw = torch.Generator().manual_seed(length)
    return torch.randint(0, tiny.VOCABULARY, (rows, length), generator=draw).tolist()


def ignore() -> None:
    """Take no notice of the first token."""
