"""Latents: made once, only what changed is made again, bad pictures are left out, and a kill costs nothing finished."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from simpletuner.config.datasets import ImageDataset
from simpletuner.data import precompute
from simpletuner.data.index import ImageSet, Remembered, open_dataset
from simpletuner.data.pixels import Unreadable, read_pixels
from simpletuner.data.precompute import LatentStore, fill_latents
from simpletuner.data.ranks import Alone
from simpletuner.data.samples import LatentSpec, Place, Recipe
from simpletuner.errors import DataError, RunError
from simpletuner.events import Event, Notice, Progress

Encode = Callable[[Tensor, Sequence[str]], Tensor]

WIDE, TALL = (64, 32), (32, 64)
SPEC = LatentSpec(channels=4, cell_px=8, alignment_px=32, native_edge_px=64)


class Convolution:
    """An image encoder whose last bits depend on the batch, as a real one's do on a CPU."""

    def __init__(self, weights: int = 0, gain: float = 1.0) -> None:
        self.recipe = Recipe("conv", {"weights": weights})
        self.sizes: list[tuple[int, ...]] = []
        self.keys: list[str] = []
        self.gain = gain

    @contextmanager
    def lent(self, device: str) -> Iterator[Encode]:
        kernel = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(self.recipe.facts["weights"])) / 7

        def encode(pixels_BCHW: Tensor, keys: Sequence[str]) -> Tensor:
            self.keys += keys
            self.sizes.append(tuple(pixels_BCHW.shape))
            return torch.nn.functional.conv2d(pixels_BCHW, kernel, stride=8) * self.gain * (1 + len(pixels_BCHW) * 1e-3)

        yield encode

    @property
    def encoded(self) -> int:
        return sum(size[0] for size in self.sizes)


def picture(seed: int, size: tuple[int, int] = WIDE) -> bytes:
    pixels_HWC = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "PNG")
    return file.getvalue()


class Pictures:
    """A set in memory, with what a manifest would remember of it."""

    in_flight = 1

    def __init__(self, cache_dir: Path, raw: Sequence[bytes], *, sizes: Sequence[tuple[int, int]] = (), batch: int = 3) -> None:
        self.cache_dir, self.raw = cache_dir, list(raw)
        self.sizes = list(sizes) or [WIDE] * len(raw)
        self.entry = ImageDataset(id="cats", instance_data_dir="x", vae_batch_size=batch, write_batch_size=4)
        self.bucket_ids: NDArray[np.int32] = np.array([size == TALL for size in self.sizes], np.int32)
        self.corners = [(0, 0)] * len(raw)
        self.memory: dict[int, Remembered] = {}
        self.current: set[int] = set()
        self.excluded: dict[int, tuple[str, str]] = {}
        self.reads = self.saves = 0

    def __len__(self) -> int:
        return len(self.raw)

    def file(self, sample: int) -> str:
        return f"{sample}.png"

    def read(self, sample: int) -> bytes:
        self.reads += 1
        return self.raw[sample]

    def place(self, sample: int) -> Place:
        return Place(self.sizes[sample], (72, 72), self.corners[sample], self.sizes[sample])

    def alive(self) -> NDArray[np.int64]:
        return np.array([sample for sample in range(len(self)) if sample not in self.excluded], np.int64)

    def remembered(self, sample: int) -> Remembered | None:
        return self.memory.get(sample) if sample in self.current else None

    def previous(self, sample: int) -> Remembered | None:
        return self.memory.get(sample)

    def remember(self, sample: int, digest: bytes, latent_key: str, recipe: str) -> None:
        self.memory[sample] = Remembered(digest, latent_key, recipe)
        self.current.add(sample)

    def exclude(self, sample: int, reason: str, detail: str = "") -> None:
        self.excluded[sample] = (reason, detail)

    def check_usable(self) -> None:
        if not len(self.alive()):
            raise DataError("no images detected in dataset cats")

    def save(self) -> None:
        self.saves += 1

    def replace(self, sample: int, raw: bytes) -> None:
        self.raw[sample] = raw
        self.current.discard(sample)


def fill(
    images: Pictures | ImageSet, encoder: Convolution, *, dtype: str = "float32", ranks: Any = None
) -> tuple[LatentStore, list[Event]]:
    told: list[Event] = []
    stores = fill_latents(
        [images],  # type: ignore[list-item]
        encoder,
        dtype=dtype,
        device="cpu",
        ranks=ranks or Alone(),
        tell=told.append,
    )
    return stores[0], told


def notices(told: list[Event]) -> list[str]:
    return [event.text for event in told if isinstance(event, Notice)]


def everything(store: LatentStore, images: Pictures | ImageSet) -> dict[int, Tensor]:
    return {sample: store.get(sample) for sample in images.alive().tolist()}


def same(left: dict[int, Tensor], right: dict[int, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[sample], right[sample]) for sample in left)


@pytest.fixture
def ten(tmp_path: Path) -> Pictures:
    """Ten pictures in two buckets, by threes."""
    sizes = [TALL if n % 3 == 0 else WIDE for n in range(10)]
    return Pictures(tmp_path / "cache", [picture(n, size) for n, size in enumerate(sizes)], sizes=sizes)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_each_sample_gets_the_latents_of_its_own_pixels_in_the_dtype_asked_for(ten: Pictures, dtype: str) -> None:
    store, _ = fill(ten, Convolution(), dtype=dtype)
    with Convolution().lent("cpu") as encode:
        for sample, latents_CHW in everything(store, ten).items():
            alone_CHW = encode(read_pixels(ten.raw[sample], ten.place(sample))[None], [""])[0]
            assert latents_CHW.dtype == getattr(torch, dtype)
            assert latents_CHW.shape == alone_CHW.shape
            torch.testing.assert_close(latents_CHW.float(), alone_CHW, rtol=5e-3, atol=2e-3)


def test_the_encoder_is_told_the_key_under_which_each_picture_is_kept(ten: Pictures) -> None:
    encoder = Convolution()
    store, _ = fill(ten, encoder)
    assert sorted(encoder.keys) == sorted(key.decode() for key in store.keys)


def test_batches_are_of_one_bucket_in_the_order_of_the_samples(ten: Pictures) -> None:
    encoder = Convolution()
    fill(ten, encoder)
    wide, tall = (3, 32, 64), (3, 64, 32)
    assert encoder.sizes == [(3, *wide), (3, *wide), (3, *tall), (1, *tall)]


def test_nothing_is_read_and_nothing_encoded_where_nothing_is_missing(ten: Pictures) -> None:
    first, _ = fill(ten, Convolution())
    ten.reads = 0
    encoder = Convolution()
    store, told = fill(ten, encoder)
    assert (encoder.sizes, ten.reads) == ([], 0)
    assert told == [Notice("cats: 10 reused")]
    assert same(everything(store, ten), everything(first, ten))


def test_a_new_set_says_so_and_tells_progress_to_its_end(ten: Pictures) -> None:
    _, told = fill(ten, Convolution())
    progress = [(event.done, event.total) for event in told if isinstance(event, Progress)]
    assert progress == [(0, 10), (3, 10), (6, 10), (9, 10), (10, 10)]
    assert notices(told) == ["cats: 0 reused, 10 encoded (new)"]
    assert ten.saves == 1


def test_a_moved_crop_encodes_just_the_pictures_whose_box_moved(ten: Pictures) -> None:
    before, _ = fill(ten, Convolution())
    ten.corners[1] = ten.corners[8] = (4, 4)
    encoder = Convolution()
    after, told = fill(ten, encoder)
    assert [size[0] for size in encoder.sizes] == [1, 1], "each in the batch that it was first encoded with"
    assert notices(told) == ["cats: 8 reused, 2 encoded (crop changed)"]
    changed = {s for s in range(10) if not torch.equal(before.get(s), after.get(s))}
    assert changed == {1, 8}


def test_other_sizes_encode_just_the_pictures_that_go_to_them(tmp_path: Path) -> None:
    root = tmp_path / "cats"
    root.mkdir()
    for n, size in enumerate([(64, 64), (70, 70), (96, 64), (100, 64), (64, 96), (60, 90)]):
        (root / f"{n}.png").write_bytes(picture(n, size))

    def told(**keys: Any) -> list[str]:
        entry = ImageDataset(id="cats", instance_data_dir=str(root), cache_dir_vae=str(tmp_path / "cache"), **keys)
        return notices(fill(open_dataset(entry, SPEC, tell=lambda _: None), Convolution())[1])

    assert told(bucket_resolutions=[(64, 64), (96, 64)]) == ["cats: 0 reused, 6 encoded (new)"]
    assert told(bucket_resolutions=[(64, 64), (96, 64), (64, 96)]) == ["cats: 4 reused, 2 encoded (crop changed)"]
    assert told(bucket_resolutions=[(96, 64), (64, 64)]) == ["cats: 6 reused"]
    assert told(bucket_resolutions=[(64, 64), (96, 64)], crop=True, crop_aspect="square") == [
        "cats: 2 reused, 4 encoded (crop changed)"
    ]


@pytest.mark.parametrize("most", [1, 6])
def test_no_more_pictures_are_read_ahead_than_asked_for(ten: Pictures, most: int) -> None:
    ten.entry = ten.entry.model_copy(update={"read_batch_size": most})
    ahead = []

    class Watching(Convolution):
        @contextmanager
        def lent(self, device: str) -> Iterator[Encode]:
            with super().lent(device) as encode:

                def watched(pixels_BCHW: Tensor, keys: Sequence[str]) -> Tensor:
                    time.sleep(0.05)  # whoever reads ahead has time to
                    ahead.append(ten.reads - self.encoded)
                    return encode(pixels_BCHW, keys)

                yield watched

    fill(ten, Watching())
    ahead_of_the_first = ahead[0] - 3  # the encoder takes three at once
    assert ahead_of_the_first <= max(most, 3), "the next three in any case"
    assert ahead_of_the_first > 3 or most == 1


def test_a_crop_moved_back_finds_its_old_latents(ten: Pictures) -> None:
    fill(ten, Convolution())
    ten.corners[1] = (4, 4)
    fill(ten, Convolution())
    ten.corners[1] = (0, 0)
    encoder = Convolution()
    _, told = fill(ten, encoder)
    assert encoder.sizes == []
    assert notices(told) == ["cats: 10 reused"]
    ten.corners[1] = (4, 4)
    assert notices(fill(ten, Convolution())[1]) == ["cats: 10 reused"]


def test_a_replaced_picture_and_a_new_one_are_encoded_each_with_its_reason(ten: Pictures) -> None:
    fill(ten, Convolution())
    for sample in (1, 2, 5):
        ten.replace(sample, picture(100 + sample))
    ten.replace(4, picture(104))
    del ten.memory[4]
    encoder = Convolution()
    _, told = fill(ten, encoder)
    assert encoder.encoded == 4
    assert notices(told) == ["cats: 6 reused, 4 encoded (3 picture changed, 1 new)"]


def test_a_touched_file_with_the_same_bytes_is_read_but_not_encoded(ten: Pictures) -> None:
    fill(ten, Convolution())
    ten.reads = 0
    ten.replace(3, ten.raw[3])
    encoder = Convolution()
    _, told = fill(ten, encoder)
    assert (encoder.sizes, ten.reads) == ([], 1)
    assert notices(told) == ["cats: 10 reused"]
    assert ten.remembered(3) is not None


def test_another_encoder_makes_everything_again_and_the_first_ones_work_is_kept(ten: Pictures) -> None:
    fill(ten, Convolution(weights=0))
    _, told = fill(ten, Convolution(weights=1))
    assert notices(told) == ["cats: 0 reused, 10 encoded (encoder changed)"]
    assert notices(fill(ten, Convolution(weights=0))[1]) == ["cats: 10 reused"]


def test_the_reason_told_is_what_changed_since_the_last_run_even_if_that_encoded_nothing(ten: Pictures) -> None:
    for weights in (0, 1, 0):
        fill(ten, Convolution(weights=weights))
    ten.corners[1] = (4, 4)
    assert notices(fill(ten, Convolution(weights=0))[1]) == ["cats: 9 reused, 1 encoded (crop changed)"]


def test_another_stored_dtype_is_another_cache(ten: Pictures) -> None:
    fill(ten, Convolution(), dtype="float16")
    store, _ = fill(ten, Convolution(), dtype="float32")
    assert store.get(0).dtype == torch.float32


def test_what_was_read_is_kept_now_and_then_while_encoding_goes_on(ten: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(ten, Convolution())
    assert ten.saves == 1
    monkeypatch.setattr(precompute, "SAVE_EVERY_S", 0.0)
    fill(ten, Convolution(weights=1))
    assert ten.saves > 2


def test_a_damaged_shard_is_made_again_and_told(ten: Pictures) -> None:
    before = everything(fill(ten, Convolution())[0], ten)
    victim = min(ten.cache_dir.glob("*/shard-*"))
    victim.write_bytes(victim.read_bytes()[:-1])
    store, told = fill(ten, Convolution())
    assert "set aside" in notices(told)[0]
    assert "not in the cache" in notices(told)[1]
    assert same(everything(store, ten), before)


def test_bad_pictures_are_left_out_with_their_reasons_and_the_rest_goes_on(ten: Pictures) -> None:
    ten.raw[2] = b"no picture at all"
    ten.raw[6] = ten.raw[6][:200]
    store, told = fill(ten, Convolution())
    assert {sample: reason for sample, (reason, _) in ten.excluded.items()} == {2: "not a picture", 6: "damaged"}
    assert ten.alive().tolist() == [0, 1, 3, 4, 5, 7, 8, 9]
    assert all(store.get(sample).isfinite().all() for sample in ten.alive().tolist())
    assert notices(told) == [
        "cats: 2 left out: 2.png (not a picture), 6.png (damaged)",
        "cats: 0 reused, 8 encoded (new)",
    ]


def test_a_file_that_cannot_be_opened_is_left_out(ten: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    read = ten.read

    def refuses(sample: int) -> bytes:
        if sample == 5:
            raise Unreadable("cannot open", "Permission denied")
        return read(sample)

    monkeypatch.setattr(ten, "read", refuses)
    fill(ten, Convolution())
    assert ten.excluded == {5: ("cannot open", "Permission denied")}


def test_a_set_that_loses_all_its_pictures_is_an_error_after_it_is_remembered_why(ten: Pictures) -> None:
    ten.raw = [b"nothing"] * 10
    with pytest.raises(DataError, match="no images detected in dataset cats"):
        fill(ten, Convolution())
    assert len(ten.excluded) == 10
    assert ten.saves == 1


def test_identical_pictures_are_encoded_once(ten: Pictures) -> None:
    ten.raw[4] = ten.raw[1]
    ten.raw[8] = ten.raw[1]
    encoder = Convolution()
    store, told = fill(ten, encoder)
    assert encoder.encoded == 8
    assert torch.equal(store.get(8), store.get(1))
    assert notices(told) == ["cats: 2 reused, 8 encoded (new)"]


def test_latents_that_are_not_finite_stop_the_run_with_the_files_name(ten: Pictures) -> None:
    with pytest.raises(RunError, match=r"cats/1\.png are not finite"):
        fill(ten, Convolution(gain=1e6), dtype="float16")


def test_what_was_encoded_before_an_error_is_kept(ten: Pictures) -> None:
    class Stumbles(Convolution):
        @contextmanager
        def lent(self, device: str) -> Iterator[Encode]:
            with super().lent(device) as encode:
                yield lambda pixels, keys: encode(pixels, keys) if len(self.sizes) < 2 else 1 / 0  # type: ignore[return-value]

    with pytest.raises(ZeroDivisionError):
        fill(ten, Stumbles())
    ten.memory.clear()
    ten.current.clear()
    encoder = Convolution()
    _, told = fill(ten, encoder)
    assert encoder.encoded == 4
    assert notices(told) == ["cats: 6 reused, 4 encoded (new)"]


@pytest.mark.parametrize(
    ("gain", "count", "is_told"), [(1.0, 70, False), (0.05, 70, True), (50.0, 70, True), (0.05, 20, False)]
)
def test_a_spread_far_from_one_is_told_when_there_are_pictures_enough(
    tmp_path: Path, gain: float, count: int, is_told: bool
) -> None:
    images = Pictures(tmp_path, [picture(n) for n in range(count)], batch=8)
    _, told = fill(images, Convolution(gain=gain))
    warnings = [event for event in told if isinstance(event, Notice) and event.level == "warning"]
    assert bool(warnings) == is_told
    assert all("standard deviation" in warning.text for warning in warnings)


def test_only_a_few_pictures_wait_in_memory(ten: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompute, "_cores", lambda: 1)
    ahead = []

    class Watches(Convolution):
        @contextmanager
        def lent(self, device: str) -> Iterator[Encode]:
            with super().lent(device) as encode:

                def slowly(pixels_BCHW: Tensor, keys: Sequence[str]) -> Tensor:
                    time.sleep(0.05)
                    ahead.append(ten.reads - self.encoded)
                    return encode(pixels_BCHW, keys)

                yield slowly

    fill(ten, Watches())
    assert 3 < max(ahead) <= 6, "the next batch is read meanwhile, and no more"


def test_a_slow_store_has_many_reads_under_way_whatever_the_cores(ten: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompute, "_cores", lambda: 1)
    ten.in_flight, read, meeting = 5, ten.read, threading.Barrier(5)

    def together(sample: int) -> bytes:
        meeting.wait(timeout=10)  # opens when five wait for it: ten reads meet twice
        return read(sample)

    monkeypatch.setattr(ten, "read", together)
    store, _ = fill(ten, Convolution())
    assert len(everything(store, ten)) == 10


class TwoRanks:
    """Two threads that meet as two processes would: what they tell each other survives JSON."""

    ranks = 2

    def __init__(self, rank: int, meeting: threading.Barrier, table: list[str]) -> None:
        self.rank, self._meeting, self._table = rank, meeting, table

    def barrier(self) -> None:
        self._meeting.wait()

    def gather(self, value: Any) -> list[Any]:
        self._table[self.rank] = json.dumps(value)
        self.barrier()
        told = [json.loads(text) for text in self._table]
        self.barrier()
        return told


def test_two_ranks_share_the_work_and_agree_on_everything(tmp_path: Path) -> None:
    raw = [*(picture(n) for n in range(9)), b"bad", picture(10), b"bad too"]
    expected_images = Pictures(tmp_path / "alone", raw)
    expected = everything(fill(expected_images, Convolution())[0], expected_images)
    meeting, table = threading.Barrier(2, timeout=20), ["", ""]
    images = [Pictures(tmp_path / "shared", raw) for _ in range(2)]
    encoders = [Convolution(), Convolution()]
    found: list[Any] = [None, None]

    def run(rank: int) -> None:
        found[rank] = fill(images[rank], encoders[rank], ranks=TwoRanks(rank, meeting, table))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [encoder.encoded for encoder in encoders] == [6, 4]
    assert images[0].excluded == images[1].excluded
    assert set(images[0].excluded) == {9, 11}
    assert images[0].memory == images[1].memory == expected_images.memory
    assert [one.saves for one in images] == [1, 0]
    for rank in range(2):
        assert same(everything(found[rank][0], images[rank]), expected)
        assert notices(found[rank][1])[-1] == "cats: 0 reused, 10 encoded (new)"


# With real folders


def real_set(folder: Path, cache: Path, count: int = 0, **options: Any) -> ImageSet:
    folder.mkdir(exist_ok=True)
    for n in range(count):
        (folder / f"a picture {n}.png").write_bytes(picture(n, (80 + 8 * (n % 3), 72)))
    values = {"id": "cats", "resolution": 64, "crop": True, "crop_style": "center", "vae_batch_size": 3, "write_batch_size": 3}
    entry = ImageDataset(instance_data_dir=str(folder), cache_dir_vae=str(cache), **{**values, **options})
    return open_dataset(entry, SPEC, tell=lambda event: None)


def test_a_real_folder_is_encoded_once_and_a_changed_crop_just_where_it_bites(tmp_path: Path) -> None:
    images = real_set(tmp_path / "pictures", tmp_path / "cache", 7)
    store, told = fill(images, Convolution())
    assert notices(told) == ["cats: 0 reused, 7 encoded (new)"]
    assert store.get(0).shape == (4, 8, 8)

    encoder = Convolution()
    _, told = fill(real_set(tmp_path / "pictures", tmp_path / "cache"), encoder)
    assert (notices(told), encoder.sizes) == (["cats: 7 reused"], [])

    _, told = fill(real_set(tmp_path / "pictures", tmp_path / "cache", crop_style="corner"), encoder)
    assert notices(told) == ["cats: 0 reused, 7 encoded (crop changed)"]

    (tmp_path / "pictures" / "a picture 3.png").write_bytes(picture(33, (80, 72)))
    (tmp_path / "pictures" / "b new one.png").write_bytes(picture(34, (80, 72)))
    images = real_set(tmp_path / "pictures", tmp_path / "cache", crop_style="corner")
    _, told = fill(images, Convolution())
    assert notices(told) == ["cats: 6 reused, 2 encoded (1 picture changed, 1 new)"]


def test_a_bad_real_picture_is_in_the_ledger_and_not_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    images = real_set(folder, tmp_path / "cache", 4)
    raw = (folder / "a picture 2.png").read_bytes()
    (folder / "a picture 2.png").write_bytes(raw[:-300])
    images = real_set(folder, tmp_path / "cache")
    assert len(images.alive()) == 4, "its header is fine"
    _, told = fill(images, Convolution())
    assert [exclusion.file for exclusion in images.ledger.excluded] == ["a picture 2.png"]
    assert images.ledger.used == 3
    assert notices(told)[-1] == "cats: 0 reused, 3 encoded (new)"
    assert len(real_set(folder, tmp_path / "cache")) == 3


def test_two_sets_share_a_folder_and_keep_their_own_caches(tmp_path: Path) -> None:
    sets = [
        real_set(tmp_path / "pictures", tmp_path / "one", 4),
        real_set(tmp_path / "pictures", tmp_path / "two", id="large", resolution=128),
    ]
    small, large = fill_latents(sets, Convolution(), dtype="float32", device="cpu", ranks=Alone(), tell=lambda event: None)
    assert small.get(3).shape == (4, 8, 8)
    assert large.get(3).shape == (4, 16, 16)


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_precompute import Convolution, real_set, fill

class Slow(Convolution):
    def lent(self, device):
        from contextlib import contextmanager
        @contextmanager
        def lent():
            with Convolution.lent(self, device) as encode:
                yield lambda pixels, keys: (time.sleep(0.15), encode(pixels, keys))[1]
        return lent()

fill(real_set(Path(sys.argv[1]), Path(sys.argv[2])), Slow())
"""


def test_a_cache_finished_after_a_kill_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    folder, cache = tmp_path / "pictures", tmp_path / "cache"
    real_set(folder, tmp_path / "unbroken", 32)
    bad = folder / "a picture 1.png"
    bad.write_bytes(bad.read_bytes()[:-300])
    expected_images = real_set(folder, tmp_path / "unbroken")
    expected = everything(fill(expected_images, Convolution())[0], expected_images)

    command = [sys.executable, "-c", KILLED, str(folder), str(cache), str(Path(__file__).parent)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    deadline_s = time.monotonic() + 60
    while len(list(cache.glob("*/shard-*.safetensors"))) < 3:
        assert process.poll() is None, "it was killed too late to tell anything"
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()

    encoder = Convolution()
    images = real_set(folder, cache)
    store, told = fill(images, encoder)
    assert 0 < encoder.encoded <= 31 - 8, "what was finished survives"
    assert notices(told)[-1] == f"cats: {31 - encoder.encoded} reused, {encoder.encoded} encoded (new)"
    assert same(everything(store, images), expected)
    assert not list(cache.glob("*/.*.tmp"))


def test_what_is_made_besides_the_latents_does_not_disturb_what_is_known_of_them(ten: Pictures) -> None:
    fill(ten, Convolution())
    known, encoder = dict(ten.memory), Convolution(weights=5)
    told: list[Event] = []
    for _ in range(2):
        [store] = fill_latents(
            [ten],  # type: ignore[list-item]
            encoder,
            dtype="float32",
            device="cpu",
            ranks=Alone(),
            tell=told.append,
            part="embeds",
        )
    assert ten.memory == known
    assert encoder.encoded == 10
    assert store.get(3).isfinite().all()
    assert notices(told) == ["cats (embeds): 0 reused, 10 encoded (not in the cache)", "cats (embeds): 10 reused"]
    assert notices(fill(ten, Convolution())[1]) == ["cats: 10 reused"]
