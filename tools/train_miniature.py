"""Trains the miniature: a base model of the real Sana architecture, small enough to ship and to fine-tune on two cores.

    pip install -e .
    python tools/train_miniature.py autoencoder                     # 64 px pictures <-> 8 x 8 latents
    torchrun --nproc_per_node 2 tools/train_miniature.py denoiser   # text encoder and denoiser, a worker a core
    torchrun --nproc_per_node 2 tools/train_miniature.py variants   # both again, on recoloured and shaded pictures too
    python tools/train_miniature.py assemble                        # the folder that ships, with its recipe

Packages are taken from `--packages`, or packed into it by npm. Each step writes into `--work` as it goes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # threads on cores that others use too wait for the slowest at every operator

import numpy as np
import torch
import torch.distributed as dist
from miniature import autoencoder, denoiser, pictures, shipping, text
from miniature.augment import lit, on_white, recoloured
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

SEED = 20261120
AUTOENCODER = {"steps": 4500, "batch": 16, "learning_rate": 3e-3, "final_share": 0.05}
DENOISER = {"steps": 3000, "batch": 32, "learning_rate": 2e-3, "decay_steps": 0}
VARIANTS = {"steps": 2000, "batch": 32, "learning_rate": 2e-3, "decay_steps": 1000}
"""`batch` is of each worker; two share a step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--packages", type=Path, default=Path("output/miniature"), help="folder with the npm tarballs")
    parser.add_argument("--work", type=Path, default=Path("output/miniature"), help="folder for what is between the steps")
    asked = parser.parse_args()
    asked.packages.mkdir(parents=True, exist_ok=True)
    asked.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    STEPS[asked.step](asked.packages, asked.work)


def train_autoencoder(packages: Path, work: Path) -> None:
    vae = autoencoder.build()
    report = autoencoder_report(vae, work / "autoencoder.safetensors", work / "autoencoder.jsonl")
    autoencoder.train(vae, every_picture(packages), **AUTOENCODER, report=report)


def train_denoiser(packages: Path, work: Path) -> None:
    vae = autoencoder.build()
    vae.load_state_dict(load_file(work / "autoencoder.safetensors"))
    pixels_N3HW, captions = drawn_pictures(packages)
    latents_NCHW = autoencoder.encode(vae, pixels_N3HW)
    scale = round(1 / latents_NCHW.std().item(), 4)
    tokenizer = text.learned_tokenizer(caption for pair in captions for caption in pair)
    if is_first_worker():
        (work / "scale.json").write_text(json.dumps({"scaling_factor": scale}))
        tokenizer.save_pretrained(work / "tokenizer")
    text_encoder = text.build(tokenizer)
    pair = denoiser.Pair(denoiser.build(latents_NCHW.shape[1], text_encoder.config.hidden_size), text_encoder)
    if dist.is_initialized():
        torch.manual_seed(SEED + dist.get_rank())
    prompts = text.tokenize(tokenizer, captions)
    denoiser.train(pair, latents_NCHW * scale, prompts, **DENOISER, report=denoiser_report(work, "denoiser"))


def train_on_variants(packages: Path, work: Path) -> None:
    """Goes on with the averaged weights, on the same pictures and on recoloured and shaded ones."""
    vae = autoencoder.build()
    vae.load_state_dict(load_file(work / "autoencoder.safetensors"))
    plain_N3HW, plain_captions = drawn_pictures(packages)
    varied_N3HW, varied_captions = varied_pictures(packages)
    latents_NCHW = autoencoder.encode(vae, torch.cat([plain_N3HW, varied_N3HW]))
    latents_NCHW *= json.loads((work / "scale.json").read_text())["scaling_factor"]
    prompts = text.tokenize(AutoTokenizer.from_pretrained(work / "tokenizer"), [*plain_captions, *varied_captions])
    pair = shipping.load_pair(work, latents_NCHW.shape[1])
    if dist.is_initialized():
        torch.manual_seed(SEED + 100 + dist.get_rank())
    denoiser.train(pair, latents_NCHW, prompts, **VARIANTS, report=denoiser_report(work, "variants"))


def assemble(packages: Path, work: Path) -> None:
    vae = autoencoder.build()
    vae.load_state_dict(load_file(work / "autoencoder.safetensors"))
    vae.register_to_config(**json.loads((work / "scale.json").read_text()))
    psnr_B = autoencoder.psnr_db(vae, bundled_pictures())
    shipping.write(vae, work)
    shipping.write_recipe(
        {
            "told_in": "docs/log.md, 2026-11-20: also where the shipped run departed from this plan",
            "seed": SEED,
            "styles": {name: style.package for name, style in pictures.STYLES.items()},
            "held_out": {
                "style": pictures.FLUENT_PACKAGE,
                "concepts": pictures.BUNDLED | pictures.UNSEEN,
            },
            "autoencoder": {"pictures": len(every_picture(packages)), **AUTOENCODER, **last_row(work / "autoencoder.jsonl")},
            "denoiser": {
                "pictures": len(drawn_pictures(packages)[0]),
                "workers": 2,
                **DENOISER,
                **last_row(work / "denoiser.jsonl"),
            },
            "variants": {
                "pictures": len(drawn_pictures(packages)[0]) + len(varied_pictures(packages)[0]),
                "workers": 2,
                **VARIANTS,
                **last_row(work / "variants.jsonl"),
            },
            "measured": {
                "autoencoder_psnr_db": {"mean": round(psnr_B.mean().item(), 2), "least": round(psnr_B.min().item(), 2)},
            },
        }
    )


def every_picture(packages: Path) -> Tensor:
    """Both styles whole, but for the concepts that are held out: (N, 4, H, W) in [0, 1]."""
    concepts = pictures.read_concepts(packages)
    found = [torch.from_numpy(pictures.read(style, concepts, packages)[1]) for style in pictures.STYLES.values()]
    return as_tensor(torch.cat(found))


Captions = list[tuple[str, str]]


def drawn_pictures(packages: Path) -> tuple[Tensor, Captions]:
    """What the denoiser learns: pictures on white, (N, 3, H, W), and two captions of each."""
    return described(packages, lambda rgba_N4HW: rgba_N4HW)


def varied_pictures(packages: Path) -> tuple[Tensor, Captions]:
    """Each of them three times more: once shaded, twice recoloured as well, with the colour that it now has."""
    shaded_N3HW, captions = described(packages, lit)
    found = [described(packages, lambda rgba_N4HW: lit(recoloured(rgba_N4HW)), is_recoloured=True) for _ in range(2)]
    pixels_N3HW = torch.cat([shaded_N3HW, *(pixels for pixels, _ in found)])
    return pixels_N3HW, captions + [pair for _, pairs in found for pair in pairs]


def described(packages: Path, change: Callable[[Tensor], Tensor], *, is_recoloured: bool = False) -> tuple[Tensor, Captions]:
    drawn = {code: concept for code, concept in pictures.read_concepts(packages).items() if concept.is_drawn}
    changed, captions = [], []
    for style in pictures.STYLES.values():
        codes, rgba_NHW4 = pictures.read(style, drawn, packages)
        rgba_N4HW = change(as_tensor(torch.from_numpy(rgba_NHW4)))
        for code, one in zip(codes, rgba_N4HW, strict=True):
            named_by_colour = is_recoloured and drawn[code].names_colour
            if not named_by_colour:  # a recoloured "green apple" would be a lie
                changed.append(one)
                plain, coloured = pictures.captions(style, drawn[code], as_bytes(one))
                captions.append((coloured, coloured) if is_recoloured else (plain, coloured))
    return on_white(torch.stack(changed)), captions


def as_bytes(rgba_4HW: Tensor) -> NDArray[np.uint8]:
    return (rgba_4HW * 255).round().byte().movedim(0, -1).numpy()


def bundled_pictures() -> Tensor:
    """The example's pictures on white, only to measure on."""
    return on_white(as_tensor(torch.from_numpy(pictures.bundled())))


def as_tensor(rgba_NHW4: Tensor) -> Tensor:
    return rgba_NHW4.movedim(-1, 1).float() / 255


def autoencoder_report(vae: torch.nn.Module, weights: Path, log: Path) -> Callable[[int, dict[str, float]], None]:
    """Logs the losses; every 250 steps also what the held-out example's pictures come to, and saves the weights."""
    shown = bundled_pictures()
    begun_s = time.monotonic()

    def report(step: int, facts: dict[str, float]) -> None:
        row = {"step": step, "seconds": round(time.monotonic() - begun_s), **{k: round(v, 5) for k, v in facts.items()}}
        if step % 250 == 0:
            row["held_out_psnr_db"] = round(autoencoder.psnr_db(vae, shown).mean().item(), 3)
            save(vae, weights)
        append_row(log, row)

    return report


def denoiser_report(work: Path, log: str) -> Callable[[int, float, denoiser.Pair], None]:
    """The first worker's: logs the loss, and saves the averaged weights every 500 steps, of which all runs are multiples."""
    begun_s = time.monotonic()

    def report(step: int, loss: float, average: denoiser.Pair) -> None:
        if not is_first_worker():
            return
        if step % 500 == 0:
            save(average.denoiser, work / "denoiser.safetensors")
            save(average.text_encoder, work / "text_encoder.safetensors")
        row = {"step": step, "seconds": round(time.monotonic() - begun_s), "loss": round(loss, 5)}
        append_row(work / f"{log}.jsonl", row)

    return report


def is_first_worker() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def append_row(log: Path, row: dict[str, float]) -> None:
    with log.open("a") as file:
        file.write(json.dumps(row) + "\n")


def last_row(log: Path) -> dict[str, float]:
    row: dict[str, float] = json.loads(log.read_text().splitlines()[-1])
    return {name: value for name, value in row.items() if name in ("seconds", "loss")}


def save(model: torch.nn.Module, path: Path) -> None:
    """Written beside and renamed: somebody may be looking at it."""
    staged = path.with_suffix(".staged")
    save_file({name: weight.contiguous() for name, weight in model.state_dict().items()}, staged)
    os.replace(staged, path)


STEPS: dict[str, Callable[[Path, Path], None]] = {
    "autoencoder": train_autoencoder,
    "denoiser": train_denoiser,
    "variants": train_on_variants,
    "assemble": assemble,
}


if __name__ == "__main__":
    main()
