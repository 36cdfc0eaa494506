"""A decode step of trellis recorded as a CUDA graph, as far as that can be tried without a GPU."""

from __future__ import annotations

import contextlib

import pytest
import torch

from espalier.trellis import products
from espalier.trellis.model import Trellis
from test_trellis import NEW, hf, model_of, prompts, trellis_of


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    """Leave the layouts as they are, and the user's file of what was measured alone."""
    monkeypatch.setattr(products, "known_seconds", lambda *_: {})


@pytest.fixture
def recording(monkeypatch):
    """Have a CUDA graph recorded as far as there is none: what is left fails with the error that is given."""

    def install(error):
        @contextlib.contextmanager
        def graph(_):
            yield
            raise error

        class Stream:
            def wait_stream(self, stream):
                pass

        fakes = {"Stream": Stream, "current_stream": Stream, "CUDAGraph": object, "graph": graph}
        fakes |= {"stream": contextlib.nullcontext, "synchronize": lambda: None}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    return install


def as_on_cuda(model, **options) -> Trellis:
    ours = trellis_of(model, **options)
    ours.on_cuda = ours.recordable = True
    return ours


def test_layers_that_cannot_be_recorded_are_run_as_they_are(recording):
    recording(RuntimeError("operation not permitted when stream is capturing"))
    model = model_of("llama")
    ours = as_on_cuda(model, centre=1000.0)
    assert ours.details()["step"] == "CUDA graph"
    for _ in range(2):
        assert ours.generate(prompts(3, 60), NEW) == hf(model, prompts(3, 60))
    blocks, heads, steps = 3, 4, NEW - 1
    assert ours.details()["step"] == "plain: its layers cannot be recorded"
    assert ours.details()["recomputed_rows"] == 2 * 3 * heads * blocks * steps  # what was tried does not count


def test_memory_that_runs_out_in_a_recording_says_nothing_of_the_layers(recording):
    recording(torch.OutOfMemoryError("out of memory"))
    ours = as_on_cuda(model_of("llama"))
    with pytest.raises(torch.OutOfMemoryError):
        ours.generate(prompts(3, 5), NEW)
    assert ours.details()["step"] == "CUDA graph"
