"""An engine's worker, from the side of the job that drives it. Nothing here imports torch.

The worker (`worker.py`) runs in the Python that the engine needs. One that dies, or does not answer in time, is ended
with all that it started, and the error says so; the driver may start another.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from espalier import worker
from espalier.errors import UserError
from espalier.provenance import LIBRARY

SECONDS_TO_CLOSE = 10.0


class OutOfMemory(Exception):
    """Memory ran out in a call. The worker goes on, unless the system has killed it for that: then it has `ended`."""


class Died(Exception):
    """The worker ended, hung, or failed so that it cannot be trusted; it is gone. The text is the reason."""


class Loaded(NamedTuple):
    """What a worker says of the model that it has loaded."""

    device: str  # cpu or cuda
    context: int  # most tokens, prompt and output, that the model has positions for
    allocated: int  # bytes of all tensors alive on the device
    checkpoint: dict  # the checkpoint's description, as loaded
    made_with: dict  # packages, python, device and threads, for the result's provenance


class Generated(NamedTuple):
    """What came of one timed call."""

    token_ids: list[list[int]]
    seconds: float  # wall time of the whole call
    first_token_seconds: float | None  # wall time until the first new token of every row was known, if that can be told
    cpu_seconds: float  # of all threads of the worker
    joules: float | None  # of the device, where it counts them
    first_tokens: int | None  # new tokens of all rows known at that moment: one a row, or more where rows are not alike


class EngineProcess:
    """A worker of the engine `name`, run by `python` (this one, if None); no request takes longer than `limit` s.

    Raises UserError if there is no such Python. Every request raises `worker.Unavailable` with the reason,
    `OutOfMemory`, `Died` or UserError.
    """

    def __init__(self, name: str, python: Path | None = None, *, limit: float = 1800.0, threads: int | None = None):
        self.name, self.limit = name, limit
        self.threads = threads or int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
        if python is not None and not python.exists():
            raise UserError(f"{python} is not there any more; the next run of snakemake builds it again.")
        paths = [str(LIBRARY.parent), *([os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else [])]
        self.process = subprocess.Popen(
            [str(python or sys.executable), "-m", "espalier.worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(self.threads)},
            start_new_session=True,  # a group of its own, to be ended as a whole
        )
        self.unread = b""
        self.kills = oom_kills()

    def probe(self, device: str) -> dict[str, str]:
        """Return the versions of the engine's packages; raises Unavailable where it cannot run."""
        return self._ask("probe", device=device)["packages"]

    def load(
        self,
        folder: Path | None,
        *,
        device: str,
        max_tokens: int,
        max_batch: int,
        seed: int,
        random: dict | None = None,
    ) -> Loaded:
        """Load a checkpoint, or make and load a model of random weights by the recipe `random`."""
        load = worker.Load(folder or Path(), device, self.threads, max_tokens, max_batch, seed)
        return Loaded(**self._ask("load", load={**asdict(load), "folder": str(load.folder)}, random=random))

    def generate(self, token_ids: list[list[int]], output_tokens: int, sampling: str = "greedy") -> Generated:
        """Return exactly `output_tokens` new tokens for each of the equally long prompts, and what they took."""
        return Generated(**self._generate(token_ids, output_tokens, sampling, memory=False))

    def peaks(self, token_ids: list[list[int]], output_tokens: int, sampling: str = "greedy") -> dict[str, int]:
        """Return the peak bytes of such a call, by `memory.kinds`. It is not timed: measuring slows it."""
        return self._generate(token_ids, output_tokens, sampling, memory=True)["peaks"]

    def held(self) -> tuple[int, dict[str, Any]]:
        """Return the bytes of all tensors alive on the device, and what the engine has to say of how it works."""
        found = self._ask("held")
        return found["allocated"], found["details"]

    @property
    def ended(self) -> bool:
        """Whether the worker is gone."""
        return self.process.poll() is not None

    def close(self) -> None:
        """End the worker, by asking first."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if self.process.poll() is None:
                self.process.stdin.write(b'{"ask": "close"}\n')
                self.process.stdin.close()
                self.process.wait(SECONDS_TO_CLOSE)
        self._end()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _generate(self, token_ids: list[list[int]], output_tokens: int, sampling: str, memory: bool) -> dict:
        return self._ask("generate", token_ids=token_ids, output_tokens=output_tokens, sampling=sampling, memory=memory)

    def _ask(self, ask: str, **more: object) -> dict:
        if self.process.stdin.closed:
            raise Died("its worker has ended before")
        try:
            self.process.stdin.write(json.dumps({"ask": ask, **more}).encode() + b"\n")
            self.process.stdin.flush()
            line = self._line()
        except OSError:
            line = b""
        except BaseException:  # such as Ctrl-C, which the worker's own group does not see
            self._end()
            raise
        if not line:
            reason = self._end()
            killed = self.process.returncode == -signal.SIGKILL and oom_kills() > self.kills
            raise OutOfMemory("the system has killed its worker") if killed else Died(reason)
        found = json.loads(line)
        if "ok" in found:
            return found["ok"]
        if found["error"] == "failed":
            self._end()
            raise Died(found["reason"])
        raise {"unavailable": worker.Unavailable, "out of memory": OutOfMemory, "user": UserError}[found["error"]](
            found["reason"]
        )

    def _line(self) -> bytes:
        """Return the next line of the worker's answers; empty if it has ended. Raises Died once `limit` is over."""
        until = time.monotonic() + self.limit
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.unread:
                if not selector.select(max(0.0, until - time.monotonic())):
                    self._end()
                    raise Died(f"there was no answer within {self.limit:g} s, the key 'limit'")
                found = os.read(self.process.stdout.fileno(), 1 << 20)
                if not found:
                    return b""
                self.unread += found
        line, _, self.unread = self.unread.partition(b"\n")
        return line

    def _end(self) -> str:
        """Kill the worker with all that it started, and return how it had ended before, if it had."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0 if self.process.poll() is None and not self.unread else 0.0)
        code = self.process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        if code is None:
            return "its worker was ended"
        if code == -signal.SIGKILL:
            return "its worker was killed"
        return f"its worker ended with {f'signal {-code}' if code < 0 else f'status {code}'}: the log says more"


def oom_kills() -> int:
    """Return how many processes the system has killed for lack of memory since it started."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
