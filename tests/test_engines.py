"""Every engine of the main environment against transformers' model, called token by token without a cache."""

from __future__ import annotations

import json

import pytest
import torch

import width_cases
from engine_cases import CONTEXT, LONG, NEW, SHORT, ignore, loaded, prompts
from espalier import checkpoints, plugins, recipes
from espalier.models.anatomy import adopt, keep, parts_of, remove_blocks
from espalier.worker import Unavailable
from near_ties import differs_only_at_near_ties

ENGINES = [name for name in plugins.names("engines") if not hasattr(plugins.load("engines", name), "ENVIRONMENTS")]


def shorten(model) -> None:
    remove_blocks(model, [1])


def narrow(model) -> None:
    """Make the widths of heads and neurons differ by block."""
    for number, (parts, neurons) in enumerate(zip(parts_of(model), (20, 48, 33), strict=True)):
        keep(parts, list(range(parts.groups - number % 2)), range(neurons))
    adopt(model)


# Name → architecture, how it is pruned, how it is quantized.
MODELS = {
    **{family: (family, None, None) for family in ("llama", "opt", "glm", "mistral", "qwen2")},
    **{f"{family}, fewer blocks": (family, shorten, None) for family in ("llama", "opt")},
    **{f"{family}, narrower blocks": (family, narrow, None) for family in ("llama", "opt", "glm")},
    "llama, 8 bits": ("llama", None, {"bits": 8, "symmetric": True, "activations": 8}),
    "opt, 4 bits": ("opt", None, {"bits": 4, "group_size": 16}),
    "glm, narrower blocks, 4 bits": ("glm", narrow, {"bits": 4}),
}
QUANTIZED = [name for name, (_, _, quantized) in MODELS.items() if quantized]


@pytest.fixture(scope="module", autouse=True)
def uncompiled(tmp_path_factory):
    """Run what torch would compile as it is, and keep what an engine measures for itself out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Return a function that makes each of MODELS once."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def make(name):
        if name not in made:
            family, prune, quantized = MODELS[name]
            folder = width_cases.parent(root / str(len(made)), family, max_position_embeddings=CONTEXT)
            if prune:
                model = checkpoints.load(folder, device="cpu").model
                prune(model)
                folder = folder.with_name(f"{folder.name} pruned")
                width_cases.save(model, folder)
            if quantized:
                module, parent = plugins.load("quantize", "round-to-nearest"), folder
                folder = folder.with_name(f"{folder.name} quantized")
                folder.mkdir()
                recipe = recipes.build(module.Recipe, quantized, "recipe")
                module.apply(parent, folder, recipe, seed=0, device="cpu")
            made[name] = folder
        return made[name]

    return make


@pytest.fixture(scope="module")
def expected(folder_of):
    """Return a function that gives the greedy tokens of a model behind three prompts of some length, found once."""
    found = {}

    def ask(name, length):
        if (name, length) not in found:
            found[name, length] = naive(checkpoints.load(folder_of(name), device="cpu").model, prompts(length))
        return found[name, length]

    return ask


def naive(model, token_ids) -> list[list[int]]:
    """Return the most likely tokens, one after the other, by the whole model each time."""
    ids = torch.tensor(token_ids)
    for _ in range(NEW):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[:, -NEW:].tolist()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_tokens_are_those_of_the_model(folder_of, expected, engine, name):
    if engine == "hf-compiled" and name in QUANTIZED:
        with pytest.raises(Unavailable, match="does not compile"):
            loaded(engine, folder_of(name))
        return
    made = loaded(engine, folder_of(name))
    for length, rows in ((LONG, 1), (LONG, 3), (SHORT, 3), (SHORT, 1)):
        assert made.generate(prompts(length)[:rows], NEW, "greedy", ignore) == expected(name, length)[:rows]
    made.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_first_token_is_told_of_once_and_no_token_ends_early(folder_of, expected, tmp_path, engine):
    tokens = expected("llama", SHORT)
    model = checkpoints.load(folder_of("llama"), device="cpu").model
    model.config.eos_token_id = model.generation_config.eos_token_id = tokens[0][1]
    model.generation_config.repetition_penalty = 5.0
    width_cases.save(model, tmp_path / "ending")
    made, told = loaded(engine, tmp_path / "ending"), []
    assert made.generate(prompts(SHORT), NEW, "greedy", lambda: told.append(1)) == tokens
    assert made.generate(prompts(SHORT), 1, "greedy", lambda: told.append(2)) == [row[:1] for row in tokens]
    assert told == [1, 2]
    assert made.context == CONTEXT
    json.dumps(made.details())


@pytest.mark.parametrize("engine", ENGINES)
def test_sampling_follows_the_seed_and_draws_from_likely_tokens_alone(folder_of, engine):
    token_ids = prompts(SHORT, rows=1) * 200
    with torch.no_grad():
        logits = checkpoints.load(folder_of("llama"), device="cpu").model(torch.tensor(token_ids[:1])).logits[0, -1]
    # The 50 most likely tokens, and of these, in order, all up to the one with which 95% of their mass is reached.
    best = sorted(range(len(logits)), key=lambda token: -logits[token])[:50]
    chances = torch.softmax(logits[best], 0).tolist()
    likely = {token for place, token in enumerate(best) if sum(chances[:place]) < 0.95}
    drawn = []
    for seed in (1, 1, 2):
        made = loaded(engine, folder_of("llama"), seed=seed)
        drawn.append([row[0] for row in made.generate(token_ids, 1, "top-k-top-p", ignore)])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(likely) / 3 < len(set(drawn[0] + drawn[2])) <= len(likely) < 50
    assert set(drawn[0] + drawn[2]) <= likely


@pytest.mark.parametrize("family", ["llama", "opt", "glm"])
@pytest.mark.parametrize("engine", ENGINES)
def test_in_bfloat16_other_tokens_are_near_ties(tmp_path, engine, family):
    folder = width_cases.parent(tmp_path / "model", family, torch.bfloat16, max_position_embeddings=CONTEXT)
    generated = loaded(engine, folder).generate(prompts(LONG), NEW, "greedy", ignore)
    differs_only_at_near_ties(folder, prompts(LONG), generated)
    generated[1][3] += 1
    with pytest.raises(AssertionError, match="what rounding explains"):
        differs_only_at_near_ties(folder, prompts(LONG), generated)
