"""The GPU that CUDA shows first, as NVIDIA's management library knows it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from espalier import devices


def first_gpu() -> tuple[ModuleType, Any] | None:
    """Return pynvml and its handle of the GPU; None where there is no GPU, or nothing to ask it with."""
    try:
        import pynvml
    except ImportError:
        return None
    uuid = next(iter(devices.present().values()), None)
    if uuid is None:
        return None
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError:
        return None
