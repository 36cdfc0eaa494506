"""Prefill, and decoding one token at a time over a static key-value cache.

The cache holds batch × kv_heads × capacity × head_dim for exactly the shape that is generated. All that a decode step
reads and writes, its position included, stays on the device in tensors that keep their place: on CUDA a whole step is
recorded as one graph, and on a CPU it can be compiled as a whole (`compiled`).

By default it is not compiled on a CPU, where the plain step makes few and large calls. Measured on one thread of an AMD
EPYC with AVX512, 8 blocks, float32, plain → compiled: hidden size 64, 0.74 → 0.61 ms a token (batch 1), 1.14 → 1.11 ms
(batch 4); hidden size 512, the same within the noise, at batches 1, 4 and 8. Compiling takes 7 to 13 s for each choice
of layouts, and 4 to 8 s where torch finds it in its cache on disk: the small model earns that back after 50 000 tokens.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable

import torch
from torch.nn import functional as F

from espalier.memory import is_out_of_memory
from espalier.trellis.attention import decode_attention
from espalier.trellis.blocks import Block, Blocks
from espalier.trellis.products import Projections
from espalier.trellis.recording import Compiled, Graph
from espalier.trellis.rotary import Rotary, tables
from espalier.trellis.sampling import SAMPLINGS

MULTIPLE = 64  # tokens to which a cache's capacity is rounded up


class Trellis:
    """A model ready to generate.

    `centre` is the unified maximum φ of every block's attention scores (Hong et al. 2023, FlashDecoding++, section 3).
    By default φ is taken from the model, one a block: the mean, over the rows and heads of a prompt's last token, of
    the largest score. The first prompt sets it, and so does each that is longer than all before. `recomputed` counts
    the rows (of a batch and a head) that left φ's range.
    """

    def __init__(self, blocks: Blocks, *, seed: int = 0, compiled: bool = False, centre: float | None = None):
        self.blocks = blocks
        self.like = blocks.embedding  # whose dtype and device all else has
        self.on_cuda = self.like.is_cuda
        self.generator = torch.Generator(self.like.device).manual_seed(seed)
        self.recomputed = torch.zeros((), dtype=torch.long, device=self.like.device)
        # φ of each block; a tensor for a compiled step, which else would be compiled anew for every φ.
        self.centres: list[float] | torch.Tensor = []
        self.seen = 0  # tokens of the prompt that these are from
        self.rows = self.capacity = 0  # batch that products are laid out for; tokens that the cache holds
        self.cache: list[tuple[torch.Tensor, torch.Tensor]] = []  # keys and values of each block
        self.rotary: Rotary | None = None
        self.graph: Graph | None = None
        self.recordable = self.on_cuda  # until a recording fails
        self.layouts: dict[str, dict] = {}  # for each batch met, kind of product → layout → how many have it
        self.compiled = Compiled(self) if compiled and not self.on_cuda else None
        self.attend = self.compiled.attend if self.compiled else decode_attention
        if centre is not None:
            self.centre_at([centre] * len(blocks.blocks), tokens=sys.maxsize)

    @torch.inference_mode()
    def generate(
        self,
        token_ids: list[list[int]],
        output_tokens: int,
        sampling: str = "greedy",
        first_token: Callable[[], None] = lambda: None,
    ) -> list[list[int]]:
        """Return exactly `output_tokens` new tokens for each prompt; the prompts are equally long.

        `first_token` is called when the first new token of every row is known.
        """
        prompts = torch.tensor(token_ids, device=self.like.device)
        choose = SAMPLINGS[sampling]
        batch, length = prompts.shape
        self.make_room(batch, length + output_tokens - 1)
        tokens = [choose(self.prefill(prompts), self.generator)]
        if self.on_cuda:
            torch.cuda.synchronize()
        first_token()
        self.position.fill_(length)
        for known in range(length + 1, length + output_tokens):
            tokens.append(choose(self.logits(tokens[-1], known), self.generator))
            self.position.add_(1)
        return torch.stack(tokens, 1).tolist()

    def make_room(self, batch: int, tokens: int) -> None:
        """Lay the products out for a batch, and allocate the cache, unless both are there for this shape."""
        capacity = -(-tokens // MULTIPLE) * MULTIPLE
        if (batch, capacity) == (self.rows, self.capacity):
            return
        self.graph, self.rotary, self.cache, self.capacity = None, None, [], 0  # what is old is freed first
        if batch != self.rows:
            self.rows = 0
            for product in self.products():
                product.arrange(batch)
            self.layouts[str(batch)] = self.chosen()
        for block in self.blocks.blocks:
            shape = (batch, block.kv_heads, capacity, block.head_dim)
            self.cache.append((self.like.new_zeros(shape), self.like.new_zeros(shape)))
        if self.blocks.rotary is not None:
            head_dim = self.blocks.blocks[0].head_dim
            self.rotary = tables(self.blocks.rotary, self.blocks.interleaved, capacity, head_dim, self.like)
        self.position = torch.zeros(1, dtype=torch.long, device=self.like.device)
        self.rows, self.capacity = batch, capacity
        if self.compiled:
            self.compiled.mark(self)

    def prefill(self, prompts: torch.Tensor) -> torch.Tensor:
        """Fill the cache with prompts, batch × tokens, and return the logits of their last tokens."""
        length = prompts.shape[1]
        x, rotary = self.embed(prompts, torch.arange(length, device=prompts.device))
        centres = []
        for block, (keys, values) in zip(self.blocks.blocks, self.cache, strict=True):
            query, key, value = (part.transpose(1, 2) for part in enter(block, x, rotary))
            keys[:, :, :length] = key
            values[:, :, :length] = value
            if length > self.seen:
                centres.append(mean_largest_score(query[:, :, -1], key))
            grouped = block.heads != block.kv_heads
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
            x = leave(block, x, attended.transpose(1, 2).flatten(2))
        if centres:
            self.centre_at(torch.stack(centres).tolist(), length)
        return self.blocks.head(self.blocks.norm(x[:, -1]))[0]

    def centre_at(self, centres: list[float], tokens: int) -> None:
        """Take these φ, one a block, which a prompt of so many tokens gave."""
        self.centres = torch.tensor(centres) if self.compiled else centres
        self.seen, self.graph = tokens, None

    def logits(self, tokens: torch.Tensor, known: int) -> torch.Tensor:
        """Return the logits behind one token a row, of which the cache will then hold `known`, this one included."""
        if self.recordable and self.graph is None:
            try:
                self.graph = Graph(self, tokens)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self.recordable = False  # some packed layers wait for the device in each call
        if self.graph:
            return self.graph.replay(tokens)
        if self.on_cuda:
            return self.recorded_step(tokens)
        return self.compiled.step(tokens) if self.compiled else self.step(tokens, known)

    def recorded_step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Do one decode step in which all that changes is a tensor."""
        return self.step(tokens, self.position[0] + 1)

    def step(self, tokens: torch.Tensor, known: int | torch.Tensor) -> torch.Tensor:
        """Do one decode step at `self.position`."""
        x, rotary = self.embed(tokens, self.position)
        for block, (keys, values), centre in zip(self.blocks.blocks, self.cache, self.centres, strict=True):
            query, key, value = enter(block, x, rotary)
            keys.index_copy_(2, self.position, key.unsqueeze(2))
            values.index_copy_(2, self.position, value.unsqueeze(2))
            attended = self.attend(query, keys, values, known, centre, recomputed=self.recomputed)
            x = leave(block, x, attended.flatten(1))
        return self.blocks.head(self.blocks.norm(x))[0]

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, Rotary | None]:
        """Return … × hidden of … tokens, and what turns queries and keys at their positions."""
        x = F.embedding(tokens, self.blocks.embedding)
        if self.blocks.positions is not None:
            x = x + self.blocks.positions.index_select(0, positions)
        return x, None if self.rotary is None else self.rotary.at(positions)

    def products(self) -> list[Projections]:
        """Return all products whose weights can be laid out: not those of packed layers."""
        return [product for _, product in self.blocks.products() if isinstance(product, Projections)]

    def chosen(self) -> dict[str, dict[str, int]]:
        """Return kind of product → layout → how many have it now."""
        layouts: dict[str, Counter] = {}
        for kind, product in self.blocks.products():
            layout = product.choice()["arrangement"] if isinstance(product, Projections) else "of a packed layer"
            layouts.setdefault(kind, Counter())[layout] += 1
        return {kind: dict(counted) for kind, counted in layouts.items()}

    def details(self) -> dict:
        """Return what was chosen, for each batch, and what happened, as plain JSON."""
        if self.on_cuda:
            step = "CUDA graph" if self.recordable else "plain: its layers cannot be recorded"
        else:
            step = "compiled" if self.compiled else "plain"
        return {
            "layouts": self.layouts,
            "cache_capacity": self.capacity,
            "step": step,
            "centres": torch.as_tensor(self.centres).tolist(),
            "recomputed_rows": self.recomputed.item(),
        }


def enter(block: Block, x: torch.Tensor, rotary: Rotary | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value of a block, … × heads × head_dim, from … × hidden."""
    query, key, value = block.project(block.attention_norm(x))
    value = value.view(*x.shape[:-1], block.kv_heads, block.head_dim)
    both = torch.cat((query, key), -1).view(*x.shape[:-1], block.heads + block.kv_heads, block.head_dim)
    if rotary is not None:
        both = rotary.turn(both)
    query, key = both.split((block.heads, block.kv_heads), -2)
    return query, key, value


def leave(block: Block, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """Return what a block gives, … × hidden, from what it got and what its heads attended to."""
    x = block.output(attended)[0].add_(x)
    inner, *factor = block.up(block.mlp_norm(x))
    inner = block.activation(inner)
    if factor:
        inner = inner.mul_(*factor)
    return block.down(inner)[0].add_(x)


def mean_largest_score(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return the mean, over b and h, of the largest score of queries, b×h×d, with keys, b×kv×tokens×d."""
    grouped = query.float().unflatten(1, (keys.shape[1], -1))
    return (grouped @ keys.float().transpose(-1, -2)).amax(-1).mean() * query.shape[-1] ** -0.5
