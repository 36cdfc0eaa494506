"""What the tests of engines of other projects share: prompts, and how a stand-in for a library is put in its place."""

from __future__ import annotations

import sys
from types import ModuleType

from espalier.worker import Load

PROMPTS = [[5, 6, 7], [8, 9, 10], [11, 12, 13], [14, 15, 16]]
OUTPUT = 5


def load(folder, device="cpu", **changes):
    return Load(**{"folder": folder, "device": device, "threads": 1, "max_tokens": 40, "max_batch": 4, **changes})


def answer(prompt: list[int], tokens: int) -> list[int]:
    """Return what every stand-in makes of a prompt."""
    return [100 * prompt[0] + place for place in range(tokens)]


def install(monkeypatch, **modules) -> None:
    for name, content in modules.items():
        module = ModuleType(name.replace("__", "."))
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def generate(engine, log: list, prompts=PROMPTS, tokens=OUTPUT, sampling="greedy"):
    """Generate, and say in the stand-in's log when the first token was told of."""
    return engine.generate(prompts, tokens, sampling, lambda *known: log.append("first token"))
