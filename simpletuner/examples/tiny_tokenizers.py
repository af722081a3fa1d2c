"""Small tokenizers of the real classes, from vocabularies written in Python: no download, and no text is unknown to them."""

from __future__ import annotations

import string
from itertools import chain
from typing import Any

from tokenizers import pre_tokenizers, processors
from transformers import CLIPTokenizer, GemmaTokenizer

__all__ = ["clip_tokenizer", "gemma_tokenizer"]

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


def clip_tokenizer(text: str) -> CLIPTokenizer:
    """A byte-level BPE as CLIP's: 256 bytes, the same at the end of a word, the words of `text`, start and end of text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(text.lower().split()):
        body, last = word[:-1], word[-1]
        if word.isascii() and word.isalnum():  # other words stay split into their bytes
            merges += zip(accumulated(body), [*body[1:], f"{last}</w>"], strict=False)
    merges = list(dict.fromkeys(merges))
    ends = ["<|startoftext|>", "<|endoftext|>"]  # in this order: CLIP reads its summary where the highest id stands
    pieces = chain(letters, (f"{letter}</w>" for letter in letters), (left + right for left, right in merges), ends)
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    settings: dict[str, Any] = {"vocab": vocabulary, "merges": merges, "pad_token": ends[1], "model_max_length": 77}
    return CLIPTokenizer(**settings)


def accumulated(letters: str) -> list[str]:
    """The beginnings of a word, shortest first."""
    return [letters[: length + 1] for length in range(len(letters))]


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
