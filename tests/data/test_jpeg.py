"""The quick look at a JPEG's header, against Pillow's."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest
from PIL import Image

from simpletuner.data.jpeg import upright_size
from simpletuner.data.pixels import LARGEST_PX, Unreadable, measure


def jpeg(size: tuple[int, int] = (48, 32), *, mode: str = "RGB", orientation: int | None = None, **options: Any) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
        exif[0x010F] = "a camera"
    Image.new(mode, size).save(file, "JPEG", exif=exif, **options)
    return file.getvalue()


def by_pillow(raw: bytes) -> tuple[int, int] | None:
    try:
        return measure(io.BytesIO(raw))
    except Unreadable:
        return None


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_each_orientation_is_seen_as_pillow_sees_it(orientation):
    raw = jpeg(orientation=orientation)
    assert upright_size(raw) == by_pillow(raw) == ((32, 48) if (orientation or 1) > 4 else (48, 32))


@pytest.mark.parametrize(
    "options",
    [{"mode": "L"}, {"mode": "CMYK"}, {"progressive": True}, {"comment": b"by me"}, {"icc_profile": b"x" * 70_000},
     {"subsampling": 0}, {"optimize": True}, {"restart_marker_blocks": 2}],
)  # fmt: skip
def test_plain_kinds_are_measured_or_left_to_pillow(options):
    raw = jpeg(**options)
    assert by_pillow(raw) == (48, 32)
    assert upright_size(raw) == (48, 32)


def test_big_and_little_endian_exif_are_read():
    for order in (b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0",
                  b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"):  # fmt: skip
        file = io.BytesIO()
        Image.new("RGB", (48, 32)).save(file, "JPEG", exif=b"Exif\0\0" + order)
        assert upright_size(file.getvalue()) == by_pillow(file.getvalue()) == (32, 48)


@pytest.mark.parametrize("orientation", [0, 9])
def test_odd_exif_is_left_to_pillow(orientation):
    assert upright_size(jpeg(orientation=orientation)) is None


def test_an_orientation_in_xmp_is_left_to_pillow():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    raw = jpeg(xmp=xmp)
    assert by_pillow(raw) == (32, 48)
    assert upright_size(raw) is None
    assert upright_size(jpeg(xmp=xmp, orientation=1)) == by_pillow(jpeg(xmp=xmp, orientation=1)) == (48, 32)


@pytest.mark.parametrize("raw", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"GIF89a", b"\xff\xd8\xff\xe0\0\0", b"\xff\xd8" * 40])
def test_what_is_no_plain_header_is_left_to_pillow(raw):
    assert upright_size(raw) is None


def block(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload


EMPTY_EXIF = block(0xE1, b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0")
TURNED_EXIF = block(0xE1, b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0")


@pytest.mark.parametrize(
    "blocks",
    [EMPTY_EXIF + TURNED_EXIF, block(0xDB, b"\0" * 20), block(0xDB, b"\x18" * 65), block(0xE0, b"JFIF"), block(0xEE, b"Adobe"),
     block(0xE2, b"ICC_PROFILE\0"), block(0xED, b"Photoshop 3.0\x008BIM\x03\xed")],
    ids=["EXIF in pieces", "short table", "long table", "short JFIF", "short Adobe", "short profile", "odd Photoshop"],
)  # fmt: skip
def test_blocks_that_pillow_looks_into_are_left_to_it_where_they_are_odd(blocks):
    file = io.BytesIO()
    Image.new("RGB", (48, 32)).save(file, "JPEG")
    plain = file.getvalue()
    odd = plain[:2] + blocks + plain[2:]
    assert upright_size(odd) is None
    assert upright_size(plain[:2] + TURNED_EXIF + plain[2:]) == (32, 48)


def test_a_header_whose_last_block_is_cut_off_is_left_to_pillow():
    raw = jpeg()
    assert upright_size(raw[: raw.index(b"\xff\xda") + 6]) is None


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
def test_damaged_headers_never_give_another_size_than_pillow():
    draws, whole, compared = random.Random(0), jpeg(orientation=6, comment=b"by me"), 0
    header = whole.index(b"\xff\xda")
    for number in range(3000):
        raw = bytearray(whole)
        for _ in range(draws.randint(1, 3)):
            raw[draws.randrange(header)] = draws.randrange(256)
        damaged = bytes(raw[: draws.randrange(header)]) if number % 3 == 0 else bytes(raw)
        if (quick := upright_size(damaged)) is not None and quick[0] * quick[1] <= LARGEST_PX:
            compared += 1
            assert quick == by_pillow(damaged)
    assert compared > 500
