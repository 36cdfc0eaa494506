"""Hugging Face transformers: `model.generate` with its dynamic key-value cache. The baseline: nothing is tuned."""

from __future__ import annotations

from espalier import hf_generation

PACKAGES = hf_generation.PACKAGES
SAMPLINGS = hf_generation.SAMPLINGS
probe = hf_generation.probe


class Engine(hf_generation.HFGeneration):
    """Whatever transformers does for this model by default."""

    name = "hf"
