"""AWQ against its formulas written out naively, on models with outlier channels and on pruned ones."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch

import tiny as tiny_cases
import width_cases
from espalier import checkpoints, llm_compressor, plugins, recipes
from espalier.errors import UserError
from espalier.models import lowbit
from espalier.models.anatomy import adopt, keep, parts_of, remove_blocks
from espalier.models.lowbit import Scheme
from espalier.models.smoothing import pairs_of
from espalier.quantize import awq
from families import GROUPED, WIDTHS, tiny

FRESH = """
import sys, torch
from espalier import checkpoints
models = [checkpoints.load(folder, device="cpu").model for folder in sys.argv[2:]]
with torch.no_grad(): torch.save([model(torch.arange(40)[None]).logits for model in models], sys.argv[1])
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return width_cases.calibration(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder = width_cases.parent(tmp_path_factory.mktemp("models") / "llama", num_key_value_heads=4)
    model = with_outliers(checkpoints.load(folder, "cpu").model)
    width_cases.save(model, folder)
    return folder


def with_outliers(model):
    """Make some channels of what the norms give 20 times as large as the others."""
    with torch.no_grad():
        for pair in [pair for both in pairs_of(model) for pair in both]:
            pair.norm.weight[::11] *= 20
    return model


def recipe(calibration=None, **keys) -> awq.Recipe:
    return awq.Recipe(**{"bits": 4, "calibration": calibration, "group_size": 16, "batch_size": 4, **keys})


def ids(count: int = 6) -> list[list[int]]:
    return torch.randint(3, 90, (count, 12), generator=torch.Generator().manual_seed(0)).tolist()


def quantize(parent, output, calibration, **keys) -> dict:
    output.mkdir()
    return awq.apply(parent, output, recipe(calibration, **keys), seed=0, device="cpu")


def logits(model):
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


def unrounded(model, plain):
    """Return a model of the scaled weights, before they were rounded, of a calibrated one like `plain`."""
    scaled = copy.deepcopy(plain)
    state = model.state_dict()
    scaled.load_state_dict({name: state[name] for name in scaled.state_dict()})
    return scaled.double()


def naive_grid(row: list[float], bits: int, symmetric: bool) -> tuple[float, int]:
    """Return the scale and the zero point of one group, whose codes begin at −2^(bits−1)."""
    low, high = min(0.0, *row), max(0.0, *row)
    if symmetric:
        return max(-low, high) / ((2**bits - 1) / 2), 0
    scale = (high - low) / (2**bits - 1)
    return scale, round(-(2 ** (bits - 1)) - low / scale)


def naive_codes(row: list[float], bits: int, symmetric: bool) -> list[int]:
    scale, zero = naive_grid(row, bits, symmetric)
    return [max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, round(value / scale + zero))) for value in row]


def groups_of(weight: torch.Tensor, size: int) -> list[list[float]]:
    return weight.double().unflatten(1, (-1, size if size > 0 else weight.shape[1])).flatten(0, 1).tolist()


def naively_rounded(weight: torch.Tensor, size: int, bits: int) -> torch.Tensor:
    """Return the values of the nearest codes of a weight."""
    values = []
    for row in groups_of(weight, size):
        scale, zero = naive_grid(row, bits, symmetric=False)
        values.append([(code - zero) * scale for code in naive_codes(row, bits, symmetric=False)])
    return torch.tensor(values).view_as(weight)


CASES = [(family, {}) for family in WIDTHS]
CASES += [("llama", {"num_key_value_heads": 4}), ("glm", {"num_key_value_heads": 4})]
CASES += [("opt", {"activation_function": "gelu"})]


@pytest.mark.parametrize(("family", "options"), CASES, ids=str)
def test_scales_leave_what_the_model_computes(family, options):
    plain = with_outliers(tiny(family, **options))
    model = copy.deepcopy(plain)
    report = awq.scale_and_quantize(model, ids(), recipe(), Scheme(4, 16, False), "cpu")
    # Norms; value to output where no heads share values; and up to down, but not through a function such as GELU.
    shared = family in GROUPED and not options
    assert len(report) == 3 * (4 - shared - (options == {"activation_function": "gelu"}))
    state = plain.state_dict()
    changed = {
        name for name, one in unrounded(model, plain).state_dict().items() if not torch.equal(one.float(), state[name])
    }
    assert len(changed) > 12
    with torch.no_grad():
        found, true = (one(torch.tensor(ids())).logits for one in (unrounded(model, plain), plain.double()))
    assert (found - true).abs().max() < 1e-5 * true.abs().max()
    for entry in report:
        assert entry["mean_squared_error"]["awq"] <= entry["mean_squared_error"]["nearest"]


@pytest.mark.parametrize("duo", [False, True])
def test_scales_are_those_with_the_least_error_of_the_papers_search(duo):
    """The first norm's scales, from equations 4 and 5 in float64, on the attention that reads it."""
    plain = with_outliers(tiny("llama"))
    model = copy.deepcopy(plain)
    report = awq.scale_and_quantize(model, ids(), recipe(duo_scaling=duo, grid=6), Scheme(4, 16, False), "cpu")
    found = plain.model.layers[0].input_layernorm.weight / model.model.layers[0].input_layernorm.weight

    seen = []
    attention = plain.model.layers[0].self_attn
    handle = attention.register_forward_pre_hook(lambda _, given, named: seen.append(named), with_kwargs=True)
    with torch.no_grad():
        plain(torch.tensor(ids()), use_cache=False)
        handle.remove()
        inputs = seen[0]["hidden_states"]
        readers = [attention.q_proj, attention.k_proj, attention.v_proj]
        weights = [layer.weight.data.clone() for layer in readers]
        true = attention(**seen[0])[0]
        of_inputs = inputs.double().abs().mean((0, 1))
        shares = [one.double().abs().unflatten(1, (-1, 16)) for one in weights]
        of_weights = torch.cat([(one / one.amax(2, keepdim=True)).flatten(1) for one in shares]).mean(0)
        tried = []
        candidates = (
            [(0.0, False), *((step / 4, True) for step in range(5))] if duo else [(i / 5, False) for i in range(6)]
        )
        for alpha, with_weights in candidates:
            scales = of_inputs**alpha / (of_weights ** (1 - alpha) if with_weights else 1)
            scales = (scales / (scales.max() * scales.min()).sqrt()).float()
            for layer, weight in zip(readers, weights, strict=True):
                layer.weight.data = naively_rounded(weight * scales, 16, bits=4) / scales
            tried.append(((attention(**seen[0])[0] - true).square().mean().item(), scales))
    best = min(tried, key=lambda one: one[0])
    assert torch.allclose(found, best[1], rtol=1e-3)
    errors = report[0]["mean_squared_error"]
    assert (errors["nearest"], errors["awq"]) == pytest.approx((tried[0][0], best[0]), rel=1e-3)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "size"), [(2, 16), (3, -1), (4, 16), (8, 16)])
def test_codes_are_those_of_the_papers_grid_on_the_scaled_weights(bits, size, symmetric):
    from compressed_tensors.quantization import forward_quantize

    model, scheme = with_outliers(tiny("llama")), Scheme(bits, size, symmetric)
    awq.scale_and_quantize(model, ids(), recipe(bits=bits, group_size=size, symmetric=symmetric), scheme, "cpu")
    for layer in lowbit.linear_layers(model).values():
        found, groups = llm_compressor.codes(layer, scheme), groups_of(layer.weight.data, size)
        scales, zeros = torch.tensor([naive_grid(row, bits, symmetric) for row in groups], dtype=torch.double).T
        assert torch.allclose(found.scale.flatten().double(), scales)
        places = torch.tensor(groups).view(len(groups), -1).double() / scales[:, None]
        halfway = ((places % 1) - 0.5).abs().view_as(found.codes) < 1e-4  # float32 may round these either way
        naive = torch.tensor([naive_codes(row, bits, symmetric) for row in groups]).view_as(found.codes)
        assert torch.equal(found.codes[~halfway].long(), naive[~halfway])
        assert halfway.float().mean() < 0.1
        assert symmetric or torch.equal(found.zero.flatten().double(), zeros)
        computed_with = forward_quantize(layer, layer.weight, "weight", layer.quantization_scheme.weights)
        assert torch.equal(lowbit.dequantized(found), computed_with)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_outliers_cost_less_than_rounded_to_nearest(parent, words, tmp_path, bits):
    quantize(parent, tmp_path / "awq", words, bits=bits)
    nearest = plugins.load("quantize", "round-to-nearest")
    (tmp_path / "nearest").mkdir()
    floor = nearest.Recipe(bits=bits, group_size=16)
    nearest.apply(parent, tmp_path / "nearest", floor, seed=0, device="cpu")
    windows = width_cases.windows(parent, words)
    with torch.no_grad():
        true, *found = (
            checkpoints.load(folder, "cpu").model(windows).logits
            for folder in (parent, tmp_path / "awq", tmp_path / "nearest")
        )
    errors = [(one - true).square().mean().item() for one in found]
    assert errors[0] < 0.9 * errors[1]


def depth_pruned(model) -> None:
    remove_blocks(model, [1])


def width_pruned(model) -> None:
    """Leave blocks of different widths: groups of 16 divide them all."""
    groups = len(parts_of(model)[0].attention.k_proj.weight) // parts_of(model)[0].head_dim
    for number, parts in enumerate(parts_of(model)):
        keep(parts, range(groups if number else groups // 2), range(16 * (number + 1)))
    adopt(model)


def test_pruned_parents_and_the_same_logits_in_a_fresh_process(words, tmp_path):
    folders, found = [], []
    cases = [("llama", depth_pruned), ("llama", width_pruned), ("opt", width_pruned), ("glm", width_pruned)]
    for family, change in cases:
        source = tmp_path / f"{family}-{change.__name__}"
        width_cases.parent(source, family)
        model = checkpoints.load(source, "cpu").model
        change(model)
        width_cases.save(model, source)
        folders.append(tmp_path / f"{source.name}-awq")
        quantize(source, folders[-1], words, bits=8)
        found.append(logits(checkpoints.load(folders[-1], "cpu").model))
        true = logits(model)
        assert (found[-1] - true).norm() < 0.05 * true.norm(), source
    again = tmp_path / "again"
    quantize(source, again, words, bits=8)
    for name, tensor in checkpoints.load(again, "cpu").model.state_dict().items():
        assert torch.equal(tensor, checkpoints.load(folders[-1], "cpu").model.state_dict()[name])
    subprocess.run([sys.executable, "-c", FRESH, tmp_path / "logits", *folders], check=True, capture_output=True)
    assert all(torch.equal(*both) for both in zip(torch.load(tmp_path / "logits"), found, strict=True))


def test_16_bit_parents_get_the_codes_of_32_bits_and_stay_what_they_are(words, tmp_path):
    source = width_cases.parent(tmp_path / "parent", dtype=torch.bfloat16)
    (tmp_path / "single").mkdir()
    width_cases.save(checkpoints.load(source, "cpu").model.float(), tmp_path / "single")
    stored = []
    for folder in (source, tmp_path / "single"):
        output = tmp_path / f"{folder.name}-awq"
        quantize(folder, output, words, bits=8)
        stored.append(checkpoints.load(output, "cpu").model)
    assert {one.dtype for one in stored[0].parameters()} == {torch.bfloat16}
    for one, other in zip(stored[0].buffers(), stored[1].buffers(), strict=True):
        assert torch.equal(one, other)
    true = logits(checkpoints.load(source, "cpu").model).float()
    assert (logits(stored[0]).float() - true).norm() < 0.05 * true.norm()


def test_report_and_description(parent, words, tmp_path):
    report = json.loads(json.dumps(quantize(parent, tmp_path / "awq", words)))
    assert report["calibration"]["samples"] == 6
    assert report["bytes"]["after"] < report["bytes"]["before"]
    assert {entry["behind"].rpartition("layers.0.")[2] for entry in report["scaled"][:4]} == {
        "input_layernorm",
        "self_attn.v_proj",
        "post_attention_layernorm",
        "mlp.up_proj",
    }
    described = checkpoints.describe(tmp_path / "awq")
    assert (described["format"], described["bits"], described["arithmetic"]) == ("compressed-tensors", 4, "unpacked")
    assert described["parameters"] == checkpoints.describe(parent)["parameters"]
    with pytest.raises(UserError, match=r"is quantized already \(compressed-tensors\): AWQ needs"):
        quantize(tmp_path / "awq", tmp_path / "again", words)


@pytest.mark.parametrize(
    ("family", "options", "keys", "message"),
    [
        ("llama", {}, {"group_size": 32}, "down_proj of .* has 48 input channels, which groups of 32"),
        ("gpt_neox", {}, {}, "norms of a 'gpt_neox' model, .* are not known"),
        ("opt", {"do_layer_norm_before": False}, {}, "'do_layer_norm_before' is false"),
        ("llama", {"max_position_embeddings": 8}, {}, "windows have 12 tokens, and the model reads 8"),
    ],
)
def test_parents_that_cannot_be_quantized_are_refused_before_their_weights_are_read(
    words, tmp_path, monkeypatch, family, options, keys, message
):
    source = width_cases.parent(tmp_path / "parent", family, **options)
    monkeypatch.setattr(checkpoints, "load", None)
    with pytest.raises(UserError, match=message):
        quantize(source, tmp_path / "awq", words, **keys)


def test_weights_that_are_not_numbers_are_refused(parent, words, tmp_path):
    model = checkpoints.load(parent, "cpu").model
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    (tmp_path / "parent").mkdir()
    width_cases.save(model, tmp_path / "parent")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        quantize(tmp_path / "parent", tmp_path / "awq", words)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"bits": 5}, "bits"),
        ({"grid": 2}, "'grid' must be at least 3"),
        ({"batch_size": 0}, "'batch_size' must be at least 1"),
        ({"group_size": 48}, "group_size"),
    ],
)
def test_recipes_that_mean_nothing(keys, message, tmp_path):
    mapping = {"bits": 4, "calibration": tiny_cases.calibration(tmp_path / "words"), **keys}
    with pytest.raises(UserError, match=message):
        recipes.build(awq.Recipe, mapping, "recipe")
