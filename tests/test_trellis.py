"""The engine trellis against `model.generate`: tokens, caches, layouts, sampling, and what it refuses."""

from __future__ import annotations

import copy
import gc
import json
import random
import weakref

import pytest
import torch
from transformers import GenerationConfig, TopKLogitsWarper, TopPLogitsWarper

import depth_cases
import tiny
import width_cases
from engine_cases import ignore, loaded
from espalier import checkpoints, memory, plugins, recipes
from espalier.engines import trellis as engine_file
from espalier.prune import flap
from espalier.trellis import attention, engine, products, sampling
from espalier.trellis.blocks import Called, read
from espalier.trellis.model import Trellis, mean_largest_score
from espalier.trellis.products import PLAIN
from espalier.worker import Unavailable
from families import VOCABULARY
from families import tiny as random_model

NEW = 26
SHAPES = [(1, 5), (3, 60), (2, 130)]  # rows × tokens of the prompt: within the cache's rounding, and across it
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
MODELS = {
    "llama": ("llama", {}),
    "llama, a key head for each query head": ("llama", {"num_key_value_heads": 4}),
    "llama, one key head, all biases": ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama, rotary of llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama, rotary of yarn": ("llama", {"rope_parameters": YARN}),
    "llama, tied, gelu": ("llama", {"tie_word_embeddings": True, "hidden_act": "gelu"}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "glm": ("glm", {}),
    "glm, all channels turn": ("glm", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "opt": ("opt", {}),
}
REFUSED = {
    "gpt_neox": ("gpt_neox", {}, "does not know the architecture gpt_neox; it knows llama, mistral"),
    "norms behind": ("opt", {"do_layer_norm_before": False}, "norms before attention"),
    "narrow embeddings": ("opt", {"word_embed_proj_dim": 16}, "embeddings as wide as the blocks"),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
}
PACKED = {
    "int8, integer activations": ("round-to-nearest", {"bits": 8, "symmetric": True, "activations": 8}),
    "4 bits": ("round-to-nearest", {"bits": 4, "group_size": 32}),
    "bitsandbytes, nf4": ("bitsandbytes", {"bits": 4}),
    "bitsandbytes, int8": ("bitsandbytes", {"bits": 8}),
}


@pytest.fixture(autouse=True)
def layouts(monkeypatch):
    """Let layouts be chosen by chance and not by measurement: so every one of them is met, and always the same."""

    def seconds(rows, outputs, inputs, dtype, device):
        draw = random.Random(f"{rows} {outputs} {inputs}")
        return {name: draw.random() for name in products.possible(rows, len(outputs), dtype, device)}

    monkeypatch.setattr(products, "known_seconds", seconds)


def model_of(family: str, **options):
    """Return a tiny model with random biases."""
    model = random_model(family, **{"max_position_embeddings": 256, **options})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


def trellis_of(model, **options) -> Trellis:
    return Trellis(read(copy.deepcopy(model)), **options)


def prompts(rows: int, tokens: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(rows * 1000 + tokens)
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=draw).tolist()


def hf(model, given: list[list[int]], new: int = NEW) -> list[list[int]]:
    """Return the greedy tokens of transformers, without an end token."""
    model.generation_config, ids = GenerationConfig(pad_token_id=0), torch.tensor(given, device=model.device)
    with torch.no_grad():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return found[:, ids.shape[1] :].tolist()


def logits_of(model, tokens: list[int]) -> torch.Tensor:
    """Return the logits behind a sequence."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_transformers(name):
    family, options = MODELS[name]
    model = model_of(family, **options)
    ours = trellis_of(model)
    for shape in SHAPES:
        assert ours.generate(prompts(*shape), NEW) == hf(model, prompts(*shape)), shape
    assert ours.recomputed == 0


def test_every_layout_is_met():
    found = set()
    for family in ("llama", "opt"):
        ours = trellis_of(model_of(family))
        for rows in range(1, 9):
            ours.make_room(rows, 1)
        for kinds in ours.details()["layouts"].values():
            found |= {layout for counted in kinds.values() for layout in counted}
    assert found == set(products.possible(2, 2, torch.float32, "cpu"))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_checkpoints_of_flap_have_widths_and_biases_of_their_own(family, tmp_path):
    source = width_cases.parent(tmp_path / "dense", family, max_position_embeddings=256)
    sizes = {"parameters": int(0.8 * checkpoints.describe(source)["parameters"])}
    sets = width_cases.calibration(tmp_path / "text")
    width_cases.prune(flap, source, tmp_path / "pruned", calibration=sets, **sizes)
    model = checkpoints.load(tmp_path / "pruned", device="cpu").model
    assert model.config.model_type == f"pruned_{family}"
    shapes = model.config.block_shapes
    assert any(shape != shapes[0] for shape in shapes)
    assert all(bias for shape in shapes for name, (*_, bias) in shape.items() if name.endswith(("o_proj", "out_proj")))
    ours = loaded("trellis", tmp_path / "pruned")
    assert ours.generate(prompts(3, 60), NEW, "greedy", ignore) == hf(model, prompts(3, 60))


def test_checkpoints_that_lost_blocks(tmp_path):
    source = depth_cases.save(depth_cases.llama(max_position_embeddings=256), tmp_path / "dense")
    output, _ = depth_cases.prune(source, tmp_path, blocks=2, criterion="magnitude")
    model = checkpoints.load(output, device="cpu").model
    ours = loaded("trellis", output)
    assert len(ours.model.blocks.blocks) == 2
    assert ours.generate(prompts(3, 60), NEW, "greedy", ignore) == hf(model, prompts(3, 60))


@pytest.mark.parametrize("name", PACKED)
def test_packed_layers_are_called(name, tmp_path):
    method, recipe = PACKED[name]
    module = plugins.load("quantize", method)
    source, output = tiny.llama(tmp_path / "dense"), tmp_path / "packed"
    output.mkdir()
    module.apply(source, output, recipes.build(module.Recipe, recipe, "recipe"), seed=0, device="cpu")
    ours, model = loaded("trellis", output), checkpoints.load(output, device="cpu").model
    assert all(isinstance(block.down, Called) for block in ours.model.blocks.blocks)
    assert ours.generate(prompts(3, 60), NEW, "greedy", ignore) == hf(model, prompts(3, 60))
    assert ours.details()["layouts"]["3"]["project"] == {"of a packed layer": 2}


def test_gate_and_up_in_one_packed_layer():
    model = model_of("glm")
    for block in model.model.layers:
        block.mlp.gate_up_proj.__class__ = type("Packed", (torch.nn.Linear,), {})
    ours = trellis_of(model)
    assert isinstance(ours.blocks.blocks[0].up, Called)
    assert ours.generate(prompts(3, 5), NEW) == hf(model, prompts(3, 5))


def test_a_context_longer_than_one_split():
    model = model_of("llama", max_position_embeddings=2048)
    given = prompts(2, attention.SPLIT - NEW // 2)
    assert trellis_of(model).generate(given, NEW) == hf(model, given)


@pytest.mark.parametrize("centre", [1000.0, -1000.0])
def test_rows_that_leave_the_range_of_the_unified_maximum_are_recomputed(centre):
    model = model_of("llama")
    ours = trellis_of(model, centre=centre)
    assert ours.generate(prompts(3, 60), NEW) == hf(model, prompts(3, 60))
    blocks, heads, steps = 3, 4, NEW - 1
    assert ours.details()["recomputed_rows"] == 3 * heads * blocks * steps


def test_the_unified_maximum_is_the_mean_of_the_last_tokens_largest_scores():
    draw = torch.Generator().manual_seed(0)
    query, keys = torch.randn(2, 4, 8, generator=draw), torch.randn(2, 2, 5, 8, generator=draw)
    largest = []
    for row in range(2):
        for head in range(4):
            scores = [sum(a * b for a, b in zip(query[row, head], key, strict=True)) for key in keys[row, head // 2]]
            largest.append(max(scores).item() / 8**0.5)
    assert mean_largest_score(query, keys).item() == pytest.approx(sum(largest) / len(largest), rel=1e-5)


def test_a_longer_prompt_sets_the_unified_maximum_anew_and_a_shorter_one_does_not():
    ours, seen = trellis_of(model_of("llama")), []
    for tokens in (1, 30, 20):
        ours.generate(prompts(1, tokens), 2)
        seen.append(ours.details()["centres"])
    assert len(seen[0]) == 3
    assert seen[0] != seen[1] == seen[2]


def test_the_compiled_step_is_the_plain_one_and_compiled_once_for_all_lengths(monkeypatch):
    """With torch's own compiler but for the last stage, which writes C++ and takes long."""
    forms, compiled = [], torch.compile

    def backend(graph, inputs):
        forms.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda *given, **options: compiled(*given, **options, backend=backend))
    model = model_of("llama", num_hidden_layers=1)
    ours = trellis_of(model, compiled=True)
    for tokens in (5, 60, 130):  # another φ, and another capacity
        assert ours.generate(prompts(2, tokens), NEW) == hf(model, prompts(2, tokens))
    assert ours.details()["step"] == "compiled"
    assert len(forms) == 1


def test_an_end_token_ends_nothing():
    model = model_of("llama")
    whole = hf(model, prompts(1, 5))
    model.config.eos_token_id = whole[0][3]
    assert trellis_of(model).generate(prompts(1, 5), NEW) == whole
    assert [len(row) for row in trellis_of(model).generate(prompts(3, 5), 1)] == [1, 1, 1]


def test_the_cache_is_as_large_as_the_shape_needs():
    ours = trellis_of(model_of("llama"))
    for rows, tokens, new, capacity in ((1, 60, 5, 64), (1, 60, 6, 128), (3, 5, 2, 64)):
        ours.generate(prompts(rows, tokens), new)
        shapes = {tuple(part.shape) for pair in ours.cache for part in pair}
        assert shapes == {(rows, 2, capacity, 8)}
        assert ours.details()["cache_capacity"] == capacity


def test_draws_follow_the_warpers_of_transformers():
    logits = 3 * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1))
    warped = TopPLogitsWarper(0.95)(None, TopKLogitsWarper(50)(None, logits.clone()))[0]
    expected, count = warped.softmax(-1), 20_000
    drawn = sampling.top_k_top_p(logits.expand(count, -1), torch.Generator().manual_seed(2))
    shares = torch.bincount(drawn, minlength=VOCABULARY) / count
    assert not shares[warped.isneginf()].any()
    assert 10 < warped.isfinite().sum() < 50  # the share cuts, and not the number alone
    assert ((shares - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()


def test_sampling_draws_allowed_tokens_and_the_seed_decides_which():
    model = model_of("llama", initializer_range=0.05)
    first, again, other = (
        trellis_of(model, seed=seed).generate(prompts(2, 9), NEW, "top-k-top-p") for seed in (1, 1, 2)
    )
    assert first == again != other
    for given, row in zip(prompts(2, 9), first, strict=True):
        for step, token in enumerate(row):
            logits = logits_of(model, given + row[:step])[None]
            warped = TopPLogitsWarper(0.95)(None, TopKLogitsWarper(50)(None, logits))
            assert warped[0, token].isfinite(), step


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    family, options, reason = REFUSED[name]
    with pytest.raises(Unavailable, match=reason):
        read(random_model(family, **options))


def test_a_sliding_window_ends_the_context():
    assert read(model_of("mistral", sliding_window=100)).context == 100
    assert read(model_of("mistral")).context == 256


@pytest.mark.parametrize("family", ["llama", "glm", "opt"])
def test_in_bfloat16_tokens_differ_only_where_rounding_decides(family):
    """Where tokens first differ from transformers', float32 logits of the two must lie within the rounding of both.

    A number rounded to bfloat16 is off by up to 2⁻⁹ of it, and some twelve are rounded one after another in a block.
    As independent errors these add up to √(12 · blocks) · 2⁻⁹ of the logits' spread; two logits in each of two engines
    make twice that, and three standard deviations are allowed.
    """
    exact = model_of(family, initializer_range=0.1) if family != "opt" else model_of(family, init_std=0.1)
    exact = exact.to(torch.bfloat16).float()
    rounded = copy.deepcopy(exact).to(torch.bfloat16)
    given = prompts(8, 20)
    for start, ours, theirs in zip(given, trellis_of(rounded).generate(given, 60), hf(rounded, given, 60), strict=True):
        first = next((step for step in range(60) if ours[step] != theirs[step]), None)
        if first is not None:
            logits = logits_of(exact, start + theirs[:first])
            gap = (logits[ours[first]] - logits[theirs[first]]).abs()
            bound = 3 * 2 * (12 * len(exact.get_decoder().layers)) ** 0.5 * 2**-9 * logits.std()
            assert gap <= bound, first


def test_weights_are_held_once_even_while_someone_holds_the_model():
    before = memory.allocated_bytes("cpu")
    model = model_of("llama", hidden_size=256, intermediate_size=512)
    weights = memory.allocated_bytes("cpu") - before
    ours = Trellis(read(model))
    ours.generate(prompts(2, 5), 3)
    cache = 3 * 2 * (2 * 2 * 64 * 64) * 4  # blocks × keys and values × shape × bytes
    assert weights + cache <= memory.allocated_bytes("cpu") - before < 1.05 * (weights + cache)
    assert "stored separate" not in ours.details()["layouts"]["2"]["project"]


def test_the_model_that_was_read_is_freed():
    model = model_of("llama")
    alive = weakref.ref(model)
    blocks = read(model)
    del model
    gc.collect()
    assert alive() is None
    assert len(blocks.blocks) == 3


def test_the_engine_tells_of_its_first_token_and_of_its_choices(tmp_path):
    engine_file.probe("cpu")
    ours = loaded("trellis", tiny.llama(tmp_path / "model"), seed=3)
    told = []
    generated = ours.generate(prompts(2, 5), 4, "top-k-top-p", lambda: told.append(1))
    assert (len(told), [len(row) for row in generated], ours.context) == (1, [4, 4], 128)
    details = json.loads(json.dumps(ours.details()))
    assert details == ours.details()
    assert sum(details["layouts"]["2"]["down"].values()) == 2
    assert details["step"] == "plain"


def test_layouts_are_told_of_every_batch(monkeypatch):
    fastest = {1: "stored fused", 2: "transposed separate"}
    monkeypatch.setattr(products, "known_seconds", lambda rows, *_: {fastest[rows]: 1.0})
    ours = trellis_of(model_of("llama"))
    for rows in (1, 2, 1):
        ours.generate(prompts(rows, 5), 2)
    found = {batch: kinds["up"] for batch, kinds in ours.details()["layouts"].items()}
    assert found == {"1": {"stored fused": 3}, "2": {"transposed separate": 3}}


def test_memory_that_runs_out_while_weights_are_laid_out_loses_none(monkeypatch):
    def fail(tensors):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(products, "known_seconds", lambda rows, *_: {"stored fused" if rows > 1 else PLAIN: 1.0})
    model = model_of("llama")
    ours = trellis_of(model)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch, "cat", fail)
        ours.generate(prompts(3, 5), NEW)
    for rows in (1, 3):
        assert ours.generate(prompts(rows, 5), NEW) == hf(model, prompts(rows, 5))


def test_on_cuda_triton_is_needed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="the package triton is not installed"):
        engine_file.probe("cuda")
    engine_file.probe("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_unavailable():
    with pytest.raises(Unavailable, match="no CUDA device"):
        engine_file.probe("cuda")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["llama", "glm", "opt"])
def test_greedy_tokens_on_a_gpu(family):
    model = model_of(family).cuda()
    ours = trellis_of(model)
    for shape in (*SHAPES, SHAPES[0]):
        assert ours.generate(prompts(*shape), NEW) == hf(model, prompts(*shape)), shape
