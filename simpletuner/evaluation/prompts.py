"""Which pictures the gallery makes: the main prompt and the library, at every size that was asked for.

What is read here is told at start: which prompts will be rendered, which sizes were rounded, a `<token>` left in a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simpletuner.config.run import Run
from simpletuner.config.sources import read_json
from simpletuner.data.samples import Prompt
from simpletuner.errors import ConfigError, Problem
from simpletuner.events import Notice, Tell
from simpletuner.families.base import Shot

__all__ = ["GENERAL", "MAIN", "Entry", "prompts_of", "read_library", "validation_shots"]

MAIN = "validation"
"""Nickname of the main prompt."""
LEFT_OVER = "<token>"
"""Stands in published prompt libraries for the subject's name."""
LIBRARY = "validation_prompt_library"
GENERAL = Path(__file__).parents[1] / "examples" / "general_prompts.json"
"""The bundled library: what a model should still be able to do, whatever it is taught."""


@dataclass(frozen=True)
class Entry:
    """One prompt of the gallery."""

    nickname: str
    prompt: str
    adapter_strength: float = 1.0


def validation_shots(
    run: Run, *, defaults: tuple[float, int], native_edge_px: int, alignment_px: int, tell: Tell, guidance: float | None = None
) -> tuple[Shot, ...]:
    """The pictures of each gallery: every prompt at every size, in the order of main prompt, library, sizes.

    `defaults` are the family's guidance and steps; `guidance`, if given, wins over `validation_guidance`; edges are rounded
    to `alignment_px`. Raises ConfigError.
    """
    options = run.validation
    assert options.validation_seed is not None, "config/derive.py fills in validation_seed"
    entries = [] if options.validation_prompt is None else [Entry(MAIN, options.validation_prompt)]
    if library := options.validation_prompt_library:
        entries += read_library(GENERAL if library is True else Path(library))
    if not entries:
        tell(Notice("No gallery: there is no validation_prompt and no prompt in a validation_prompt_library."))
        return ()
    entries = [replace(entry, nickname=_encodable(entry.nickname), prompt=_encodable(entry.prompt)) for entry in entries]
    if run.model.model_type == "full":
        _refuse_strengths(entries)
    _warn_of_tokens(entries, tell)
    sizes_WH = _sizes(options.validation_resolution, native_edge_px, alignment_px, tell)
    default_guidance, steps = defaults
    if guidance is None:
        guidance = default_guidance if options.validation_guidance is None else options.validation_guidance
    shots = tuple(
        Shot(
            nickname=entry.nickname,
            index=index,
            prompt=entry.prompt,
            negative=options.validation_negative_prompt,
            width_px=width_px,
            height_px=height_px,
            seed=options.validation_seed,
            guidance=guidance,
            steps=steps if options.validation_num_inference_steps is None else options.validation_num_inference_steps,
            adapter_strength=entry.adapter_strength,
        )
        for index, entry in enumerate(entries)
        for width_px, height_px in sizes_WH
    )
    tell(Notice(_summary([entry.nickname for entry in entries], sizes_WH)))
    return shots


def prompts_of(shots: Iterable[Shot]) -> list[Prompt]:
    """What must be encoded for these pictures, each once."""
    both = ((Prompt(shot.prompt), Prompt(shot.negative, "uncond")) for shot in shots)
    return list(dict.fromkeys(prompt for pair in both for prompt in pair))


def read_library(path: Path) -> list[Entry]:
    """The prompts of a JSON file with comments and trailing commas allowed. Raises ConfigError, for all entries at once."""
    content = read_json(path, Path.cwd())
    if not isinstance(content, dict):
        what = f"The prompt library {path} is not an object."
        raise ConfigError([Problem(LIBRARY, what, mend='write it as {"nickname": "the prompt", ...}.')])
    judged = [_entry(nickname, value, path) for nickname, value in content.items()]
    if problems := [one for one in judged if isinstance(one, Problem)]:
        raise ConfigError(problems)
    return [one for one in judged if isinstance(one, Entry)]


def _entry(nickname: str, value: Any, path: Path) -> Entry | Problem:
    """One prompt of a library, or what is wrong with it."""
    if isinstance(value, str):
        return Entry(nickname, value)
    where = f"The prompt library {path}: `{nickname}`"
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        mend = 'write the prompt in quotes, or {"prompt": "...", "adapter_strength": 0.8}.'
        return Problem(LIBRARY, f"{where} has no text but {value!r}.", mend=mend)
    if unknown := sorted(value.keys() - {"prompt", "adapter_strength"}):
        what = f"{where} has the unknown key {', '.join(map(repr, unknown))}."
        return Problem(LIBRARY, what, "an entry has `prompt` and `adapter_strength`.", "remove it, or correct its name.")
    strength = value.get("adapter_strength", 1.0)
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
        return Problem(LIBRARY, f"{where} has the `adapter_strength` {strength!r}.", mend="write a number; 1 is as trained.")
    return Entry(nickname, value["prompt"], float(strength))


def _refuse_strengths(entries: list[Entry]) -> None:
    names = ", ".join(entry.nickname for entry in entries if entry.adapter_strength != 1)
    if names:
        what = f"The prompt library sets an `adapter_strength` for {names}, but model_type is full."
        mend = "remove it from the library."
        raise ConfigError([Problem(LIBRARY, what, "there is no adapter that could count more or less.", mend)])


def _encodable(text: str) -> str:
    """Half a character, as JSON may hold ("\\ud83d"), has no bytes: neither a tokenizer nor a PNG takes it."""
    return text.encode(errors="replace").decode()


def _sizes(written: str | None, native_edge_px: int, alignment_px: int, tell: Tell) -> list[tuple[int, int]]:
    """(width, height) for "1024x1024,1280x768" (a lone number is a square), rounded to what the family can render."""
    sizes_WH = []
    for part in (written or str(native_edge_px)).lower().replace("×", "x").split(","):
        edges = part.split("x")  # config/rules.py has seen to it that these are one or two numbers
        exact_WH = int(edges[0]), int(edges[-1])
        width_px, height_px = (max(1, round(edge / alignment_px)) * alignment_px for edge in exact_WH)
        if (width_px, height_px) != exact_WH:
            rounded = f"{exact_WH[0]}x{exact_WH[1]} is rendered at {width_px}x{height_px}"
            tell(Notice(f"Gallery: {rounded}: this model's edges are multiples of {alignment_px} px."))
        sizes_WH.append((width_px, height_px))
    return list(dict.fromkeys(sizes_WH))


def _warn_of_tokens(entries: list[Entry], tell: Tell) -> None:
    nicknames = [entry.nickname for entry in entries if LEFT_OVER in entry.prompt]
    if nicknames:
        which = f"prompts {', '.join(nicknames)}" if len(nicknames) > 1 else f"prompt {nicknames[0]}"
        tell(Notice(f"{LEFT_OVER} still stands in the {which}: write your subject's name there.", level="warning"))


def _summary(nicknames: list[str], sizes_WH: list[tuple[int, int]]) -> str:
    sizes = ", ".join(f"{width_px}x{height_px}" for width_px, height_px in sizes_WH)
    shown = ", ".join(name if len(name) <= 40 else f"{name[:40]}..." for name in nicknames[:8]) + (
        f" and {len(nicknames) - 8} more" if len(nicknames) > 8 else ""
    )
    return f"Gallery: {len(nicknames)} prompt{'s' if len(nicknames) > 1 else ''} at {sizes}: {shown}."
