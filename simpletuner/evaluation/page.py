"""`gallery.html`: all pictures of a run side by side, rows for each prompt and size, a column for each step.

Made anew after each gallery from what the pictures say of themselves. It needs no server and no script, and loads nothing but
the pictures, by relative links.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from html import escape
from pathlib import Path
from urllib.parse import quote

from simpletuner.data.whole import write_whole
from simpletuner.evaluation.names import Picture, pictures_in
from simpletuner.events import Notice, Tell

__all__ = ["PAGE", "page_of", "write_page"]

PAGE = "gallery.html"
STYLE = Path(__file__).with_name("page.css")
BASE = -1
"""Column of the base model's pictures, before step 0."""
ROWS = {"trained": "", "ema": "average (EMA)"}
"""Rows of a prompt, by whose weights painted, and what is written beneath. The base stands at the beginning of the first."""
DETAILS = ("seed", "guidance", "inference_steps", "negative_prompt")
"""Metadata that is shown with a picture; what else there is follows."""
KNOWN = {*DETAILS, "weights", "nickname", "prompt", "step"}


def write_page(folder: Path, tell: Tell, *, galleries: Sequence[str]) -> None:
    """Write the page of a run's `folder` over the pictures of its sub-folders; none where there are no pictures yet."""
    pictures = [picture for name in galleries for picture in pictures_in(folder / name)]
    if not pictures:
        return
    try:
        write_whole(folder / PAGE, page_of(pictures, folder).encode())
    except OSError as error:  # the pictures are what counts, and the next gallery writes the page again
        tell(Notice(f"{folder / PAGE} could not be written: {error}.", "warning"))


def page_of(pictures: Sequence[Picture], folder: Path) -> str:
    """The whole page; links are relative to `folder`."""
    columns = sorted({_column(picture) for picture in pictures})
    rows: dict[tuple[int, str, str, str], list[Picture]] = {}
    for picture in sorted(pictures, key=lambda one: (one.index, one.size_WH)):
        rows.setdefault(_row(picture), []).append(picture)
    name = escape(folder.resolve().name)
    heads = "".join(f"<th{_class(column)}>{'base' if column == BASE else f'step {column:,}'}</th>" for column in columns)
    body = "\n".join(line for row in rows.values() for line in _rows(row, columns, folder))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name}</title>
<style>
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<header>
<h1>{name}</h1>
<p>{_summary(rows, columns)}</p>
<fieldset><legend>Size</legend>
<label><input type="radio" name="size" id="small">S</label>
<label><input type="radio" name="size" id="medium" checked>M</label>
<label><input type="radio" name="size" id="large">L</label>
</fieldset>
</header>
<table>
<thead><tr>{heads}</tr></thead>
{body}
</table>
</body>
</html>
"""


def _column(picture: Picture) -> int:
    return BASE if picture.texts["weights"] == "base" else picture.step


def _class(column: int) -> str:
    return ' class="base"' if column == BASE else ""


def _row(picture: Picture) -> tuple[int, str, str, str]:
    """What pictures of one row have in common. A prompt that was changed in the middle has a row of its own."""
    width_px, height_px = picture.size_WH
    return picture.index, picture.texts["nickname"], picture.texts["prompt"], f"{width_px} × {height_px}"


def _summary(rows: Sized, columns: Sequence[int]) -> str:
    steps = [column for column in columns if column != BASE]
    shown = f"{len(rows)} row{'s' if len(rows) > 1 else ''} of pictures"
    if not steps:
        return f"{shown} by the base model; the first gallery follows."
    return f"{shown}, up to step {steps[-1]:,}. Each column is a step; tap a picture for its full size."


def _rows(pictures: Sequence[Picture], columns: Sequence[int], folder: Path) -> Iterator[str]:
    """The body of one prompt at one size: its heading, a row of pictures, and one of the average's if there are any."""
    _, nickname, prompt, size = _row(pictures[0])
    strength = pictures[-1].texts.get("adapter_strength")
    facts = size + (f", adapter at {escape(strength)}" if strength else "")
    yield "<tbody>"
    heading = f"<h2>{escape(nickname)} <small>{facts}</small></h2><p>{escape(prompt) or '(no words)'}</p>"
    yield f'<tr class="prompt"><th colspan="{len(columns)}"><div>{heading}</div></th></tr>'
    shown = [weights for weights in ROWS if any(one.texts["weights"] == weights for one in pictures)] or ["trained"]
    for weights in shown:
        wanted = {weights, "base"} if weights == shown[0] else {weights}
        own = {_column(one): one for one in pictures if one.texts["weights"] in wanted}
        figures = {column: _figure(own[column], folder) if column in own else "" for column in columns}
        cells = "".join(f"<td{_class(column)}>{figure}</td>" for column, figure in figures.items())
        yield f"<tr>{cells}</tr>"
    yield "</tbody>"


def _figure(picture: Picture, folder: Path) -> str:
    texts, (width_px, height_px) = picture.texts, picture.size_WH
    link = quote(picture.path.relative_to(folder).as_posix())
    others = [name for name in texts if name not in KNOWN]
    details = ", ".join(f"{name.replace('_', ' ')} {texts[name]}" for name in (*DETAILS, *others) if texts.get(name))
    whose = ROWS.get(texts["weights"], "")
    step = "base model" if texts["weights"] == "base" else f"step {picture.step:,}{f', {whose}' if whose else ''}"
    words = escape(f"{texts['nickname']}, {step}")
    image = f'<img src="{link}" alt="{words}" title="{escape(details)}" width="{width_px}" height="{height_px}" loading="lazy">'
    caption = f"<figcaption>{whose}</figcaption>" if whose else ""
    return f'<figure><a href="{link}">{image}</a>{caption}</figure>'
