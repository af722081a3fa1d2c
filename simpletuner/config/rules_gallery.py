"""What is to be said of previews that nobody will see."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.config.run import Run

__all__ = ["preview_notices"]


def preview_notices(run: Run, *, has_webhook: bool) -> Iterator[str]:
    """Told at check and at start."""
    if not run.previews.validation_preview:
        return
    if run.validation.validation_prompt is None and not run.validation.validation_prompt_library:
        yield "`validation_preview` shows nothing: there is no gallery without a `validation_prompt` or a library of prompts."
    elif not has_webhook:
        folder = f"{run.checkpointing.output_dir}/previews"
        yield f"`validation_preview` is sent nowhere: there is no `webhook_config`. The newest frames are kept in {folder}."
