from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from simpletuner import hub_cli
from simpletuner.hub_cli import RENAMED, forwarded, main


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("login", "auth login"),
        ("whoami", "auth whoami"),
        ("logout", "auth logout"),
        (
            "download --repo-type=dataset bghira/pseudo-camera-10k --local-dir=pseudo-camera-10k",
            "download --repo-type=dataset bghira/pseudo-camera-10k --local-dir=pseudo-camera-10k",
        ),
        ("upload me/model .", "upload me/model ."),
        ("", ""),
    ],
)
def test_old_commands_become_new_ones(old: str, new: str) -> None:
    assert forwarded(old.split()) == new.split()


def test_the_new_name_is_told_and_the_token_is_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[list[str]] = []
    command = SimpleNamespace(load=lambda: lambda: seen.append(list(sys.argv)))
    monkeypatch.setattr(hub_cli, "entry_points", lambda **_: [command])
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert main(["login", "--token", "hf_secret"]) == 0
    assert seen == [["hf", "auth", "login", "--token", "hf_secret"]]
    told = capsys.readouterr().err
    assert "hf auth login --token ..." in told
    assert "hf_secret" not in told


@pytest.mark.parametrize("words", sorted({*RENAMED.values(), ("download",), ("upload",)}))
def test_the_installed_hub_client_knows_the_new_command(words: tuple[str, ...]) -> None:
    code = f"import sys; sys.argv = ['hf', *{words}, '--help']; from huggingface_hub.cli.hf import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
