"""What is wrong with uploads and trackers, found before any work: no network here, no weights."""

from __future__ import annotations

import os
from collections.abc import Iterator

from simpletuner.config.run import Run
from simpletuner.errors import Problem, missing

__all__ = ["check", "notices"]


def check(run: Run) -> Iterator[Problem]:
    """A repository that cannot be, a missing login, a missing package."""
    if "tensorboard" in run.trackers.trackers and (
        problem := missing("tensorboard", option="report_to=tensorboard", extra="tensorboard")
    ):
        yield problem
    if run.hub.push_to_hub:
        yield from _repository(run)
        yield from _login()


def notices(run: Run) -> Iterator[str]:
    """A tracker that is asked for and not there is no reason to stop: the figures are in `metrics.jsonl` as well."""
    if "wandb" in run.trackers.trackers and (problem := missing("wandb", option="report_to=wandb", extra="wandb")):
        yield f"{problem.what} Its figures are in metrics.jsonl alone. {problem.mend}"


def _repository(run: Run) -> Iterator[Problem]:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(run.hub.hub_model_id)
    except HFValidationError as error:
        mend = 'Write "name" or "owner/name", of letters, digits, ".", "-" and "_", at most 96 of them.'
        yield Problem("hub_model_id", f'`hub_model_id` is "{run.hub.hub_model_id}".', f"{str(error).strip()}", mend)


def _login() -> Iterator[Problem]:
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        what = "`push_to_hub` is set, and so is HF_HUB_OFFLINE."
        yield Problem("push_to_hub", what, "nothing can be uploaded offline.", "Unset HF_HUB_OFFLINE, or turn push_to_hub off.")
    elif not os.environ.get("HF_OIDC_RESOURCE") and get_token() is None:  # that one is asked for over the network
        what = "`push_to_hub` is set, but nobody is logged in to the Hugging Face Hub."
        mend = "Run `hf auth login` with a token that may write, or set HF_TOKEN; or turn push_to_hub off."
        yield Problem("push_to_hub", what, "uploads need an account.", mend)
