"""The arithmetic of peaks: by hand for one model, and against what is allocated while a stream works."""

from __future__ import annotations

import pytest
import torch

from espalier import memory
from espalier.data import Calibration, Dataset, Text
from espalier.models import footprint
from espalier.models.anatomy import blocks_of
from espalier.models.streaming import BlockStream, gradients
from families import VOCABULARY, tiny


def calibration(samples: int, length: int) -> Calibration:
    return Calibration(Text(Dataset("none", "local", path="."), "none"), samples=samples, length=length)


def forward(stream: BlockStream) -> None:
    with torch.no_grad():
        hidden = stream.enter()
        for index in range(len(stream)):
            with stream.resident(index):
                hidden = stream.run(index, hidden)
        stream.losses(hidden)


def backward(stream: BlockStream) -> None:
    for _ in gradients(stream):
        pass


def test_both_sums_by_hand():
    """Hidden size 32, two key/value heads of 8, four query heads, 48 neurons, 97 tokens, three blocks."""
    with torch.device("meta"):
        model = tiny("llama")
    attention, mlp, norms = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 48, 2 * 32
    block = attention + mlp + norms
    outputs = 32 + 16 + 16 + 32 + 48 + 48 + 32
    batch = 4 * 12
    inside = 7 * block * 2 + batch * (2 * 32 + outputs) * 2
    given = footprint.peak_bytes(model, calibration(5, 12), 4, copies=7, itemsize=2)
    assert given == inside
    beside = (2 * 97 * 32 + 32) * 2 + batch * (32 * 2 + 97 * (2 + 4 + 4))
    assert beside < inside
    model.config.vocab_size = 970  # the logits alone: the weights stay as they are
    wide = footprint.peak_bytes(model, calibration(5, 12), 4, copies=1, itemsize=2)
    assert wide == beside + batch * (970 - 97) * 10


def test_a_batch_is_never_larger_than_the_calibration_and_the_largest_block_counts():
    with torch.device("meta"):
        model = tiny("llama")
        few, many = (footprint.peak_bytes(model, calibration(3, 8), batch, copies=1, itemsize=4) for batch in (3, 99))
        assert few == many
        before = footprint.peak_bytes(model, calibration(3, 8), 1, copies=100, itemsize=4)
        blocks_of(model)[2].mlp.up_proj = torch.nn.Linear(32, 1000, bias=False)
        after = footprint.peak_bytes(model, calibration(3, 8), 1, copies=100, itemsize=4)
    assert after - before == (1000 - 48) * 32 * 100 * 4 + 8 * (1000 - 48) * 4


# Family, work, sets of hidden states (of which one is joined from its batches), copies, sizes, samples, length, batch
# size. What dominates is weights, hidden states, one batch in a block, logits.
CASES = [
    ("llama", forward, 3, 1, {"hidden_size": 64, "intermediate_size": 384}, 4, 16, 1),
    ("llama", forward, 3, 1, {}, 64, 64, 2),
    ("llama", forward, 3, 1, {}, 8, 64, 8),
    ("llama", forward, 3, 1, {"vocab_size": 1000}, 8, 64, 2),
    ("opt", forward, 3, 1, {"ffn_dim": 192}, 8, 32, 2),
    ("glm", forward, 3, 1, {}, 16, 32, 4),
    ("gpt_neox", forward, 3, 1, {}, 16, 32, 4),
    ("llama", backward, 3 + 4, 4, {"hidden_size": 64, "intermediate_size": 384}, 4, 16, 1),
    ("qwen2", backward, 3 + 4, 4, {}, 32, 64, 1),
]


@pytest.mark.parametrize(("family", "work", "sets", "copies", "sizes", "samples", "length", "batch"), CASES)
def test_what_a_stream_allocates_is_within_half_of_the_sum(family, work, sets, copies, sizes, samples, length, batch):
    """On a CPU nothing is moved; but a stream in float32 of 16-bit weights makes the copies a device would hold."""
    stream = started(family, sizes, samples, length, batch, "cpu")
    work(stream)  # what is made once, in the first pass, belongs to no peak
    measured = memory.peak_allocated_bytes(lambda: work(stream), "cpu", before=0)
    expected = footprint.peak_bytes(stream.model, calibration(samples, length), batch, copies=copies, itemsize=4)
    # Here the host's memory, in which the hidden states of all samples wait, is the device's.
    expected += sets * samples * length * stream.model.config.hidden_size * 4
    assert 0.5 < expected / measured < 1.5


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("work", "copies", "batch"), [(forward, 1, 4), (backward, 4, 1)])
def test_the_peak_on_a_device(work, copies, batch):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 32000}
    stream = started("llama", sizes | {"max_position_embeddings": 512}, 16, 512, batch, "cuda")
    work(stream)
    before = memory.allocated_bytes("cuda")
    measured = memory.peak_allocated_bytes(lambda: work(stream), "cuda") - before
    expected = footprint.peak_bytes(stream.model, calibration(16, 512), batch, copies=copies, itemsize=4)
    assert 0.5 < expected / measured < 1.5


def started(family: str, sizes: dict, samples: int, length: int, batch: int, device: str) -> BlockStream:
    model = tiny(family, **sizes).bfloat16()
    windows = torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(1))
    return BlockStream(model, windows, device, batch, dtype=torch.float32)
