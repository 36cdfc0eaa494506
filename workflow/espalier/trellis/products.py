"""Products with weights, laid out as was measured to be fastest: the heuristic dataflow of FlashDecoding++.

Hong et al. 2023 (arXiv 2311.01282), section 5: which implementation of a product of M rows with a weight N × K is
fastest depends on M, N, K and the device alone. So each shape is measured once, and looked up from then on. Here a
choice is a layout and whether the weights that share an input (q, k, v; gate, up) are fused into one.

Measured seconds are kept in one JSON file for each machine, number of threads, version of torch and of the layouts'
code, and dtype, in espalier/trellis of $XDG_CACHE_HOME (by default ~/.cache).
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from espalier.bandwidth import last_level_cache, timed
from espalier.errors import UserError
from espalier.files import read_json, write_json
from espalier.memory import is_out_of_memory
from espalier.provenance import code_version, describe_device, version
from espalier.trellis import layouts
from espalier.trellis.layouts import LAYOUTS, Stored

TIE = 1.03  # seconds that differ by less count as equal, and the plainer layout is taken
MEASURED_BYTES = 64 * 2**20  # of larger weights a part is measured: time grows in proportion to their size
MEASURED_ROWS = 64  # for more rows these are measured: from there on the bound is arithmetic, not memory
LEAST_ROUNDS, MOST_ROUNDS = 3, 12  # in which a shape is measured: as many of these as there is time for
SECONDS = 0.5  # for the rounds of a shape

PLAIN = "stored separate"
# The plainest first, which wins a tie.
ARRANGEMENTS = [f"{layout} {how}" for layout in LAYOUTS for how in ("separate", "fused")]


class Projections:
    """Products of one input with several weights, such as those of q, k and v, each weight held once.

    `weights` are out_i × in, of one dtype and device, `biases` their biases or None. Whoever gives them lets go of
    them, or they are held twice once another layout is chosen.
    """

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]):
        if len({(weight.shape[1], weight.dtype, weight.device) for weight in weights}) != 1:
            raise ValueError("Weights that share an input have one number of input channels, dtype and device.")
        self._outputs = [len(weight) for weight in weights]
        self._inputs, self._dtype, self._device = weights[0].shape[1], weights[0].dtype, str(weights[0].device)
        biases = [None if bias is None else bias.detach() for bias in biases]
        self._parts = [Stored(weight.detach(), bias) for weight, bias in zip(weights, biases, strict=True)]
        self._choice = {"arrangement": PLAIN, "rows": None, "seconds": {}}

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return … × out_i for each weight, of x, … × in; those of fused weights are views of one tensor."""
        if len(self._parts) == len(self._outputs):
            return tuple(part(x) for part in self._parts)
        return self._parts[0](x).split(self._outputs, -1)

    def arrange(self, rows: int) -> None:
        """Lay the weights out as is fastest for products of `rows` rows; any other number stays possible.

        A shape that is not known yet is measured, which takes up to about half a second and some memory.
        """
        seconds = {}
        if rows > 0 and self._inputs and all(self._outputs):
            seconds = known_seconds(min(rows, MEASURED_ROWS), self._outputs, self._inputs, self._dtype, self._device)
        self._lay_out(fastest(seconds) if seconds else PLAIN)
        self._choice |= {"rows": rows, "seconds": seconds}

    def choice(self) -> dict:
        """Return what `arrange` chose, for how many rows, and the seconds that it knew, as plain JSON."""
        return dict(self._choice)

    def _lay_out(self, arrangement: str) -> None:
        if arrangement == self._choice["arrangement"]:
            return
        layout, how = arrangement.split()
        # Memory may run out on the way. So a part is let go of only once another stands for it, and no weight is lost.
        self._choice["arrangement"] = None
        self._lay_out_parts(Stored)
        if how == "fused" and len(self._parts) > 1:
            bias = self._joined_bias([part.bias for part in self._parts])
            self._parts = [Stored(torch.cat([part.weight for part in self._parts]), bias)]
        elif how == "separate" and len(self._parts) < len(self._outputs):
            (part,) = self._parts
            biases = [None] * len(self._outputs) if part.bias is None else part.bias.split(self._outputs)
            self._parts = [Stored(*pair) for pair in zip(part.weight.split(self._outputs), biases, strict=True)]
        self._lay_out_parts(LAYOUTS[layout])
        self._choice["arrangement"] = arrangement

    def _lay_out_parts(self, layout: type) -> None:
        for place, part in enumerate(self._parts):
            self._parts[place] = layout(part.dense(), part.bias)

    def _joined_bias(self, biases: list[torch.Tensor | None]) -> torch.Tensor | None:
        if all(bias is None for bias in biases):
            return None
        nothing = torch.zeros(max(self._outputs), dtype=self._dtype, device=self._device)
        return torch.cat(
            [nothing[:size] if bias is None else bias for bias, size in zip(biases, self._outputs, strict=True)]
        )


def fastest(seconds: dict[str, float]) -> str:
    """Return the arrangement of the least seconds; of those within `TIE`, the plainest."""
    least = min(seconds.values())
    return next(name for name in ARRANGEMENTS if name in seconds and seconds[name] < TIE * least)


def possible(rows: int, weights: int, dtype: torch.dtype, device: str) -> list[str]:
    """Return the arrangements that there are for so many weights that share an input."""
    found = []
    for name in ARRANGEMENTS:
        layout, how = name.split()
        if (weights > 1 or how == "separate") and LAYOUTS[layout].works(rows, dtype, device):
            found.append(name)
    return found


def known_seconds(rows: int, outputs: Sequence[int], inputs: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Return arrangement → seconds of `rows` × inputs with weights outputs_i × inputs, measured now or before."""
    file = cache_file(dtype, device)
    table, key = _table(file), f"{rows} x {inputs} -> {' + '.join(map(str, outputs))}"
    names = possible(rows, len(outputs), dtype, device)
    if not _is_measured(table.get(key), names):
        table[key] = measure(names, rows, outputs, inputs, dtype, device)
        # Whoever else writes the file now: one of both wins, and what is lost is measured anew. A folder that cannot
        # be written to costs no more than that either.
        with contextlib.suppress(UserError, OSError):
            write_json(file, _read(file) | table)
    return table[key]


def measure(
    names: Sequence[str], rows: int, outputs: Sequence[int], inputs: int, dtype: torch.dtype, device: str
) -> dict[str, float]:
    """Return arrangement → seconds, the least of several rounds, in which all arrangements take turns.

    Weights are read from memory, as in a model whose other weights were read since: before each product the caches are
    filled with something else. Of weights above `MEASURED_BYTES` a part is measured. An arrangement that this device
    cannot run, such as a kernel that needs more shared memory than it has, is left out; `PLAIN` is always there.
    """
    whole = sum(outputs) * inputs * dtype.itemsize
    kept = [max(1, size * min(whole, MEASURED_BYTES) // whole) for size in outputs]
    filler = torch.ones(2 * last_level_cache(device) // 4, device=device)
    # Written, and not only allocated: else nothing of it is in memory, and nothing is read.
    fused = torch.full((sum(kept), inputs), 0.01, dtype=dtype, device=device)
    x = torch.full((rows, inputs), 0.01, dtype=dtype, device=device)
    works = {}
    with torch.inference_mode():
        for name in names:
            layout, how = name.split()
            weights = fused.split(kept) if how == "separate" else [fused]
            parts = [LAYOUTS[layout](weight, None) for weight in weights]
            works[name] = lambda parts=parts: [part(x) for part in parts]
            try:
                works[name]()  # to warm up, and to compile kernels
            except Exception as error:  # whatever a library or a compiler raises
                if name == PLAIN or is_out_of_memory(error):
                    raise
                del works[name]
        seconds: dict[str, list[float]] = {name: [] for name in works}
        started = time.perf_counter()
        for done in range(MOST_ROUNDS):
            if done >= LEAST_ROUNDS and time.perf_counter() - started > SECONDS:
                break
            for name, work in works.items():
                filler.sum()
                seconds[name].append(timed(work, device))
    return {name: min(times) for name, times in seconds.items()}


def cache_file(dtype: torch.dtype, device: str) -> Path:
    """Return where measured seconds are kept."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    about = (*_machine_and_code(device), f"{torch.get_num_threads()}-threads", str(dtype).removeprefix("torch."))
    return folder / "espalier" / "trellis" / (re.sub(r"[^\w.+-]+", "-", "_".join(about)) + ".json")


@cache
def _machine_and_code(device: str) -> tuple[str, ...]:
    """Return what seconds depend on and a process does not change."""
    on_cuda = device.startswith("cuda")
    return (
        describe_device(device)["name"],
        f"cache-{last_level_cache(device)}",
        f"triton-{version('triton')}" if on_cuda else torch.backends.cpu.get_cpu_capability(),
        f"torch-{torch.__version__}",
        code_version(Path(layouts.__file__))[:8],  # and of kernels.py, which it imports
    )


@cache
def _table(file: Path) -> dict:
    """Return what this process knows of a file's shapes: read once, and added to as more are measured."""
    return _read(file)


def _read(file: Path) -> dict:
    try:
        found = read_json(file)
    except (UserError, OSError):  # missing or damaged: nothing is known
        return {}
    return found if isinstance(found, dict) else {}


def _is_measured(seconds: object, names: Sequence[str]) -> bool:
    """Whether these are seconds of such arrangements, the plain one among them."""
    if not isinstance(seconds, dict) or not {PLAIN} <= set(seconds) <= set(names):
        return False
    return all(isinstance(value, float) and value > 0 for value in seconds.values())
