"""Buckets and crops: how a picture of any size becomes one of its bucket's size. Pure integer arithmetic, no pixels.

Sizes named _WH are (width, height) in pixels, and every size is rounded once, half up, from an exact ratio. So the same picture
lands at the same place on every machine. A ratio is a pair of whole numbers: `Fraction` reduces at every step, which is slow.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from math import isqrt

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.samples import LatentSpec, Place, draw_seed

__all__ = ["WH", "Fitter", "Misfit", "asked_sizes", "enlargement", "fit"]

WH = tuple[int, int]
Ratio = tuple[int, int]
"""(numerator, denominator), both positive; not reduced."""

REMEMBERED_SIZES = 2**14
"""Pictures of a set share few sizes, as a rule those of a camera; more of them than this would only fill memory."""


@dataclass(frozen=True)
class Misfit:
    """Why a picture is left out: `reason` in words that the ledger counts by, `detail` with its own figures."""

    reason: str
    detail: str


def fit(original_WH: WH, entry: ImageDataset, latent: LatentSpec, key: str) -> Place | Misfit:
    """Where a picture goes, or why it goes nowhere. Depends on its arguments alone.

    `original_WH` is the size after the EXIF turn. `key` ("<dataset id>/<relative path>") draws random crops and random
    aspects: they belong to the file and not to the run's seed, which would encode everything afresh.

    The bucket
        Its aspect is the picture's own (`crop` off, or `crop_aspect` "preserve"), 1 ("square"), or one of
        `crop_aspect_buckets`; unset, it is 1, and the picture's own with `bucket_resolutions`.
        `bucket_resolutions`: of those sizes, snapped to the alignment, the one of the nearest aspect.
        `resolution` as (width, height): that size for every picture, snapped likewise.
        Otherwise that aspect at the resolution in its unit: E x E has the area of "pixel_area" and "area", and E is the
        shorter edge of "pixel". No resolution: the native edge.
    The scale
        `crop` off: the picture just covers its bucket; the few pixels over are trimmed evenly.
        `crop` on, without the pair `maximum_image_size` and `target_downsample_size`: the same, so a cut loses only
        what the bucket's shape asks.
        `crop` on, with the pair: a picture larger than the maximum is reduced to the target, any other keeps its own
        scale. One that would not cover the bucket is scaled so that it just does.
    The cut
        `crop_style`: "center", "corner" (upper left) or "random" (drawn from `key`).
    """
    return _moved(_fitted(original_WH, entry, latent, _drawn_aspect(entry, key)), entry, key)


class Fitter:
    """`fit` for all pictures of one entry: a size that came before is not reckoned again."""

    def __init__(self, entry: ImageDataset, latent: LatentSpec) -> None:
        self._entry = entry

        @lru_cache(REMEMBERED_SIZES)
        def fitted(original_WH: WH, drawn_aspect: int) -> Place | Misfit:
            return _fitted(original_WH, entry, latent, drawn_aspect)

        self._fitted: Callable[[WH, int], Place | Misfit] = fitted

    def fit(self, original_WH: WH, key: str) -> Place | Misfit:
        """Where a picture goes, or why it goes nowhere."""
        return _moved(self.sized(original_WH, key), self._entry, key)

    def sized(self, original_WH: WH, key: str) -> Place | Misfit:
        """The same, but for the corner of a random crop, which takes longest to draw."""
        return self._fitted(original_WH, _drawn_aspect(self._entry, key))


def asked_sizes(entry: ImageDataset, latent: LatentSpec) -> dict[WH, WH]:
    """The sizes that the entry names, each with the nearest one that the family can train at."""
    sizes = entry.bucket_resolutions or ([entry.resolution] if isinstance(entry.resolution, tuple) else ())
    return {size_WH: _snapped(size_WH, latent) for size_WH in sizes}


def enlargement(place: Place) -> float:
    """How many times larger each edge becomes; below 1 for a picture that is reduced."""
    (width, height), (columns, rows) = place.original_WH, place.resized_WH
    return max(columns / width, rows / height)


def _fitted(original_WH: WH, entry: ImageDataset, latent: LatentSpec, drawn_aspect: int) -> Place | Misfit:
    """All of `fit` that depends on the picture's size; a random crop lies upper left until `_moved`."""
    if misfit := _misfit(original_WH, entry):
        return misfit
    target_WH = _bucket(original_WH, entry, latent, drawn_aspect)
    resized_WH = _scaled(original_WH, target_WH, entry)
    if not entry.crop or entry.crop_style == "center":
        corner_XY = (resized_WH[0] - target_WH[0]) // 2, (resized_WH[1] - target_WH[1]) // 2
    else:
        corner_XY = 0, 0
    return Place(original_WH, resized_WH, corner_XY, target_WH)


def _moved(place: Place | Misfit, entry: ImageDataset, key: str) -> Place | Misfit:
    """A random crop where `key` draws it; any other stays."""
    if isinstance(place, Misfit) or not entry.crop or entry.crop_style != "random" or place.resized_WH == place.target_WH:
        return place
    spare_x, spare_y = (resized - target for resized, target in zip(place.resized_WH, place.target_WH, strict=True))
    draw = draw_seed(key, "crop")
    corner_XY = draw % (spare_x + 1), draw // (spare_x + 1) % (spare_y + 1)
    return Place(place.original_WH, place.resized_WH, corner_XY, place.target_WH)


def _drawn_aspect(entry: ImageDataset, key: str) -> int:
    """Which of `crop_aspect_buckets` is this file's; 0 where none is drawn."""
    if not entry.crop or entry.crop_aspect != "random":
        return 0
    choices = entry.crop_aspect_buckets
    assert choices, "crop_aspect random needs crop_aspect_buckets"
    ends = list(accumulate(choices.values() if isinstance(choices, dict) else [1.0] * len(choices)))
    return min(bisect(ends, draw_seed(key, "aspect") / 2**63 * ends[-1]), len(ends) - 1)


def _misfit(original_WH: WH, entry: ImageDataset) -> Misfit | None:
    width, height = original_WH
    size = f"{width}x{height}"
    if min(original_WH) < entry.minimum_edge_px:
        return Misfit("too small", f"{size}: the shorter side is under {entry.minimum_edge_px} px")
    if entry.minimum_image_size and _surplus(original_WH, entry.minimum_image_size, entry) < 0:
        asked = f"{entry.minimum_image_size:g} ({entry.resolution_type})"
        return Misfit("below minimum_image_size", f"{size}: the minimum is {asked}")
    if width / height < entry.minimum_aspect_ratio:
        return Misfit("too narrow", f"{size}: {width / height:.3g}, minimum_aspect_ratio is {entry.minimum_aspect_ratio:g}")
    if width / height > entry.maximum_aspect_ratio:
        return Misfit("too wide", f"{size}: {width / height:.3g}, maximum_aspect_ratio is {entry.maximum_aspect_ratio:g}")
    return None


def _extent(size_WH: WH, entry: ImageDataset) -> int:
    """What sizes are compared by: the shorter edge of "pixel", else the area."""
    return min(size_WH) if entry.resolution_type == "pixel" else size_WH[0] * size_WH[1]


def _limit(size: float, entry: ImageDataset) -> Ratio:
    """A size of the configuration in pixels, as `_extent` counts them. Exact: a float is a ratio."""
    numerator, denominator = size.as_integer_ratio()
    if entry.resolution_type == "area":
        return numerator * 1_000_000, denominator
    return (numerator, denominator) if entry.resolution_type == "pixel" else (numerator**2, denominator**2)


def _bucket(original_WH: WH, entry: ImageDataset, latent: LatentSpec, drawn_aspect: int) -> WH:
    """The size this picture is trained at."""
    unit = latent.alignment_px
    if entry.bucket_resolutions:
        sizes = [_snapped(size_WH, latent) for size_WH in entry.bucket_resolutions]
        return _nearest_size(original_WH, _aspect(original_WH, entry, drawn_aspect), sizes)
    if isinstance(entry.resolution, tuple):
        return _snapped(entry.resolution, latent)
    if entry.resolution is not None:
        size, parts = _limit(entry.resolution, entry)
    else:
        size, parts = latent.native_edge_px ** (1 if entry.resolution_type == "pixel" else 2), 1
    wide, high = _aspect(original_WH, entry, drawn_aspect)
    if entry.resolution_type == "pixel":  # the longer edge grows with the aspect, the shorter one is the size itself
        longer, shorter = max(wide, high), min(wide, high)
        long_px = _aligned(((size * longer) ** 2, (parts * shorter) ** 2), unit)
        short_px = _aligned((size**2, parts**2), unit)
        return (long_px, short_px) if wide >= high else (short_px, long_px)
    return _aligned((size * wide, parts * high), unit), _aligned((size * high, parts * wide), unit)


def _aspect(original_WH: WH, entry: ImageDataset, drawn_aspect: int) -> Ratio:
    """Width over height of the bucket, before alignment."""
    asked = entry.crop_aspect or ("preserve" if entry.bucket_resolutions else "square")
    if not entry.crop or asked == "preserve":
        return original_WH
    if asked == "square":
        return 1, 1
    choices = [aspect.as_integer_ratio() for aspect in entry.crop_aspect_buckets]
    if asked == "random":
        return choices[drawn_aspect]
    assert choices, "crop_aspect closest needs crop_aspect_buckets"
    return min(choices, key=lambda aspect: _apart(original_WH, aspect))


def _nearest_size(original_WH: WH, aspect: Ratio, sizes: Sequence[WH]) -> WH:
    """The size nearest in aspect; of several, the largest that the picture covers, else the smallest."""

    def rank(size_WH: WH) -> tuple[Fraction, bool, int]:
        is_covered = original_WH[0] >= size_WH[0] and original_WH[1] >= size_WH[1]
        area = size_WH[0] * size_WH[1]
        return _apart(aspect, size_WH), not is_covered, -area if is_covered else area

    return min(sizes, key=rank)


def _apart(one: Ratio, other: Ratio) -> Fraction:
    """How far apart two aspects are: the larger over the smaller."""
    smaller, larger = sorted((one[0] * other[1], one[1] * other[0]))
    return Fraction(larger, smaller)


def _snapped(size_WH: WH, latent: LatentSpec) -> WH:
    """A size that the user named, at the family's alignment."""
    width, height = size_WH
    return _aligned((width**2, 1), latent.alignment_px), _aligned((height**2, 1), latent.alignment_px)


def _scaled(original_WH: WH, target_WH: WH, entry: ImageDataset) -> WH:
    """The size from which the target is cut."""
    maximum, reduced = entry.maximum_image_size, entry.target_downsample_size
    if not entry.crop or maximum is None or reduced is None:
        return _covering(original_WH, target_WH)
    size_WH = original_WH
    if _surplus(original_WH, maximum, entry) > 0:
        size_WH = _reduced(original_WH, reduced, entry)
    return size_WH if size_WH[0] >= target_WH[0] and size_WH[1] >= target_WH[1] else _covering(original_WH, target_WH)


def _surplus(size_WH: WH, limit: float, entry: ImageDataset) -> int:
    """Positive for a size over a limit of the configuration, negative for one below it."""
    numerator, denominator = _limit(limit, entry)
    return _extent(size_WH, entry) * denominator - numerator


def _reduced(original_WH: WH, limit: float, entry: ImageDataset) -> WH:
    """The same shape at `limit`, and never larger than it was."""
    if _surplus(original_WH, limit, entry) <= 0:
        return original_WH
    width, height = original_WH
    size, parts = _limit(limit, entry)
    if entry.resolution_type == "pixel":
        parts *= min(original_WH)
        return _aligned(((width * size) ** 2, parts**2), 1), _aligned(((height * size) ** 2, parts**2), 1)
    return _aligned((size * width, parts * height), 1), _aligned((size * height, parts * width), 1)


def _covering(original_WH: WH, target_WH: WH) -> WH:
    """The smallest size of the picture's shape with no edge shorter than the target's."""
    width, height = original_WH
    target_width, target_height = target_WH
    if target_width * height >= target_height * width:
        return target_width, (2 * target_width * height + width) // (2 * width)
    return (2 * target_height * width + height) // (2 * height), target_height


def _aligned(edge_squared: Ratio, unit: int) -> int:
    """The multiple of `unit` nearest to the edge whose square is given (halves go up), at least one `unit`."""
    # round(sqrt(x)) with integers alone is (isqrt(4x) + 1) // 2: a float's square root may round either way at a half.
    numerator, denominator = edge_squared
    doubled = isqrt(4 * numerator // (denominator * unit * unit))
    return max((doubled + 1) // 2, 1) * unit
