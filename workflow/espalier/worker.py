"""An engine in a process of its own, which answers requests: one JSON object a line, on standard input and output.

    python -m espalier.worker ENGINE

    {"ask": "probe", "device": "auto"}               is it there, and can it run here
    {"ask": "load", "load": {…}}                     the keys of `Load`; `random` in place of `folder`: a recipe of
                                                     pretrain/random_weights.py, whose model is made, loaded, deleted
    {"ask": "generate", "token_ids": [[…], …], "output_tokens": 8, "sampling": "greedy", "memory": false}
    {"ask": "held"}                                  bytes held now, and what the engine has to say
    {"ask": "close"}

An answer is {"ok": {…}}, or {"error": kind, "reason": text}, where kind is unavailable, out of memory, user (a mistake
of the user) or failed. Seconds are taken here, so what the requests take is in no timing. Whatever libraries print goes
to standard error. The driver's side is `engine_process.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from espalier import checkpoints, cli, energy, memory, plugins, provenance, recipes
from espalier.errors import UserError, first_line


class Unavailable(Exception):
    """An engine cannot run here, or not this model; the text is the reason, a clause without a full stop."""


def require_device(device: str) -> None:
    """Raise Unavailable if torch does not see the device."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("torch sees no CUDA device")


@dataclass(frozen=True)
class Load:
    """What an engine is to get ready for."""

    folder: Path  # an Espalier checkpoint
    device: str  # cpu or cuda; in a request also auto
    threads: int
    max_tokens: int  # of the longest prompt with its output
    max_batch: int
    seed: int = 0


class Worker:
    """Holds the engine between requests."""

    def __init__(self, name: str):
        self.module = plugins.load("engines", name, "engine")
        self.engine: Any = None
        self.device = ""
        self.held: int | None = None
        self.joules: Callable[[], float] | None = None

    def probe(self, device: str) -> dict:
        self.module.probe(checkpoints.pick_device(device))
        return {"packages": self._packages()}

    def load(self, load: dict, random: dict | None = None) -> dict:
        if not hasattr(self.module, "ENVIRONMENTS"):  # there an engine's libraries may need what is left out
            cli.import_lightly()
        import torch

        device = checkpoints.pick_device(load["device"])
        self.module.probe(device)
        torch.set_num_threads(load["threads"])
        torch.manual_seed(load["seed"])
        with tempfile.TemporaryDirectory(prefix="espalier-random-") as temporary:
            if random is not None:
                # Not imported by name: this module is part of what every measurement depends on, and that is not.
                random_weights = plugins.load("pretrain", "random-weights")
                recipe = recipes.build(random_weights.Recipe, random, "random:")
                random_weights.apply(None, Path(temporary), recipe, seed=load["seed"], device=device)
                load["folder"] = temporary
            asked = replace(Load(**load), device=device, folder=Path(load["folder"]))
            engine = self.module.Engine()
            engine.load(asked)
            info = getattr(engine, "info", None) or checkpoints.describe(asked.folder)
        self.engine, self.device, self.joules = engine, device, energy.counter(device)
        return {
            "device": device,
            "context": engine.context,
            "allocated": self._allocated(),
            "checkpoint": info,
            "made_with": {
                "packages": self._packages(),
                "python": platform.python_version(),
                "device": provenance.describe_device(device),
                "threads": str(load["threads"]),
            },
        }

    def generate(self, token_ids: list[list[int]], output_tokens: int, sampling: str, memory: bool) -> dict:
        if memory:
            return self._peaks(token_ids, output_tokens, sampling)
        stamps: list[tuple[float, int]] = []
        before = self.joules and self.joules()
        cpu, started = time.process_time(), time.perf_counter()

        def first_token(known: int = len(token_ids)) -> None:
            stamps.append((time.perf_counter() - started, known))

        generated = self.engine.generate(token_ids, output_tokens, sampling, first_token)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
        joules = None if before is None else self.joules() - before
        if len(stamps) > 1:
            raise RuntimeError(f"the engine {self.engine.name} told of its first token {len(stamps)} times")
        return {
            "token_ids": generated,
            "seconds": seconds,
            "first_token_seconds": stamps[0][0] if stamps else None,
            "first_tokens": stamps[0][1] if stamps else None,
            "cpu_seconds": cpu_seconds,
            "joules": joules,
        }

    def hold(self) -> dict:
        return {"allocated": self._allocated(), "details": self.engine.details()}

    def _peaks(self, token_ids: list[list[int]], output_tokens: int, sampling: str) -> dict:
        def call() -> None:
            self.engine.generate(token_ids, output_tokens, sampling, lambda known=0: None)

        if self.engine.keeps_cache:
            call()  # so that what another shape has left there is gone
            self.held = None
        if self.held is None:
            self.held = self._allocated()
        return {"peaks": memory.peaks(call, self.device, self.held)}

    def _allocated(self) -> int:
        """Return the bytes of all tensors alive, those that the engine's libraries keep out of sight included."""
        return memory.allocated_bytes(self.device) + getattr(self.engine, "unseen_bytes", 0)

    def _packages(self) -> dict[str, str]:
        found = {name: provenance.version(name) for name in self.module.PACKAGES}
        return {name: version for name, version in found.items() if version}


def answer(worker: Worker, request: dict) -> dict:
    """Return the answer to a request: no error ends the worker, whose engine may still serve other shapes."""
    asked = {key: value for key, value in request.items() if key != "ask"}
    handlers = {"probe": worker.probe, "load": worker.load, "generate": worker.generate, "held": worker.hold}
    try:
        return {"ok": handlers[request["ask"]](**asked)}
    except Unavailable as error:
        return {"error": "unavailable", "reason": str(error)}
    except checkpoints.TooLarge as error:
        reason = str(error)
    except UserError as error:
        return {"error": "user", "reason": str(error)}
    except ImportError as error:
        traceback.print_exc()
        return {"error": "unavailable", "reason": f"a package that it needs cannot be imported ({first_line(error)})"}
    except Exception as error:
        if not memory.is_out_of_memory(error):
            traceback.print_exc()
            return {"error": "failed", "reason": f"{type(error).__name__}: {first_line(error)}"}
        error.__traceback__ = None  # it would hold on to the tensors
        reason = first_line(error)
    _empty_cache()
    return {"error": "out of memory", "reason": reason}


def serve(name: str, requests: Iterator[str], answers: TextIO) -> None:
    """Answer requests until there are no more, or one asks to close."""
    worker = Worker(name)
    for line in requests:
        request = json.loads(line)
        if request["ask"] == "close":
            break
        print(json.dumps(answer(worker, request)), file=answers, flush=True)
    if worker.engine is not None:
        worker.engine.close()


def main() -> None:
    _end_first()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    cli.prepare()
    (name,) = sys.argv[1:]
    serve(name, sys.stdin, answers)
    gc.freeze()  # as in cli.run


def _end_first() -> None:
    """Have Linux kill this process when the one that started it ends, and before any other where memory runs out."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _empty_cache() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    from espalier.worker import main  # engines import this module by name: their Unavailable is to be the one here

    main()
