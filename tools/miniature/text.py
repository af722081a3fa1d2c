"""The miniature's tokenizer and text encoder: a Gemma 2 of 0.3 M parameters, its vocabulary learned from the captions.

Shape letters:  B batch,  L tokens,  D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tokenizers import processors
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from simpletuner.examples.tiny_tokenizers import SPACE, gemma_tokenizer
from simpletuner.families.instruction import stock_instruction

__all__ = ["Prompts", "build", "instruction", "learned_tokenizer", "tokenize"]

CAPTION_MERGES = 900
INSTRUCTION_TOKENS = 8
"""What the fixed instruction before every prompt is merged down to, where Gemma itself takes some 200: it costs time."""


def instruction() -> str:
    return "\n".join(stock_instruction())


def learned_tokenizer(captions: Iterable[str]) -> GemmaTokenizer:
    """The real class, with byte pieces for whatever is unknown; words of the captions are one or a few pieces."""
    counts = Counter(piece for caption in captions for piece in caption.replace(" ", f" {SPACE}").split(" "))
    words = {tuple(word): count for word, count in counts.items()}
    merges = learned_merges(words, CAPTION_MERGES)
    # Its last space belongs to the prompt's first word.
    pieces = tuple(instruction().rstrip().replace(" ", SPACE))
    for pair in merges:
        pieces = merged(pieces, pair)
    while len(pieces) > INSTRUCTION_TOKENS:
        # Short pieces first: chains that grow by a word at a time would fill half a megabyte of tokenizer.json.
        # Words before phrases, since a caption would find the phrase's piece in itself.
        pair = min(pairwise(pieces), key=lambda pair: (SPACE in pair[1], len(pair[0] + pair[1])))
        merges.append(pair)
        pieces = merged(pieces, pair)
    base = gemma_tokenizer("")
    vocabulary = dict(base.get_vocab())
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    settings: dict[str, Any] = {"vocab": vocabulary, "merges": merges, "padding_side": "right"}
    tokenizer = GemmaTokenizer(**settings)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return tokenizer


def learned_merges(words: dict[tuple[str, ...], int], number: int) -> list[tuple[str, str]]:
    """Byte-pair encoding: the commonest pair of neighbours becomes a piece, again and again. Ties go by the alphabet."""
    merges: list[tuple[str, str]] = []
    while len(merges) < number:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {merged(word, best): count for word, count in words.items()}
    return merges


def merged(pieces: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    result: list[str] = []
    position = 0
    while position < len(pieces):
        if pieces[position : position + 2] == pair:
            result.append(pair[0] + pair[1])
            position += 2
        else:
            result.append(pieces[position])
            position += 1
    return tuple(result)


def build(tokenizer: GemmaTokenizer) -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=32,
            query_pre_attn_scalar=32,
            max_position_embeddings=4096,
            sliding_window=4096,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    )


@dataclass(frozen=True)
class Prompts:
    """Token ids with what the denoiser sees of them. A dropped caption is the last row: empty, without instruction."""

    ids_NL: Tensor
    shown_NL: Tensor

    def embeds(self, encoder: Gemma2Model, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D) and its mask, as our family hands them to the denoiser, without the padding that nobody sees."""
        ids_BL, shown_BL = self.ids_NL[rows_B], self.shown_NL[rows_B]
        # Causal: what follows a token does not change it, so that padding needs no mask here.
        return encoder(ids_BL)[0], shown_BL


def tokenize(tokenizer: GemmaTokenizer, captions: list[tuple[str, str]]) -> Prompts:
    """The first caption of every picture, the second of every picture, all with the instruction; then the empty one.

    Shown are the first token and those from the instruction's last on.
    """
    prefix = instruction()
    hidden = range(1, len(tokenizer.encode(prefix)) - 1)
    texts = [prefix + caption.lower().strip() for column in zip(*captions, strict=True) for caption in column]
    tokens = tokenizer([*texts, ""], padding=True, return_tensors="pt")
    shown_NL = tokens.attention_mask.clone()
    shown_NL[:-1, list(hidden)] = 0
    return Prompts(tokens.input_ids, shown_NL)
