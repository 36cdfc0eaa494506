"""What the tests of depth pruning share: a tiny Llama, one way to prune, and every criterion written out naively."""

from __future__ import annotations

import copy
import math

import torch

import tiny
from espalier import checkpoints, recipes
from espalier.data import Calibration
from espalier.models.block_scores import CRITERIA
from espalier.prune import depth
from families import tiny as model_of

CALIBRATED = [name for name, criterion in CRITERIA.items() if criterion.calibrated]


def save(model, folder):
    folder.mkdir()
    parameters = checkpoints.logical_parameters(model)
    checkpoints.save(model, tiny.tokenizer(), folder, {"task": "causal-lm", "parameters": parameters})
    return folder


def llama(blocks=4, **options):
    return model_of("llama", vocab_size=tiny.VOCABULARY, num_hidden_layers=blocks, **options)


def words(folder) -> Calibration:
    """Return a calibration set of five windows of twelve tokens, with its text in `folder`."""
    return recipes.build(Calibration, tiny.calibration(folder, samples=5, length=12), "calibration")


def prune(parent, tmp_path, seed=0, **recipe):
    output = tmp_path / "pruned"
    output.mkdir(exist_ok=True)
    built = depth.Recipe(**recipe)
    built.check()
    return output, depth.apply(parent, output, built, seed=seed, device="cpu")


def windows_of(parent, calibration) -> list[list[int]]:
    return calibration.token_ids(checkpoints.load_tokenizer(parent))


def without(model, removed):
    """Return a copy without some blocks, cut by hand."""
    model = copy.deepcopy(model)
    decoder = model.get_decoder()
    decoder.layers = torch.nn.ModuleList(block for i, block in enumerate(decoder.layers) if i not in set(removed))
    return model


def naive_loss(model, window):
    """Mean of -log p(next token), one token at a time."""
    logits = model(input_ids=torch.tensor([window]), use_cache=False).logits[0]
    losses = [-torch.log_softmax(logits[i], -1)[window[i + 1]] for i in range(len(window) - 1)]
    return sum(losses) / len(losses)


def naive_perplexity(model, windows, removed=()) -> float:
    shorter = without(model, removed)
    with torch.no_grad():
        return math.exp(sum(naive_loss(shorter, window).item() for window in windows) / len(windows))


def naive_perplexities(model, windows) -> dict[int, float]:
    return {block: naive_perplexity(model, windows, [block]) for block in range(len(model.get_decoder().layers))}


def matrices(model):
    for number, block in enumerate(model.model.layers):
        attention, mlp = block.self_attn, block.mlp
        layers = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        yield number, [layer.weight for layer in (*layers, mlp.gate_proj, mlp.up_proj, mlp.down_proj)]


def naive_magnitude(model, windows) -> dict[int, float]:
    return {
        number: sum(abs(value) for weight in weights for value in weight.flatten().tolist())
        for number, weights in matrices(model)
    }


def naive_taylor(model, windows) -> dict[int, float]:
    model.zero_grad()
    (sum(naive_loss(model, window) for window in windows) / len(windows)).backward()
    return {
        number: sum(
            abs(value * slope)
            for weight in weights
            for value, slope in zip(weight.flatten().tolist(), weight.grad.flatten().tolist(), strict=True)
        )
        for number, weights in matrices(model)
    }


def naive_influence(model, windows) -> dict[int, float]:
    found = {}
    for number, block in enumerate(model.model.layers):
        seen = []
        handle = block.register_forward_hook(lambda _, given, made, seen=seen: seen.append((given[0][0], made[0])))
        with torch.no_grad():
            for window in windows:
                model(input_ids=torch.tensor([window]), use_cache=False)
        handle.remove()
        cosines = []
        for before, behind in seen:
            for x, y in zip(before.tolist(), behind.tolist(), strict=True):
                product = sum(a * b for a, b in zip(x, y, strict=True))
                cosines.append(product / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y)))
        found[number] = 1 - sum(cosines) / len(cosines)
    return found


NAIVE = {
    "magnitude": naive_magnitude,
    "taylor": naive_taylor,
    "perplexity": naive_perplexities,
    "block-influence": naive_influence,
}
