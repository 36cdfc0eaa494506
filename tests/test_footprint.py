"""The arithmetic of peaks: by hand for one model, and against what is allocated while a stream works."""

from __future__ import annotations

import contextlib

import pytest
import torch

import tiny as tiny_llama
from espalier import checkpoints, memory
from espalier.data import Calibration, Dataset, Text
from espalier.models import footprint, streaming, widths
from espalier.models.anatomy import blocks_of
from espalier.models.streaming import BlockStream, gradients
from espalier.prune import depth, flap, llm_pruner, wanda_sp
from espalier.recipes import build
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
    losses = 5 * 12  # so few tokens that all are there at once
    beside = (2 * 97 * 32 + 32) * 2 + losses * (32 * 2 + 97 * (2 + 4 + 4))
    assert beside < inside
    model.config.vocab_size = 970  # the logits alone: the weights stay as they are
    wide = footprint.peak_bytes(model, calibration(5, 12), 4, copies=1, itemsize=2, losses=True)
    assert wide == beside + losses * (970 - 97) * 10
    long = footprint.peak_bytes(model, calibration(500, 1200), 1, copies=1, itemsize=2, losses=True)
    assert long == (2 * 97 * 32 + 32) * 2 + 1200 * (32 * 2 + 970 * 10), "one window of losses at a time"


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


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("family", "work", "sets", "copies", "sizes", "samples", "length", "batch"), CASES)
def test_what_a_stream_allocates_is_within_half_of_the_sum(family, work, sets, copies, sizes, samples, length, batch):
    """On a CPU nothing is moved; but a stream in float32 of 16-bit weights makes the copies a device would hold."""
    stream = started(family, sizes, samples, length, batch, "cpu")
    work(stream)  # what is made once, in the first pass, belongs to no peak
    measured = memory.peaks(lambda: work(stream), "cpu", before=0)["allocated"]
    expected = footprint.peak_bytes(
        stream.model, calibration(samples, length), batch, copies=copies, itemsize=4, losses=True
    )
    # Here the host's memory, in which the hidden states of all samples wait, is the device's.
    expected += sets * samples * length * stream.model.config.hidden_size * 4
    assert 0.5 < expected / measured < 1.5


class Done(Exception):
    """All blocks are scored."""


METHODS = {
    "depth perplexity": (depth, {"blocks": 1, "criterion": "perplexity"}),
    "depth block-influence": (depth, {"blocks": 1, "criterion": "block-influence"}),
    "depth taylor": (depth, {"blocks": 1, "criterion": "taylor"}),
    "llm-pruner": (llm_pruner, {"ratio": 0.5, "keep_first": 0, "keep_last": 0, "order": "mixed"}),
    "flap": (flap, {"ratio": 0.5}),
    "wanda-sp": (wanda_sp, {"ratio": 0.5}),
}


@pytest.fixture
def one_thread():
    """Matrix products of several threads take scratch memory, which a device would not hold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_says_is_what_it_takes(name, monkeypatch, tmp_path):
    """Where weights dominate: what is moved is copied, as it would be to a device, and counted until blocks go."""
    module, settings = METHODS[name]
    parent = tiny_llama.llama(tmp_path / "parent", layers=4, hidden=128, mlp=512)
    sets = tiny_llama.calibration(tmp_path / "words", samples=2, length=8)
    checkpoint = checkpoints.load(parent, "cpu", dtype=torch.bfloat16)
    recipe = build(module.Recipe, {**settings, "calibration": sets}, name)

    def copied(tensors, device, dtype):
        homes = [one.data for one in tensors]
        for one in tensors:
            one.data = one.data.to(device, dtype if isinstance(one, torch.nn.Parameter) else None, copy=True)
        try:
            yield
        finally:
            for one, home in zip(tensors, homes, strict=True):
                one.data = home

    def done(*_):
        raise Done

    def zeros(layer):
        return torch.zeros(layer.in_features)

    monkeypatch.setattr(streaming, "_moved", contextlib.contextmanager(copied))
    monkeypatch.setattr(depth, "remove_blocks", done)
    monkeypatch.setattr(widths, "choose", done)
    # Scores of FLAP and Wanda-sp are computed by the host, in its memory.
    monkeypatch.setattr(flap, "channel_metrics", lambda parts, *_: tuple(map(zeros, (parts.output, parts.down))))
    monkeypatch.setattr(wanda_sp, "channel_scores", lambda layer, _: zeros(layer))
    monkeypatch.setattr(checkpoints, "load", lambda *_, **__: checkpoint)

    def work() -> None:
        with pytest.raises(Done):
            module.apply(parent, tmp_path, recipe, seed=0, device="cpu")

    work()
    measured = memory.peaks(work, "cpu", before=0)["allocated"]
    assert module.peak_bytes(checkpoint.model, recipe) == pytest.approx(measured, rel=0.2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("work", "copies", "batch"), [(forward, 1, 4), (backward, 4, 1)])
def test_the_peak_on_a_device(work, copies, batch):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 32000}
    stream = started("llama", sizes | {"max_position_embeddings": 512}, 16, 512, batch, "cuda")
    work(stream)
    before = memory.allocated_bytes("cuda")
    measured = memory.peaks(lambda: work(stream), "cuda")["allocated"] - before
    expected = footprint.peak_bytes(stream.model, calibration(16, 512), batch, copies=copies, itemsize=4, losses=True)
    assert 0.5 < expected / measured < 1.5


def started(family: str, sizes: dict, samples: int, length: int, batch: int, device: str) -> BlockStream:
    model = tiny(family, **sizes).bfloat16()
    windows = torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(1))
    return BlockStream(model, windows, device, batch, dtype=torch.float32)
