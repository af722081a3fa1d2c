from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from simpletuner.reporting.logs import follow_log_level

ASKING = """
import json, logging, os, sys, warnings
from simpletuner.reporting.logs import follow_log_level
follow_log_level(sys.argv[1], os.environ)
import huggingface_hub.utils.logging, transformers.utils.logging, diffusers.utils.logging
libraries = (huggingface_hub.utils.logging, transformers.utils.logging, diffusers.utils.logging)
print(json.dumps([logging.getLevelName(each.get_verbosity()) for each in libraries]))
warnings.warn("python's own")
"""


@pytest.mark.slow
def test_the_libraries_themselves_follow_once_they_are_imported() -> None:
    done = subprocess.run([sys.executable, "-c", ASKING, "error"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["ERROR"] * 3
    assert "python's own" not in done.stderr


@pytest.mark.parametrize(
    ("level", "theirs"), [("debug", "info"), ("info", "warning"), ("warning", "warning"), ("error", "error")]
)
def test_each_level_is_handed_on_but_what_a_user_has_set_holds(level: str, theirs: str) -> None:
    environ = {"DIFFUSERS_VERBOSITY": "debug"}
    follow_log_level(level, environ)
    assert environ["TRANSFORMERS_VERBOSITY"] == theirs
    assert environ["DIFFUSERS_VERBOSITY"] == "debug"
    assert ("HF_HUB_DISABLE_PROGRESS_BARS" in environ) is (level in ("warning", "error"))


def test_our_own_watchers_failures_are_told_at_warning_and_not_at_error(caplog: pytest.LogCaptureFixture) -> None:
    follow_log_level("warning", {})
    logging.getLogger("simpletuner").warning("told")
    follow_log_level("error", {})
    logging.getLogger("simpletuner").warning("not told")
    assert caplog.messages == ["told"]
