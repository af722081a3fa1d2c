"""Captions: what a picture is said to show. Strategies as functions from a name or a text to alternatives.

Which files there are is `index.py`'s; which alternative is trained is drawn in `batches.py`.
"""

from __future__ import annotations

import codecs
import random
import unicodedata
from collections.abc import Iterator

from simpletuner.config.caption_shuffle import CaptionShuffle
from simpletuner.config.datasets import ImageDataset
from simpletuner.data.samples import draw_seed

__all__ = ["APART", "LARGEST_TEXT_BYTES", "TABLED", "captions_of", "decode", "has_caption", "wants_column", "wants_texts"]

LARGEST_TEXT_BYTES = 2**20
"""A file of more is a log or a list that happens to bear a picture's name, and would be tokenised for hours."""

APART = "\0"
"""Stands between the alternatives that a table gives a picture: no text holds it."""

TABLED = frozenset({"parquet", "csv", "huggingface"})
"""Strategies whose captions come from a table."""

MARKS = {"comma": (",", ", "), "space": (None, " "), "period": (".", ". ")}
"""`split_on` -> where a caption is cut, and what joins its tags again."""


def wants_texts(entry: ImageDataset) -> bool:
    """Whether caption files are to be read."""
    return entry.caption_strategy == "textfile" and not entry.only_instance_prompt


def wants_column(entry: ImageDataset) -> bool:
    """Whether captions are to be read from a table."""
    return entry.caption_strategy in TABLED and not entry.only_instance_prompt


def has_caption(entry: ImageDataset, file: str, text: str) -> bool:
    """Whether `captions_of` would give one, for less work."""
    is_found = text.strip() if wants_texts(entry) else _found(entry, file, text)
    return bool(is_found or _in_place_of_none(entry))


def captions_of(entry: ImageDataset, file: str, text: str) -> tuple[str, ...]:
    """The captions of a picture, alternatives of one another that are all encoded ahead; empty if it has none.

    `file` is its path within the set, `text` what the caption file beside it says, or the table (empty if there is none).
    """
    found = _found(entry, file, text)
    if not found:
        return _in_place_of_none(entry)
    if entry.only_instance_prompt or entry.caption_strategy == "instanceprompt":
        return found
    shuffle = CaptionShuffle(enable=entry.caption_shuffle) if isinstance(entry.caption_shuffle, bool) else entry.caption_shuffle
    if shuffle.enable:
        found = tuple(variant for caption in found for variant in _variants(caption, shuffle))
    if entry.prepend_instance_prompt:
        found = tuple(f"{first} {caption}" for first in _instance_prompt(entry) for caption in found)
    return found


def _variants(caption: str, shuffle: CaptionShuffle) -> Iterator[str]:
    """The caption, if it stays an alternative, and itself with its tags in other orders.

    The orders belong to the caption and not to the run's seed: the text cache holds each variant, from one run to the next.
    """
    if shuffle.include_original:
        yield caption
    cut, joint = MARKS[shuffle.split_on]
    tags = [tag.strip() for tag in caption.split(cut) if tag.strip()]
    front, rest = tags[: shuffle.position_start], tags[shuffle.position_start :]
    draws = random.Random(draw_seed(caption, shuffle.seed, "caption shuffle"))
    for _ in range(shuffle.count):
        # Python promises the numbers of random() for good, the results of shuffle() it does not.
        yield joint.join([*front, *sorted(rest, key=lambda _: draws.random())])


def decode(raw: bytes) -> str | None:
    """The text of a caption file, with plain line ends: UTF-8, or UTF-16 with its mark. None if it is neither."""
    encoding = "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        return None
    # A NUL is a UTF-16 file that lost its mark: it decodes as UTF-8, to nonsense.
    return None if "\0" in text else text.replace("\r\n", "\n").replace("\r", "\n")


def _found(entry: ImageDataset, file: str, text: str) -> tuple[str, ...]:
    """What the strategy gives, as it is written."""
    if entry.only_instance_prompt or entry.caption_strategy == "instanceprompt":
        return _instance_prompt(entry)
    if entry.caption_strategy == "filename":
        return _from_name(file)
    if entry.caption_strategy in TABLED:
        return tuple(caption.strip() for caption in text.split(APART) if caption.strip())
    lines = [text] if entry.disable_multiline_split else text.split("\n")
    return tuple(line.strip() for line in lines if line.strip())


def _from_name(file: str) -> tuple[str, ...]:
    """`animals/a_red_fox.jpg` is captioned "a red fox"."""
    # Undecodable bytes of a name cannot go to a tokenizer; macOS stores accents apart from their letters.
    stem = file.rpartition("/")[2].rpartition(".")[0].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    caption = unicodedata.normalize("NFC", stem).replace("_", " ").strip()
    return (caption,) if caption else ()


def _in_place_of_none(entry: ImageDataset) -> tuple[str, ...]:
    return _instance_prompt(entry) if entry.caption_missing == "instance_prompt" else ()


def _instance_prompt(entry: ImageDataset) -> tuple[str, ...]:
    prompt = (entry.instance_prompt or "").strip()
    return (prompt,) if prompt else ()
