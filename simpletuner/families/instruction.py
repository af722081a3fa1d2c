"""Sana's "complex human instruction": the lines before each prompt, as the user or the stock pipeline writes them."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path

from simpletuner.errors import UserError

__all__ = ["instruction_lines", "lines_of_json", "stock_instruction"]


def stock_instruction() -> list[str]:
    """The lines that the stock pipeline puts before each prompt by default, read from its signature."""
    from diffusers import SanaPipeline

    return list(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)


def instruction_lines(written: str | tuple[str, ...] | None, config_path: Path | None) -> list[str]:
    """What `sana_complex_human_instruction` means. A path not found from here is looked for beside the config file."""
    if written is None:
        return stock_instruction()
    if not isinstance(written, str):
        return list(written)
    if written.strip().lower() == "none":
        return []
    if written.lstrip().startswith("["):
        return lines_of_json(written)
    places = [Path(os.path.expanduser(written)), *([config_path.parent / written] if config_path else [])]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UserError(
            f"The file `{written}` of `sana_complex_human_instruction` is missing.",
            why="looked for " + " or ".join(f"`{place.absolute()}`" for place in dict.fromkeys(places)) + ".",
            mend='name a file, or write the lines as a list, or "None" for no instruction.',
        )
    text = file.read_text(encoding="utf-8").strip()
    try:
        return lines_of_json(text) if text.startswith("[") else text.splitlines()
    except ValueError as error:
        raise UserError(f"`{file}`, named by `sana_complex_human_instruction`, cannot be read: {error}") from error


def lines_of_json(text: str) -> list[str]:
    """A JSON list of strings. Raises ValueError."""
    lines = json.loads(text)
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError("a JSON list of strings is expected")
    return lines
