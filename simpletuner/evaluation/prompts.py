"""Which pictures the gallery makes: the main prompt and the library, at every size that was asked for.

What is read here is told at start: which prompts will be rendered, which sizes were rounded, a `<token>` left in a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from simpletuner.config.run import Run
from simpletuner.config.sources import read_json
from simpletuner.data.samples import Prompt
from simpletuner.errors import ConfigError, Problem
from simpletuner.events import Notice, Tell
from simpletuner.families.base import Shot

__all__ = ["MAIN", "prompts_of", "read_library", "validation_shots"]

MAIN = "validation"
"""Nickname of the main prompt."""
LEFT_OVER = "<token>"
"""Stands in published prompt libraries for the subject's name."""


def validation_shots(
    run: Run, *, defaults: tuple[float, int], native_edge_px: int, alignment_px: int, tell: Tell, guidance: float | None = None
) -> tuple[Shot, ...]:
    """The pictures of each gallery: every prompt at every size, in the order of main prompt, library, sizes.

    `defaults` are the family's guidance and steps; `guidance`, if given, wins over `validation_guidance`; edges are rounded
    to `alignment_px`. Raises ConfigError.
    """
    options = run.validation
    assert options.validation_seed is not None, "config/derive.py fills in validation_seed"
    prompts = {} if options.validation_prompt is None else {(0, MAIN): options.validation_prompt}
    if options.validation_prompt_library is not None:
        library = read_library(Path(options.validation_prompt_library))
        prompts |= {(index, nickname): text for index, (nickname, text) in enumerate(library.items(), start=len(prompts))}
    if not prompts:
        tell(Notice("No gallery: there is no validation_prompt and no prompt in a validation_prompt_library."))
        return ()
    _warn_of_tokens(prompts, tell)
    sizes_WH = _sizes(options.validation_resolution, native_edge_px, alignment_px, tell)
    default_guidance, steps = defaults
    if guidance is None:
        guidance = default_guidance if options.validation_guidance is None else options.validation_guidance
    shots = tuple(
        Shot(
            nickname=nickname,
            index=index,
            prompt=text,
            negative=options.validation_negative_prompt,
            width_px=width_px,
            height_px=height_px,
            seed=options.validation_seed,
            guidance=guidance,
            steps=steps if options.validation_num_inference_steps is None else options.validation_num_inference_steps,
        )
        for (index, nickname), text in prompts.items()
        for width_px, height_px in sizes_WH
    )
    tell(Notice(_summary([nickname for _, nickname in prompts], sizes_WH)))
    return shots


def prompts_of(shots: Iterable[Shot]) -> list[Prompt]:
    """What must be encoded for these pictures, each once."""
    both = ((Prompt(shot.prompt), Prompt(shot.negative, "uncond")) for shot in shots)
    return list(dict.fromkeys(prompt for pair in both for prompt in pair))


def read_library(path: Path) -> dict[str, str]:
    """Nickname -> prompt, from a JSON file with comments and trailing commas allowed. Raises ConfigError."""
    content = read_json(path, Path.cwd())
    option = "validation_prompt_library"
    if not isinstance(content, dict):
        what = f"The prompt library {path} is not an object."
        raise ConfigError([Problem(option, what, mend='write it as {"nickname": "the prompt", ...}.')])
    problems = [
        Problem(
            option, f"The prompt library {path} has no text for `{nickname}` but {text!r}.", mend="write the prompt in quotes."
        )
        for nickname, text in content.items()
        if not isinstance(text, str)
    ]
    if problems:
        raise ConfigError(problems)
    return content


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


def _warn_of_tokens(prompts: dict[tuple[int, str], str], tell: Tell) -> None:
    nicknames = [nickname for (_, nickname), text in prompts.items() if LEFT_OVER in text]
    if nicknames:
        which = f"prompts {', '.join(nicknames)}" if len(nicknames) > 1 else f"prompt {nicknames[0]}"
        tell(Notice(f"{LEFT_OVER} still stands in the {which}: write your subject's name there.", level="warning"))


def _summary(nicknames: list[str], sizes_WH: list[tuple[int, int]]) -> str:
    sizes = ", ".join(f"{width_px}x{height_px}" for width_px, height_px in sizes_WH)
    shown = ", ".join(nicknames[:8]) + (f" and {len(nicknames) - 8} more" if len(nicknames) > 8 else "")
    return f"Gallery: {len(nicknames)} prompt{'s' if len(nicknames) > 1 else ''} at {sizes}: {shown}."
