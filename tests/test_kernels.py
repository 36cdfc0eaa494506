"""The Triton kernels: right under Triton's interpreter, and compiled for a GPU without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
CASES = Path(__file__).parent / "kernel_cases.py"
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
POINTERS = {
    "denominators": "*fp32",
    "largest_scores": "*fp32",
    "length": "*i64",
    "numerators": "*fp32",
    "recomputed": "*i64",
}
ATTENTION = {"KV_HEADS": 2, "WIDTH": 80, "SPLITS": 17, "BLOCK": 64, "BLOCK_WIDTH": 128}
# Every kernel, and the sizes that it is compiled for.
COMPILED = [
    ("attention_kernels", "_split_sums", ATTENTION | {"GROUP": 1, "BLOCK_GROUP": 16}),
    ("attention_kernels", "_split_sums", ATTENTION | {"GROUP": 4, "BLOCK_GROUP": 16}),
    ("attention_kernels", "_merge", ATTENTION | {"GROUP": 4, "BLOCK_SPLITS": 32}),
    ("kernels", "_gemv", {"ROWS": 4, "COLUMNS": 4, "BLOCK": 1024}),
    ("kernels", "_flat_gemm", {"BLOCK_ROWS": 16, "COLUMNS": 32, "BLOCK": 128, "SPLITS": 1}),
    ("kernels", "_add_splits", {"SPLITS": 3, "BLOCK": 256}),
]


@pytest.mark.parametrize("interpreted", ["1", pytest.param("0", marks=[pytest.mark.cuda, NO_GPU])])
def test_kernels_compute_what_float64_gives(interpreted):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(CASES)]
    environment = {**os.environ, "TRITON_INTERPRET": interpreted}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=CASES.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("module", "kernel", "sizes"), COMPILED)
def test_kernels_compile_for_a_gpu(module, kernel, sizes, tmp_path, monkeypatch):
    """The compiler finds mistakes of types and layouts that the interpreter does not know of."""
    import importlib

    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(importlib.import_module(f"espalier.trellis.{module}"), kernel)
    floats = ("centre", "scale", "low", "high")
    tensors = ("query", "keys", "values", "x", "weight", "bias", "output", "sums")
    types = {name: POINTERS.get(name, "i32") for name in function.arg_names}
    types |= dict.fromkeys(floats, "fp32") | dict.fromkeys(tensors, "*bf16") | dict.fromkeys(sizes, "constexpr")
    signature = {name: types[name] for name in function.arg_names}
    source = ASTSource(function, signature, {(function.arg_names.index(name),): size for name, size in sizes.items()})
    assert compiled(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
