"""What is particular to the engines around transformers' loop: compiled steps, flash kernels, the first token."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import families
import tiny
import width_cases
from engine_cases import CONTEXT, HF_ENGINES, LONG, NEW, SHORT, ignore, loaded, prompts
from espalier import flash_attention
from espalier.engines import hf_compiled
from espalier.models.anatomy import adopt, keep, parts_of
from espalier.worker import Unavailable
from near_ties import differs_only_at_near_ties

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def dynamo():
    """Forget what was compiled before, and how often compiling is allowed."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch({}):
        yield


@pytest.fixture
def parent(tmp_path):
    """Return a function that saves a tiny model of one block."""

    def make(family="llama", dtype=torch.float32, **options):
        sizes = {"num_hidden_layers": 1, "max_position_embeddings": CONTEXT}
        return width_cases.parent(tmp_path / family, family, dtype, **sizes | options)

    return make


@pytest.mark.parametrize("engine", HF_ENGINES)
def test_the_first_token_is_told_of_before_the_second_is_computed(parent, engine):
    made, calls, at_first = loaded(engine, parent()), [], []
    made.model.register_forward_hook(lambda *_: calls.append(1))
    with torch.compiler.set_stance("force_eager"):
        made.generate(prompts(SHORT), NEW, "greedy", lambda: at_first.append(len(calls)))
    assert (at_first, len(calls)) == ([1], NEW)


def test_a_compiled_step_gives_the_same_tokens(parent):
    folder = parent()
    made, usual = loaded("hf-compiled", folder), loaded("hf", folder)
    for _ in range(2):  # the second time in the cache of the first
        assert made.generate(prompts(SHORT), NEW, "greedy", ignore) == usual.generate(
            prompts(SHORT), NEW, "greedy", ignore
        )


def narrower(tmp_path):
    model = families.tiny("llama", vocab_size=tiny.VOCABULARY, num_hidden_layers=2, max_position_embeddings=CONTEXT)
    for number, parts in enumerate(parts_of(model)):
        keep(parts, list(range(2 - number)), range(20 + number))
    adopt(model)
    width_cases.save(model, tmp_path / "pruned")
    return tmp_path / "pruned"


@pytest.mark.parametrize("family", ["llama", "opt", "glm", "mistral", "narrower"])
def test_each_shape_is_one_graph_compiled_once(parent, tmp_path, family):
    made = loaded("hf-compiled", narrower(tmp_path) if family == "narrower" else parent(family))
    made.compiling.backend = "eager"  # the graphs are captured and run as they are
    before = made.details()["compiled_graphs"]
    for rows, graphs in ((1, 1), (3, 2), (1, 2)) if family == "llama" else ((3, 1),):
        made.generate(prompts(SHORT, rows), NEW, "greedy", ignore)
        assert made.details()["compiled_graphs"] == before + graphs


def test_a_shape_too_many_is_an_error_and_not_run_uncompiled(parent, monkeypatch):
    monkeypatch.setattr(hf_compiled, "SHAPES", 1)
    made = loaded("hf-compiled", parent())
    made.compiling.backend = "eager"
    made.generate(prompts(SHORT), NEW, "greedy", ignore)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        made.generate(prompts(SHORT, rows=2), NEW, "greedy", ignore)


def test_a_step_that_does_not_compile_whole_is_refused(parent):
    made = loaded("hf-compiled", parent())
    made.model.get_decoder().layers[0].register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(Unavailable, match="as a whole"):
        made.generate(prompts(SHORT), NEW, "greedy", ignore)


@pytest.mark.parametrize("engine", ["hf-compiled", "flash-decoding"])
def test_a_window_shorter_than_the_longest_sequence_is_refused(parent, engine):
    with pytest.raises(Unavailable, match=f"sees {CONTEXT - 1} tokens"):
        loaded(engine, parent("mistral", sliding_window=CONTEXT - 1))


@pytest.mark.parametrize("family", ["llama", "opt", "glm"])
def test_flash_kernels_compute_all_attention_and_copy_no_keys(parent, family):
    """With grouped heads (llama, glm) and without."""
    made = loaded("flash-decoding", parent(family, num_hidden_layers=2))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        made.generate(prompts(LONG), NEW, "greedy", ignore)
    calls = [event for event in seen.events() if "attention" in event.name]
    kinds = {name: sum(event.name == name for event in calls) for name in {event.name for event in calls}}
    assert kinds == {
        "aten::scaled_dot_product_attention": 2 * NEW,
        "aten::_scaled_dot_product_flash_attention_for_cpu": 2 * NEW,
    }
    decoding = [event for event in calls if event.input_shapes[0][2] == 1]
    assert {event.input_shapes[1][2] for event in decoding} == set(range(LONG + 1, LONG + NEW))
    start = min(event.time_range.start for event in decoding)
    copies = [event for event in seen.events() if event.name == "aten::copy_" and event.time_range.start > start]
    assert max(math.prod(event.input_shapes[0]) for event in copies) < LONG * 8  # channels of a head


def test_the_cache_takes_its_memory_once_a_call(parent, monkeypatch):
    make = flash_attention.cache
    made, caches, places = loaded("flash-decoding", parent()), [], []
    monkeypatch.setattr(flash_attention, "cache", lambda *sizes: caches.append(make(*sizes)) or caches[-1])
    made.model.register_forward_hook(lambda *_: places.append(caches[-1].layers[0].keys.data_ptr()))
    made.generate(prompts(SHORT), NEW, "greedy", ignore)
    assert len(caches) == len(set(places)) == 1
    assert caches[0].layers[0].keys.shape == (3, 2, SHORT + NEW - 1, 8)


def test_where_the_flash_kernels_refuse_nothing_else_is_run(parent, monkeypatch):
    folder = parent()
    monkeypatch.setattr(flash_attention, "kernel", lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION))
    with pytest.raises(Unavailable, match=r"heads of 8 channels in torch\.float32"):
        loaded("flash-decoding", folder)


def test_attention_that_flash_kernels_do_not_compute_is_refused():
    query, keys = torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 3, 8)
    with pytest.raises(Unavailable, match="softcap"):
        flash_attention.attend(None, query, keys, keys, None, softcap=30.0)
    with pytest.raises(Unavailable, match="prompts"):
        flash_attention.attend(None, query, keys, keys, torch.ones(1, 1, 3, 3, dtype=torch.bool))
    with pytest.raises(Unavailable, match="prompts"):
        flash_attention.attend(None, query[:, :, :2], keys, keys, None)


@cuda
@pytest.mark.cuda
@pytest.mark.parametrize("family", ["llama", "opt", "glm"])
@pytest.mark.parametrize("engine", HF_ENGINES)
def test_on_cuda_in_bfloat16_other_tokens_are_near_ties(parent, engine, family):
    folder = parent(family, torch.bfloat16, num_hidden_layers=3)
    made = loaded(engine, folder, "cuda")
    for rows in (1, 3, 3):
        given, told = prompts(LONG)[:rows], []
        generated = made.generate(given, NEW, "greedy", lambda told=told: told.append(1))
        assert told == [1]
        differs_only_at_near_ties(folder, given, generated)


@cuda
@pytest.mark.cuda
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_on_cuda_the_keys_of_one_query_are_split(parent, family):
    """One row of four heads fills no GPU, so FlashAttention splits 600 keys."""
    made = loaded("flash-decoding", parent(family, torch.bfloat16), "cuda")
    made.generate(prompts(LONG, rows=1), 2, "greedy", ignore)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        made.generate(prompts(LONG, rows=1), NEW, "greedy", ignore)
    splits = [event.name for event in seen.events() if "splitkv" in event.name]
    assert len([name for name in splits if "combine" in name]) >= NEW - 1


@cuda
@pytest.mark.cuda
def test_on_cuda_flash_decoding_refuses_float32(parent):
    with pytest.raises(Unavailable, match="float32"):
        loaded("flash-decoding", parent(), "cuda")
