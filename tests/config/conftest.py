"""A fake family of a few lines, and a project folder with a config that tests change."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simpletuner.config.load import Parsed, build, parse
from simpletuner.config.options import Section, option
from simpletuner.config.run import Hardware, Run
from simpletuner.errors import ConfigError, Problem


class FakeOptions(Section):
    """The fake family's own options."""

    fake_strength: float = option(1.0, ge=0)
    """How strong."""


class OtherOptions(Section):
    """Another family's options."""

    other_switch: bool = option(False)
    """On or off."""


class Fake:
    """A family of facts only."""

    title = "Fake"
    flavours: Mapping[str, Any] = {
        "small": SimpleNamespace(repository="maker/small", defaults={}),
        "large": SimpleNamespace(repository="maker/large", defaults={"max_grad_norm": 0.7}),
    }
    default_flavour = "small"
    defaults: Mapping[str, Any] = {"max_grad_norm": 0.1, "vae_batch_size": 3}
    keeps_float32 = False
    has_tiles = True
    adapter_presets: Mapping[str, tuple[str, ...]] = {"attention": ("to_q",), "full": ("to_q", "proj")}
    lycoris_presets: Mapping[str, tuple[str, ...]] = {"attn-mlp": ("Attention", "FeedForward"), "full": ("Linear",)}
    keeps_attention = ""
    Options: type[Section] = FakeOptions

    @classmethod
    def check(cls, run: Run) -> Iterable[Problem]:
        if run.family.fake_strength > 5:  # type: ignore[attr-defined]
            yield Problem("fake_strength", "Too strong.", why="it breaks.", overridable=True)

    @classmethod
    def notices(cls, run: Run) -> Iterable[str]:
        if run.family.fake_strength > 2:  # type: ignore[attr-defined]
            yield "That is strong."


class Other(Fake):
    title = "Other"
    has_tiles = False
    keeps_attention = "its heads are odd."
    Options = OtherOptions

    @classmethod
    def check(cls, run: Run) -> Iterable[Problem]:
        return ()

    @classmethod
    def notices(cls, run: Run) -> Iterable[str]:
        return ()


FAMILIES: Mapping[str, Any] = {"fake": Fake, "other": Other}
PICTURES = {"id": "pictures", "instance_data_dir": "datasets/pictures"}


class Project:
    """A working directory with `config/config.json`, a datasets' file and one folder of pictures."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "datasets" / "pictures").mkdir(parents=True)
        self.config({"model_family": "fake"})
        self.datasets([PICTURES])

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def config(self, content: Mapping[str, Any]) -> None:
        self.write("config/config.json", json.dumps(content))

    def options(self, **options: Any) -> None:
        self.config({"model_family": "fake", **options})

    def datasets(self, entries: list[Any]) -> None:
        self.write("config/multidatabackend.json", json.dumps(entries))

    def dataset(self, **keys: Any) -> None:
        self.datasets([{**PICTURES, **keys}])

    def parse(self, *argv: str, environ: Mapping[str, str] | None = None) -> Parsed:
        return parse(argv, families=FAMILIES, environ=environ or {}, cwd=self.root)

    def run(self, *argv: str, environ: Mapping[str, str] | None = None, hardware: Hardware | None = None) -> Run:
        return build(self.parse(*argv, environ=environ), hardware or Hardware())

    def problems(self, *argv: str, environ: Mapping[str, str] | None = None) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            self.run(*argv, environ=environ)
        return [str(problem) for problem in caught.value.problems]

    def problem(self, *argv: str, environ: Mapping[str, str] | None = None) -> str:
        """The only problem there is."""
        [only] = self.problems(*argv, environ=environ)
        return only


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path)
