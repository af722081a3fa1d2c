"""Decode, resize and crop: `read_pixels` against Pillow's own whole-image Lanczos, CPU time on one core.

JPEGs of quality 92 with photographic grain, the sizes in the names below, each put into a square of 1024 px. Both sides end in
the same uint8 pixels; the fidelity is their PSNR. From a shrink of 2 on the JPEG decoder does half of it (draft mode).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from common import Figure, arguments, least_cpu_s, tell
from numpy.typing import NDArray
from PIL import Image

from simpletuner.data.pixels import read_pixels
from simpletuner.data.samples import Place

EDGE_PX = 1024
CASES = {
    "2 MP, shrink 1.1": ((1760, 1168), 2.0, 70.0),
    "4 MP, shrink 1.6": ((2400, 1600), 2.0, 70.0),
    "12 MP, shrink 2.9 (draft)": ((4240, 2832), None, None),
}
"""Name -> size, least speed and least dB."""


def photograph(size_WH: tuple[int, int], seed: int) -> bytes:
    """Shapes of all sizes, edges and grain, as a JPEG."""
    rng = np.random.default_rng(seed)
    width, height = size_WH
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    pixels_HWC = np.full((height, width, 3), 128, np.float32)
    for _ in range(6):
        way = x[..., None] * rng.uniform(0.002, 0.2, 3) + y[..., None] * rng.uniform(0.002, 0.2, 3)
        pixels_HWC += rng.uniform(10, 40) * np.sin(way.astype(np.float32))
    pixels_HWC[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 255, 3)
    pixels_HWC += rng.normal(0, 4, (height, width, 1)).astype(np.float32)
    file = io.BytesIO()
    Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
    return file.getvalue()


def placed(size_WH: tuple[int, int]) -> Place:
    """The shorter edge becomes the square's, the middle is kept."""
    scale = EDGE_PX / min(size_WH)
    width, height = (round(edge * scale) for edge in size_WH)
    return Place(size_WH, (width, height), ((width - EDGE_PX) // 2, (height - EDGE_PX) // 2), (EDGE_PX, EDGE_PX))


def by_pillow(raw: bytes, place: Place) -> NDArray[np.uint8]:
    """What trainers usually do: decode all, resize all, crop."""
    left, top = place.corner_XY
    whole = Image.open(io.BytesIO(raw)).convert("RGB").resize(place.resized_WH, Image.Resampling.LANCZOS)
    return np.asarray(whole.crop((left, top, left + EDGE_PX, top + EDGE_PX)))


def psnr_db(raw: bytes, place: Place) -> float:
    ours_HWC = ((read_pixels(raw, place) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    return float(10 * np.log10(255**2 / np.square(ours_HWC - by_pillow(raw, place)).mean()))


def over(work: Callable[[bytes, Place], object], files: list[bytes], place: Place) -> None:
    for raw in files:
        work(raw, place)


def by_pillow_as_tensor(raw: bytes, place: Place) -> torch.Tensor:
    """The same, with the tensor that an encoder takes: `read_pixels` gives one too."""
    return torch.from_numpy(by_pillow(raw, place).copy()).permute(2, 0, 1).float().div_(127.5).sub_(1)


def main() -> None:
    asked = arguments(__doc__, rounds=5, files=4)
    figures = []
    for name, (size_WH, least, least_db) in CASES.items():
        place, files = placed(size_WH), [photograph(size_WH, seed) for seed in range(asked.files)]
        works = {"ours": partial(over, read_pixels, files, place), "pillow": partial(over, by_pillow_as_tensor, files, place)}
        seconds = least_cpu_s(works, asked.rounds)
        figures += [
            Figure(f"{name}: ours", seconds["ours"] / len(files) * 1e3, "CPU ms"),
            Figure(f"{name}: Pillow", seconds["pillow"] / len(files) * 1e3, "CPU ms"),
            Figure(f"{name}: Pillow / ours", seconds["pillow"] / seconds["ours"], "times", least=least),
            Figure(f"{name}: fidelity to Pillow", min(psnr_db(raw, place) for raw in files), "dB", least=least_db),
        ]
    tell(figures, as_json=asked.json)


if __name__ == "__main__":
    main()
