"""Trellis as an engine, with a plain decode step or a compiled one: what engines/trellis*.py share."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

from espalier import checkpoints
from espalier.trellis.sampling import SAMPLINGS as CHOICES
from espalier.worker import Unavailable, require_device

if TYPE_CHECKING:
    from espalier.worker import Load

PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "gptqmodel")
SAMPLINGS = tuple(CHOICES)


def probe(device: str) -> None:
    """Raise Unavailable where the device is cuda, and there is none or no Triton for its kernels."""
    require_device(device)
    if device == "cuda" and find_spec("triton") is None:
        raise Unavailable("the package triton is not installed")


class TrellisEngine:
    """A static cache, products laid out as measured, split attention with a unified maximum."""

    name: str
    keeps_cache = True
    compiled = False

    def load(self, load: Load) -> None:
        from espalier.trellis.blocks import read
        from espalier.trellis.model import Trellis

        checkpoint = checkpoints.load(load.folder, load.device)
        blocks = read(checkpoint.model)
        self.context, self.info = blocks.context, checkpoint.info
        self.model = Trellis(blocks, seed=load.seed, compiled=self.compiled)

    def generate(
        self, token_ids: list[list[int]], output_tokens: int, sampling: str, first_token: Callable[[], None]
    ) -> list[list[int]]:
        return self.model.generate(token_ids, output_tokens, sampling, first_token)

    def details(self) -> dict:
        return self.model.details()

    def close(self) -> None:
        self.model = None
