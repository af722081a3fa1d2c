"""The examples that come with the package: list, find and copy.

An example is a folder with a `config.json`, named with underscores; users write its name with dashes. No torch at import.
"""

from __future__ import annotations

import difflib
import filecmp
import json
import shutil
from pathlib import Path

from simpletuner.errors import UserError

__all__ = ["MINIATURE", "copy", "copy_templates", "find", "names", "templates"]

HERE = Path(__file__).parent
MINIATURE = HERE / "miniature"
"""The base model that the examples train: small enough to come with the package."""

TEMPLATE_FOLDERS = (HERE / "config", HERE.parents[1] / "config")
"""Where the config templates lie: in an installed wheel, and in a clone."""


def names() -> list[str]:
    """The examples that `example=NAME` takes."""
    return sorted(config.parent.name.replace("_", "-") for config in HERE.glob("*/config.json"))


def find(name: str) -> Path:
    """The config file of an example. Raises UserError for an unknown name."""
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean `{close[0]}`? " if close else ""
        raise UserError(f"There is no example `{name}`.", mend=f"{hint}The examples are: {', '.join(names())}.")
    return HERE / name.replace("-", "_") / "config.json"


def copy(name: str, folder: Path) -> list[Path]:
    """Copy an example into a new or empty `folder`, to be changed there; returns the files. Raises UserError."""
    source = find(name).parent
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"`{folder}` is there already and not empty.", mend="name another folder; nothing is overwritten.")
    shutil.copytree(source, folder, dirs_exist_ok=True)
    config = folder / "config.json"
    # The base model stays where it is installed; from the copy's folder "../miniature" would be nowhere.
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"../miniature"', json.dumps(str(MINIATURE))), encoding="utf-8")
    return sorted(path for path in folder.rglob("*") if path.is_file())


def templates() -> list[Path]:
    """The `*.example` files of the config folder: a config, a dataset file, a prompt library."""
    return sorted(next(found for folder in TEMPLATE_FOLDERS if (found := list(folder.glob("*.example")))))


def copy_templates(folder: Path) -> list[Path]:
    """Copy the config templates into `folder`; returns where they are. Raises UserError rather than overwrite a changed one."""
    targets = {source: folder / source.name for source in templates()}
    changed = [str(target) for source, target in targets.items() if target.exists() and not filecmp.cmp(source, target, False)]
    if changed:
        raise UserError(
            f"Already there, with other content: {', '.join(changed)}.",
            why="nothing is overwritten.",
            mend="use these, or move them away.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    for source, target in targets.items():
        if not target.exists():  # in a clone they lie there already
            shutil.copyfile(source, target)
    return list(targets.values())
