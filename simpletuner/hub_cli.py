"""`huggingface-cli`, as guides still write it: forwards to `hf`, which the hub client ships today, and tells the new name."""
# ruff: noqa: T201

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

__all__ = ["forwarded", "main"]

RENAMED = {
    "login": ("auth", "login"),
    "logout": ("auth", "logout"),
    "whoami": ("auth", "whoami"),
    "scan-cache": ("cache", "ls"),
    "delete-cache": ("cache", "rm"),
    "repo": ("repos",),
    "upload-large-folder": ("upload",),
}
"""Commands whose name changed; all others kept theirs."""


def forwarded(words: Sequence[str]) -> list[str]:
    """`huggingface-cli`'s words -> `hf`'s."""
    if not words:
        return []
    return [*RENAMED.get(words[0], (words[0],)), *words[1:]]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `hf` in this process; its exit code."""
    words = forwarded(sys.argv[1:] if argv is None else argv)
    print(f"huggingface-cli is now hf; running: hf {' '.join(_masked(words))}", file=sys.stderr)
    command = next(iter(entry_points(group="console_scripts", name="hf")))
    sys.argv = ["hf", *words]
    return command.load()() or 0


def _masked(words: list[str]) -> list[str]:
    """The words without what follows `--token`."""
    shown = ["..." if before == "--token" else word for before, word in zip(["", *words], words, strict=False)]
    return ["--token=..." if word.startswith("--token=") else word for word in shown]


if __name__ == "__main__":
    raise SystemExit(main())
