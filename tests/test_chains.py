"""Chains: their parents, and the orders that make no sense."""

from __future__ import annotations

import re

import pytest

from espalier import chains
from espalier.errors import UserError

STAGES = {"depth-1": "prune", "lora": "tune", "gptq.w4": "quantize", "int8": "quantize"}


def test_split_and_ancestors():
    assert chains.split("dense") == ("dense", None)
    assert chains.split("dense+depth-1+lora") == ("dense+depth-1", "lora")
    assert chains.ancestors("dense+depth-1+lora") == ["dense", "dense+depth-1", "dense+depth-1+lora"]
    assert re.fullmatch(chains.CHAIN, "dense+depth-1+gptq.w4")
    assert not re.fullmatch(chains.CHAIN, "dense+Depth")


@pytest.mark.parametrize("chain", ["dense", "dense+depth-1", "dense+lora+depth-1+gptq.w4"])
def test_accepts(chain):
    chains.check(chain, STAGES, "here")


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ("depth-1", "must begin with 'dense'"),
        ("dense+depht-1", "names no recipe 'depht-1'. Did you mean 'depth-1'?"),
        ("dense+int8+lora", "'lora' (tune) cannot follow 'int8'"),
        ("dense+int8+gptq.w4", "Put 'int8' last"),
        ("dense+", "names no recipe ''"),
    ],
)
def test_refuses(chain, message):
    with pytest.raises(UserError, match=r"^here: ") as caught:
        chains.check(chain, STAGES, "here")
    assert message in str(caught.value)
