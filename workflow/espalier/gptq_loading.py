"""GPTQModel made fit for a pipeline: set up before it is imported, silent in logs, loaded in the dtype asked for."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prepare(device: str) -> None:
    """Set GPTQModel's environment variables, which it reads when it is imported; those that a user set stay."""
    # With one worker, which is its choice for two cores, it waits for a second one for ever or crashes.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, min(12, (os.cpu_count() or 1) // 2))))
    if not device.startswith("cuda"):
        # Compiling its C++ packer takes 20 s and a compiler; the one in Python is quick enough for a CPU's models.
        os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep GPTQModel's banner, tables and redrawn bars out of logs; a failure prints the last of what it said."""
    if sys.stdout.isatty():
        yield
        return
    logging.getLogger("tokenicer").setLevel(logging.WARNING)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    except Exception:
        print(said.getvalue()[-4000:], file=sys.stderr)
        raise


@contextlib.contextmanager
def no_logs() -> Iterator[None]:
    """Send the log file that GPTQModel puts into ./logs for each quantization to a temporary folder."""
    from gptqmodel.looper import loop_processor

    usual = loop_processor._PROJECT_LOG_DIR
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        loop_processor._PROJECT_LOG_DIR = Path(folder)
        try:
            yield
        finally:
            loop_processor._PROJECT_LOG_DIR = usual


def load(source: Path, dtype: str, device: str, **options) -> PreTrainedModel:
    """Return a packed model that computes in `dtype`.

    On a CPU every number of bits takes the same path: weights are unpacked for each product, in `dtype`, float32
    included. GPTQModel's own choice there would be bfloat16, with a fast kernel for 4 bits and a compiled one (up to
    15 s) for others, and neither speed nor error could be compared. On CUDA its choice of kernel stands, and float32
    becomes float16, because the kernels know no other.
    """
    prepare(device)
    import torch

    with quiet():
        from gptqmodel import BACKEND, GPTQModel
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear

        backend = BACKEND.AUTO
        if device.startswith("cuda"):
            dtype = "float16" if dtype == "float32" else dtype
        else:
            backend = BACKEND.GPTQ_TORCH
            # It computes rightly in float32, but its list of dtypes leaves it out.
            TorchLinear.SUPPORTS_DTYPES = [torch.float16, torch.bfloat16, torch.float32]
            TorchLinear.optimize = lambda self, *_, **__: None  # else each layer is compiled
        options = {"dtype": getattr(torch, dtype), "backend": backend, **options}
        return GPTQModel.load(str(source), device=device, **options).model
