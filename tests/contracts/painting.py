"""What `test_two_ranks.py` has its processes paint: a gallery of a real family, tiny."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from training_fakes import Stream, Told, make_run, stir

from simpletuner.data.samples import Prompt
from simpletuner.evaluation.gallery import Gallery
from simpletuner.events import Measured, Painted
from simpletuner.examples.tiny import model_options
from simpletuner.families import find
from simpletuner.families.base import Shot
from simpletuner.training.engine import Engine
from simpletuner.training.trainer import Trainer
from simpletuner.training.tuning import load_tuned


def model_of(name: str, repository: str) -> dict[str, Any]:
    """The options of `make_run` that name a family and its tiny model."""
    options = model_options(name, Path(repository))
    path = options.pop("pretrained_model_name_or_path")
    return {"model_family": name, "family": find()[name].Options(**options), "pretrained_model_name_or_path": path}


def paint_together(engine: Engine, results: Path, name: str, repository: str) -> None:
    """A gallery of three pictures by an adapter on 4-bit weights and by its average; what was told is written to `results`."""
    output, nicknames = results / f"painted-by-{engine.ranks}" / name, []
    run = make_run(
        output,
        **model_of(name, repository),
        base_model_precision="int4-quanto",
        use_ema=True,
        ema_validation="comparison",
        disable_benchmark=True,
        validation_on_startup=True,
        validation_step_interval=1,
        evaluation_type="clip",
        pretrained_evaluation_model_name_or_path=str(results / "clip"),
    )

    class Noting(find()[name]):  # type: ignore[misc]
        @contextmanager
        def sampler(self, denoiser: Any, device: str) -> Iterator[Callable[..., torch.Tensor]]:
            with super().sampler(denoiser, device) as sample:

                def noting(shot: Shot, *rest: Any) -> torch.Tensor:
                    nicknames.append(shot.nickname)
                    return sample(shot, *rest)

                yield noting

    family, told = Noting(run), Told()
    edge_px = min(256, family.latent.native_edge_px)
    size = {"width_px": edge_px, "height_px": edge_px, "guidance": 3.0, "steps": 2}
    shots = tuple(Shot(word, nth, word, "", seed=nth, **size) for nth, word in enumerate(("cat", "dog", "green square")))
    shots = (shots[0], replace(shots[1], adapter_strength=0.5), shots[2])
    asked = [Prompt("", "uncond"), *(Prompt(shot.prompt) for shot in shots)]
    embeds: dict[Prompt, dict[str, torch.Tensor]] = {prompt: {} for prompt in asked}
    for encoder in family.text_encoders():
        with encoder.lent("cpu") as encode:
            for prompt, new in zip(asked, encode(asked), strict=True):
                embeds[prompt].update(new)
    gallery = Gallery(run, shots, embeds, steps_per_epoch=Fraction(5))  # type: ignore[arg-type]
    denoiser, tuning = load_tuned(family, run, device=engine.device, tell=told)
    trainer = Trainer(run, engine, family, denoiser, tuning, Stream(), [gallery], told, steps=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stir(tuning, 0.1)
    weights, state = tuning.weights(), torch.get_rng_state()
    gallery.run(trainer)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in tuning.weights().items())
    painted = [event.path.relative_to(output).as_posix() for event in told.of(Painted)]
    answer = {"own": nicknames, "painted": painted, "measured": [event.figures for event in told.of(Measured)]}
    (results / f"painted-{name}-{engine.rank}of{engine.ranks}.json").write_text(json.dumps(answer))
