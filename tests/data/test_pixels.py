"""Decoding against Pillow's own operations, done the long way round."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from simpletuner.data.pixels import LARGEST_PX, Unreadable, measure, read_pixels
from simpletuner.data.samples import Place

ORIENTATION = 0x0112


def noise(width: int, height: int, bands: int = 3) -> Image.Image:
    values = np.random.default_rng(width).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(values[..., 0] if bands == 1 else values)


def smooth(width: int, height: int) -> Image.Image:
    return noise(width // 16, height // 16).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **keys: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **keys)
    return file.getvalue()


def as_it_is(raw: bytes) -> np.ndarray:
    """(rows, columns, 3) bytes of a picture that is neither resized nor cut."""
    size = measure(io.BytesIO(raw))
    return to_bytes(read_pixels(raw, Place(size, size, (0, 0), size)))


def to_bytes(pixels: torch.Tensor) -> np.ndarray:
    assert pixels.dtype == torch.float32
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def test_pixels_are_the_picture_in_minus_one_to_one():
    image = noise(20, 30)
    raw = encoded(image)
    pixels = read_pixels(raw, Place((20, 30), (20, 30), (0, 0), (20, 30)))
    assert pixels.shape == (3, 30, 20)
    assert torch.equal(pixels, torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1)


def test_a_picture_is_resized_then_cut():
    image = smooth(400, 300)
    got = to_bytes(read_pixels(encoded(image), Place((400, 300), (200, 150), (30, 10), (128, 64)))).astype(int)
    wanted = np.asarray(image.resize((200, 150), Image.Resampling.LANCZOS).crop((30, 10, 158, 74))).astype(int)
    assert got.shape == (64, 128, 3)
    assert np.abs(got - wanted).max() <= 2


def test_a_jpeg_shrunk_by_the_decoder_first_is_close_to_one_that_is_not():
    image = smooth(960, 640)
    raw = encoded(image, "JPEG", quality=95)
    got = to_bytes(read_pixels(raw, Place((960, 640), (240, 160), (0, 0), (240, 160)))).astype(int)
    wanted = np.asarray(Image.open(io.BytesIO(raw)).resize((240, 160), Image.Resampling.LANCZOS)).astype(int)
    assert np.square(got - wanted).mean() < 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(kind, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    lossless = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100}}
    raw = encoded(smooth(48, 32), kind, exif=exif, **lossless.get(kind, {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(raw))).convert("RGB")
    assert measure(io.BytesIO(raw)) == upright.size
    assert np.array_equal(as_it_is(raw), np.asarray(upright))


def test_a_turned_jpeg_is_shrunk_along_the_right_edges():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    raw = encoded(smooth(1200, 400), "JPEG", quality=95, exif=exif)
    got = to_bytes(read_pixels(raw, Place((400, 1200), (200, 600), (0, 0), (200, 600)))).astype(int)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(raw)))
    wanted = np.asarray(upright.resize((200, 600), Image.Resampling.LANCZOS)).astype(int)
    assert np.square(got - wanted).mean() < 2


def test_a_turned_jpeg_is_shrunk_by_the_decoder_as_one_that_lies():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 1200, 3), np.uint8))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    turned = read_pixels(encoded(noise, "JPEG", exif=exif), Place((400, 1200), (200, 600), (0, 0), (200, 600)))
    lying = read_pixels(encoded(noise, "JPEG"), Place((1200, 400), (600, 200), (0, 0), (600, 200)))
    assert np.abs(to_bytes(turned).astype(int) - np.rot90(to_bytes(lying), -1).astype(int)).max() <= 2


def test_spoilt_exif_does_not_spoil_a_picture():
    raw = encoded(noise(20, 30), exif=b"Exif\0\0no such header")
    with pytest.raises(SyntaxError):
        Image.open(io.BytesIO(raw)).getexif()
    assert as_it_is(raw).shape == (30, 20, 3)


def test_transparency_lies_over_white():
    half_red = Image.new("RGBA", (16, 16), (255, 0, 0, 128))
    assert as_it_is(encoded(half_red))[0, 0] == pytest.approx([255, 127, 127], abs=1)
    grey = Image.new("LA", (16, 16), (0, 0))
    assert (as_it_is(encoded(grey)) == 255).all()


def test_a_transparent_palette_colour_is_white():
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    got = as_it_is(encoded(image, transparency=0))
    assert got[0, 0].tolist() == [255, 255, 255]
    assert got[1, 1].tolist() == [10, 20, 30]


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette_become_rgb(mode):
    image = noise(24, 24).convert(mode)
    assert np.array_equal(as_it_is(encoded(image)), np.asarray(image.convert("RGB")))


def test_cmyk_becomes_rgb():
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    assert as_it_is(encoded(cyan, "TIFF"))[0, 0].tolist() == [0, 255, 255]


def test_sixteen_bits_of_grey_keep_their_tones():
    grey = Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16))
    expected = np.arange(256).reshape(16, 16, 1).repeat(3, 2)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(as_it_is(encoded(grey, kind)), expected)


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        raw = encoded(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert as_it_is(raw)[0, 0] == pytest.approx([255, 0, 0], abs=1)


def swapped_profile() -> bytes:
    """sRGB with red and blue exchanged."""
    raw = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    raw = raw.replace(b"rXYZ", b"tmp!").replace(b"bXYZ", b"rXYZ").replace(b"tmp!", b"bXYZ")
    return raw.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


def test_colours_of_an_icc_profile_become_srgb():
    raw = encoded(Image.new("RGB", (16, 16), (255, 0, 0)), icc_profile=swapped_profile())
    assert as_it_is(raw)[0, 0] == pytest.approx([0, 0, 255], abs=1)


def test_srgb_profiles_change_nothing():
    image = noise(24, 24)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(as_it_is(encoded(image, icc_profile=srgb)), np.asarray(image))


def test_a_profile_that_does_not_fit_is_passed_over():
    image = noise(24, 24, bands=1)
    for profile in (b"no profile", swapped_profile()):
        raw = encoded(image, icc_profile=profile)
        assert np.array_equal(as_it_is(raw), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "JPEG2000", "GIF", "BMP"])
def test_a_truncated_file_is_unreadable_not_half_a_picture(kind):
    raw = encoded(noise(256, 256), kind)
    with pytest.raises(Unreadable) as caught:
        as_it_is(raw[: len(raw) // 2])
    assert caught.value.reason == "damaged"
    assert caught.value.detail


def test_a_truncated_jpeg_is_measured_from_its_header():
    raw = encoded(noise(300, 200), "JPEG")
    assert measure(io.BytesIO(raw[: len(raw) // 2])) == (300, 200)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [(b"", "empty file"), (b"hello", "not a picture"), (b"\x89PNG\r\n\x1a\n", "damaged"), (b"%!PS-Adobe", "not a picture")],
)
def test_what_is_no_picture_says_so(raw, reason):
    with pytest.raises(Unreadable) as caught:
        measure(io.BytesIO(raw))
    assert caught.value.reason == reason


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is this large, of a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_over_a_gigapixel_is_refused_and_below_it_is_not():
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measure(io.BytesIO(png_header(40_000, LARGEST_PX // 40_000))) == (40_000, 25_000)
    with pytest.raises(Unreadable, match="too large"):
        measure(io.BytesIO(png_header(40_001, 25_000)))
    assert limit == Image.MAX_IMAGE_PIXELS, "other users of Pillow keep their guard"


def test_a_file_replaced_since_it_was_measured_is_unreadable():
    with pytest.raises(Unreadable, match="changed"):
        read_pixels(encoded(noise(32, 32)), Place((64, 64), (64, 64), (0, 0), (64, 64)))


def test_floating_point_pictures_are_refused():
    with pytest.raises(Unreadable, match="unsupported colours"):
        as_it_is(encoded(Image.new("F", (16, 16), 0.5), "TIFF"))


def test_a_file_that_cannot_be_opened_is_the_disks_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        measure(tmp_path / "none.jpg")
