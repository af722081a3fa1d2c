"""What is uploaded to the Hugging Face Hub, and what the model card says."""

from __future__ import annotations

from simpletuner.config.options import Section, option

__all__ = ["Hub"]

PUSHING = "push_to_hub=true"


class Hub(Section):
    """Uploads to the Hugging Face Hub while training goes on, and the model card `README.md`, written with every result."""

    push_to_hub: bool = option(False, level="essential")
    """Upload the result with its model card and newest gallery at the end. Log in first (`hf auth login`), or set HF_TOKEN."""

    push_checkpoints_to_hub: bool = option(False, when=PUSHING)
    """Upload each checkpoint too, whole, as `checkpoint-<step>/` of the repository. Training never waits for it."""

    hub_model_id: str | None = option(None, when=PUSHING)
    """The repository: `name` of your own, or `owner/name`. It is made if need be. Unset: the name of `output_dir`'s last
    folder. Alone it uploads nothing."""

    model_card_private: bool = option(True, when=PUSHING)
    """Make the repository private. One that is there already stays what it is."""

    model_card_note: str | None = option(None)
    """Your own words for the model card, as Markdown."""

    model_card_safe_for_work: bool = option(False)
    """Leave out the model card's tag `not-for-all-audiences`."""
