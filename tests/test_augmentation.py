"""Augmented rows: which words are replaced, by which, how many, and that nothing but seed and index decides it."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from espalier import augmentation, training
from espalier.augmentation import Augmented, NearestWords, nearest_words
from espalier.errors import UserError
from espalier.pretrain.demo_encoder import train_tokenizer

WORDS = ("Cat", "Dog", "mat", "on", "sat", "walk", "un", "Hat", "hat", "well", "known", "the", "like")
ENDINGS = ("ed", "s", "like")


def word_pieces():
    """Return BERT's tokenizer with words, endings, punctuation, digits and what must never be put into a text."""
    from transformers import BertTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "MASK", "[unused0]", "[unused1]"]
    pieces = [*special, *(f"##{one}" for one in ENDINGS), *".,-'?", "4", "##2", "é", *WORDS]
    return BertTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)}, do_lower_case=False, mask_token="MASK"
    )


def byte_level():
    """Return RoBERTa's tokenizer: words with and without a space before them, endings, and all single bytes.

    As in any byte-pair encoding, what a word is merged from, such as "ĠCa", is a token, too.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import RobertaTokenizer

    merges = {}  # in the order in which they are tried
    for word in (*(f"Ġ{one}" for one in WORDS), *WORDS, *ENDINGS):
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
    pieces = ["<pad>", "<unk>", "<s>", "</s>", "<mask>", *sorted(ByteLevel.alphabet()), *map("".join, merges)]
    return RobertaTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=list(merges))


TOKENIZERS = {"word pieces": word_pieces, "byte-level": byte_level}


def teacher(tokenizer, width: int = 6):
    """Return what has a random word embedding for each token, and some rows more, as models padded to 64 have."""
    generator = torch.Generator().manual_seed(0)
    table = torch.nn.Embedding.from_pretrained(torch.randn(len(tokenizer) + 9, width, generator=generator) * 3)
    return SimpleNamespace(get_input_embeddings=lambda: table)


def begins_a_word(piece: str, of_bytes: bool) -> bool:
    """Return whether a piece is letters that begin a word. (The é of a byte-level piece is no letter but a byte.)"""
    return piece[0] == "Ġ" and piece[1:].isascii() and piece[1:].isalpha() if of_bytes else piece.isalpha()


def spelling(piece: str) -> str:
    return piece.removeprefix("Ġ").lower()


def plain_nearest(tokenizer, table: torch.Tensor, token: int, count: int) -> list[int]:
    """Return the nearest whole words, in float64 and one by one; a word is told by how its token is written."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    cosines = {}
    for other, piece in enumerate(pieces):
        if other in tokenizer.all_special_ids or not begins_a_word(piece, "Ġ" in pieces):
            continue
        if spelling(piece) != spelling(pieces[token]):
            one, two = table[token].double(), table[other].double()
            cosines[other] = (one @ two).item() / math.sqrt((one @ one).item() * (two @ two).item())
    return sorted(cosines, key=cosines.get, reverse=True)[:count]


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_candidates_are_the_nearest_whole_words(monkeypatch, make):
    monkeypatch.setattr(augmentation, "BLOCK", 5)
    tokenizer = make()
    model = teacher(tokenizer)
    found = nearest_words(model, tokenizer, count=4).candidates
    table = model.get_input_embeddings().weight
    words = [word for word in (*WORDS, *(f"Ġ{one}" for one in WORDS)) if word in tokenizer.get_vocab()]
    assert len(words) == (1 if make is word_pieces else 2) * len(WORDS)
    for token in tokenizer.convert_tokens_to_ids(words):
        assert found[token] == plain_nearest(tokenizer, table, token, 4), tokenizer.convert_ids_to_tokens(token)
    for token in (*tokenizer.all_special_ids, *tokenizer.convert_tokens_to_ids(["4", ".", "-", "##ed"])):
        assert token not in found


def test_a_small_vocabulary_gives_as_many_candidates_as_there_are():
    tokenizer = word_pieces()
    found = nearest_words(teacher(tokenizer), tokenizer, count=1000).candidates
    hat, others = tokenizer.convert_tokens_to_ids("hat"), set(tokenizer.convert_tokens_to_ids(["é", *WORDS]))
    assert set(found[hat]) == others - set(tokenizer.convert_tokens_to_ids(["Hat", "hat"]))
    assert len(found[hat]) == len(others) - 2


# A text (or two), what of it is replaced, and what where tokens are bytes: é is two, and only a space begins a word.
TEXTS = [
    (("Cat sat on mat",), ["Cat", "sat", "on", "mat"], None),
    (("walked on",), ["on"], None),
    (("the Dogs, un like the walk.",), ["the", "un", "like", "the", "walk"], None),
    (("unlike the catlike Dog",), ["the", "Dog"], None),
    (("mat 4 Dog 42 4s hat?",), ["mat", "Dog", "hat"], None),
    (("well-known Cat's hat",), ["well", "known", "Cat", "hat"], ["well", "Cat", "hat"]),
    (("hat é", "Cat sat"), ["hat", "é", "Cat", "sat"], ["hat", "Cat", "sat"]),
    (("caté onש hat",), ["hat"], None),
    (("mat MASK <mask> hat",), ["mat", "hat"], None),
    (("zebra 4.", "?"), [], None),
]


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize(("texts", "of_pieces", "of_bytes"), TEXTS, ids=[" / ".join(one[0]) for one in TEXTS])
def test_only_whole_words_of_one_piece_are_replaced(make, texts, of_pieces, of_bytes):
    tokenizer = make()
    neighbours = nearest_words(teacher(tokenizer), tokenizer)
    encoded = dict(tokenizer(*texts, return_attention_mask=False))
    expected = of_pieces if make is word_pieces or of_bytes is None else of_bytes
    ids = encoded["input_ids"]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    places = neighbours.places(ids)
    assert [pieces[place].removeprefix("Ġ") for place in places] == expected
    assert neighbours.places([*ids, tokenizer.pad_token_id, tokenizer.pad_token_id]) == places
    original = {"inputs": encoded, "label": 1}
    rows = Augmented([original], copies=3, neighbours=neighbours, seed=0, probability=1.0)
    for row in list(rows)[1:]:
        found = row["inputs"]["input_ids"]
        assert row == {"inputs": {**encoded, "input_ids": found}, "label": 1}
        assert [i for i, (old, new) in enumerate(zip(ids, found, strict=True)) if old != new] == places
        new = tokenizer.convert_ids_to_tokens([found[place] for place in places])
        assert all(begins_a_word(one, make is byte_level) for one in new)


def test_the_demo_tokenizer_is_one_of_them():
    recipe = SimpleNamespace(vocabulary=1000, max_tokens=64)
    tokenizer = train_tokenizer(["the cat sat on the mat"], recipe)
    neighbours = nearest_words(teacher(tokenizer), tokenizer)
    ids = tokenizer("The cat unsat, on mat 7")["input_ids"]
    expected = ["the", "cat", "on", "mat"]
    assert tokenizer.convert_ids_to_tokens([ids[place] for place in neighbours.places(ids)]) == expected


def test_another_kind_of_tokenizer_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("▁a", -1.0), ("b", -1.0)])))
    with pytest.raises(UserError, match=r"The tokenizer \(Unigram\) does not tell where words begin"):
        nearest_words(teacher(unigram), unigram)


# Chance ---------------------------------------------------------------------------------------------------------------


def plain_words(count: int, rows: int, length: int) -> tuple[NearestWords, list[dict]]:
    """Return a vocabulary of words that have five candidates each, after one special token, and random rows of it."""
    candidates = {token: [1 + (token + step) % count for step in range(5)] for token in range(1, count + 1)}
    draw = random.Random(0)
    items = [{"inputs": {"input_ids": [0, *draw.choices(list(candidates), k=length), 0]}} for _ in range(rows)]
    return NearestWords(candidates, frozenset(), frozenset({0})), items


@pytest.mark.parametrize("probability", [0.1, 0.4, 0.9])
def test_words_are_replaced_with_the_probability_by_all_candidates_alike(probability):
    neighbours, items = plain_words(50, 40, 100)
    rows = Augmented(items, copies=5, neighbours=neighbours, seed=1, probability=probability)
    assert len(rows) == 240
    steps = Counter()
    for i, row in enumerate(rows):
        for old, new in zip(items[i % 40]["inputs"]["input_ids"], row["inputs"]["input_ids"], strict=True):
            if i < 40 or old == 0:
                assert new == old
            else:
                steps["kept" if new == old else neighbours.candidates[old].index(new)] += 1
    words, share = 5 * 40 * 100, probability / 5
    assert sum(steps.values()) == words
    for found, chance in [(steps["kept"], 1 - probability), *((steps[step], share) for step in range(5))]:
        assert abs(found - chance * words) < 4.5 * math.sqrt(words * chance * (1 - chance))


def test_seed_and_index_alone_decide_a_row():
    neighbours, items = plain_words(50, 4, 30)
    before = copy.deepcopy(items)
    rows, again = (Augmented(items, 3, neighbours, seed=7) for _ in range(2))
    there = [rows[i] for i in range(16)]
    back = [again[i] for i in reversed(range(16))]
    assert there == back[::-1] == [rows[i - 16] for i in range(16)] == list(rows)
    assert there[:4] == items == before, "no row may be changed in place"
    copies = [tuple(row["inputs"]["input_ids"]) for row in there[4:]]
    assert len(set(copies)) == 12
    other = [row["inputs"]["input_ids"] for row in Augmented(items, 3, neighbours, seed=8)]
    assert all(list(one) != two for one, two in zip(copies, other[4:], strict=True))
    with pytest.raises(IndexError):
        rows[16]


def test_equal_rows_have_different_copies():
    neighbours, items = plain_words(50, 1, 30)
    rows = Augmented(items * 5, 1, neighbours, seed=0)
    assert len({tuple(rows[i]["inputs"]["input_ids"]) for i in range(5, 10)}) == 5


def test_a_resumed_training_gets_the_same_batches():
    neighbours, items = plain_words(50, 7, 20)
    whole, resumed = (training.Rows(Augmented(items, 2, neighbours, 3), 4, 11, seed=3) for _ in range(2))
    batches = [whole.take() for _ in range(11)]
    resumed.seek(6)
    assert resumed.position() == 6
    assert [resumed.take() for _ in range(5)] == batches[6:]
    assert sum(map(len, batches[:6])) == 21, "a pass is over the rows and all their copies"


def test_the_fingerprint_follows_from_all_but_the_seed():
    neighbours, items = plain_words(50, 7, 20)
    fewer = NearestWords({**neighbours.candidates, 1: [2]}, neighbours.continuing, neighbours.special)

    def fingerprint(items=items, copies=2, neighbours=neighbours, seed=0, probability=0.4) -> str:
        return training.Rows(Augmented(items, copies, neighbours, seed, probability), 4, 5, seed).fingerprint()

    changed = [{"items": items[1:]}, {"copies": 3}, {"neighbours": fewer}, {"probability": 0.5}]
    assert len({fingerprint(), *(fingerprint(**one) for one in changed)}) == 5
    assert fingerprint() == fingerprint(seed=1)


def test_a_real_teacher_s_embeddings_are_what_is_compared():
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = word_pieces()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes))
    words = tokenizer.convert_tokens_to_ids(["Cat", "Dog", "walk"])
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[words] = torch.eye(16)[0] * torch.tensor([[1.0], [2.0], [9.0]])
        model.bert.embeddings.word_embeddings.weight[words[2], 1] = 1.0
    found = nearest_words(model, tokenizer, count=2).candidates
    assert [found[one] for one in words[:2]] == [words[:0:-1][::-1], [words[0], words[2]]]
