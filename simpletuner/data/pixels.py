"""Pixels: measure a picture from its header, and read it as the tensor an image encoder takes.

Pillow decodes; torch's antialiased uint8 Lanczos resizes (2.6 times faster than Pillow's, at most 2 of 255 from it). Where a
picture is cut is decided in `geometry.py`.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageFile
from torch import Tensor
from torch.nn.functional import interpolate

from simpletuner.data.geometry import WH
from simpletuner.data.jpeg import HEADER_BYTES, upright_size
from simpletuner.data.samples import Place

__all__ = ["LARGEST_PX", "RESIZE_RECIPE", "Unreadable", "measure", "read_mask", "read_pixels"]

RESIZE_RECIPE = {"decode": "pillow, jpeg draft", "background": "white", "resize": "torch uint8 lanczos antialias"}
"""What alters the pixels of every picture, for the cache's recipe."""

LARGEST_PX = 1_000_000_000
"""A picture of more is taken for a decompression bomb."""

MASK_TOLERANCE = 0.02
"""How far the shapes of a mask and its picture may part: sizes that were rounded on the way, and no more."""

# Of what Pillow can open, the formats that hold plain pictures. EPS, for one, would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI")

# What Pillow's decoders are known to raise on damaged input. MemoryError is not among them: it says nothing of the file.
DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, RuntimeError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what brings the picture upright."""


class Unreadable(Exception):
    """A file that gives no picture. `reason` is the same for all files of a kind, `detail` is this file's."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def measure(source: str | os.PathLike[str] | IO[bytes]) -> WH:
    """(width, height) of a picture as it stands upright, from its header alone.

    Raises Unreadable, or the OSError of a file that cannot be opened.
    """
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb", buffering=0) as file:
            head = file.read(HEADER_BYTES)
            if (size_WH := upright_size(head)) is not None and size_WH[0] * size_WH[1] <= LARGEST_PX:
                return size_WH
            if len(head) < HEADER_BYTES:
                return measure(io.BytesIO(head))
        with open(source, "rb") as file:
            return measure(file)
    with _damage_told():
        image = _opened(source)
        return _upright_WH(image, _orientation(image))


def read_pixels(raw: bytes, place: Place) -> Tensor:
    """The picture in a file's bytes, put in its place: (3, rows, columns) float32 in [-1, 1], sRGB.

    The first frame of an animation, upright, over white where it is transparent. Raises Unreadable.
    """
    with _damage_told():
        pixels_HWC, profile = _decoded(raw, place)
    cut_HWC = _cut(pixels_HWC, place)
    if profile:
        # After the cut: a million pixels to convert instead of twelve.
        cut_HWC = np.array(_in_srgb(Image.fromarray(cut_HWC), profile))
    pixels_CHW = torch.from_numpy(cut_HWC).permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    return pixels_CHW.div_(127.5).sub_(1)


def read_mask(raw: bytes, place: Place) -> Tensor:
    """The first channel of a mask's file, put in its picture's place: (1, rows, columns) float32 in [0, 1].

    It may have another size than the picture, but must have its shape. Transparency says nothing. Raises Unreadable.
    """
    with _damage_told():
        image = _opened(io.BytesIO(raw))
        orientation = _orientation(image)
        width, height = _upright_WH(image, orientation)
        picture_width, picture_height = place.original_WH
        if abs(width * picture_height / (height * picture_width) - 1) > MASK_TOLERANCE:
            raise Unreadable("of another shape", f"{width}x{height}, its picture is {picture_width}x{picture_height}")
        image.load()
        upright = image.transpose(TURNS[orientation]) if orientation in TURNS else image
        mask_HW1 = np.array(_first_channel(upright))[:, :, None]
    return torch.from_numpy(_cut(mask_HW1, place)).permute(2, 0, 1).to(torch.float32).div_(255)


def _first_channel(image: Image.Image) -> Image.Image:
    """As grey of eight bits. Of an RGBA picture it is red."""
    if image.mode == "F":
        raise Unreadable("unsupported colours", "floating-point values, of a range that the file does not tell")
    if image.mode.startswith("I"):
        return _eight_bits(image)
    if image.mode == "1":
        return image.convert("L")
    return (image if image.mode in ("L", "LA", "RGB", "RGBA") else image.convert("RGB")).getchannel(0)


def _decoded(raw: bytes, place: Place) -> tuple[NDArray[np.uint8], bytes | None]:
    """The whole picture as RGB, upright, and the ICC profile that is still to be applied."""
    image = _opened(io.BytesIO(raw))
    orientation = _orientation(image)
    if (found_WH := _upright_WH(image, orientation)) != place.original_WH:
        found, known = (f"{width}x{height}" for width, height in (found_WH, place.original_WH))
        raise Unreadable("changed", f"it is {found}, and {known} was measured before, or is said by its table")
    if image.format in ("JPEG", "MPO"):
        # A shrink of 2 or more is half done by the JPEG decoder, which then makes a quarter of the pixels.
        image.draft(None, place.resized_WH if orientation < 5 else place.resized_WH[::-1])
    image.load()
    profile = image.info.get("icc_profile")
    upright = image.transpose(TURNS[orientation]) if orientation in TURNS else image
    if profile and image.mode in ("L", "CMYK", "LAB"):
        upright, profile = _in_srgb(upright, profile), None
    return np.array(_over_white(upright)), profile


@contextmanager
def _damage_told() -> Iterator[None]:
    """Pillow's many exceptions become one. A disk's own errors (they have a number) stay what they are."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise Unreadable("too large", str(error)) from error
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise Unreadable("damaged", str(error) or type(error).__name__) from error


def _opened(file: IO[bytes]) -> ImageFile.ImageFile:
    """Like `Image.open`, which refuses 0.18 gigapixels by a limit that all threads of the process share."""
    prefix = file.read(16)
    if not prefix:
        raise Unreadable("empty file", "0 bytes")
    Image.init()
    for name in FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is None or accept is None or accept(prefix) is not True:
            continue
        file.seek(0)
        image = factory(file, "")
        if image.width * image.height > LARGEST_PX:
            raise Unreadable("too large", f"{image.width}x{image.height} is over a gigapixel")
        return image
    raise Unreadable("not a picture", f"it is none of {', '.join(FORMATS)}")


def _orientation(image: ImageFile.ImageFile) -> int:
    """The EXIF orientation, 1 (upright) to 8."""
    if image.format == "TIFF":
        return 1  # Pillow turns TIFFs itself, their size included
    try:
        # PNG's own `getexif` decodes the whole picture, in case an EXIF chunk follows it.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except DAMAGE:
        return 1  # spoilt metadata do not spoil a picture
    return orientation if orientation in TURNS else 1


def _upright_WH(image: ImageFile.ImageFile, orientation: int) -> WH:
    return image.size if orientation < 5 else (image.height, image.width)


def _over_white(image: Image.Image) -> Image.Image:
    """As RGB of eight bits, transparency laid over white."""
    if image.mode == "F":
        raise Unreadable("unsupported colours", "floating-point values, of a range that the file does not tell")
    if image.mode.startswith("I"):
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of sixteen bits in eight; Pillow's own conversion would clip all but the darkest to white."""
    grey_HW = np.asarray(image).astype(np.int64)
    if grey_HW.min() < 0 or grey_HW.max() > 0xFFFF:
        raise Unreadable("unsupported colours", "grey values of more than 16 bits")
    return Image.fromarray(((grey_HW + 128) // 257).astype(np.uint8))


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """RGB in sRGB, from the colours of an ICC profile. One that does not fit its picture is passed over, as viewers do."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB") or image
    except (ImageCms.PyCMSError, OSError):
        return image


def _cut(pixels_HWC: NDArray[np.uint8], place: Place) -> NDArray[np.uint8]:
    """Resized to `place.resized_WH`, then the part that `place` keeps."""
    (columns, rows), (left, top), (width, height) = place.resized_WH, place.corner_XY, place.target_WH
    if pixels_HWC.shape[:2] != (rows, columns):
        pixels_BCHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None]  # channels last: four times faster
        pixels_BCHW = interpolate(pixels_BCHW, size=(rows, columns), mode="lanczos", antialias=True)
        pixels_HWC = pixels_BCHW[0].permute(1, 2, 0).numpy()
    return pixels_HWC[top : top + height, left : left + width]
