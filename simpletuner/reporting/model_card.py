"""The model card: `README.md` beside a run's result, as the hub reads it. Text of facts that are handed in.

Names, prompts and captions are other people's words: none of them can become markup, and no path of this machine is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

__all__ = ["CARD", "DatasetFacts", "ModelFacts", "Picture", "card", "newest_pictures"]

CARD = "README.md"
MOST_PICTURES = 24
"""More would make a page that nobody waits for; the others stay in the run's folder."""
SPECIAL = re.compile(r"([\\`*_\[\]|~$])")
"""What Markdown gives a meaning in the middle of a line."""
CODED = re.compile(r"[\\`*_{}\[\]()#+!|~$<>&]")
"""The same and HTML's, where only entities escape."""


@dataclass(frozen=True)
class Picture:
    """One picture of the newest gallery, as its own metadata tells."""

    file: str
    """Relative to the card."""
    facts: Mapping[str, str]


@dataclass(frozen=True)
class DatasetFacts:
    """A set of pictures."""

    id: str
    pictures: int
    """Those that were used."""
    options: Mapping[str, Any]
    """Its keys that are told: no paths, no secrets."""


@dataclass(frozen=True)
class ModelFacts:
    """What the card tells."""

    name: str
    family: str
    title: str
    kind: str
    """"LoRA", "LyCORIS" or "full fine-tune"."""
    base: str
    """The base model's hub repository; "" where it was a folder of this machine."""
    repository: str
    """Where it is uploaded as `owner/name`; "" if nowhere."""
    step: int
    """Where training ended."""
    length: str
    """In words: "2,000 optimiser steps: 12.5 epochs of 160 steps"."""
    usage: str
    """Python that makes a picture."""
    settings: Mapping[str, Any]
    """Options that are told: no paths, no secrets."""
    datasets: Sequence[DatasetFacts]
    pictures: Sequence[Picture] = ()
    instance_prompt: str = ""
    note: str = ""
    is_safe_for_work: bool = False
    has_average: bool = False
    """Whether `ema/` holds the averaged weights."""
    paths: Sequence[str] = ()
    """Paths of this machine that `usage` may hold."""


def card(facts: ModelFacts) -> str:
    """The whole file."""
    parts = [
        f"---\n{_front_matter(facts)}\n---",
        f"# {_plain(facts.name)}",
        _opening(facts),
        facts.note.strip(),
        _gallery(facts),
        _how_to_use(facts),
        _training(facts),
        _data(facts.datasets),
        _licence(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def newest_pictures(folder: Path, step: int) -> list[Picture]:
    """The gallery's pictures of `step`, from `folder`/validation, in the order of the prompts."""
    found = []
    for path in (folder / "validation").glob(f"step_{step}_*.png"):
        try:
            with Image.open(path) as image:
                # Pillow's own kind of str, which YAML would write as an object, becomes a plain one.
                texts = {str(key): str(value) for key, value in image.info.items() if isinstance(value, str)}
        except OSError:  # no picture
            continue
        order = re.search(r"_(\d+)_\d+x\d+$", path.stem)
        found.append((int(order[1]) if order else 0, Picture(path.relative_to(folder).as_posix(), texts)))
    return [picture for _, picture in sorted(found, key=lambda one: (one[0], one[1].file))][:MOST_PICTURES]


def _front_matter(facts: ModelFacts) -> str:
    from huggingface_hub import ModelCardData

    tags = ["text-to-image", "diffusers", "simpletuner", facts.family, facts.kind.lower().replace(" ", "-")]
    licence: dict[str, Any] = {"license": "unknown"}
    if facts.base:
        link = f"https://huggingface.co/{facts.base}"
        licence = {"license": "other", "license_name": "as-the-base-model", "license_link": link}
    is_adapter = facts.kind != "full fine-tune"
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=facts.base or None,
        base_model_relation=("adapter" if is_adapter else "finetune") if facts.base else None,
        tags=tags if facts.is_safe_for_work else [*tags, "not-for-all-audiences"],
        instance_prompt=facts.instance_prompt or None,
        widget=[_widget(picture) for picture in facts.pictures] or None,
        **licence,
    )
    return data.to_yaml()


def _widget(picture: Picture) -> dict[str, Any]:
    negative = picture.facts.get("negative_prompt", "")
    shown = {"text": picture.facts.get("prompt") or "(no prompt)", "output": {"url": picture.file}}
    return {**shown, "parameters": {"negative_prompt": negative}} if negative else shown


def _opening(facts: ModelFacts) -> str:
    base = f"[{_plain(facts.base)}](https://huggingface.co/{facts.base})" if facts.base else "a base model in a local folder"
    what = "A full fine-tune" if facts.kind == "full fine-tune" else f"A {facts.kind} adapter"
    return f"{what} of {_plain(facts.title)}, trained with SimpleTuner from {base}."


def _gallery(facts: ModelFacts) -> str:
    if not facts.pictures:
        return ""
    rows = ["| picture | prompt | size | seed | guidance | steps |", "|---|---|---|---|---|---|"]
    for picture in facts.pictures:
        told = picture.facts
        size = re.search(r"(\d+x\d+)\.png$", picture.file)
        name = told.get("nickname", "") + (" (average)" if told.get("weights") == "ema" else "")
        cells = [name, told.get("prompt", ""), size[1] if size else "", *(told.get(key, "") for key in ("seed", "guidance"))]
        rows.append(f"| {' | '.join(_plain(cell) for cell in (*cells, told.get('inference_steps', '')))} |")
    return "\n".join(["## Gallery", "", f"At step {facts.step:,}.", "", "<Gallery />", "", *rows])


def _how_to_use(facts: ModelFacts) -> str:
    code = facts.usage
    for path in sorted(facts.paths, key=len, reverse=True):
        code = code.replace(path, f"path/to/{PurePath(path).name}")
    blocks = ["## Use it"]
    if facts.repository:
        fetch = f"hf download {facts.repository} --local-dir {_folder(facts)}"
        blocks.append(_fenced(fetch, "bash"))
    else:
        blocks.append("In the folder of this file:")
    blocks.append(_fenced(code, "python"))
    if facts.has_average:
        blocks.append("`ema/` holds the average of the weights (EMA), under the same name.")
    return "\n\n".join(blocks)


def _folder(facts: ModelFacts) -> str:
    return facts.repository.rpartition("/")[2]


def _training(facts: ModelFacts) -> str:
    rows = [f"| {_code(name)} | {_code(_shown(value))} |" for name, value in facts.settings.items()]
    return "\n".join(["## Training", "", f"{facts.length}.", "", "| option | value |", "|---|---|", *rows])


def _data(datasets: Sequence[DatasetFacts]) -> str:
    blocks = ["## Data"]
    for dataset in datasets:
        told = "".join(f"\n- {_code(name)}: {_code(_shown(value))}" for name, value in dataset.options.items())
        blocks.append(f"### {_plain(dataset.id)}\n\n- pictures: {dataset.pictures:,}{told}")
    return "\n\n".join(blocks)


def _licence(facts: ModelFacts) -> str:
    where = "its terms are on the page linked above" if facts.base else "look for its terms where you have it from"
    return (
        "## Licence\n\n"
        f"These weights derive from the base model, so its licence applies to them: {where}. The pictures that they were "
        "trained on may set terms of their own. Whoever trained this names the licence here."
    )


def _shown(value: Any) -> str:
    """As users write it: a size as "1024x768", whole numbers without a point."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) == 2 and all(isinstance(edge, int) for edge in value):
        return f"{value[0]}x{value[1]}"
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _plain(text: str) -> str:
    """Other people's words on one line, without any markup of Markdown or HTML."""
    line = " ".join(text.split())
    escaped = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return SPECIAL.sub(r"\\\1", escaped)


def _code(text: str) -> str:
    """A value as code, in a table too. What would end the backticks or the cell is written as entities."""
    line = " ".join(text.split())
    if line and not re.search("[`|]", line):
        return f"`{line}`"
    return f"<code>{CODED.sub(lambda mark: f'&#{ord(mark[0])};', line)}</code>"


def _fenced(code: str, language: str) -> str:
    """A block that nothing within can end."""
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code.strip()}\n{fence}"
