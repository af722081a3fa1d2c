"""What may be wrong with a run for SD3, and what its user should know: pure functions of the options, no files, no network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from simpletuner.config.run import Run
from simpletuner.errors import Problem

if TYPE_CHECKING:
    from simpletuner.families.sd3 import SD3Options

__all__ = ["GUIDANCE", "LONGEST_T5_TOKENS", "STEPS", "notices", "problems"]

LONGEST_T5_TOKENS = 154
"""The cap of SD3's quickstart; no results beyond it are known to us."""
GUIDANCE, STEPS = 3.0, 28
HIGH_GUIDANCE = 5.0


def problems(run: Run, options: SD3Options) -> Iterator[Problem]:
    """What refuses the run."""
    tokens = options.tokenizer_max_length
    if tokens > LONGEST_T5_TOKENS:
        yield Problem(
            "tokenizer_max_length",
            f"`tokenizer_max_length` is {tokens}, more than {LONGEST_T5_TOKENS}.",
            why="that is the cap of SD3's quickstart: longer prompts are untried, and each takes more of the cache.",
            mend=f'set it to {LONGEST_T5_TOKENS} or less, or add "i_know_what_i_am_doing": true.',
            overridable=True,
        )
    path = run.model.pretrained_model_name_or_path
    if path is not None and path.endswith(".safetensors"):
        yield Problem(
            "pretrained_model_name_or_path",
            f'"pretrained_model_name_or_path" is the single file `{path}`.',
            why="text encoders and autoencoder are needed too, and come from a repository.",
            mend='name the file in "pretrained_transformer_model_name_or_path" and its repository here.',
        )


def notices(run: Run, options: SD3Options) -> Iterator[str]:
    """What the user should know of skip-layer guidance."""
    if not options.validation_guidance_skip_layers:
        return
    validation = run.validation
    guidance = GUIDANCE if validation.validation_guidance is None else validation.validation_guidance
    steps = validation.validation_num_inference_steps or STEPS
    start, stop = options.validation_guidance_skip_layers_start, options.validation_guidance_skip_layers_stop
    if guidance <= 1:
        yield f"Skip-layer guidance has no effect: validation_guidance is {guidance:g}, and there is none at 1 and below."
    elif not any(steps * start < step < steps * stop for step in range(steps)):
        yield f"Skip-layer guidance has no effect: of {steps} steps none lies between {start:g} and {stop:g} of them."
    if guidance > HIGH_GUIDANCE:
        yield f"validation_guidance {guidance:g} is high for skip-layer guidance, which adds to it: about 4 is usual."
