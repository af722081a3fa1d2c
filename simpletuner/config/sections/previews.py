"""Pictures in the making."""

from __future__ import annotations

from simpletuner.config.options import Section, option

__all__ = ["Previews"]


class Previews(Section):
    """Frames of the gallery's pictures while they are made."""

    validation_preview: bool = option(False)
    """Send frames of each picture to the webhooks while it is denoised; the newest is kept in `previews/` of the run's folder.
    A frame shows the latents as they stand, noise included: by TAESD3 for SD3, by the Previewer for Stable Cascade, by the
    model's own DC-AE for Sana. Of several processes the first then paints the whole gallery, not each its
    share."""

    validation_preview_steps: int = option(1, ge=1, when="validation_preview=true")
    """A frame after every so many denoising steps: of 20 steps, 5 shows 5, 10, 15 and 20. The sampler waits for each."""
