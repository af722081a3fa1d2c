"""Small tokenizers of the real classes, from vocabularies written in Python: no download, and no text is unknown to them."""

from __future__ import annotations

import string
from itertools import chain
from typing import Any

from tokenizers import pre_tokenizers, processors
from transformers import CLIPTokenizer, GemmaTokenizer, T5Tokenizer

__all__ = ["clip_tokenizer", "gemma_tokenizer", "t5_tokenizer"]

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")  # Gemma's own order, so the ids are the real ones
SPACE = "▁"


def gemma_tokenizer(text: str) -> GemmaTokenizer:
    """A byte-fallback BPE whose vocabulary is the bytes, the printable characters and the words of `text`."""
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    characters = [character for character in string.printable if not character.isspace()]
    merges = word_merges(text, set(characters))
    pieces = chain(SPECIAL, byte_pieces, [SPACE, "\n"], characters, (left + right for left, right in merges))
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    settings: dict[str, Any] = {"vocab": vocabulary, "merges": merges, "padding_side": "right"}
    tokenizer = GemmaTokenizer(**settings)
    # The class adds no <bos> by itself: Gemma's tokenizer.json carries this step, and Sana keeps position 0 for it.
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return tokenizer


def clip_tokenizer(text: str, *, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """A byte-level BPE of the bytes, within a word and at its end, and the words of `text`; 77 tokens.

    The end of a text has the highest id, since CLIP finds the place to pool at by it. "!" has id 0: it pads SD3's second CLIP.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    characters = ["!", *(character for character in alphabet if character != "!")]
    merges = []
    for word in dict.fromkeys(text.lower().split()):
        letters = [*word[:-1], f"{word[-1]}</w>"]
        if set(word) <= set(alphabet):
            merges += [("".join(letters[:end]), letters[end]) for end in range(1, len(letters))]
    merges = list(dict.fromkeys(merges))
    ends = [f"{character}</w>" for character in characters]
    pieces = [*characters, *ends, *(left + right for left, right in merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    settings: dict[str, Any] = {"vocab": vocabulary, "merges": merges, "pad_token": pad, "model_max_length": 77}
    return CLIPTokenizer(**settings)


def t5_tokenizer(text: str) -> T5Tokenizer:
    """A unigram model of the printable characters and the words of `text`, with T5's ids of padding, end and unknown."""
    characters = [character for character in string.printable if not character.isspace()]
    words = [SPACE + word for word in dict.fromkeys(text.split()) if word not in characters]
    scores = (
        {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, SPACE: -2.0} | dict.fromkeys(words, -3.0) | dict.fromkeys(characters, -6.0)
    )
    settings: dict[str, Any] = {"vocab": list(scores.items()), "extra_ids": 0, "model_max_length": 512}
    return T5Tokenizer(**settings)


def word_merges(text: str, alphabet: set[str]) -> list[tuple[str, str]]:
    """The merges that build each word of `text`, a space before it, letter by letter: every prefix becomes a piece."""
    merges = []
    for word in dict.fromkeys(text.split()):
        piece = SPACE
        for character in word:
            if character not in alphabet:
                break
            merges.append((piece, character))
            piece += character
    return list(dict.fromkeys(merges))
