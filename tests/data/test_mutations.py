"""Every input of a cache, changed alone: just what it concerns is encoded again, and nothing where it concerns nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from simpletuner.config.datasets import ImageDataset
from simpletuner.data import encoding
from simpletuner.data.index import open_dataset
from simpletuner.data.precompute import fill_latents
from simpletuner.data.prompts import PromptStore, training_prompts
from simpletuner.data.ranks import Alone
from simpletuner.data.samples import Embeds, LatentSpec, Prompt, Recipe
from simpletuner.events import Event, Notice

SPEC = LatentSpec(channels=4, cell_px=8, alignment_px=32, native_edge_px=64)
SIZES = {"a_square": (64, 64), "a_wide_one": (96, 64), "a_tall_one": (64, 96)}


@dataclass
class Encoders:
    """What a run encodes with, and what was encoded."""

    image: Recipe = field(default_factory=lambda: Recipe("vae", {"weights": "one", "dtype": "float32"}))
    text: Recipe = field(default_factory=lambda: Recipe("t5", {"weights": "one", "tokens": 154}))
    pictures: int = 0
    prompts: list[str] = field(default_factory=list)


@dataclass
class Case:
    """A run before it starts: what it is given, to be changed."""

    folder: Path
    keys: dict[str, Any]
    spec: LatentSpec = SPEC
    dtype: str = "float32"
    encoders: Encoders = field(default_factory=Encoders)

    def cached(self) -> tuple[int, list[str], str]:
        """How many pictures were encoded, which prompts, and the verdict on the pictures."""
        encoders, told = Encoders(self.encoders.image, self.encoders.text), []
        entry = ImageDataset(
            id="cats", instance_data_dir=str(self.folder / "cats"), cache_dir_vae=str(self.folder / "vae"), vae_batch_size=1,
            **self.keys,
        )  # fmt: skip

        def tell(event: Event) -> None:
            if isinstance(event, Notice):
                told.append(event.text)

        images = open_dataset(entry, self.spec, tell=tell)
        fill_latents([images], Pictures(encoders), dtype=self.dtype, device="cpu", ranks=Alone(), tell=tell)
        store = PromptStore(self.folder / "text", [encoders.text], write_batch_size=4, text_encoder_batch_size=1)
        store.fill(Texts(encoders), training_prompts([images]), device="cpu", ranks=Alone(), tell=tell)
        [verdict] = [text for text in told if text.startswith("cats:")]
        return encoders.pictures, sorted(encoders.prompts), verdict


@dataclass
class Pictures:
    """A stand-in that notes what it encodes."""

    encoders: Encoders

    @property
    def recipe(self) -> Recipe:
        return self.encoders.image

    @contextmanager
    def lent(self, device: str) -> Iterator[Callable[[Tensor, Sequence[str]], Tensor]]:
        def encode(pixels_BCHW: Tensor, keys: Sequence[str]) -> Tensor:
            self.encoders.pictures += len(pixels_BCHW)
            return torch.nn.functional.avg_pool2d(pixels_BCHW.repeat(1, 2, 1, 1)[:, :4], 8)

        yield encode


@dataclass
class Texts:
    """The same for prompts."""

    encoders: Encoders

    @property
    def recipe(self) -> Recipe:
        return self.encoders.text

    @contextmanager
    def lent(self, device: str) -> Iterator[Callable[[list[Prompt]], list[Embeds]]]:
        def encode(prompts: list[Prompt]) -> list[Embeds]:
            self.encoders.prompts += [prompt.text for prompt in prompts]
            return [{"prompt_LD": torch.ones(2, 2)} for _ in prompts]

        yield encode


def painted(path: Path, size: tuple[int, int], seed: int) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """Three pictures with captions, cached."""
    (tmp_path / "cats").mkdir()
    for seed, (name, size) in enumerate(SIZES.items()):
        painted(tmp_path / "cats" / f"{name}.png", size, seed)
        (tmp_path / "cats" / f"{name}.txt").write_text(name.replace("_", " "))
    keys = {"resolution": 64, "crop": True, "crop_style": "center", "caption_strategy": "textfile"}
    case = Case(tmp_path, keys)
    assert case.cached() == (3, ["", "a square", "a tall one", "a wide one"], "cats: 0 reused, 3 encoded (new)")
    assert case.cached() == (0, [], "cats: 3 reused")
    return case


def file(case: Case, name: str) -> Path:
    return case.folder / "cats" / name


def keys(**changed: Any) -> Callable[[Case], None]:
    return lambda case: case.keys.update(changed)


def new_spec(**changed: Any) -> Callable[[Case], None]:
    def change(case: Case) -> None:
        case.spec = replace(case.spec, **changed)

    return change


def facts(which: str, **changed: Any) -> Callable[[Case], None]:
    def change(case: Case) -> None:
        recipe = getattr(case.encoders, which)
        setattr(case.encoders, which, Recipe(recipe.name, {**recipe.facts, **changed}))

    return change


def half(case: Case) -> None:
    case.dtype = "float16"


def repaint(case: Case) -> None:
    painted(file(case, "a_wide_one.png"), (96, 64), 99)


def caption(case: Case) -> None:
    file(case, "a_square.txt").write_text("a round one")


def rename(case: Case) -> None:
    for suffix in (".png", ".txt"):
        file(case, f"a_square{suffix}").rename(file(case, f"renamed{suffix}"))


def touch(case: Case) -> None:
    for path in (case.folder / "cats").iterdir():
        os.utime(path, ns=(1, 1))


def add(case: Case) -> None:
    painted(file(case, "new.png"), (64, 64), 7)
    file(case, "new.txt").write_text("a new one")


def remove(case: Case) -> None:
    for suffix in (".png", ".txt"):
        file(case, f"a_square{suffix}").unlink()


PROMPTS = ["", "a square", "a tall one", "a wide one"]
CHANGES: dict[str, tuple[Callable[[Case], None], int, list[str], str]] = {
    # what alters all pictures
    "VAE weights": (facts("image", weights="two"), 3, [], "encoder changed"),
    "VAE dtype": (facts("image", dtype="bfloat16"), 3, [], "encoder changed"),
    "stored dtype": (half, 3, [], "encoder changed"),
    "resolution": (keys(resolution=96), 3, [], "crop changed"),
    # what alters some of them: the square one is cut in no style
    "crop_style": (keys(crop_style="corner"), 2, [], "crop changed"),
    "alignment": (new_spec(alignment_px=64), 0, [], ""),
    "alignment and shape": (lambda case: (keys(crop=False)(case), new_spec(alignment_px=16)(case)), 2, [], "crop changed"),
    # what alters one
    "an image's bytes": (repaint, 1, [], "picture changed"),
    "a caption": (caption, 0, ["a round one"], ""),
    "a new picture": (add, 1, ["a new one"], "new"),
    # what alters all prompts, and no picture
    "tokenizer length": (facts("text", tokens=77), 0, PROMPTS, ""),
    "text encoder weights": (facts("text", weights="two"), 0, PROMPTS, ""),
    # what alters nothing
    "crop off, where the cut stays": (keys(crop=False), 0, [], ""),
    "a renamed file": (rename, 0, [], ""),
    "touched files": (touch, 0, [], ""),
    "a removed file": (remove, 0, [], ""),
    "repeats": (keys(repeats=7), 0, [], ""),
    "regularisation": (keys(is_regularisation_data=True), 0, [], ""),
    "batch sizes": (keys(write_batch_size=1), 0, [], ""),
    "caption strategy of the same words": (keys(caption_strategy="filename"), 0, [], ""),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_encodes_just_what_it_concerns(case: Case, name: str) -> None:
    change, pictures, prompts, reason = CHANGES[name]
    change(case)
    encoded, texts, verdict = case.cached()
    assert (encoded, texts) == (pictures, prompts)
    assert verdict.endswith(f"{pictures} encoded ({reason})" if pictures else " reused")
    assert case.cached()[:2] == (0, []), "and now it is there"


def test_another_way_to_resize_is_another_cache(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "RESIZE_RECIPE", "nearest")
    assert case.cached() == (3, [], "cats: 0 reused, 3 encoded (encoder changed)")


def test_each_change_undone_finds_what_was_made_first(case: Case) -> None:
    former = dict(case.keys)
    case.keys.update(crop_style="corner", resolution=96)
    assert case.cached()[0] == 3
    case.keys = former
    assert case.cached()[0] == 0
