"""What is allocated on a CPU, against sums done by hand."""

from __future__ import annotations

import gc

import pytest
import torch

from espalier import memory

MIB = 2**20


def test_tensor_counts_once_however_often_it_is_seen():
    before = memory.allocated_bytes("cpu")
    tensor = torch.zeros(MIB)
    views = [tensor.view(1024, 1024), tensor[5:], tensor.detach()]
    assert memory.allocated_bytes("cpu") - before == 4 * MIB
    del tensor, views
    assert memory.allocated_bytes("cpu") == before


def test_tensor_in_an_odd_place_counts():
    class State:
        __slots__ = ("inside",)

    before = memory.allocated_bytes("cpu")
    layer = torch.nn.Linear(4, 4)
    own = memory.allocated_bytes("cpu") - before
    layer.weight.quant_state = State()
    layer.weight.quant_state.inside = {"absmax": [torch.zeros(MIB, dtype=torch.uint8)]}
    assert memory.allocated_bytes("cpu") - before - own == MIB


def test_tensor_without_memory_counts_nothing():
    before = memory.allocated_bytes("cpu")
    kept = [torch.empty(MIB, device="meta"), torch.eye(3).to_sparse()]
    assert memory.allocated_bytes("cpu") - before < 1000
    del kept


def test_peak_of_a_matrix_product_is_its_result():
    factor = torch.randn(512, 512)
    before = memory.allocated_bytes("cpu")
    peak = memory.peak_allocated_bytes(lambda: (factor @ factor).shape, "cpu")
    assert peak - before == MIB


def test_peak_of_a_chain_of_layers_is_one_input_and_one_output():
    layers = torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(4)))
    rows = torch.randn(1000, 256)
    before = memory.allocated_bytes("cpu")
    with torch.no_grad():
        peak = memory.peak_allocated_bytes(lambda: layers(rows), "cpu", before)
    assert peak - before == 2 * 1000 * 256 * 4


def test_peak_keeps_what_the_work_frees_of_earlier_tensors():
    earlier = [torch.zeros(MIB)]
    before = memory.allocated_bytes("cpu")

    def work():
        earlier.clear()
        return torch.zeros(MIB // 2)

    assert memory.peak_allocated_bytes(work, "cpu") - before == 2 * MIB


def test_highest_level_may_lie_before_the_end_and_never_below_the_start():
    assert memory.highest_level([5, -3, 2, -4]) == 5
    assert memory.highest_level([5, -3, 4, -4]) == 6
    assert memory.highest_level([-7, 3]) == 0


def test_profiler_stops_when_the_work_fails():
    with pytest.raises(ZeroDivisionError):
        memory.peak_allocated_bytes(lambda: 1 / 0, "cpu")
    before = memory.allocated_bytes("cpu")
    assert memory.peak_allocated_bytes(lambda: torch.zeros(MIB), "cpu") - before == 4 * MIB


def test_out_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**50)
    assert memory.is_out_of_memory(found.value)
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert memory.is_out_of_memory(MemoryError())
    assert not memory.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not memory.is_out_of_memory(ValueError("out of memory"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_on_cuda_counts_the_temporary():
    factor = torch.randn(1024, 1024, device="cuda")
    _ = factor @ factor  # the library's workspace
    del _
    gc.collect()
    before = memory.allocated_bytes("cuda")
    assert memory.peak_allocated_bytes(lambda: (factor @ factor).shape, "cuda") - before == 4 * MIB
