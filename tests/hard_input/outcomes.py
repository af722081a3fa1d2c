"""The table of hard inputs: what lies in the folder, and what becomes of it. `docs/data.md` shows it, tests hold it."""

from __future__ import annotations

import codecs
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, PngImagePlugin

from tests.hard_input.pictures import (
    COLOURS,
    GREYS,
    SIZE_WH,
    alpha,
    animated,
    broken_checksum,
    cmyk,
    colour_key,
    encoded,
    exif,
    fifo,
    flipped,
    floats,
    grey_alpha,
    half,
    jpeg,
    link,
    noisy,
    p3_in_srgb,
    palette,
    plain,
    png,
    png_of,
    quadrants,
    sixteen_bit,
    stored,
    swapped_profile,
    turned,
    wide_profile,
    with_chunk_after_pixels,
)

__all__ = ["CAPTIONS", "CHANGES", "PICTURES", "UNREADABLE", "Change", "Row", "Text", "as_markdown"]

USED, PASSED_OVER = "used", "passed over"
TRUNCATED = "Cut off in the middle: JPEG, progressive JPEG, PNG, WebP, GIF, TIFF"
NO_PICTURE = "A picture's ending on something else: text, a web page, PostScript, Photoshop, HEIC, a zip"
BOMB = "A file of a few bytes whose header claims 60000x60000"
ODD_NAMES = "Names with spaces, Unicode composed or not, line breaks, markup, 255 bytes, or bytes that are no UTF-8"
FOLDERS_AND_PIPES = "A folder or a pipe with a picture's ending, a socket, a device"
HIDDEN = "Hidden files and folders, AppleDouble files (`._x.jpg`), `Thumbs.db`, sidecars"
WHITE = (255, 255, 255)
GREY_COLOURS = tuple((grey,) * 3 for grey in GREYS)
OVER_WHITE = (*COLOURS[:2], WHITE, WHITE)


@dataclass(frozen=True)
class Row:
    """A file, and what becomes of it."""

    what: str
    """As the documentation says it; rows of the same words are one there."""
    file: str
    make: bytes | Callable[[Path], None]
    outcome: str = USED
    """"used", "passed over" (not even counted), or the ledger's reason."""
    how: str = ""
    """More for the documentation."""
    size_WH: tuple[int, int] = SIZE_WH
    colours: Sequence[Sequence[int]] = COLOURS
    """What its four quarters show; empty where nobody can know."""
    tolerance: int = 2

    def write(self, root: Path) -> None:
        path = root / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(self.make):
            self.make(path)
        else:
            path.write_bytes(self.make)


@dataclass(frozen=True)
class Text:
    """A caption file beside a good picture, and the captions it gives."""

    what: str
    content: bytes
    captions: tuple[str, ...] = ()
    """None: the picture is without a caption."""
    detail: str = ""
    """A part of the ledger's detail, if it is without."""


@dataclass(frozen=True)
class Change:
    """What happens to a picture after it was measured and before it is encoded."""

    what: str
    happen: Callable[[Path], object]
    outcome: str = USED
    how: str = ""


def _socket(path: Path) -> None:
    os.mknod(path, 0o140644)


def _outside(path: Path) -> None:
    """A picture in a folder beside the set's, to which a link leads."""
    root = path.parent.parent
    plain(root.parent / "elsewhere" / path.name)
    if not path.parent.is_symlink():
        path.parent.rmdir()
        link(path.parent, "../elsewhere")


def _dated(seconds: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        plain(path)
        os.utime(path, (seconds, seconds))

    return write


def _large_text() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "{}" * 2**20, zip=False)
    return png(pnginfo=info)


def _xmp(orientation: int) -> bytes:
    raw = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    return encoded(stored(quadrants(), orientation), "JPEG", xmp=raw)


PICTURES = (
    *(
        Row(TRUNCATED, f"cut.{kind.lower()}", half(noisy(kind)), "damaged", "no half pictures")
        for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF")
    ),
    Row(
        TRUNCATED,
        "cut-progressive.jpg",
        half(encoded(Image.open(io.BytesIO(noisy("PNG"))), "JPEG", progressive=True)),
        "damaged",
        "no half pictures",
    ),
    Row("Cut off within its header", "cut-header.png", png()[:20], "damaged"),
    Row("No bytes at all", "zero.jpg", b"", "empty file"),
    Row(NO_PICTURE, "text.jpg", b"this is no picture", "not a picture"),
    Row(NO_PICTURE, "page.jpg", b"<!DOCTYPE html><title>404 Not Found</title>", "not a picture"),
    Row(NO_PICTURE, "script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    Row(NO_PICTURE, "layers.tif", b"8BPS\0\1" + bytes(40), "not a picture"),
    Row(NO_PICTURE, "phone.heic", b"\0\0\0\x18ftypheic" + bytes(40), "not a picture"),
    Row(NO_PICTURE, "packed.webp", b"PK\3\4" + bytes(40), "not a picture"),
    Row("Another format than its ending says", "really-a-png.jpg", png(), how="by its contents"),
    Row("Another format than its ending says", "really-a-webp.PNG", encoded(quadrants(), "WEBP"), how="by its contents"),
    Row("1x1", "dot.png", encoded(quadrants((1, 1)), "PNG"), "too small", "under 16 px"),
    Row("20000x30", "strip.png", encoded(Image.new("L", (20000, 30)), "PNG"), "too wide", "`maximum_aspect_ratio`"),
    Row("30x20000", "tower.png", encoded(Image.new("L", (30, 20000)), "PNG"), "too narrow", "`minimum_aspect_ratio`"),
    Row(BOMB, "bomb.png", png_of(60000, 60000, 8, 2, b"\0"), "too large", "over a gigapixel"),
    Row("The same within the limit, 30000x30000", "small-bomb.png", png_of(30000, 30000, 8, 2, b"\0"), "damaged"),
    Row("A header that claims no width", "no-width.png", png_of(0, 64, 8, 2, b"\0"), "damaged"),
    Row("A wrong checksum in a PNG whose pixels are all there", "checksum.png", broken_checksum()),
    Row("Flipped bits in a PNG", "flipped.png", flipped(noisy("PNG")), "damaged"),
    Row("Flipped bits in a JPEG or WebP", "flipped.jpg", flipped(jpeg()), how="the format has no means to tell", colours=()),
    Row("Bytes after the end of the picture", "longer.jpg", jpeg() + bytes(1000)),
    Row("Megabytes of text in a PNG, as some programs keep their workflow", "workflow.png", _large_text()),
    Row("CMYK, marked by Adobe's programs or not", "cmyk-adobe.jpg", cmyk(marker=True), tolerance=6),
    Row("CMYK, marked by Adobe's programs or not", "cmyk.jpg", cmyk(marker=False), tolerance=6),
    Row("CMYK in TIFF", "cmyk.tif", encoded(Image.fromarray(quadrants()).convert("CMYK"), "TIFF")),
    Row("Sixteen bits, grey and colour", "grey16.png", sixteen_bit(GREYS, 0), colours=GREY_COLOURS),
    Row("Sixteen bits, grey and colour", "colour16.png", sixteen_bit(COLOURS, 2)),
    Row(
        "Floating-point TIFF",
        "float.tif",
        floats(),
        "unsupported colours",
        "the file does not say which value is white",
    ),
    Row("Palette", "palette.png", encoded(palette(), "PNG")),
    Row(
        "One bit",
        "bit.png",
        encoded(Image.fromarray(quadrants(colours=(0, 255, 255, 0))).convert("1"), "PNG"),
        colours=[(0,) * 3, WHITE, WHITE, (0,) * 3],
    ),
    Row(
        "Palette with alpha",
        "palette-alpha.png",
        encoded(palette(), "PNG", transparency=b"\xff\xff\0\0"),
        how="over white",
        colours=OVER_WHITE,
    ),
    Row("RGB with alpha or with a transparent colour", "alpha.png", alpha(), how="over white", colours=OVER_WHITE),
    Row("RGB with alpha or with a transparent colour", "alpha.webp", alpha("WEBP"), how="over white", colours=OVER_WHITE),
    Row(
        "RGB with alpha or with a transparent colour", "key.png", colour_key(), how="over white", colours=(*COLOURS[:3], WHITE)
    ),
    Row("Grey with alpha (LA)", "grey-alpha.png", grey_alpha(), how="over white", colours=(*GREY_COLOURS[:2], WHITE, WHITE)),
    Row("Grey JPEG", "grey.jpg", encoded(quadrants(colours=GREYS), "JPEG", subsampling=-1), colours=GREY_COLOURS),
    *(
        Row(
            "EXIF orientation 1 to 8",
            f"turned-{orientation}.{ending}",
            turned(orientation, kind),
            how="upright, before anything is measured",
            tolerance=6,
        )
        for orientation in range(1, 9)
        for kind, ending in (("JPEG", "jpg"), ("PNG", "png"))
    ),
    Row("An orientation told by XMP alone", "xmp.jpg", _xmp(6), how="upright", tolerance=6),
    Row("An EXIF orientation that there is not, or spoilt EXIF", "orientation-9.jpg", jpeg(exif=exif(9)), how="as it lies"),
    Row("An EXIF orientation that there is not, or spoilt EXIF", "orientation-0.jpg", jpeg(exif=exif(0)), how="as it lies"),
    Row(
        "An EXIF orientation that there is not, or spoilt EXIF",
        "spoilt.jpg",
        jpeg(exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
        how="as it lies",
    ),
    Row(
        "EXIF that a PNG keeps behind its pixels",
        "late.png",
        with_chunk_after_pixels(png(), b"eXIf", exif(6).tobytes()[6:]),
        how="as it lies: it is not looked for there",
    ),
    Row("Animations: GIF, WebP, PNG", "moving.gif", animated("GIF"), how="the first frame", tolerance=6),
    Row("Animations: GIF, WebP, PNG", "moving.webp", animated("WEBP"), how="the first frame"),
    Row("Animations: GIF, WebP, PNG", "moving.png", animated("PNG"), how="the first frame"),
    Row("Progressive JPEG", "progressive.jpg", jpeg(progressive=True), tolerance=6),
    Row(
        "An ICC profile: a wide gamut, or red and blue exchanged",
        "swapped.png",
        png(icc_profile=swapped_profile()),
        how="converted to sRGB",
        colours=[colour[::-1] for colour in COLOURS],
    ),
    Row(
        "An ICC profile: a wide gamut, or red and blue exchanged",
        "wide.png",
        png(icc_profile=wide_profile()),
        how="converted to sRGB",
        colours=[p3_in_srgb(colour) for colour in COLOURS],
        tolerance=3,
    ),
    Row("An ICC profile that is broken or does not fit", "broken-icc.jpg", jpeg(icc_profile=b"no profile"), how="as sRGB"),
    Row(
        "An ICC profile that is broken or does not fit",
        "unfit-icc.png",
        encoded(quadrants(colours=GREYS), "PNG", icc_profile=swapped_profile()),
        how="as sRGB",
        colours=GREY_COLOURS,
    ),
    Row(
        "One stem with two endings",
        "twin.jpg",
        jpeg(),
        how="two pictures, each with its own latents; a `.txt` beside them captions both",
    ),
    Row(
        "One stem with two endings",
        "twin.png",
        encoded(quadrants(colours=COLOURS[::-1]), "PNG"),
        how="two pictures, each with its own latents; a `.txt` beside them captions both",
        colours=COLOURS[::-1],
    ),
    *(
        Row(ODD_NAMES, name, plain)
        for name in (
            "two  spaces .jpg",
            "été composed.jpg",
            "e\u0301te\u0301 apart.jpg",
            "日本語 🦊.jpg",
            "a line\nbreak.jpg",
            "[bold] mark[/] up %s {0}.jpg",
            "x" * 251 + ".jpg",
            "y/" * 60 + "deep.jpg",
            os.fsdecode(b"caf\xe9 noir.jpg"),
            "LOUD.JPG",
            "a.b.c..jpg",
        )
    ),
    Row("Dates before 1970 and beyond 2106", "old.jpg", _dated(-600_000_000)),
    Row("Dates before 1970 and beyond 2106", "future.jpg", _dated(5_000_000_000)),
    *(
        Row(HIDDEN, name, plain, PASSED_OVER)
        for name in (".hidden.jpg", "._LOUD.JPG", ".Trashes/thrown away.jpg", "__MACOSX/._LOUD.JPG")
    ),
    Row(HIDDEN, "Thumbs.db", b"\xd0\xcf\x11\xe0", PASSED_OVER),
    Row(HIDDEN, "LOUD.JPG.xmp", b"<x:xmpmeta/>", PASSED_OVER),
    Row(FOLDERS_AND_PIPES, "folder.jpg/plain.txt", b"text", PASSED_OVER, "a folder is searched as any other"),
    Row(FOLDERS_AND_PIPES, "pipe.png", fifo, PASSED_OVER, "a folder is searched as any other"),
    Row(FOLDERS_AND_PIPES, "socket.png", _socket, PASSED_OVER, "a folder is searched as any other"),
    Row(FOLDERS_AND_PIPES, "null.png", lambda path: link(path, "/dev/null"), PASSED_OVER, "a folder is searched as any other"),
    Row("Links that lead in a circle", "circle", lambda path: link(path, "."), PASSED_OVER, "each folder is searched once"),
    Row("A link to itself, or to a file that is gone", "itself.jpg", lambda path: link(path, "itself.jpg"), "cannot be opened"),
    Row("A link to itself, or to a file that is gone", "gone.jpg", lambda path: link(path, "no such file"), "cannot be opened"),
    Row("Links to files and folders, within the set or outside", "linked/outside.jpg", _outside),
    Row("Links to files and folders, within the set or outside", "linked.jpg", lambda path: link(path, "LOUD.JPG")),
)
"""All written into one folder."""

UNREADABLE = (
    Row("A file that this user may not read", "shut.jpg", plain, "cannot be opened", "tried again at every start"),
    Row("A folder that this user may not search", "shut/inside.jpg", plain, PASSED_OVER, "told, and noted in the ledger"),
)
"""For a user who is not root."""

NOT_UTF8 = "holds no text, or none in UTF-8"
CAPTIONS = (
    Text("UTF-8, with or without a byte order mark, lines ended as on any system", b"ein Fuchs\n", ("ein Fuchs",)),
    Text(
        "UTF-8, with or without a byte order mark, lines ended as on any system",
        codecs.BOM_UTF8 + "ein Fuchs\r\nzwei Füchse\r\n".encode(),
        ("ein Fuchs", "zwei Füchse"),
    ),
    Text("UTF-8, with or without a byte order mark, lines ended as on any system", b"one\rtwo", ("one", "two")),
    Text("UTF-16 with a byte order mark", "zwei Füchse".encode("utf-16"), ("zwei Füchse",)),
    Text("UTF-16 with a byte order mark", codecs.BOM_UTF16_BE + "zwei Füchse".encode("utf-16-be"), ("zwei Füchse",)),
    Text("UTF-16 without one", "a fox".encode("utf-16-le"), (), NOT_UTF8),
    Text("Another encoding (cp1252, Shift JIS)", "zwei Füchse".encode("cp1252"), (), NOT_UTF8),
    Text("Another encoding (cp1252, Shift JIS)", "狐".encode("shift_jis"), (), NOT_UTF8),
    Text("NUL bytes", b"a fox\0", (), NOT_UTF8),
    Text("Empty, or white space alone", b"", (), "is empty"),
    Text("Empty, or white space alone", b" \r\n\t\n", (), NOT_UTF8),
    Text("A byte order mark alone", codecs.BOM_UTF8, (), NOT_UTF8),
    Text("One very long line", b"a fox " * 20_000, (("a fox " * 20_000).strip(),)),
    Text("More than 1 MiB", b"a fox\n" * 200_000, (), "too large for a caption"),
)
"""Each beside a good picture, under `caption_strategy` "textfile"."""

CHANGES: tuple[Change, ...] = (
    Change("It vanishes", os.unlink, "cannot be opened"),
    Change("It is emptied", lambda path: path.write_bytes(b""), "empty file"),
    Change("It is cut off", lambda path: path.write_bytes(jpeg()[:-300]), "damaged"),
    Change(
        "Another picture of another size takes its place",
        lambda path: path.write_bytes(encoded(quadrants((64, 64)), "JPEG")),
        "changed",
        "at the next start it is measured anew",
    ),
    Change(
        "Another picture of the same size takes its place",
        lambda path: path.write_bytes(encoded(quadrants(colours=COLOURS[::-1]), "JPEG")),
        how="the new one",
    ),
)


def as_markdown() -> str:
    """The section of `docs/data.md`."""
    pictures = [(row.what, row.outcome, row.how) for row in (*PICTURES, *UNREADABLE)]
    texts = [(text.what, "a caption" if text.captions else "no caption", "") for text in CAPTIONS]
    changes = [(change.what, change.outcome, change.how) for change in CHANGES]
    return "\n\n".join(
        [
            "What becomes of odd files; each line is a test. A reason for leaving a picture out stands so in the ledger,\n"
            "what is *passed over* is not counted. None of it stops a run.",
            _table("In the folder", pictures),
            "A text file beside a picture under `caption_strategy` `textfile`. A picture with no caption is an error before\n"
            "any work, unless `caption_missing` says otherwise.",
            _table("Text", texts),
            "A picture that changes after it was found and before it is encoded:",
            _table("Change", changes),
        ]
    )


def _table(title: str, rows: Sequence[tuple[str, str, str]]) -> str:
    lines = [f"| {title} | becomes |", "|---|---|"]
    told = set()
    for what, outcome, how in rows:
        words = {USED: "**used**", PASSED_OVER: "*passed over*"}.get(outcome, outcome)
        line = f"| {what} | {f'{words}: {how}' if how else words} |"
        if line not in told:
            lines.append(line)
            told.add(line)
    return "\n".join(lines)
