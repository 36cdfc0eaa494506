"""GPTQModel made fit for a pipeline: set up before it is imported, silent in logs, loaded in the dtype asked for.

And without code that a checkpoint carries, which GPTQModel runs whether or not anybody trusts it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from espalier.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Kernel(NamedTuple):
    """A way of GPTQModel to multiply by packed weights: its name there, and what it takes."""

    backend: str
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    asymmetric: bool  # whether it knows zero points
    device: str | None  # the only one that it runs on


ALL_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)
KERNELS = {
    "torch": Kernel("GPTQ_TORCH", (2, 3, 4, 8), ALL_SIZES, True, None),
    "torch-aten": Kernel("GPTQ_TORCH_ATEN", (4,), (16, 32, 64, 128), True, "cpu"),
    "triton": Kernel("GPTQ_TRITON", (2, 4, 8), ALL_SIZES, True, "cuda"),
    "exllama-v2": Kernel("GPTQ_EXLLAMA_V2", (4,), (-1, 32, 64, 128), True, "cuda"),
    "marlin": Kernel("GPTQ_MARLIN", (4, 8), (-1, 32, 64, 128), False, "cuda"),
    "machete": Kernel("GPTQ_MACHETE", (4, 8), (-1, 64, 128), True, "cuda"),
}


def check(kernel: str, bits: int, group_size: int, symmetric: bool) -> None:
    """Raise ValueError for what a kernel of `KERNELS` does not take."""
    known = KERNELS[kernel]
    for key, value, taken in (("bits", bits, known.bits), ("group_size", group_size, known.group_sizes)):
        if value not in taken:
            raise ValueError(f"the kernel '{kernel}' takes '{key}' {', '.join(map(str, taken))}, not {value}.")
    if not (symmetric or known.asymmetric):
        raise ValueError(f"the kernel '{kernel}' needs 'symmetric: true'.")


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
def no_carried_code(trusted: bool) -> Iterator[None]:
    """Unless it is trusted, have transformers refuse to import code that a checkpoint carries.

    GPTQModel imports a model's class before it looks at trust, and where a tokenizer cannot be loaded without trust, it
    loads it again with trust. It goes on without either, and what needs code of its own then fails as it should.
    Import GPTQModel before: a module of transformers that is first imported in here might keep the refusal.
    """
    from transformers import dynamic_module_utils

    def refuse(folder, file, *_, **__):
        raise ValueError(f"{folder} carries code, {file}, that nobody has said to trust.")

    usual = dynamic_module_utils.get_cached_module_file
    dynamic_module_utils.get_cached_module_file = usual if trusted else refuse
    try:
        yield
    finally:
        dynamic_module_utils.get_cached_module_file = usual


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


def load(source: Path, dtype: str, device: str, kernel: str = "auto", **options) -> PreTrainedModel:
    """Return a packed model that computes in `dtype`, by a name of `KERNELS`, or auto.

    With auto on a CPU every number of bits takes the same path: weights are unpacked for each product, in `dtype`,
    float32 included. GPTQModel's own choice there would be bfloat16, with a fast kernel for 4 bits and a compiled one
    (up to 15 s) for others, and neither speed nor error could be compared. On CUDA its choice of kernel stands. All
    kernels but `torch` on a CPU know no float32: it becomes float16 on CUDA, and bfloat16 for torch-aten.
    """
    kind = "cuda" if device.startswith("cuda") else "cpu"
    if kernel != "auto" and KERNELS[kernel].device not in (None, kind):
        raise UserError(
            f"{source} is to run by the kernel '{kernel}', which needs {KERNELS[kernel].device}, not {kind}."
        )
    prepare(device)
    import torch

    with quiet():
        from gptqmodel import BACKEND, GPTQModel
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear

        if kernel == "auto":
            kernel = "torch" if kind == "cpu" else kernel
        backend = BACKEND.AUTO if kernel == "auto" else BACKEND[KERNELS[kernel].backend]
        if kind == "cpu":
            # It computes rightly in float32, but its list of dtypes leaves it out.
            TorchLinear.SUPPORTS_DTYPES = [torch.float16, torch.bfloat16, torch.float32]
            TorchLinear.optimize = lambda self, *_, **__: None  # else each layer is compiled
        if dtype == "float32" and (kind == "cuda" or kernel == "torch-aten"):
            dtype = "float16" if kind == "cuda" else "bfloat16"
        options = {"dtype": getattr(torch, dtype), "backend": backend, **options}
        with no_carried_code(options.get("trust_remote_code", False)):
            return GPTQModel.load(str(source), device=device, **options).model
