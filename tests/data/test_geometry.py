"""Buckets and crops, by properties and by the quickstarts' own figures."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.geometry import Fitter, Misfit, asked_sizes, enlargement, fit
from simpletuner.data.samples import LatentSpec, Place

SANA = LatentSpec(channels=32, cell_px=32, alignment_px=64, native_edge_px=1024)
CASCADE = LatentSpec(channels=16, cell_px=128 / 3, alignment_px=128, native_edge_px=1024)


def entry(**keys: Any) -> ImageDataset:
    return ImageDataset(id="cats", instance_data_dir="cats", **keys)


def placed(width: int, height: int, key: str = "cats/a.jpg", latent: LatentSpec = SANA, **keys: Any) -> Place:
    place = fit((width, height), entry(**keys), latent, key)
    assert isinstance(place, Place), place
    return place


def bucket(width: int, height: int, **keys: Any) -> tuple[int, int]:
    return placed(width, height, **keys).target_WH


def refused(width: int, height: int, **keys: Any) -> Misfit:
    misfit = fit((width, height), entry(**keys), SANA, "cats/a.jpg")
    assert isinstance(misfit, Misfit), misfit
    return misfit


@st.composite
def entries(draw: st.DrawFn) -> ImageDataset:
    """Any entry whose resolution, in its own unit, lies between 64 and 2048 px, or that names its sizes."""
    unit = draw(st.sampled_from(["pixel", "area", "pixel_area"]))
    sizes = st.integers(64, 2048).map(lambda edge: edge * edge / 1e6 if unit == "area" else edge)
    pair = draw(st.none() | st.tuples(sizes, sizes))
    exact = st.tuples(st.integers(64, 2048), st.integers(64, 2048))
    return entry(
        resolution=draw(st.none() | sizes | exact),
        bucket_resolutions=draw(st.none() | st.lists(exact, min_size=1, max_size=4)),
        resolution_type=unit,
        crop=draw(st.booleans()),
        crop_aspect=draw(st.sampled_from([None, "square", "preserve", "closest", "random"])),
        crop_style=draw(st.sampled_from(["center", "random", "corner"])),
        crop_aspect_buckets=draw(st.sampled_from([(1.0, 0.75, 1.5), {1.0: 2, 0.75: 1}])),
        maximum_image_size=pair[0] if pair else None,
        target_downsample_size=pair[1] if pair else None,
    )


sizes = st.tuples(st.integers(16, 8000), st.integers(16, 8000)).filter(lambda size: 0.25 <= size[0] / size[1] <= 4)


@given(sizes, entries(), st.sampled_from([SANA, CASCADE]), st.text(max_size=8))
def test_every_cut_lies_in_the_resized_picture_and_is_aligned(original, entry, latent, key):
    place = fit(original, entry, latent, key)
    for resized, corner, target in zip(place.resized_WH, place.corner_XY, place.target_WH, strict=True):
        assert 0 <= corner <= corner + target <= resized
        assert target % latent.alignment_px == 0
        assert target > 0


@given(sizes, entries(), st.sampled_from([SANA, CASCADE]), st.text(max_size=8))
def test_where_sizes_are_named_every_picture_gets_one_of_them_at_the_grid(original, entry, latent, key):
    place = fit(original, entry, latent, key)
    named = asked_sizes(entry, latent)
    assert set(named) == set(entry.bucket_resolutions or ([entry.resolution] if isinstance(entry.resolution, tuple) else []))
    assert not named or place.target_WH in named.values()
    for size, taken in named.items():
        assert all(
            abs(edge - max(asked, latent.alignment_px)) <= latent.alignment_px / 2
            for asked, edge in zip(size, taken, strict=True)
        )


@given(sizes, entries())
def test_a_picture_keeps_its_shape_to_within_a_pixel(original, entry):
    place = fit(original, entry, SANA, "cats/a.jpg")
    (width, height), (columns, rows) = place.original_WH, place.resized_WH
    # A common scale must exist for which both edges are rounded by at most half a pixel.
    assert max((columns - 0.5) / width, (rows - 0.5) / height) <= min((columns + 0.5) / width, (rows + 0.5) / height) + 1e-9


@given(sizes, entries())
def test_without_crop_only_the_shape_that_alignment_asks_is_trimmed(original, entry):
    place = fit(original, entry.model_copy(update={"crop": False}), SANA, "cats/a.jpg")
    spare_x, spare_y = (resized - target for resized, target in zip(place.resized_WH, place.target_WH, strict=True))
    assert min(spare_x, spare_y) == 0, "the picture only just covers its bucket"
    assert place.corner_XY == (spare_x // 2, spare_y // 2)


@given(sizes, st.integers(64, 2048))
def test_a_bucket_is_the_aligned_root_of_area_times_aspect(original, edge):
    aspect = original[0] / original[1]
    for got, exact in zip(bucket(*original, resolution=edge), (edge * aspect**0.5, edge / aspect**0.5), strict=True):
        assert abs(got - max(exact, 64)) <= 32 + 1e-6


@given(sizes, entries(), st.text(max_size=20))
def test_the_same_file_lands_at_the_same_place(original, entry, key):
    assert fit(original, entry, SANA, key) == fit(original, entry, SANA, key)


@given(st.lists(sizes, min_size=1, max_size=4), entries(), st.lists(st.text(max_size=4), min_size=1, max_size=4))
def test_a_fitter_answers_for_every_file_as_fit_does_although_it_remembers_sizes(originals, entry, keys):
    fitter = Fitter(entry, SANA)
    for original in originals * 2:
        for key in keys:
            place = fit(original, entry, SANA, key)
            assert fitter.fit(original, key) == place
            sized = fitter.sized(original, key)
            assert (sized.resized_WH, sized.target_WH) == (place.resized_WH, place.target_WH)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"resolution": 1024}, (1152, 896)),
        ({"resolution": 1.048576, "resolution_type": "area"}, (1152, 896)),
        ({"resolution": 1024, "resolution_type": "pixel"}, (1344, 1024)),
        ({"resolution": 512}, (576, 448)),
        ({}, (1152, 896)),
        ({"resolution": (1000, 600)}, (1024, 576)),
        ({"crop": True, "resolution": 512}, (512, 512)),
        ({"crop": True, "resolution": 512, "resolution_type": "pixel"}, (512, 512)),
        ({"crop": True, "crop_aspect": "preserve"}, (1152, 896)),
        ({"crop": True, "crop_aspect": "closest", "crop_aspect_buckets": (0.5, 1.4, 2.0)}, (1216, 896)),
        ({"resolution": 20}, (64, 64)),
    ],
)
def test_each_kind_of_resolution_has_its_bucket(keys, expected):
    assert bucket(2000, 1540, **keys) == expected


def test_pixel_resolution_is_the_shorter_edge_of_a_portrait_too():
    assert bucket(1540, 2000, resolution=1024, resolution_type="pixel") == (1024, 1344)


def test_an_unset_resolution_is_the_native_edge_in_every_unit():
    for unit in ("pixel", "area", "pixel_area"):
        assert bucket(1000, 1000, resolution_type=unit) == (1024, 1024)


def test_cascade_buckets_are_multiples_of_128():
    assert placed(2000, 1540, latent=CASCADE).target_WH == (1152, 896)
    assert placed(2000, 1000, latent=CASCADE).target_WH == (1408, 768)


def test_a_half_rounds_up_on_every_machine():
    assert bucket(1000, 1000, resolution=96) == (128, 128)


def test_random_aspects_belong_to_the_file_and_all_occur():
    keys = {"crop": True, "crop_aspect": "random", "crop_aspect_buckets": (0.5, 1.0, 2.0)}
    drawn = [placed(900, 900, key=f"cats/{n}.jpg", **keys).target_WH for n in range(60)]
    assert set(drawn) == {(704, 1472), (1024, 1024), (1472, 704)}


def test_random_aspects_occur_by_their_weights():
    keys = {"crop": True, "crop_aspect": "random", "crop_aspect_buckets": {1.0: 3, 0.5: 1}}
    drawn = [placed(900, 900, key=f"cats/{n}.jpg", **keys).target_WH for n in range(400)]
    assert set(drawn) == {(704, 1472), (1024, 1024)}
    assert 260 < drawn.count((1024, 1024)) < 340


CASCADE_PAGE = {
    "resolution": (1024, 1024),
    "bucket_resolutions": [(1024, 1024), (896, 1152), (1152, 896)],
    "crop": True,
    "crop_style": "random",
    "minimum_image_size": 768,
    "maximum_image_size": 1536,
    "target_downsample_size": 1024,
}


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1000, 1000), (1024, 1024)), ((900, 1400), (896, 1152)), ((3000, 1000), (1152, 896)), ((1100, 1000), (1024, 1024))],
)
def test_of_named_sizes_the_one_of_the_nearest_aspect_is_taken_whatever_the_resolution(size, expected):
    assert placed(*size, latent=CASCADE, **CASCADE_PAGE).target_WH == expected


def test_the_cascade_page_reduces_large_pictures_before_it_cuts_them_and_still_covers():
    place = placed(4000, 3200, latent=CASCADE, **CASCADE_PAGE)
    assert place.target_WH == (1152, 896)
    assert place.resized_WH == (1152, 922)
    assert placed(1500, 1500, latent=CASCADE, **CASCADE_PAGE).resized_WH == (1500, 1500)


def test_a_cut_to_a_written_aspect_goes_to_the_named_size_nearest_to_that():
    sizes = {"bucket_resolutions": [(1024, 1024), (768, 1280), (1280, 768)], "crop": True}
    assert bucket(900, 1500, **sizes) == (768, 1280)
    assert bucket(900, 1500, crop_aspect="preserve", **sizes) == (768, 1280)
    assert bucket(900, 1500, crop_aspect="square", **sizes) == (1024, 1024)
    assert bucket(900, 1500, crop_aspect="closest", crop_aspect_buckets=(1.0, 1.6), **sizes) == (1024, 1024)


def test_without_crop_named_sizes_are_cut_from_the_middle():
    place = placed(900, 1500, bucket_resolutions=[(1024, 1024), (768, 1280)], crop_style="corner")
    assert place == Place((900, 1500), (768, 1280), (0, 0), (768, 1280))
    assert placed(1000, 1500, bucket_resolutions=[(512, 512)]).corner_XY == (0, 128)


@pytest.mark.parametrize(("edge", "expected"), [(2000, 1024), (1024, 1024), (1000, 512), (300, 256)])
def test_of_named_sizes_of_one_aspect_the_largest_that_needs_no_enlarging_is_taken(edge, expected):
    assert bucket(edge, edge, bucket_resolutions=[(256, 256), (1024, 1024), (512, 512), (512, 1024)])[0] == expected


def test_random_crops_differ_between_files_and_reach_both_ends():
    keys = {"crop": True, "crop_style": "random", "resolution": 64}
    corners = {placed(72, 64, key=f"cats/{n}.jpg", **keys).corner_XY for n in range(200)}
    assert corners == {(x, 0) for x in range(9)}


def test_random_crops_are_not_bound_to_the_diagonal():
    keys = {"crop": True, "crop_style": "random", "resolution": 64, "maximum_image_size": 66, "target_downsample_size": 66}
    corners = {placed(660, 660, key=f"cats/{n}.jpg", **keys).corner_XY for n in range(200)}
    assert corners == {(x, y) for x in range(3) for y in range(3)}


def test_center_and_corner_crops():
    assert placed(200, 100, crop=True, crop_style="center", resolution=64).corner_XY == (32, 0)
    assert placed(200, 100, crop=True, crop_style="corner", resolution=64).corner_XY == (0, 0)


def test_a_crop_without_the_maximum_loses_only_what_the_shape_asks():
    assert placed(4000, 3000, crop=True, resolution=1024).resized_WH == (1365, 1024)


PAIR = {"crop": True, "resolution": 1024, "maximum_image_size": 1536, "target_downsample_size": 1280}


def test_a_picture_over_the_maximum_is_reduced_to_the_target():
    place = placed(4000, 3000, **PAIR)
    assert math.sqrt(math.prod(place.resized_WH)) == pytest.approx(1280, abs=1)
    assert place.target_WH == (1024, 1024)


def test_a_picture_within_the_maximum_is_cut_at_its_own_scale():
    assert placed(1500, 1400, **PAIR).resized_WH == (1500, 1400)


def test_the_target_never_goes_below_what_covers_the_bucket():
    assert placed(4000, 2000, **(PAIR | {"target_downsample_size": 600})).resized_WH == (2048, 1024)
    assert placed(900, 800, **PAIR).resized_WH == (1152, 1024)


def test_the_maximum_counts_in_its_own_unit():
    pixel = {
        "crop": True,
        "resolution": 512,
        "resolution_type": "pixel",
        "maximum_image_size": 600,
        "target_downsample_size": 550,
    }
    assert placed(2000, 600, **pixel).resized_WH == (2000, 600)
    assert placed(2000, 1000, **pixel).resized_WH == (1100, 550)
    area = {
        "crop": True,
        "resolution": 0.25,
        "resolution_type": "area",
        "maximum_image_size": 1.0,
        "target_downsample_size": 0.64,
    }
    assert placed(1000, 1000, **area).resized_WH == (1000, 1000)
    assert placed(1001, 1001, **area).resized_WH == (800, 800)


def test_a_target_above_the_maximum_enlarges_nothing():
    keys = {"crop": True, "resolution": 256, "maximum_image_size": 500, "target_downsample_size": 2000}
    assert placed(600, 600, **keys).resized_WH == (600, 600)


@pytest.mark.parametrize(
    ("size", "keys", "reason"),
    [
        ((500, 15), {}, "too small"),
        ((500, 99), {"minimum_edge_px": 100, "maximum_aspect_ratio": 9}, "too small"),
        ((511, 512), {"minimum_image_size": 512}, "below minimum_image_size"),
        ((2000, 511), {"minimum_image_size": 512, "resolution_type": "pixel"}, "below minimum_image_size"),
        ((700, 700), {"minimum_image_size": 0.5, "resolution_type": "area"}, "below minimum_image_size"),
        ((100, 401), {}, "too narrow"),
        ((401, 100), {}, "too wide"),
        ((300, 200), {"maximum_aspect_ratio": 1.2}, "too wide"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(size, keys, reason):
    misfit = refused(*size, **keys)
    assert misfit.reason == reason
    assert f"{size[0]}x{size[1]}" in misfit.detail


@pytest.mark.parametrize(
    ("size", "keys"),
    [
        ((512, 512), {"minimum_image_size": 512}),
        ((1024, 256), {"minimum_image_size": 512}),
        ((2000, 512), {"minimum_image_size": 512, "resolution_type": "pixel"}),
        ((64, 16), {}),
        ((16, 64), {"minimum_image_size": 0}),
        ((30, 8), {"minimum_edge_px": 8}),
        ((500, 100), {"maximum_aspect_ratio": 5}),
    ],
)
def test_what_only_just_fits_is_used(size, keys):
    assert placed(*size, **keys).original_WH == size


def test_the_quickstarts_square_crop_takes_a_picture_smaller_than_its_maximum():
    place = placed(
        900, 1100, crop=True, crop_style="center", resolution=1024, maximum_image_size=1024, target_downsample_size=1024
    )
    assert place == Place((900, 1100), (1024, 1252), (0, 114), (1024, 1024))


def test_enlargement_counts_edges():
    assert enlargement(placed(256, 256)) == 4
    assert enlargement(placed(2048, 2048)) == 0.5
