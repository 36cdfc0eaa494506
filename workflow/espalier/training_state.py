"""The state of a training on disk, from which it goes on after it was stopped or killed, as if nothing had happened.

One file, replaced in one move, so that whatever moment a process is killed at, a whole state lies there or none. It is
no output of the workflow, which removes the outputs of a job before that starts again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import random
import signal
import sys
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from espalier import checkpoints, parallel, plugins, provenance
from espalier.errors import UserError
from espalier.files import whole_file

if TYPE_CHECKING:
    import argparse
    from types import TracebackType

    import torch

FILE = "state.pt"
PAUSE = 10  # times what saving takes: it takes at most about a tenth of the time


class Saving:
    """Where and how often a training saves itself; a context in which SIGTERM asks it to stop after its step.

    `key` says by name what the training follows from (recipe, seed, code, parent …): a state with another one is never
    resumed. `every` is in seconds of wall time, so it changes no result; it is stretched where saving takes long, but
    not if it is 0, which is to save after each step.
    """

    def __init__(self, folder: Path, every: float, key: dict[str, str]):
        self.file, self.every, self.key = Path(folder) / FILE, every, key
        self.stopped = False
        self.saved_at, self.seconds = time.monotonic(), 0.0  # when the last state was written, and how long it took

    def __enter__(self) -> Saving:
        self.previous = signal.signal(signal.SIGTERM, self._stop)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.signal(signal.SIGTERM, self.previous)

    def _stop(self, *_: object) -> None:
        self.stopped = True

    def asked(self) -> tuple[bool, bool]:
        """Return whether to stop, and whether it is time to save; only process 0's clock counts."""
        pause = max(self.every, PAUSE * self.seconds) if self.every else 0
        return self.stopped, parallel.rank() == 0 and time.monotonic() - self.saved_at >= pause

    def read(self, data: str) -> dict | None:
        """Return the saved state of this very training on `data`; None, and a line that says why, if there is none."""
        if not self.file.exists():
            return None
        state = self._read()
        if state is None:
            why = "is damaged"
        else:
            wanted = {**self.key, "data": data}
            found = state["key"]
            differing = [name for name in wanted if found.get(name) != wanted[name]]
            if not differing:
                print(f"going on after step {len(state['losses'])}, saved in {self.file}", file=sys.stderr, flush=True)
                return state
            why = f"is of another training ({', '.join(differing)} changed)"
        print(f"the state {self.file} {why}: starting from the beginning", file=sys.stderr, flush=True)
        self.remove()
        return None

    def _read(self) -> dict | None:
        import torch

        try:
            with zipfile.ZipFile(self.file) as archive:  # torch itself does not look at the checksums
                if archive.testzip() is not None:
                    return None
            return torch.load(self.file, map_location="cpu", weights_only=True, mmap=True)
        except (
            OSError,
            ValueError,
            RuntimeError,
            EOFError,
            KeyError,
            pickle.UnpicklingError,
            zipfile.BadZipFile,
            zipfile.zlib.error,
        ):
            return None

    def write(self, data: str, state: dict) -> None:
        """Save `state`: tensors and plain values."""
        import torch

        with whole_file(self.file) as partial:
            torch.save({**state, "key": {**self.key, "data": data}}, partial)

    def remove(self) -> None:
        """Delete the state, what a killed process left beside it, and the folder unless it holds something else."""
        for file in (self.file, *self.file.parent.glob(f".{FILE}.partial-*")):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.file.parent.rmdir()

    def farewell(self, step: int, steps: int) -> UserError:
        return UserError(
            f"Stopped by SIGTERM after step {step} of {steps}; the state is saved in {self.file}, and the same command"
            " goes on from there."
        )


def of_job(kind: str, arguments: argparse.Namespace, script: Path) -> Saving:
    """Return where the job of a script, a `kind` of step, saves its training, by its command's arguments."""
    module = plugins.module_name(kind, arguments.recipe.get(kind), "--recipe")
    key = {
        "recipe": digest(arguments.recipe),
        "seed": str(arguments.seed),
        "code": provenance.code_version(script, [module]),
        "parent": digest_of_weights(arguments.parent),
        "packages": digest(provenance.packages()),
        "device": checkpoints.pick_device(arguments.device),
    }
    return Saving(arguments.state, arguments.save_every, key)


def save(
    saving: Saving, data: str, run: dict, named: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Save `run` (plain values, and tensors that are whole) with the weights `named`, what the optimizer holds of them,
    and the random number generators of all processes."""
    started = time.monotonic()
    state = {
        **run,
        "weights": {name: parallel.whole(one) for name, one in named.items()},
        "optimizer": {
            name: {key: parallel.whole(value) for key, value in optimizer.state[one].items()}
            for name, one in named.items()
            if one in optimizer.state
        },
        "random": parallel.from_all(_random_state()),
    }
    if parallel.rank() == 0:
        saving.write(data, state)
    parallel.from_first(None)  # no process goes on, or ends, before the state is written
    saving.saved_at = time.monotonic()
    saving.seconds = saving.saved_at - started


def resume(
    saving: Saving, data: str, named: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict | None:
    """Put weights, optimizer and random number generators back as they were saved; return the `run` that was.

    None, and nothing is changed, if there is no state of this training. The number of processes may differ; those that
    had no random number generator then keep theirs.
    """
    import torch

    state = saving.read(data) if parallel.rank() == 0 else None
    outline = parallel.from_first(state and _without_tensors(state))
    if outline is None:
        return None
    state = state or outline
    with torch.no_grad():
        for name, weight in named.items():
            weight.copy_(parallel.divided(state["weights"][name], weight))
    for name, values in state["optimizer"].items():
        one = named[name]
        # AdamW counts each weight's steps in a scalar, which is divided among no processes.
        optimizer.state[one] = {
            key: parallel.divided(value, one) if key != "step" else _count(parallel.from_first(value), one)
            for key, value in values.items()
        }
    if parallel.rank() < len(state["random"]):
        _set_random_state(state["random"][parallel.rank()])
    best = {name: value if value is None else value.clone() for name, value in state["best"].items()}
    return {**{key: state[key] for key in ("losses", "validations", "position")}, "best": best}


def _count(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return value.to(like.device, copy=True)


def _without_tensors(state: dict) -> dict:
    """Return what the other processes need of a state: None for each tensor that process 0 divides."""
    names = ("weights", "best")
    empty = {name: dict.fromkeys(state[name]) for name in names}
    empty["optimizer"] = {name: dict.fromkeys(values) for name, values in state["optimizer"].items()}
    return {**state, **empty}


def digest(value: object) -> str:
    """Return 16 hex digits for a plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def digest_of_weights(parent: Path) -> str:
    """Return 16 hex digits for the names, sizes and times of a checkpoint's files."""
    files = sorted(file for file in checkpoints.weights_folder(parent).iterdir() if file.is_file())
    return digest([[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files])


def _random_state() -> dict:
    """Return the states of all random number generators that a training may draw from."""
    import torch

    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def _set_random_state(state: dict) -> None:
    """Put the generators back where `_random_state` found them."""
    import torch

    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])
