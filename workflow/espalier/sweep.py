"""The loop over shapes that all workloads of generated text share: one engine, in one worker after the other.

Shapes rise. Where memory runs out, larger ones are not tried. A worker that dies or hangs costs the shape that it was
at, and larger ones of that prompt length; the others go on in a new worker. So every shape has an outcome:

    ok                 there is a result
    oom                memory ran out, at this shape or at one that is larger in nothing
    unavailable: why   the engine, or this model in it, cannot do it
    failed: why        the worker died or hung, at this shape or at a smaller one of the same prompt length
"""

from __future__ import annotations

import contextlib
import itertools
import math
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from espalier import checkpoints, memory, plugins, provenance
from espalier.engine_process import Died, EngineProcess, Loaded, OutOfMemory
from espalier.files import read_json
from espalier.progress import progress
from espalier.prompts import prompt
from espalier.worker import Unavailable

DEATHS = 3  # of workers, after which the engine gets no other


class Shape(NamedTuple):
    """What one call generates."""

    input_tokens: int  # of each prompt
    output_tokens: int  # new ones of each prompt
    batch_size: int

    def within(self, other: Shape) -> bool:
        """Whether this shape is larger than the other in nothing."""
        return all(mine <= its for mine, its in zip(self, other, strict=True))


def check_engine(engine: str, sampling: str, limit: float) -> None:
    """Raise ValueError for a sampling that an engine cannot do, or a limit that is over at once.

    An engine that does not exist is left to `plugins.module_name`, whose error names the nearest.
    """
    if engine in plugins.names("engines"):
        known = plugins.load("engines", engine).SAMPLINGS
        if sampling not in known:
            raise ValueError(f"the engine '{engine}' has no 'sampling: {sampling}', only {', '.join(known)}.")
    if not 0 < limit < math.inf:
        raise ValueError("'limit' must be a number of seconds, more than 0.")


class Sweep:
    """The way of a recipe's engine through its shapes; what it finds is kept in its attributes.

    `recipe` has input_tokens, output_tokens, batch_sizes, engine and limit, as the workload `generation` has them.
    `device` may be auto. `environment` is the file that says where the engine's own Python is, or why there is none;
    None for an engine that runs in this one.
    """

    def __init__(
        self,
        recipe: Any,
        folder: Path,
        *,
        device: str,
        environment: Path | None,
        seed: int,
        start: Callable[..., EngineProcess] = EngineProcess,
    ):
        self.engine, self.folder, self.device, self.seed = recipe.engine, folder, device, seed
        rising = map(sorted, (recipe.input_tokens, recipe.output_tokens, recipe.batch_sizes))
        self.shapes = [Shape(*shape) for shape in itertools.product(*rising)]
        found = read_json(environment) if environment else {"outcome": "ok", "python": None}
        self._python = found["python"] and Path(found["python"])
        self._limit, self._new_worker = recipe.limit, start
        self._worker: EngineProcess | None = None
        self.outcomes: dict[Shape, str] = {}
        self.results: dict[Shape, Any] = {}  # of the shapes whose outcome is ok
        self.outcome: str = found["outcome"]  # of the engine as a whole: if it is not ok, no more shapes can be tried
        self.loaded: Loaded | None = None  # what the first worker said
        self.held: int | None = None  # bytes of all tensors alive after the first worker's first short call
        self.details: dict = {}  # what the engine says of how it works
        self.deaths: list[str] = []  # why workers ended

    def run(self, work: Callable[[EngineProcess, Shape, list[list[int]]], Any]) -> None:
        """Call `work` with a worker, each shape and its prompts. Raises UserError for a checkpoint that is damaged."""
        self._tokens = prompt(self.folder, self.shapes[-1].input_tokens, self.seed)
        try:
            for shape in progress(self.shapes, f"generation with {self.engine}, shapes"):
                self.outcomes[shape] = self._prevented(shape) or self._try(shape, work)
            if self._worker:
                with contextlib.suppress(Died, OutOfMemory, Unavailable):
                    _, self.details = self._worker.held()
        finally:
            self._close()

    @property
    def kinds(self) -> tuple[str, ...]:
        """What peaks of memory there are on the device; on one that was never reached, as on a CPU."""
        return memory.kinds(self.loaded.device if self.loaded else self.device)

    def made_with(self) -> dict:
        """Return packages, python, device and threads, for the result's provenance."""
        if self.loaded:
            return self.loaded.made_with
        device = checkpoints.pick_device("cpu" if self.device == "cpu" else "auto")  # cuda may not be there
        return {"packages": {}, "python": platform.python_version(), "device": provenance.describe_device(device)}

    def checkpoint(self) -> dict:
        """Return the checkpoint's description, as it was loaded if it was."""
        return self.loaded.checkpoint if self.loaded else checkpoints.describe(self.folder)

    def _prevented(self, shape: Shape) -> str | None:
        """Return why a shape is not to be tried, or None once there is a worker for it."""
        for other, outcome in self.outcomes.items():
            same_length = other.input_tokens == shape.input_tokens
            if other.within(shape) and (outcome == "oom" or (outcome.startswith("failed") and same_length)):
                return outcome
        if not self._worker and self.outcome == "ok":
            self._start()
        if self.outcome != "ok":
            return self.outcome
        tokens = shape.input_tokens + shape.output_tokens
        if tokens > self.loaded.context:
            return f"unavailable: {tokens} tokens are more than the model's {self.loaded.context} positions"
        return None

    def _start(self) -> None:
        """Start a worker with the model loaded, and what its libraries set up once behind it."""
        try:
            self._worker = self._new_worker(self.engine, self._python, limit=self._limit)
            longest, output, batch = self.shapes[-1]
            most = {"max_tokens": longest + output, "max_batch": batch}
            loaded = self._worker.load(self.folder, device=self.device, seed=self.seed, **most)
            self._worker.generate([self._tokens[:1]], 2)
            held, self.details = self._worker.held()
        except (OutOfMemory, Unavailable, Died) as error:
            self.outcome = _outcome(error)
            self._close()
        else:
            self.loaded, self.held = self.loaded or loaded, self.held or held

    def _try(self, shape: Shape, work: Callable) -> str:
        try:
            prompts = [self._tokens[: shape.input_tokens]] * shape.batch_size
            self.results[shape] = work(self._worker, shape, prompts)
        except (OutOfMemory, Unavailable) as error:
            if self._worker.ended:  # where memory runs out on a CPU, the system may kill it
                self._close()
            return _outcome(error)
        except Died as error:
            self._close()
            self.deaths.append(str(error))
            print(f"warning: the engine {self.engine} ended at {shape}: {error}", file=sys.stderr)
            if len(self.deaths) == DEATHS:
                self.outcome = f"failed: {DEATHS} workers ended, the last one so: {error}"
            return _outcome(error)
        return "ok"

    def _close(self) -> None:
        if self._worker:
            self._worker.close()
        self._worker = None


def _outcome(error: Exception) -> str:
    if isinstance(error, OutOfMemory):
        return "oom"
    return f"{'failed' if isinstance(error, Died) else 'unavailable'}: {error}"
