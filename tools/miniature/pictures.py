"""Captioned pictures for pre-training, out of npm packages: which ones, what they are called, and which stay out.

Shape letters:  N pictures,  4 red green blue alpha,  H W rows and columns.
"""

from __future__ import annotations

import colorsys
import io
import json
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from make_emoji_example import CAPTION, FOLDER
from make_emoji_example import PICTURES as BUNDLED
from numpy.typing import NDArray
from PIL import Image

__all__ = [
    "BUNDLED",
    "EDGE_PX",
    "FLUENT_PACKAGE",
    "HELD_OUT",
    "STYLES",
    "UNSEEN",
    "Concept",
    "Style",
    "bundled",
    "captions",
    "read",
    "read_concepts",
]

EDGE_PX = 64


@dataclass(frozen=True)
class Style:
    """One way of drawing the emoji, as a package has it. `caption` takes the noun, `member` the code points."""

    package: str
    caption: str
    member: str


STYLES = {
    "noto": Style(
        package="asturur-noto-emoji@3.0.3",
        caption="a noto emoji of {}",
        member="package/png/128/emoji_u{}.png",
    ),
    "twemoji": Style(
        package="emoji-datasource-twitter@16.0.0",
        caption="a flat emoji of {}",
        member="package/img/twitter/64/{}.png",
    ),
}
NAMES_PACKAGE = "emoji-datasource-google@16.0.0"  # MIT
FLUENT_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"  # MIT; measured on, never trained on

UNSEEN = {
    "1f34a": "a tangerine",
    "1f34c": "a banana",
    "1f43b": "a bear face",
    "1f337": "a red tulip",
    "26bd": "a soccer ball",
    "1f695": "a yellow taxi",
    "26f5": "a sailboat",
    "1f514": "a golden bell",
}
"""Concepts that neither pre-training nor the example sees, in any style: what a new prompt gives is judged on them."""

HELD_OUT = frozenset(BUNDLED) | frozenset(UNSEEN)
"""Code points that stay out of all pre-training, the autoencoder's included, in every style."""

DRAWN_CATEGORIES = ("Animals & Nature", "Food & Drink")
DRAWN_SUBCATEGORIES = ("sport", "event", "sky & weather", "transport-ground", "transport-air")
"""What the denoiser learns to draw. The autoencoder sees faces, people, flags and symbols too."""

HUES = (
    (20, "red"),
    (45, "orange"),
    (70, "yellow"),
    (170, "green"),
    (260, "blue"),
    (310, "purple"),
    (345, "pink"),
    (360, "red"),
)
"""Upper bounds in degrees, and what people call the colour."""

COLOURS = {name for _, name in HUES} | {"white", "grey", "black", "brown"}


def fetch(package: str, folder: Path) -> Path:
    """The tarball of an npm package, packed into `folder` where it is not there yet."""
    name, _, version = package.rpartition("@")
    tarball = folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not tarball.is_file():
        subprocess.run(["npm", "pack", package], cwd=folder, check=True, capture_output=True)
    return tarball


@dataclass(frozen=True)
class Concept:
    name: str
    is_drawn: bool

    @property
    def names_colour(self) -> bool:
        return any(word in COLOURS for word in self.name.split())


def read_concepts(folder: Path) -> dict[str, Concept]:
    """What there is by code point, without what is held out."""
    with tarfile.open(fetch(NAMES_PACKAGE, folder)) as package:
        rows = json.load(member_of(package, "package/emoji.json"))
    concepts = {
        plain(row["unified"]): Concept(
            row["name"].lower(), row["category"] in DRAWN_CATEGORIES or row["subcategory"] in DRAWN_SUBCATEGORIES
        )
        for row in rows
    }
    return {code: concept for code, concept in concepts.items() if code not in HELD_OUT}


def captions(style: Style, concept: Concept, rgba_HW4: NDArray[np.uint8]) -> tuple[str, str]:
    """Two captions of a picture: with and without its colour."""
    coloured = concept.name if concept.names_colour else f"{colour(rgba_HW4)} {concept.name}"
    return style.caption.format(noun(concept.name)), style.caption.format(noun(coloured))


def noun(name: str) -> str:
    """A name with its article: "an owl", "a t-rex", "grapes"."""
    if name.endswith("s") and not name.endswith("ss"):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def colour(rgba_HW4: NDArray[np.uint8]) -> str:
    """The commonest colour of what is not transparent, by name: vivid pixels count more than pale ones."""
    votes: Counter[str] = Counter()
    for red, green, blue, alpha in rgba_HW4[::2, ::2].reshape(-1, 4).tolist():
        if alpha > 128:
            hue, lightness, saturation = colorsys.rgb_to_hls(red / 255, green / 255, blue / 255)
            vividness = saturation * (1 - abs(2 * lightness - 1))
            votes[shade(hue * 360, lightness, vividness)] += 1 + vividness
    return votes.most_common(1)[0][0]


def shade(hue_degrees: float, lightness: float, vividness: float) -> str:
    if vividness < 0.15:
        return "white" if lightness > 0.8 else "grey" if lightness > 0.25 else "black"
    if lightness < 0.45 and hue_degrees < 45:
        return "brown"
    return next(name for bound, name in HUES if hue_degrees <= bound)


def read(style: Style, codes: Iterable[str], folder: Path) -> tuple[list[str], NDArray[np.uint8]]:
    """The code points of which the style has a picture, and the pictures: (N, H, W, 4), 64 px."""
    found, pictures = [], []
    with tarfile.open(fetch(style.package, folder)) as package:
        members = {plain_member(member.name, style): member for member in package.getmembers()}
        for code in codes:
            if code in members:
                file = package.extractfile(members[code])
                assert file is not None
                pictures.append(small(file.read()))
                found.append(code)
    return found, np.stack(pictures)


def bundled() -> NDArray[np.uint8]:
    """The example's pictures, which only measurements may see."""
    return np.stack(
        [small((FOLDER / f"{CAPTION.format(name).replace(' ', '_')}.webp").read_bytes()) for name in BUNDLED.values()]
    )


def small(raw: bytes) -> NDArray[np.uint8]:
    """A picture at 64 px, its colours premultiplied while it is scaled, so that no hidden colour bleeds in."""
    with Image.open(io.BytesIO(raw)) as image:
        square = image.convert("RGBA")
    longest = max(square.size)
    if square.size != (longest, longest):
        canvas = Image.new("RGBA", (longest, longest))
        canvas.paste(square, ((longest - square.width) // 2, (longest - square.height) // 2))
        square = canvas
    scaled = square.convert("RGBa").resize((EDGE_PX, EDGE_PX), Image.Resampling.LANCZOS).convert("RGBA")
    return np.asarray(scaled)


def plain(code: str) -> str:
    """A code point sequence as all packages agree on it: lower case, no variation selector, no leading zeros."""
    parts = code.lower().replace("_", "-").split("-")
    return "-".join(part.lstrip("0") for part in parts if part != "fe0f")


def plain_member(path: str, style: Style) -> str | None:
    before, after = style.member.split("{}")
    if not (path.startswith(before) and path.endswith(after)):
        return None
    return plain(path[len(before) : len(path) - len(after)])


def member_of(package: tarfile.TarFile, name: str) -> io.BufferedReader:
    file = package.extractfile(name)
    assert file is not None, f"{name} is no file of the package"
    return file  # type: ignore[return-value]
