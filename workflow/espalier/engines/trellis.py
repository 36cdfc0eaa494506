"""Trellis, Espalier's own decode engine (`espalier/trellis`): llama, mistral, qwen2, opt and glm, pruned and packed."""

from __future__ import annotations

from espalier.trellis import engine

PACKAGES = engine.PACKAGES
SAMPLINGS = engine.SAMPLINGS
probe = engine.probe


class Engine(engine.TrellisEngine):
    """Its decode step is plain on a CPU, and a CUDA graph on a GPU."""

    name = "trellis"
