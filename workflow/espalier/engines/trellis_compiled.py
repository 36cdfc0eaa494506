"""Trellis with its decode step compiled by torch, on a CPU: faster where a model is so small that calls count."""

from __future__ import annotations

from espalier.trellis import engine
from espalier.worker import Unavailable

PACKAGES = engine.PACKAGES
SAMPLINGS = engine.SAMPLINGS


def probe(device: str) -> None:
    """Raise Unavailable on CUDA."""
    if device == "cuda":
        raise Unavailable("on CUDA the step is a graph, and the engine is trellis")


class Engine(engine.TrellisEngine):
    """Each layout of the products is compiled once, in 4 to 13 s, for all lengths."""

    name = "trellis-compiled"
    compiled = True
