"""Hugging Face transformers with its static key-value cache, each decode step compiled by `torch.compile`.

As transformers offers it: `model.generate` with a cache of `StaticLayer`s and a `CompileConfig`. The prompt is not
compiled. On CUDA a compiled step is one CUDA graph (torch's mode "reduce-overhead").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from espalier import hf_generation
from espalier.errors import first_line
from espalier.worker import Unavailable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from espalier.worker import Load

PACKAGES = hf_generation.PACKAGES
SAMPLINGS = hf_generation.SAMPLINGS
SHAPES = 64  # most shapes of one model that are compiled, each by itself
probe = hf_generation.probe


class Engine(hf_generation.HFGeneration):
    """Each batch size and length gets a cache that just holds it, and code of its own at its first call."""

    name = "hf-compiled"
    keeps_cache = True

    def prepare(self, model: PreTrainedModel, load: Load) -> PreTrainedModel:
        import torch
        from transformers import CompileConfig

        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is not None and not quantizer.is_compileable:
            raise Unavailable("transformers does not compile models that are stored in this format")
        hf_generation.refuse_window(model, load)
        self.shape, self.cache = None, None
        # Every shape is compiled as if it were the only one: code for any size would be slower, and a cache as large as
        # the longest shape's would be attended to whole. Were there too many shapes, the rest would run uncompiled.
        torch._dynamo.config.recompile_limit = SHAPES
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        mode = "reduce-overhead" if load.device == "cuda" else "default"
        self.compiling = CompileConfig(fullgraph=True, dynamic=False, mode=mode)
        self.compiling._compile_all_devices = True  # transformers compiles on a CPU only if told so
        return model

    def options(self, batch: int, tokens: int) -> dict:
        from transformers.cache_utils import Cache, StaticLayer

        if self.shape == (batch, tokens):
            self.cache.reset()
        else:
            self.cache = None  # before the next one takes memory
            # Transformers' StaticCache, but for layers with a window, for which it would compile each step anew.
            blocks = self.model.config.num_hidden_layers
            self.cache = Cache(layers=[StaticLayer(tokens - 1) for _ in range(blocks)])  # the last token is not kept
            self.shape = (batch, tokens)
        return {"past_key_values": self.cache, "compile_config": self.compiling}

    def generate(
        self, token_ids: list[list[int]], output_tokens: int, sampling: str, first_token: Callable[[], None]
    ) -> list[list[int]]:
        """See HFGeneration. Raises Unavailable for a model whose step does not compile as a whole."""
        import torch

        try:
            return super().generate(token_ids, output_tokens, sampling, first_token)
        except torch._dynamo.exc.Unsupported as error:
            raise Unavailable(f"torch cannot compile the model's step as a whole: {first_line(error)}") from error

    def details(self) -> dict:
        """Return what is run, the mode of torch.compile, and how many graphs it has compiled: one a shape."""
        from torch._dynamo.utils import counters

        graphs = counters["stats"]["unique_graphs"]
        return {**super().details(), "cache": "static", "mode": self.compiling.mode, "compiled_graphs": graphs}

    def close(self) -> None:
        self.cache = None
        super().close()
