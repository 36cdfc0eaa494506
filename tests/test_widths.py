"""Counting of what width pruning removes: exact fractions, targets by size, rounding, and the pool of all blocks."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch

from espalier import checkpoints
from espalier.data import Calibration, Dataset, Text
from espalier.errors import UserError
from espalier.models import widths
from espalier.models.anatomy import keep, parts_of
from espalier.models.input_moments import Moments
from espalier.models.widths import Width
from espalier.prune import depth, flap, llm_pruner, wanda_sp
from width_cases import calibration, parent, random_ids


def llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**options))


SMALL = {"hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 9}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return calibration(tmp_path_factory.mktemp("words") / "data")


def planned(method, model, words, **recipe) -> int:
    built = method.Recipe(calibration=words, **recipe)
    built.check()
    method.plan(model, built)
    return checkpoints.logical_parameters(model)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ({"ratio": 0.25}, 5_422_977_024),
        ({"ratio": 0.35}, 4_907_642_880),
        ({"parameters": 4.9e9}, 4_899_975_168),  # 11 groups and 3877 neurons; one neuron of 26 blocks is 319,488
    ],
)
def test_llm_pruner_on_the_shape_of_llama_7b(target, expected, words):
    assert planned(llm_pruner, llama(), words, **target) == expected


def test_a_group_of_llama_costs_as_many_neurons_as_in_the_paper():
    width = widths.widths_of(llama(num_hidden_layers=1), wanda_sp.Recipe(None, ratio=0.5))[0]
    assert Fraction(width.group_parameters, width.neuron_parameters) == Fraction(512, 3)


@pytest.mark.parametrize(("family", "shared"), [("opt", 4), ("glm", 2), ("qwen3", 2)])
def test_parameters_of_a_unit_are_what_keep_takes_away(family, shared):
    import families

    model = families.tiny(family)
    parts, width = parts_of(model)[0], widths.widths_of(model, wanda_sp.Recipe(None, ratio=0.5))[0]
    assert width.groups == shared
    before = checkpoints.logical_parameters(model)
    keep(parts, range(1, width.groups), range(width.neurons))
    between = checkpoints.logical_parameters(model)
    keep(parts, range(width.groups - 1), range(3, width.neurons))
    after = checkpoints.logical_parameters(model)
    assert (before - between, between - after) == (width.group_parameters, 3 * width.neuron_parameters)


@pytest.mark.parametrize(
    ("ratio", "groups", "neurons"),
    [(0.9, 9, 9), (0.3, 3, 3), (0.7, 7, 7), (0.1, 1, 1), (0.15, 1, 2)],  # 10 (1 - 0.9) is less than 1 in floats
)
def test_ratios_are_exact(ratio, groups, neurons):
    width = Width(groups=10, neurons=10, head_dim=4, channels=4, group_parameters=1, neuron_parameters=1)
    assert llm_pruner._removed(width, widths.exact(ratio)) == (groups, neurons)
    assert widths.share(width, widths.exact(ratio)) == (groups, math.floor(10 * Fraction(str(ratio))))


@pytest.mark.parametrize("method", [llm_pruner, wanda_sp, flap], ids=lambda method: method.__name__)
@pytest.mark.parametrize("round_to", [None, 16])
def test_a_size_is_the_nearest_of_all_sizes(method, round_to, words):
    options = {"structure": "UL-UM"} if method is flap else {}
    edges = {"keep_first": 0, "keep_last": 0, "round_to": round_to, **options}
    sizes = set()
    for step in range(1, 160):  # fine enough to meet every pair of counts
        try:
            sizes.add(planned(method, llama(**SMALL), words, ratio=step / 160, **edges))
        except UserError:
            assert step < 40, "only a ratio below a quarter removes no group of heads"
    for target in [*range(min(sizes), max(sizes), (max(sizes) - min(sizes)) // 7), max(sizes)]:
        found = planned(method, llama(**SMALL), words, parameters=float(target), **edges)
        assert abs(found - target) == min(abs(size - target) for size in sizes)


@pytest.mark.parametrize("structure", ["AL-AM", "AL-MM"])
def test_adaptive_plans_come_within_half_a_group(structure, words):
    manual = {"attention_ratio": 0.25} if structure == "AL-MM" else {}
    model = llama(**SMALL)
    target = 0.7 * checkpoints.logical_parameters(model)
    (group,) = {width.group_parameters for width in widths.widths_of(model, wanda_sp.Recipe(None)).values()}
    found = planned(flap, model, words, parameters=target, structure=structure, **manual)
    assert abs(found - target) <= group / 2
    assert all(parts.output.bias is not None and parts.down.bias is not None for parts in parts_of(model))


@pytest.mark.parametrize(
    ("counts", "round_to", "expected"),
    [
        ((5, 70), None, (5, 70)),
        ((5, 70), 64, (6, 64)),  # two groups fill 64; of 4 and 6 groups, as near to 5, the larger
        ((0, 0), None, (1, 1)),
        ((3, 95), 64, (4, 64)),
        ((3, 97), 64, (4, 64)),  # 128 would be nearer, but there are 100
        ((0, 1), 64, (2, 64)),
        ((7, 45), 16, (7, 48)),
        ((7, 40), 16, (7, 48)),  # of two as near, the larger
    ],
)
def test_rounding(counts, round_to, expected):
    width = Width(groups=8, neurons=100, head_dim=32, channels=64, group_parameters=1, neuron_parameters=1)
    rounded = widths.rounded({0: width}, {0: counts}, round_to)[0]
    assert rounded == expected
    if round_to:
        assert rounded[0] * 32 % round_to == rounded[0] * 64 % round_to == rounded[1] % round_to == 0


def test_thirteen_billion_parameters_fit_into_24_gb():
    """The papers' calibration sets, in 16 bits; LLM-Pruner's gradients have 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16()
    block = sum(weight.numel() for weight in model.model.layers[0].parameters())
    text = Text(Dataset("words", "local", path="."), "train")
    for method, samples, length, copies in [
        (flap, 1024, 128, 2),
        (flap, 1024, 2048, 2),
        (wanda_sp, 128, 128, 2),
        (llm_pruner, 10, 128, 16),
        (depth, 10, 128, 2),
        (depth, 128, 2048, 2),
    ]:
        recipe = method.Recipe(calibration=Calibration(text, samples=samples, length=length), ratio=0.2)
        assert copies * block < method.peak_bytes(model, recipe) < 24e9


def test_the_pool_of_billions_is_exact():
    """Costs of a 7B model: 32-bit numbers could not tell one neuron more from one less."""
    count = 300_000
    (stay,) = widths.pooled([torch.arange(float(count))], [12_288], 250_000 * 12_288 + 6_154)
    assert count - stay == 250_001


def test_the_pool_against_every_prefix():
    generator = torch.Generator().manual_seed(0)
    lists = [torch.rand(size, generator=generator) for size in (3, 2, 7, 5)]
    costs = [10, 10, 3, 4]
    pool = [
        (float(score), costs[i])
        for i, one in enumerate(lists)
        for score in sorted(one.tolist())[:-1]  # the best of each list stays
    ]
    pool.sort()
    spent = [0, *itertools.accumulate(cost for _, cost in pool)]
    for amount in range(0, spent[-1] + 5):
        end = min(range(len(spent)), key=lambda i: abs(spent[i] - amount))
        gone = {score for score, _ in pool[:end]}
        stay = [sum(score not in gone for score in one.tolist()) for one in lists]
        assert widths.pooled(lists, costs, amount) == stay


@pytest.mark.parametrize(
    ("method", "options", "recipe", "sentence"),
    [
        (llm_pruner, {}, {"ratio": 0.02}, r"removes no groups of heads .* smallest ratio that does is 0\.0311\.$"),
        (llm_pruner, {"num_key_value_heads": 2}, {"ratio": 0.25}, r"\(they have 2 at most\).*does is 0\.4998\.$"),
        (wanda_sp, {"num_key_value_heads": 2}, {"ratio": 0.25}, r"\(they have 2 at most\).*does is 0\.5\.$"),
        (wanda_sp, {"num_key_value_heads": 1}, {"ratio": 0.5}, r"No ratio removes groups of heads"),
        (wanda_sp, {}, {"ratio": 0.5, "round_to": 4096}, r"'round_to: 4096' keeps them\.$"),
        (wanda_sp, {}, {"ratio": 0.5, "round_to": 8192}, r"takes 64 groups of heads, and block 0 has 32\.$"),
        (wanda_sp, {}, {"parameters": 7e9}, r"7,000,000,000 parameters cannot be met: the model has 6,738,415,616"),
        (wanda_sp, {}, {"parameters": 1e8}, r"between 329,912,320 and 6,536,040,448"),
        (flap, {}, {"ratio": 1e-9}, r"from 1\.9e-06, where one neuron goes"),
        (flap, {}, {"ratio": 0.999}, r"to 0\.9895, where no block can lose more"),
        (flap, {}, {"parameters": 7e9}, r"7,000,000,000 parameters cannot be met"),
        (
            flap,
            {},
            {"ratio": 0.2, "structure": "AL-MM", "attention_ratio": 0.9},
            r"921 groups of heads alone weigh .* choose a smaller one\.$",
        ),
        (flap, {}, {"ratio": 0.2, "structure": "UL-MM", "attention_ratio": 0.01}, r"smallest that does is 0\.0313\.$"),
        (
            flap,
            {},
            {"ratio": 0.9, "structure": "UL-MM", "attention_ratio": 0.0},
            r"beside 0 groups of heads, all 11,008 neurons would have to go; choose a larger one\.$",
        ),
        (llm_pruner, {"num_hidden_layers": 6}, {"ratio": 0.25}, r"6 blocks; 'keep_first: 4' and 'keep_last: 2' leave"),
    ],
)
def test_targets_that_cannot_be_met(method, options, recipe, sentence, words):
    with pytest.raises(UserError, match=sentence):
        planned(method, llama(**options), words, **recipe)


@pytest.mark.parametrize(
    ("method", "recipe", "sentence"),
    [
        (wanda_sp, {}, "exactly one of 'ratio' and 'parameters'"),
        (wanda_sp, {"ratio": 0.5, "parameters": 5.0}, "exactly one of 'ratio' and 'parameters'"),
        (llm_pruner, {"ratio": 0.0}, "'ratio' must lie between 0 and 1"),
        (llm_pruner, {"ratio": 1.0}, "'ratio' must lie between 0 and 1"),
        (wanda_sp, {"parameters": 0.0}, "'parameters' must be positive"),
        (wanda_sp, {"ratio": 0.5, "keep_last": -1}, "must not be negative"),
        (wanda_sp, {"ratio": 0.5, "round_to": 0}, "'round_to' must be at least 1"),
        (wanda_sp, {"ratio": 0.5, "batch_size": 0}, "'batch_size' must be at least 1"),
        (flap, {"ratio": 0.5, "batch_size": 0}, "'batch_size' must be at least 1"),
        (flap, {"ratio": 0.5, "attention_ratio": 0.5}, "for the structures UL-MM, AL-MM, and for no other"),
        (flap, {"ratio": 0.5, "structure": "UL-MM"}, "for the structures UL-MM, AL-MM, and for no other"),
        (flap, {"ratio": 0.5, "structure": "UL-MM", "attention_ratio": 1.0}, "at least 0 and less than 1"),
    ],
)
def test_recipes_that_no_model_can_have(method, recipe, sentence, words):
    with pytest.raises(ValueError, match=sentence):
        method.Recipe(calibration=words, **recipe).check()


def test_text_that_is_too_short_and_targets_out_of_reach_fail_before_weights_are_there(tmp_path):
    source = parent(tmp_path / "parent")
    (source / "model.safetensors").unlink()
    output = tmp_path / "pruned"
    for length, sentence in [(10_000, "holds only"), (12, "removes no groups of heads")]:
        recipe = wanda_sp.Recipe(calibration(tmp_path / str(length), length=length), ratio=0.1)
        with pytest.raises(UserError, match=sentence):
            wanda_sp.apply(source, output, recipe, seed=0, device="cpu")


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(UserError, match="scores of block 3 are not finite"):
        widths.choose({3: (torch.ones(2), torch.tensor([1.0, math.nan]))}, {3: (1, 1)})


def test_keeping_every_unit_changes_nothing(tmp_path):
    model = checkpoints.load(parent(tmp_path / "parent"), device="cpu").model
    with torch.no_grad():
        before = model(random_ids()).logits
        for parts in parts_of(model):
            keep(parts, range(parts.groups), range(parts.neurons))
        assert torch.equal(model(random_ids()).logits, before)


def test_moments_keep_their_digits():
    """A spread a thousandth of the mean, in batches of unequal size."""
    values = 100 + 0.1 * torch.randn(5000, 4, generator=torch.Generator().manual_seed(0))
    moments = Moments()
    for batch in values.view(10, 500, 4).split([1, 6, 3]):
        moments.add(batch)
    exact = values.double()
    torch.testing.assert_close(moments.variance(), exact.var(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(moments.mean, exact.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.norm(), exact.square().sum(0).sqrt(), rtol=1e-6, atol=0)
