"""The libraries beneath speak through loggers of their own: they are to be as quiet, or as talkative, as `log_level` says."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import MutableMapping

__all__ = ["follow_log_level"]

VERBOSITIES = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_VERBOSITY", "DATASETS_VERBOSITY")
"""Read by each library when it is first imported; what a user has set there holds."""
THEIRS = {"debug": "info", "info": "warning", "warning": "warning", "error": "error"}
"""Our level -> theirs: what they call information is whole configurations."""


def follow_log_level(level: str, environ: MutableMapping[str, str]) -> None:
    """Hand `level` on to the libraries that are imported from now on, in this process and those that it starts."""
    for variable in VERBOSITIES:
        environ.setdefault(variable, THEIRS[level])
    if level in ("warning", "error"):
        environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("simpletuner").setLevel(level.upper())
    if level == "error" and not sys.warnoptions:
        warnings.simplefilter("ignore")
