"""Captions: what a picture is said to show. Strategies as functions from a name or a text to alternatives.

Which files there are is `index.py`'s; which alternative is trained is drawn in `batches.py`.
"""

from __future__ import annotations

import codecs
import unicodedata

from simpletuner.config.datasets import ImageDataset

__all__ = ["APART", "LARGEST_TEXT_BYTES", "TABLED", "captions_of", "decode"]

LARGEST_TEXT_BYTES = 2**20
"""A file of more is a log or a list that happens to bear a picture's name, and would be tokenised for hours."""

APART = "\0"
"""Stands between the alternatives that a table gives a picture: no text holds it."""

TABLED = frozenset({"parquet", "csv", "huggingface"})
"""Strategies whose captions come from a table."""


def captions_of(entry: ImageDataset, file: str, text: str) -> tuple[str, ...]:
    """The captions of a picture, alternatives of one another; empty if it has none.

    `file` is its path within the set, `text` what the caption file beside it says, or the table (empty if there is none).
    """
    found = _found(entry, file, text)
    if not found and entry.caption_missing == "instance_prompt":
        return _instance_prompt(entry)
    return found


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
    if entry.caption_strategy == "filename":
        return _from_name(file)
    if entry.caption_strategy == "instanceprompt":
        return _instance_prompt(entry)
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


def _instance_prompt(entry: ImageDataset) -> tuple[str, ...]:
    prompt = (entry.instance_prompt or "").strip()
    return (prompt,) if prompt else ()
