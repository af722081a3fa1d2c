"""What is to be said of previews that nobody will see, and of scores without pictures."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.config.run import Run

__all__ = ["gallery_notices"]

NO_GALLERY = "there is no gallery without a `validation_prompt` or a library of prompts."


def gallery_notices(run: Run, *, has_webhook: bool) -> Iterator[str]:
    """Told at check and at start."""
    if not run.validation.has_gallery:
        if run.previews.validation_preview:
            yield f"`validation_preview` shows nothing: {NO_GALLERY}"
        if run.scores.evaluation_type != "none":
            yield f"`evaluation_type` scores nothing: {NO_GALLERY}"
    elif run.previews.validation_preview and not has_webhook:
        folder = f"{run.checkpointing.output_dir}/previews"
        yield f"`validation_preview` is sent nowhere: there is no `webhook_config`. The newest frames are kept in {folder}."
