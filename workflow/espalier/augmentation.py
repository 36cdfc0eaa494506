"""Copies of a task's rows with some of their words replaced by similar ones: more rows for a student to learn from.

After TinyBERT's data augmentation (Jiao et al. 2020, arXiv 1909.10351, Algorithm 1), by which XTC's budgets train the
smaller tasks. There, each word of each copy is replaced with probability 0.4 by one of 15 candidates, drawn evenly: for
a word of one piece the likeliest at its place by a masked language model, for any other the nearest in GloVe. Ours
needs nothing but the teacher, which has no masked-language-model head: the candidates are the words whose vectors in
the teacher's own embedding table are nearest by cosine, whatever the sentence says, and words of several pieces stay. A
copy has no label of its own; the student learns what the teacher says of it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from espalier.errors import UserError
from espalier.progress import progress
from espalier.training_state import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BLOCK = 512  # words compared with all others at once
SPACE = "Ġ"  # how byte-level tokens write the space before a word


@dataclass(frozen=True)
class NearestWords:
    """What the tokens of a vocabulary are to words."""

    candidates: dict[int, list[int]]  # of each token that can be a word: the words to replace it by, the nearest first
    continuing: frozenset[int]  # tokens that are part of the word before them, unless that is a special token
    special: frozenset[int]

    def places(self, token_ids: list[int]) -> list[int]:
        """Return the indices of all words of one piece that have candidates."""
        begins = [True]
        for before, token in pairwise(token_ids):
            begins.append(before in self.special or token not in self.continuing)
        ends = [*begins[1:], True]
        return [i for i, token in enumerate(token_ids) if begins[i] and ends[i] and token in self.candidates]


def nearest_words(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = 15) -> NearestWords:
    """Return the `count` words nearest to each word by the cosine of their rows in `model`'s word embeddings.

    Words are tokens of letters alone, those that replace also begin a word. The same word in other letter case is no
    candidate. Raises UserError for a tokenizer that is neither WordPiece (BERT) nor byte-level (RoBERTa).
    """
    import torch

    special = frozenset(tokenizer.all_special_ids)
    tokens = {number: token for token, number in tokenizer.get_vocab().items() if number not in special}
    continuing = _continuing(tokenizer, tokens)
    texts = {number: tokenizer.convert_tokens_to_string([token]).strip() for number, token in tokens.items()}
    spelled = {number: text.lower() for number, text in sorted(texts.items()) if text.isalpha()}
    words, replacing = list(spelled), [number for number in spelled if number not in continuing]
    # In float64, so that no machine's order of summing decides which words are near: a saved training is known by them.
    table = torch.nn.functional.normalize(model.get_input_embeddings().weight.detach().double(), dim=1)
    codes = {spelling: code for code, spelling in enumerate(spelled.values())}
    spelling = torch.zeros(len(table), dtype=torch.long, device=table.device)
    spelling[words] = torch.tensor([codes[spelled[number]] for number in words], device=table.device)
    columns, column_spelling = table[replacing].T, spelling[replacing]
    candidates = {}
    for start in progress(range(0, len(words), BLOCK), "finding similar words"):
        block = words[start : start + BLOCK]
        cosines = table[block] @ columns
        cosines.masked_fill_(spelling[block][:, None] == column_spelling, -torch.inf)
        best = cosines.topk(min(count, len(replacing)))
        for number, values, indices in zip(block, best.values.tolist(), best.indices.tolist(), strict=True):
            candidates[number] = [replacing[i] for value, i in zip(values, indices, strict=True) if value > -torch.inf]
    return NearestWords({number: found for number, found in candidates.items() if found}, continuing, special)


def _continuing(tokenizer: PreTrainedTokenizerBase, tokens: dict[int, str]) -> frozenset[int]:
    """Return the tokens that do not begin a word where they follow another token."""
    from tokenizers import decoders, models

    backend = tokenizer.backend_tokenizer
    if isinstance(backend.model, models.WordPiece):
        mark = backend.model.continuing_subword_prefix
        return frozenset(number for number, token in tokens.items() if token.startswith(mark))
    if isinstance(backend.decoder, decoders.ByteLevel):
        # Letters, and bytes of characters beyond ASCII, any of which may be a letter's; punctuation begins anew.
        return frozenset(
            number
            for number, token in tokens.items()
            if not token.startswith(SPACE) and (token[0].isalpha() or not token[0].isascii())
        )
    raise UserError(
        f"The tokenizer ({type(backend.model).__name__}) does not tell where words begin in a way that 'augmentation'"
        " knows: it takes WordPiece (BERT, DistilBERT) and byte-level BPE (RoBERTa). Leave 'augmentation' out."
    )


class Augmented(Sequence):
    """Training rows {"inputs", ...}, then `copies` of each with words replaced: (1 + copies) times as many rows.

    A copy is drawn when it is asked for, from `seed` and its index alone, so it is the same in whatever order rows are
    taken. Its length, special tokens and token types are those of its row.
    """

    def __init__(self, items: list[dict], copies: int, neighbours: NearestWords, seed: int, probability: float = 0.4):
        self.items, self.copies, self.neighbours = items, copies, neighbours
        self.seed, self.probability = seed, probability  # that a word is replaced

    def __len__(self) -> int:
        return len(self.items) * (1 + self.copies)

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        item = self.items[index % len(self.items)]
        if index < len(self.items):
            return item
        chance = random.Random(f"augmentation-{self.seed}-{index}")
        token_ids = list(item["inputs"]["input_ids"])
        for place in self.neighbours.places(token_ids):
            if chance.random() < self.probability:
                token_ids[place] = chance.choice(self.neighbours.candidates[token_ids[place]])
        return {**item, "inputs": {**item["inputs"], "input_ids": token_ids}}

    def fingerprint(self) -> str:
        """Return a digest of what the rows follow from, but for the seed."""
        return digest([self.items, self.copies, self.probability, digest(self.neighbours.candidates)])
