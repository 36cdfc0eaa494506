"""A chain names a variant of a model: `dense+depth-2+lora` is the dense model, pruned, then tuned.

Each token after `dense` is the name of a recipe in the study's config. The parent of a chain is everything before its
last `+`. A token is never parsed for numbers or options.
"""

from __future__ import annotations

from collections.abc import Mapping

from espalier.errors import UserError, did_you_mean

DENSE = "dense"
TOKEN = r"[a-z0-9][a-z0-9.-]*"
CHAIN = rf"{DENSE}(?:\+{TOKEN})*"


def split(chain: str) -> tuple[str, str | None]:
    """Return (parent, last token) of a chain; the dense model has no token."""
    parent, plus, token = chain.rpartition("+")
    return (parent, token) if plus else (chain, None)


def ancestors(chain: str) -> list[str]:
    """Return the chain and all its parents, the dense model first."""
    tokens = chain.split("+")
    return ["+".join(tokens[: i + 1]) for i in range(len(tokens))]


def check(chain: str, stages: Mapping[str, str], where: str) -> None:
    """Refuse a chain whose tokens are unknown or whose order makes no sense; `stages` is token → stage.

    A quantized model can be neither pruned nor tuned nor quantized again: its weights are packed integers.
    """
    head, *tokens = chain.split("+")
    if head != DENSE:
        raise UserError(f"{where}: the chain '{chain}' must begin with '{DENSE}'.")
    quantized = None
    for token in tokens:
        if token not in stages:
            raise UserError(f"{where}: the chain '{chain}' names no recipe '{token}'.{did_you_mean(token, stages)}")
        if quantized:
            raise UserError(
                f"{where}: the chain '{chain}' makes no sense: '{token}' ({stages[token]}) cannot follow"
                f" '{quantized}', because a quantizing step ends a chain. Put '{quantized}' last."
            )
        if stages[token] == "quantize":
            quantized = token
