"""A decode step recorded as one: as a CUDA graph, or compiled on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from espalier.trellis.attention import decode_attention

if TYPE_CHECKING:
    from espalier.trellis.model import Trellis

FORMS = 64  # of one step that may be compiled: for each layout of the products, for a batch of one and of several

# Whether attention recomputes rows depends on values, which torch.compile cannot follow: to it this is one operator.
_operators = torch.library.Library("espalier", "FRAGMENT")
_operators.define(
    "attend(Tensor query, Tensor keys, Tensor values, Tensor known, Tensor centre, Tensor(a!) recomputed) -> Tensor"
)
_operators.impl(
    "attend",
    lambda query, keys, values, known, centre, recomputed: decode_attention(
        query, keys, values, known.item(), centre.item(), recomputed=recomputed
    ),
    "CPU",
)
_operators.impl("attend", lambda query, *_: query.new_empty(query.shape), "Meta")


class Graph:
    """A decode step as a CUDA graph, for one batch and capacity; not verified on a GPU.

    It is recorded at the position where it is first needed, and what the recording writes into the cache there is what
    the first replay writes again. Raises RuntimeError for a step that waits for the device on its way.
    """

    def __init__(self, model: Trellis, tokens: torch.Tensor):
        self.tokens, recomputed = tokens.clone(), model.recomputed.clone()
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # kernels are compiled and libraries set up before the recording
                for _ in range(2):
                    model.recorded_step(self.tokens)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = model.recorded_step(self.tokens)
        finally:
            model.recomputed.copy_(recomputed)  # without what the steps before the recording counted

    def replay(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits behind these tokens, in a tensor that the next replay overwrites."""
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits


class Compiled:
    """A decode step compiled by torch for a CPU, its attention but called from it."""

    def __init__(self, model: Trellis):
        torch._dynamo.config.recompile_limit = max(FORMS, torch._dynamo.config.recompile_limit)
        self.step = torch.compile(model.recorded_step, fullgraph=True)

    @staticmethod
    def attend(query, keys, values, known, centre, *, recomputed) -> torch.Tensor:
        return torch.ops.espalier.attend(query, keys, values, known, centre, recomputed)

    @staticmethod
    def mark(model: Trellis) -> None:
        """Have one compiled form serve every capacity."""
        for tensor, dimension in [(part, 2) for pair in model.cache for part in pair] + [
            (table, 0) for table in (model.rotary or ())[:2]
        ]:
            torch._dynamo.maybe_mark_dynamic(tensor, dimension)
