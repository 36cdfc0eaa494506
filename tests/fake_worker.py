"""Workers of an engine without a process: their time is counted, not measured, and what goes wrong is chosen."""

from __future__ import annotations

import json
import math
from pathlib import Path

from espalier import memory
from espalier.engine_process import Died, Generated, Loaded, OutOfMemory

MADE_WITH = {"packages": {"fake": "1"}, "python": "3", "device": {"kind": "cpu", "name": "abacus"}, "threads": "1"}


def checkpoint(folder: Path, vocabulary: int = 40) -> Path:
    """Write a checkpoint's JSON, and 7 bytes of weights, into `folder` and return it."""
    folder.mkdir(parents=True)
    (folder / "espalier.json").write_text('{"format": "transformers", "task": "causal-lm", "parameters": 3}')
    (folder / "config.json").write_text(json.dumps({"vocab_size": vocabulary, "eos_token_id": [0, 1]}))
    added = [{"id": 2, "special": True}, {"id": 3, "special": False}]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"4": {"special": true}}}')
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


class Workers:
    """Called as EngineProcess is, it returns a worker: a prompt takes 1 s, and each token after the first 0.1 s.

    A device holds `room` tokens of all rows together; a shape of `deadly` (input, output, batch) kills the worker.
    """

    def __init__(self, room=math.inf, deadly=(), context=1000, device="cpu", refuses=None, joules=None, extra=0):
        self.room, self.deadly, self.context, self.device = room, set(deadly), context, device
        self.refuses, self.joules, self.extra = refuses, joules, extra
        self.first_token, self.jitter = True, iter(())  # seconds of each timed call beyond those of prompt and tokens
        self.started, self.closed, self.calls = [], 0, []
        self.known = None  # new tokens of all rows that are known with the first token of the last row, if not one each
        self.ended = False

    def __call__(self, engine, python=None, *, limit):
        self.started.append((engine, python, limit))
        return self

    def load(self, folder, *, device, max_tokens, max_batch, seed):
        self.asked = {"device": device, "max_tokens": max_tokens, "max_batch": max_batch, "seed": seed}
        if self.refuses:
            raise self.refuses
        return Loaded(self.device, self.context, 900, {"format": "transformers", "arithmetic": "float"}, MADE_WITH)

    def held(self):
        return 500, {"calls": len(self.calls)}  # less than once loaded: a library that packs weights when it needs them

    def generate(self, token_ids, output_tokens, sampling="greedy"):
        shape = (len(token_ids[0]), output_tokens, len(token_ids))
        assert all(row == token_ids[0] for row in token_ids)
        self.calls.append(shape)
        if shape in self.deadly:
            raise Died("its worker ended with signal 11")
        if shape[2] * (shape[0] + output_tokens) > self.room:
            raise OutOfMemory("CUDA out of memory")
        before, after = next(self.jitter, (0.0, 0.0))
        seconds = 1 + before + 0.1 * (output_tokens - 1) + after
        tokens = [[0] * (output_tokens + self.extra)] * len(token_ids)
        first = 1 + before if self.first_token else None
        known = self.known or len(tokens)
        return Generated(tokens, seconds, first, 0.5 * seconds, self.joules, known if self.first_token else None)

    def peaks(self, token_ids, output_tokens, sampling="greedy"):
        self.generate(token_ids, output_tokens, sampling)
        sizes = (1000 * len(token_ids), 1024 * len(token_ids))
        return dict(zip(memory.kinds(self.device), sizes, strict=False))

    def close(self):
        self.closed += 1
