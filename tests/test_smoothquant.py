"""SmoothQuant against its formula written out naively: factors, statistics, codes; and what smoothing is there for."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

import tiny as tiny_cases
import width_cases
from espalier import checkpoints, recipes
from espalier.errors import UserError
from espalier.models import lowbit, smoothing
from espalier.models.anatomy import adopt, keep, parts_of, remove_blocks
from espalier.models.streaming import BlockStream
from espalier.quantize import smoothquant
from families import VOCABULARY, WIDTHS, tiny

PAIRS = {  # in the Llama of these tests: norm → what reads it
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
OUTLIERS = (3, 17)


def pairs_of(model) -> list[smoothing.Pair]:
    return [pair for pairs in smoothing.pairs_of(model) for pair in pairs]


def with_outliers(model, times: float = 60.0):
    """Make some channels of every norm large, and their columns as small: the model computes what it did."""
    with torch.no_grad():
        for pair in pairs_of(model):
            for parameter in pair.norm.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
                parameter[list(OUTLIERS)] *= times
            for layer in pair.readers:
                layer.weight[:, list(OUTLIERS)] /= times
    return model


def llama(folder, dtype=torch.float32, **options):
    """Save a Llama whose norms have outliers, and return its folder."""
    model = with_outliers(width_cases.dense(width_cases.parent(folder.with_suffix(".plain"), **options)))
    folder.mkdir()
    width_cases.save(model.to(dtype), folder)
    return folder


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return width_cases.calibration(tmp_path_factory.mktemp("data") / "words")


def quantize(parent, output, calibration, **recipe) -> dict:
    output.mkdir()
    built = smoothquant.Recipe(**{"bits": 8, "calibration": calibration, **recipe})
    built.check()
    return smoothquant.apply(parent, output, built, seed=0, device="cpu")


def norm_outputs(model, ids) -> list[dict[str, torch.Tensor]]:
    """Return for each block what its norms give, tokens × channels, one sample after another."""
    seen: list[dict] = [{norm: [] for norm in PAIRS} for _ in model.model.layers]
    handles = [
        block.get_submodule(norm).register_forward_hook(lambda _, __, given, into=into[norm]: into.append(given[0]))
        for block, into in zip(model.model.layers, seen, strict=True)
        for norm in PAIRS
    ]
    with torch.no_grad():
        for window in ids:
            model(input_ids=window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return [{norm: torch.cat(given) for norm, given in block.items()} for block in seen]


def naive_factors(inputs: torch.Tensor, weights: list[torch.Tensor], alpha: float) -> list[float]:
    """s_j = max|X_j|^α / max|W_:,j|^(1−α), one channel at a time."""
    found = []
    for j in range(inputs.shape[1]):
        of_inputs = max(abs(value) for value in inputs[:, j].tolist())
        of_weights = max(abs(value) for weight in weights for value in weight[:, j].tolist())
        found.append(of_inputs**alpha / of_weights ** (1 - alpha))
    return found


def naively_smoothed(model, ids, alpha: float):
    """Return a smoothed copy of a float64 model."""
    outputs, model = norm_outputs(model, ids), copy.deepcopy(model)
    for block, given in zip(model.model.layers, outputs, strict=True):
        for norm, readers in PAIRS.items():
            layers = [block.get_submodule(reader) for reader in readers]
            s = torch.tensor(naive_factors(given[norm], [layer.weight for layer in layers], alpha), dtype=torch.double)
            block.get_submodule(norm).weight.data /= s
            for layer in layers:
                layer.weight.data *= s
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=width_cases.random_ids() % VOCABULARY, use_cache=False).logits


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("family", WIDTHS)
def test_smoothing_leaves_the_logits_of_every_architecture(family, alpha):
    model = tiny(family).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    model = with_outliers(model)
    before, weights = logits(model), {name: one.clone() for name, one in model.named_parameters()}
    windows = torch.arange(60).reshape(5, 12) % VOCABULARY
    report = smoothquant.smooth_blocks(BlockStream(model, windows, "cpu", 2), alpha)
    torch.testing.assert_close(logits(model), before, rtol=1e-10, atol=1e-10)
    changed = {name for name, one in model.named_parameters() if not torch.equal(one, weights[name])}
    readers = [layer for pair in pairs_of(model) for layer in pair.readers]
    expected = {id(one) for pair in pairs_of(model) for one in pair.norm.parameters()} | {
        id(one.weight) for one in readers
    }
    assert {name for name, one in model.named_parameters() if id(one) in expected} == changed
    if alpha == 1:  # all the difficulty is in the weights
        assert all(entry[pair]["largest_activation"]["after"] == 1 for entry in report for pair in ("attention", "mlp"))
    if alpha == 0:
        largest = [torch.cat([layer.weight for layer in pair.readers]).abs().amax(0) for pair in pairs_of(model)]
        assert all(torch.allclose(one, torch.ones_like(one)) for one in largest)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_factors_are_equation_4(alpha):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 9, generator=generator).double() * torch.logspace(-2, 2, 9)
    weights = [torch.randn(rows, 9, generator=generator).double() for rows in (6, 2, 2)]
    found = smoothing.factors(inputs.abs().amax(0), weights, alpha)
    assert found.tolist() == pytest.approx(naive_factors(inputs, weights, alpha), rel=1e-12)


def test_factors_are_those_of_llm_compressor_where_both_follow_the_paper():
    """It takes max − min of the activations and twice max|W|: the same where ranges are symmetric and α is 0.5."""
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    layers = [torch.nn.Linear(9, rows) for rows in (6, 2, 2)]
    largest = torch.rand(9) * 20
    with torch.no_grad():
        theirs = SmoothQuantModifier(smoothing_strength=0.5)._calculate_smoothing_scales(layers, 2 * largest)
        ours = smoothing.factors(largest, [layer.weight for layer in layers], 0.5)
    assert torch.allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dead_channels_do_no_harm(alpha, dtype):
    """A channel that the norm never gives, one that nothing reads, and one that is nearly silent."""
    model = tiny("llama").to(dtype)
    for pair in pairs_of(model):
        pair.norm.weight.data[5] = 0
        pair.norm.weight.data[7] = 1e-6
        for layer in pair.readers:
            layer.weight.data[:, 9] = 0
    before = logits(model).double()
    smoothquant.smooth_blocks(BlockStream(model, torch.arange(60).reshape(5, 12), "cpu", 5), alpha)
    assert all(torch.isfinite(one).all() for one in model.parameters())
    rtol = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert (logits(model).double() - before).norm() < rtol * before.norm()
    for pair in pairs_of(model):
        assert pair.norm.weight[5] == 0
        assert all((layer.weight[:, 9] == 0).all() for layer in pair.readers)


def test_a_channel_that_the_samples_leave_silent_is_not_made_loud(parent, words, tmp_path):
    """It is 0 for the bytes of the samples, and not for others."""
    model, ids = checkpoints.load(parent, device="cpu").model, width_cases.windows(parent, words)
    remove_blocks(model, [1, 2])
    model.get_input_embeddings().weight.data[ids.unique(), 5] = 0
    (tmp_path / "silent").mkdir()
    width_cases.save(model, tmp_path / "silent")
    quantize(tmp_path / "silent", tmp_path / "made", words, alpha=0.8)
    true, found = logits(model), logits(checkpoints.load(tmp_path / "made", device="cpu").model)
    assert (found - true).norm() / true.norm() < 0.05


@pytest.mark.parametrize("batch_size", [1, 4])
def test_statistics_are_those_of_the_original_model(parent, words, batch_size):
    model, ids = width_cases.dense(parent), width_cases.windows(parent, words)
    expected = norm_outputs(model, ids)
    report = smoothquant.smooth_blocks(BlockStream(model, ids, "cpu", batch_size), 0.7)
    for entry, given in zip(report, expected, strict=True):
        for pair, norm in zip(("attention", "mlp"), PAIRS, strict=True):
            before = max(abs(value) for value in given[norm].flatten().tolist())
            assert entry[pair]["largest_activation"]["before"] == pytest.approx(before, rel=1e-12)


def test_more_samples_change_the_statistics_through_their_largest_alone(parent, words):
    """Of nested sets, the larger one's range is the larger of the smaller one's and that of what was added."""

    def ranges(ids) -> list[torch.Tensor]:
        model = width_cases.dense(parent)
        stream = BlockStream(model, ids, "cpu", 2)
        with smoothing.observed(*pairs_of(model)) as found:
            hidden = stream.enter()
            for number in range(len(stream)):
                hidden = stream.run(number, hidden)
        return [one.largest for one in found]

    ids = width_cases.windows(parent, words)
    few, rest, every = ranges(ids[:2]), ranges(ids[2:]), ranges(ids)
    for one, other, both in zip(few, rest, every, strict=True):
        assert torch.equal(torch.maximum(one, other), both)
        assert (one < both).any()


@pytest.mark.parametrize(("bits", "alpha"), [(8, 0.5), (8, 0.8), (4, 0.5)])
def test_codes_are_the_nearest_of_the_naively_smoothed_weights(parent, words, tmp_path, bits, alpha):
    quantize(parent, tmp_path / "made", words, bits=bits, alpha=alpha)
    model = checkpoints.load(tmp_path / "made", device="cpu").model
    expected = naively_smoothed(width_cases.dense(parent), width_cases.windows(parent, words), alpha)
    largest_code = 2 ** (bits - 1) - 1
    for name, layer in lowbit.linear_layers(expected).items():
        found = model.get_submodule(name).codes()
        for row, codes, scale in zip(layer.weight.tolist(), found.codes.tolist(), found.scale.tolist(), strict=True):
            step = max(abs(value) for value in row) / largest_code
            assert scale == pytest.approx([step], rel=1e-5)
            # Where a weight lies half way between two codes, float32 may decide otherwise than float64.
            assert all(abs(value / step - code) < 0.5 + 1e-4 for value, code in zip(row, codes, strict=True))
    for name, parameter in expected.named_parameters():
        if "proj" not in name:
            assert torch.allclose(model.get_parameter(name).double(), parameter, rtol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_outliers_cost_less_with_smoothing(parent, words, tmp_path, bits):
    quantize(parent, tmp_path / "smoothed", words, bits=bits)
    dense, plain = (checkpoints.load(parent, device="cpu").model for _ in range(2))
    lowbit.round_layers(plain, lowbit.Scheme(bits=bits, activations=8))
    smoothed = checkpoints.load(tmp_path / "smoothed", device="cpu").model
    true = logits(dense)
    lost = {name: (logits(one) - true).norm() / true.norm() for name, one in (("plain", plain), ("smoothed", smoothed))}
    assert lost["smoothed"] < (0.3 if bits == 8 else 0.8) * lost["plain"]


def test_gptq_rounds_the_smoothed_weights_and_loses_less_on_the_samples(parent, words, tmp_path):
    """Per layer of the first block, on the inputs that it has in the smoothed model."""
    ids = width_cases.windows(parent, words)
    smoothed = naively_smoothed(width_cases.dense(parent), ids, 0.5)
    inputs, block = norm_outputs(smoothed, ids)[0], smoothed.model.layers[0]
    made = {}
    for name, keys in {
        "nearest": {},
        "gptq": {"rounding": "gptq"},
        "damped": {"rounding": "gptq", "damp": 0.9},
    }.items():
        quantize(parent, tmp_path / name, words, bits=4, **keys)
        made[name] = checkpoints.load(tmp_path / name, device="cpu").model.model.layers[0]
    for norm, reader in ((norm, reader) for norm, readers in PAIRS.items() for reader in readers):
        lost, weight = {}, block.get_submodule(reader).weight
        for name, one in made.items():
            assert torch.allclose(one.get_submodule(norm).weight.double(), block.get_submodule(norm).weight)
            error = weight - lowbit.dequantized(one.get_submodule(reader).codes())
            lost[name] = (inputs[norm] @ error.T).norm() / (inputs[norm] @ weight.T).norm()
        assert lost["gptq"] < 0.6 * lost["nearest"] < 0.1
        assert lost["gptq"] < lost["damped"] < lost["nearest"]


def test_report_and_description(parent, words, tmp_path):
    report = quantize(parent, tmp_path / "made", words, alpha=0.5)
    for entry in report["blocks"]:
        for pair in ("attention", "mlp"):
            largest = entry[pair]["largest_activation"]
            assert largest["after"] < 0.2 * largest["before"]
    assert [entry["block"] for entry in report["blocks"]] == [0, 1, 2]
    sizes = [checkpoints.weight_bytes(folder) for folder in (parent, tmp_path / "made")]
    assert report["bytes"] == dict(zip(("before", "after"), sizes, strict=True))
    assert sizes[1] < sizes[0]
    assert report["calibration"] == words.draw(checkpoints.load_tokenizer(parent)).record
    assert report["seconds"] > 0
    described = checkpoints.describe(tmp_path / "made")
    assert (described["bits"], described["arithmetic"]) == (8, "integer")
    assert described["parameters"] == checkpoints.describe(parent)["parameters"]


def depth_pruned(model) -> None:
    remove_blocks(model, [1])


def width_pruned(model) -> None:
    for number, parts in enumerate(parts_of(model)):
        keep(parts, [number % parts.groups], range(10 + 7 * number))
    adopt(model)


PARENTS = [
    ("llama", depth_pruned, "nearest"),
    ("llama", width_pruned, "gptq"),
    *((family, width_pruned, "nearest") for family in ("llama", *width_cases.ARCHITECTURES)),
]

RELOAD = """
import sys, torch
from pathlib import Path
from espalier import checkpoints
for folder in map(Path, sys.argv[1:]):
    model = checkpoints.load(folder, device="cpu").model
    with torch.no_grad():
        torch.save(model(torch.load(folder / "ids")).logits, folder / "logits")
"""


def test_pruned_parents_and_the_same_logits_in_a_fresh_process(words, tmp_path):
    """Blocks of different widths, fewer blocks; at 8 bits little is lost, and what is saved is what was computed."""
    outputs = []
    for number, (family, prune, rounding) in enumerate(PARENTS):
        source, output = tmp_path / f"parent-{number}", tmp_path / f"made-{number}"
        model = with_outliers(width_cases.dense(width_cases.parent(source.with_suffix(".plain"), family)), 10).float()
        prune(model)
        source.mkdir()
        width_cases.save(model, source)
        report = quantize(source, output, words, rounding=rounding)
        assert len(report["blocks"]) == model.config.num_hidden_layers
        quantized, ids = checkpoints.load(output, device="cpu").model, width_cases.random_ids()
        with torch.no_grad():
            true, found = model(ids).logits, quantized(ids).logits
        assert 1e-4 < (found - true).norm() / true.norm() < 0.1, family
        torch.save(ids, output / "ids")
        outputs.append((output, found))
    folders = [str(output) for output, _ in outputs]
    subprocess.run([sys.executable, "-c", RELOAD, *folders], check=True, capture_output=True)
    for output, found in outputs:
        assert torch.equal(torch.load(output / "logits"), found), output


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.bfloat16, "nearest"), (torch.float16, "nearest"), (torch.bfloat16, "gptq")]
)
def test_parents_of_16_bits_stay_what_they_are(words, tmp_path, dtype, rounding):
    source = llama(tmp_path / "parent", dtype)
    quantize(source, tmp_path / "made", words, rounding=rounding)
    model = checkpoints.load(tmp_path / "made", device="cpu").model
    assert {one.dtype for one in model.parameters()} == {dtype}
    samples = width_cases.windows(source, words)  # on which GPTQ, too, does no harm
    with torch.no_grad():
        true, found = (
            checkpoints.load(source, device="cpu").model(samples).logits.float(),
            model(samples).logits.float(),
        )
    assert (found - true).norm() / true.norm() < 0.08


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gpt_neox", {}, r"norms of a 'gpt_neox' model, .*, are not known; those of these are: llama, .*, opt\."),
        ("opt", {"do_layer_norm_before": False}, r"norms stand behind attention and MLP \('do_layer_norm_before'"),
        ("opt", {"layer_norm_elementwise_affine": False}, "norms self_attn_layer_norm have no weights"),
        ("llama", {"max_position_embeddings": 8}, "windows have 12 tokens, and the model reads 8 at most"),
    ],
)
def test_parents_that_cannot_be_smoothed_are_refused_before_their_weights_are_read(
    words, tmp_path, monkeypatch, family, options, message
):
    source = width_cases.parent(tmp_path / "parent", family, **options)
    monkeypatch.setattr(checkpoints, "load", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=message):
        quantize(source, tmp_path / "made", words)
    assert not list((tmp_path / "made").iterdir())


def test_quantized_parent_is_refused(parent, words, tmp_path):
    quantize(parent, tmp_path / "once", words)
    with pytest.raises(UserError, match=r"once is quantized already .*: SmoothQuant needs an unquantized parent"):
        quantize(tmp_path / "once", tmp_path / "twice", words)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"alpha": 1.5}, "'alpha' must be at least 0 and at most 1"),
        ({"alpha": -0.1}, "'alpha' must be at least 0"),
        ({"damp": 0.0, "rounding": "gptq"}, "'damp' must lie between 0 and 1"),
        ({"batch_size": 0}, "'batch_size' must be at least 1"),
        ({"bits": 3}, "bits: 3 .* not a choice. Known: 4, 8"),
    ],
)
def test_recipes_that_mean_nothing(keys, message, tmp_path):
    calibration = tiny_cases.calibration(tmp_path / "words")
    with pytest.raises(UserError, match=message):
        recipes.build(smoothquant.Recipe, {"bits": 8, "calibration": calibration, **keys}, "recipe")
