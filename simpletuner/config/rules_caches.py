"""What is wrong with what a run is told of its caches: where they are, and when they are filled."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.config.run import Run
from simpletuner.errors import Problem

__all__ = ["check"]

BOTH = "one writes nothing, the other fills the cache."


def check(run: Run) -> Iterator[Problem]:
    """Contradictions between keys of the datasets."""
    text = run.text_embeds
    if text.text_cache_disable and text.text_cache_ondemand:
        what = f"Dataset `{text.id}`: `text_cache_disable` and `text_cache_ondemand` are both true."
        yield Problem(f"{text.id}.text_cache_ondemand", what, BOTH, "Set one of them to false.")
    for dataset in run.datasets:
        if dataset.vae_cache_disable and dataset.vae_cache_ondemand:
            what = f"Dataset `{dataset.id}`: `vae_cache_disable` and `vae_cache_ondemand` are both true."
            yield Problem(f"{dataset.id}.vae_cache_ondemand", what, BOTH, "Set one of them to false.")
