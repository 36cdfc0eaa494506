"""Running a model block by block: the same numbers as running it whole, for every architecture."""

from __future__ import annotations

import copy

import pytest
import torch

from espalier.errors import UserError
from espalier.models import anatomy, streaming
from families import VOCABULARY, tiny

WINDOWS = torch.randint(3, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", anatomy.LAYOUTS)
def test_losses_are_those_of_the_whole_model(family, attention):
    model = tiny(family)
    model.set_attn_implementation(attention)
    stream = streaming.BlockStream(model, WINDOWS, "cpu", batch_size=2)  # the last batch is smaller
    hidden = stream.enter()
    with torch.no_grad():
        for index in range(len(stream)):
            with stream.resident(index):
                hidden = stream.run(index, hidden)
        losses = stream.losses(hidden)
        expected = [model(input_ids=one[None], labels=one[None]).loss for one in WINDOWS]
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert stream.evaluations == 3


@pytest.mark.parametrize("stored", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", anatomy.LAYOUTS)
def test_gradients_are_those_of_the_whole_model(family, stored):
    """Whatever the weights are stored in, the stream computes in its own dtype, backwards too."""
    model = tiny(family).to(stored)
    whole = copy.deepcopy(model).double()
    stream = streaming.BlockStream(model, WINDOWS, "cpu", batch_size=1, dtype=torch.float64)
    first, second = {}, {}
    for index, found in streaming.gradients(stream):
        for name, (mean, mean_of_squares) in found.items():
            first[index, name], second[index, name] = mean, mean_of_squares
    expected: dict = {}
    for one in WINDOWS:
        whole.zero_grad()
        whole(input_ids=one[None], labels=one[None]).loss.backward()
        for index, block in enumerate(anatomy.blocks_of(whole)):
            for name, weight in block.named_parameters():
                expected.setdefault((index, name), []).append(weight.grad.clone())
    assert list(first) == sorted(expected, key=lambda key: -key[0])  # the last block first, and no weight left out
    for key, grads in expected.items():
        # The loss of transformers is float32 at its end.
        torch.testing.assert_close(first[key], torch.stack(grads).mean(0), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(second[key], torch.stack(grads).square().mean(0), rtol=1e-5, atol=1e-8)
    assert all(weight.grad is None for weight in model.parameters())


def test_the_model_is_left_as_it_was():
    model, whole = tiny("llama").bfloat16(), tiny("llama").bfloat16()
    stream = streaming.BlockStream(model, WINDOWS, "cpu", batch_size=1, dtype=torch.float32)
    entered = stream.enter()
    assert entered.dtype == torch.float32
    with stream.resident(0) as block:
        assert {weight.dtype for weight in block.parameters()} == {torch.float32}
    for _ in streaming.gradients(stream):
        pass
    for name, weight in whole.named_parameters():
        found = model.get_parameter(name)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, weight)
    assert torch.equal(model(WINDOWS).logits, whole(WINDOWS).logits)


def test_only_one_block_is_on_the_device():
    """The dtype goes where the device goes, and can be seen on a machine that has one device."""
    model = tiny("llama")
    stream = streaming.BlockStream(model, WINDOWS, "cpu", batch_size=5, dtype=torch.float64)

    def there() -> set[str]:
        return {name for name, weight in model.named_parameters() if weight.dtype == torch.float64}

    hidden = stream.enter()
    assert there() == set()
    with stream.resident(1):
        assert there() == {name for name, _ in model.named_parameters() if name.startswith("model.layers.1.")}
        stream.run(1, hidden)
    seen = []
    model.model.norm.register_forward_hook(lambda *_: seen.append(there()))
    stream.losses(hidden)
    assert seen == [{name for name, _ in model.named_parameters() if ".layers." not in name}]
    assert there() == set()


def test_weights_that_are_not_numbers_are_refused():
    model = tiny("llama")
    model.model.layers[1].mlp.down_proj.weight.data[3, 2] = float("nan")
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj\.weight of the model holds NaN"):
        streaming.BlockStream(model, WINDOWS, "cpu", batch_size=5)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (torch.zeros(1, 65, dtype=torch.long), "windows have 65 tokens, and the model reads 64 at most"),
        (torch.tensor([[5, VOCABULARY]]), f"gives the token {VOCABULARY}, and the model knows {VOCABULARY}"),
    ],
)
def test_windows_that_the_model_cannot_read_are_refused(windows, message):
    with pytest.raises(UserError, match=message):
        streaming.BlockStream(tiny("opt"), windows, "cpu", batch_size=1)


def test_logits_of_few_windows_are_there_at_once(monkeypatch):
    """What a loss needs grows with the vocabulary, so it does not grow with the batch."""
    model = tiny("llama")
    stream = streaming.BlockStream(model, WINDOWS, "cpu", batch_size=5)
    hidden = stream.enter()
    whole = stream.losses(hidden)
    monkeypatch.setattr(streaming, "LOSS_TOKENS", 25)  # two windows of 12
    sizes = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    torch.testing.assert_close(stream.losses(hidden), whole)
    assert sizes == [2, 2, 1]


def test_gradients_need_single_samples():
    with pytest.raises(ValueError, match="sample by sample"):
        next(streaming.gradients(streaming.BlockStream(tiny("llama"), WINDOWS, "cpu", batch_size=5)))
