"""Writes one hard file for every row of `outcomes.py`: broken, odd and hostile pictures, made of Pillow's files and bare bytes.

Every readable picture shows the same four quadrants, so that a turn, a swap of channels or a wrong range is seen at once.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

Pixels = NDArray[np.uint8]

SIZE_WH = (96, 64)
COLOURS = ((220, 40, 30), (30, 200, 60), (40, 60, 210), (230, 210, 50))
"""Upper left, upper right, lower left, lower right."""
GREYS = (20, 90, 160, 230)


def quadrants(size_WH: tuple[int, int] = SIZE_WH, colours: Any = COLOURS) -> Pixels:
    """(rows, columns[, bands]): a colour in each quarter."""
    width, height = size_WH
    four = np.asarray(colours, np.uint8)
    return four[(np.arange(height) >= height // 2)[:, None] * 2 + (np.arange(width) >= width // 2)]


def encoded(pixels: Pixels | Image.Image, kind: str, **keys: Any) -> bytes:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    if kind == "JPEG":
        keys = {"quality": 95, "subsampling": 0, **keys}
    image.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}), **keys)
    return file.getvalue()


def jpeg(**keys: Any) -> bytes:
    return encoded(quadrants(), "JPEG", **keys)


def png(**keys: Any) -> bytes:
    return encoded(quadrants(), "PNG", **keys)


def half(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def noisy(kind: str) -> bytes:
    """A file large enough that its first half is no whole picture."""
    return encoded(np.random.default_rng(1).integers(0, 256, (128, 128, 3), dtype=np.uint8), kind)


def flipped(raw: bytes) -> bytes:
    """The same with one bit of its pixels wrong."""
    spoilt = bytearray(raw)
    spoilt[len(raw) * 3 // 4] ^= 0x10
    return bytes(spoilt)


# PNG, by hand


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, bits: int, colour_type: int, scanlines: bytes, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(scanlines)) + chunk(b"IEND", b"")


def sixteen_bit(colours: Any, colour_type: int) -> bytes:
    """Each value v of eight bits as v * 257, which is the same tone in sixteen."""
    pixels = quadrants(colours=colours).astype(">u2") * 257
    rows = [b"\0" + row.astype(">u2").tobytes() for row in pixels]
    return png_of(*SIZE_WH, 16, colour_type, b"".join(rows))


def with_chunk_after_pixels(raw: bytes, kind: bytes, data: bytes) -> bytes:
    end = raw.rindex(b"IEND") - 4
    return raw[:end] + chunk(kind, data) + raw[end:]


def broken_checksum() -> bytes:
    raw = bytearray(png())
    raw[raw.index(b"IDAT") - 4 + 8 + int.from_bytes(raw[raw.index(b"IDAT") - 4 : raw.index(b"IDAT")], "big")] ^= 0xFF
    return bytes(raw)


# EXIF

# The EXIF standard says of each orientation which side of the scene the stored rows and columns begin with:
# 1 top left, 2 top right, 3 bottom right, 4 bottom left, 5 left top, 6 right top, 7 right bottom, 8 left bottom.
FIRST_ROW_IS = ("top", "top", "bottom", "bottom", "left", "right", "right", "left")
FIRST_COLUMN_IS = ("left", "right", "right", "left", "top", "top", "bottom", "bottom")


def stored(scene_HWC: Pixels, orientation: int) -> Pixels:
    """How a camera that writes this orientation lays down a scene."""
    row, column = FIRST_ROW_IS[orientation - 1], FIRST_COLUMN_IS[orientation - 1]
    if row in ("left", "right"):  # a stored row runs down the scene
        scene_HWC = scene_HWC.swapaxes(0, 1)
    rows = slice(None, None, -1) if row in ("bottom", "right") else slice(None)
    columns = slice(None, None, -1) if column in ("bottom", "right") else slice(None)
    return np.ascontiguousarray(scene_HWC[rows, columns])


def exif(orientation: Any) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def turned(orientation: int, kind: str = "JPEG") -> bytes:
    return encoded(stored(quadrants(), orientation), kind, exif=exif(orientation))


# Colours


def cmyk(*, marker: bool) -> bytes:
    """Red, green, blue and yellow as inks, with or without the segment by which Adobe's programs mark their files."""
    ink = [[255 - value for value in colour] + [0] for colour in COLOURS]
    raw = encoded(Image.fromarray(quadrants(colours=ink), "CMYK"), "JPEG")
    start = raw.index(b"\xff\xee")
    length = int.from_bytes(raw[start + 2 : start + 4], "big")
    return raw if marker else raw[:start] + raw[start + 2 + length :]


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def renamed(profile: bytes) -> bytes:
    return profile.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))


def swapped_profile() -> bytes:
    """sRGB with red and blue exchanged."""
    raw = srgb_profile().replace(b"rXYZ", b"tmp!").replace(b"bXYZ", b"rXYZ").replace(b"tmp!", b"bXYZ")
    return renamed(raw)


P3_PRIMARIES = {  # of Display P3, adapted to D50 as profiles want it
    b"rXYZ": (0.51512, 0.24120, -0.00105),
    b"gXYZ": (0.29198, 0.69225, 0.04189),
    b"bXYZ": (0.15710, 0.06657, 0.78407),
}
SRGB_PRIMARIES = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))


def wide_profile() -> bytes:
    """Display P3: the primaries of Apple's screens and phones, with the tone curve of sRGB."""
    raw = bytearray(renamed(srgb_profile()))
    for number in range(int.from_bytes(raw[128:132], "big")):
        name, offset, _ = struct.unpack_from(">4sII", raw, 132 + 12 * number)
        if name in P3_PRIMARIES:
            struct.pack_into(">3i", raw, offset + 8, *(round(value * 65536) for value in P3_PRIMARIES[name]))
    return bytes(raw)


def p3_in_srgb(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """The same in float64, from the standards' formulas."""
    coded = np.array(colour) / 255
    linear = np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)
    xyz = np.array(list(P3_PRIMARIES.values())).T @ linear
    linear = np.linalg.solve(np.array(SRGB_PRIMARIES).T, xyz).clip(0, 1)
    coded = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return tuple(np.rint(coded * 255).astype(int).tolist())


def alpha(kind: str = "PNG") -> bytes:
    """The lower half transparent, the upper solid."""
    pixels = np.concatenate([quadrants(), np.zeros((SIZE_WH[1], SIZE_WH[0], 1), np.uint8)], 2)
    pixels[: SIZE_WH[1] // 2, :, 3] = 255
    return encoded(pixels, kind)


def grey_alpha() -> bytes:
    pixels = np.stack([quadrants(colours=GREYS), np.zeros(SIZE_WH[::-1], np.uint8)], 2)
    pixels[: SIZE_WH[1] // 2, :, 1] = 255
    return encoded(pixels, "PNG")


def palette() -> Image.Image:
    image = Image.fromarray(quadrants(colours=range(4)), "P")
    image.putpalette([value for colour in COLOURS for value in colour])
    return image


def colour_key() -> bytes:
    """An RGB PNG in which one colour, that of the lower right, stands for nothing."""
    return png(transparency=COLOURS[3])


def animated(kind: str) -> bytes:
    frames = [quadrants(), quadrants(colours=COLOURS[::-1]), quadrants(colours=[(0, 0, 0)] * 4)]
    images = [Image.fromarray(frame) for frame in frames]
    if kind == "GIF":
        images = [image.convert("P", palette=Image.Palette.ADAPTIVE, colors=4) for image in images]
    return encoded(images[0], kind, save_all=True, append_images=images[1:], duration=100)


def floats() -> bytes:
    return encoded(Image.new("F", SIZE_WH, 0.5), "TIFF")


# Names and kinds of file


def plain(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg())


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link(path: Path, target: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(target, path)
