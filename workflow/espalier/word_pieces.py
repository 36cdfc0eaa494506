"""BERT's kind of tokenizer (Devlin et al. 2019) with a vocabulary of one's own: every character, and given words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNKNOWN, CLASS, SEPARATOR, MASK = range(5)
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,?!'-"
LEAST = len(SPECIAL_TOKENS) + 2 * len(CHARACTERS)  # tokens without any word


def words(document: str) -> list[str]:
    """Return the words of a text, in lower case, as the tokenizer sees them: punctuation stands alone."""
    normalizer, splitter = _parts()
    return [word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(document))]


def tokenizer(known: Iterable[str], most: int, max_tokens: int) -> PreTrainedTokenizerFast:
    """Return a lower-casing WordPiece tokenizer with BERT's template for one or two sentences.

    Its vocabulary is every character, as a start and as a continuation, and then the words `known`, at most `most`
    tokens. Texts may have `max_tokens`.
    """
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    pad, unknown, classify, separator, mask = SPECIAL_TOKENS
    tokens = [*SPECIAL_TOKENS, *CHARACTERS, *(f"##{character}" for character in CHARACTERS), *known]
    vocabulary = {token: index for index, token in enumerate(tokens[:most])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    made.normalizer, made.pre_tokenizer = _parts()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        single=f"{classify} $A {separator}",
        pair=f"{classify} $A {separator} $B:1 {separator}:1",
        special_tokens=[(classify, CLASS), (separator, SEPARATOR)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=pad,
        unk_token=unknown,
        cls_token=classify,
        sep_token=separator,
        mask_token=mask,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=max_tokens,
    )


def _parts() -> tuple:
    """Return the tokenizer's normalizer and its splitter into words."""
    from tokenizers import normalizers, pre_tokenizers

    return normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
