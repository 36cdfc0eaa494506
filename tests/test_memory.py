"""What is allocated, against sums done by hand: on a CPU for tensors and for models, on CUDA with a fake allocator."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from espalier import checkpoints, memory, plugins, recipes
from tiny import calibration, llama

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


IN_A_JOB = """
import gc
from espalier import cli, memory
cli.import_lightly()
import torch
assert gc.isenabled() and gc.get_freeze_count() > 100_000
held = torch.zeros(5)
assert memory.allocated_bytes("cpu") == 20
gc.unfreeze()
assert memory.allocated_bytes("cpu") == 20
"""


def test_nothing_that_counts_is_among_what_jobs_import():
    """The garbage collector, who names all tensors, does not look at what was imported."""
    subprocess.run([sys.executable, "-c", IN_A_JOB], check=True)


def test_weights_in_the_order_of_onednn_count():
    weight = torch.randn(512, 512)
    before = memory.allocated_bytes("cpu")
    reordered = weight.to_mkldnn()
    assert memory.allocated_bytes("cpu") - before == MIB
    del reordered
    assert memory.allocated_bytes("cpu") == before


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("models") / "dense")


# More in memory than in the file: 128 bytes are the frequencies of the rotary embedding, twice; 56 an offset a layer,
# which bitsandbytes' settings hold in the file. In the first forward pass it turns 2816 scales of 32 bits into 16 where
# the CPU multiplies bfloat16. GPTQModel has tables for unpacking, some of them made in that pass.
@pytest.mark.parametrize(
    ("method", "recipe", "more", "after_forward"),
    [
        (None, {}, (128, 128), (0, 0)),
        ("bitsandbytes", {"bits": 8}, (128, 128), (0, 64)),
        ("bitsandbytes", {"bits": 4}, (128, 128), (-2 * 2816, 0)),
        ("bitsandbytes", {"bits": 4, "double_quantization": True}, (184, 184), (-12000, 0)),
        ("gptq", {"bits": 4, "group_size": 32}, (128, 14000), (0, 20000)),
        ("round-to-nearest", {"bits": 8, "symmetric": True, "activations": 8}, (128, 128), (0, 0)),
        ("round-to-nearest", {"bits": 4, "symmetric": True, "activations": 8}, (128, 128), (0, 0)),
        ("round-to-nearest", {"bits": 3, "group_size": 16}, (128, 128), (0, 0)),
    ],
)
def test_all_that_a_quantized_model_holds_is_seen(dense, tmp_path, method, recipe, more, after_forward):
    folder = dense
    if method:
        folder = tmp_path / "quantized"
        folder.mkdir()
        recipe = recipe | ({"calibration": calibration(tmp_path / "words")} if method == "gptq" else {})
        module = plugins.load("quantize", method)
        module.apply(dense, folder, recipes.build(module.Recipe, recipe, "recipe"), seed=0, device="cpu")
    # Settings that bitsandbytes writes as tensors of bytes are no tensors in memory.
    settings = ("bitsandbytes__nf4", "weight_format")
    stored = load_file(folder / "model.safetensors").items()
    in_file = sum(one.numel() * one.element_size() for name, one in stored if not name.endswith(settings))
    del stored
    before = memory.allocated_bytes("cpu")
    model = checkpoints.load(folder, device="cpu").model
    loaded = memory.allocated_bytes("cpu") - before
    assert more[0] <= loaded - in_file <= more[1]
    with torch.no_grad():
        model(torch.arange(40)[None])
    assert after_forward[0] <= memory.allocated_bytes("cpu") - before - loaded <= after_forward[1]


def test_peak_of_a_matrix_product_is_its_result():
    factor = torch.randn(512, 512)
    before = memory.allocated_bytes("cpu")
    peak = memory.peaks(lambda: (factor @ factor).shape, "cpu")["allocated"]
    assert peak - before == MIB


def test_peak_of_a_chain_of_layers_is_one_input_and_one_output():
    layers = torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(4)))
    rows = torch.randn(1000, 256)
    before = memory.allocated_bytes("cpu")
    with torch.no_grad():
        peak = memory.peaks(lambda: layers(rows), "cpu", before)["allocated"]
    assert peak - before == 2 * 1000 * 256 * 4


def test_peak_keeps_what_the_work_frees_of_earlier_tensors():
    earlier = [torch.zeros(MIB)]
    before = memory.allocated_bytes("cpu")

    def work():
        earlier.clear()
        return torch.zeros(MIB // 2)

    assert memory.peaks(work, "cpu")["allocated"] - before == 2 * MIB


def test_highest_level_may_lie_before_the_end_and_never_below_the_start():
    assert memory.highest_level([5, -3, 2, -4]) == 5
    assert memory.highest_level([5, -3, 4, -4]) == 6
    assert memory.highest_level([-7, 3]) == 0


def test_profiler_stops_when_the_work_fails():
    with pytest.raises(ZeroDivisionError):
        memory.peaks(lambda: 1 / 0, "cpu")["allocated"]
    before = memory.allocated_bytes("cpu")
    assert memory.peaks(lambda: torch.zeros(MIB), "cpu")["allocated"] - before == 4 * MIB


def test_out_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**50)
    assert memory.is_out_of_memory(found.value)
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert memory.is_out_of_memory(MemoryError())
    assert not memory.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not memory.is_out_of_memory(ValueError("out of memory"))


class FakeAllocator:
    """An allocator that takes blocks of 100 bytes from the device, and keeps them until its cache is emptied."""

    def __init__(self, monkeypatch):
        self.level = self.peak = self.reserved = self.peak_reserved = 0
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: self.level)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.peak)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: self.peak_reserved)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: setattr(self, "reserved", self.blocks()))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def blocks(self) -> int:
        return -(-self.level // 100) * 100

    def reset(self):
        self.peak, self.peak_reserved = self.level, self.reserved

    def change(self, *sizes: int):
        for size in sizes:
            self.level += size
            self.reserved = max(self.reserved, self.blocks())
            self.peak, self.peak_reserved = max(self.peak, self.level), max(self.peak_reserved, self.reserved)


def test_peaks_on_cuda_are_those_of_the_work_alone(monkeypatch):
    allocator = FakeAllocator(monkeypatch)
    allocator.change(250, 900, -900)  # weights, and what is left in the cache
    assert memory.allocated_bytes("cuda") == 250
    assert memory.peaks(lambda: allocator.change(120, -120, 80, -80), "cuda") == {"allocated": 370, "reserved": 400}
    assert memory.peaks(lambda: None, "cuda:0") == {"allocated": 250, "reserved": 300}
    assert memory.peaks(lambda: None, "cpu", before=7) == {"allocated": 7}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_on_cuda_counts_the_temporary():
    factor = torch.randn(1024, 1024, device="cuda")
    held = memory.allocated_bytes("cuda")
    one = memory.peaks(lambda: (factor @ factor).shape, "cuda")
    assert memory.allocated_bytes("cuda") == held, "cuBLAS's workspace does not count as held"
    memory.allocated_bytes("cuda")
    peaks = memory.peaks(lambda: torch.stack([factor @ factor, factor @ factor]).shape, "cuda")
    # Two products and their stack, in place of one product; both peaks hold the workspace.
    assert peaks["allocated"] - one["allocated"] == 3 * 4 * MIB
    assert peaks["reserved"] >= peaks["allocated"]
