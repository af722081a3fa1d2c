"""What every test stands on: one thread, no network, and tiny repositories built once a session."""

from __future__ import annotations

import gc
import logging
import os

# Two cores that spin for each other make a tiny step fifteen times slower; set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.datasets import ImageDataset, TextEmbedsDataset
from simpletuner.config.run import Dtypes, Run
from simpletuner.config.sections import SECTIONS
from simpletuner.families import find

FLOAT32 = Dtypes(base="float32", trained="float32", autocast=None, text="float32", latents="float32")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-cells", action="store_true", help="tests/matrix: every combination, not only every pair")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _log_levels_as_before() -> Iterator[None]:
    """A command that is run in this process hands its `log_level` on to it."""
    log = logging.getLogger("simpletuner")
    level, environ = log.level, dict(os.environ)
    yield
    log.setLevel(level)
    for name in set(os.environ) - set(environ):
        if name.endswith("_VERBOSITY") or name == "HF_HUB_DISABLE_PROGRESS_BARS":
            del os.environ[name]


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage() -> None:
    """Every encoder's loan ends in a collection, which would search all that was imported, for a third of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_repo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> the folder of its tiny repository, built at the first call. Only to be read."""
    from simpletuner.examples.tiny import build_model

    built: dict[str, Path] = {}

    def repository(family: str) -> Path:
        if family not in built:
            folder = tmp_path_factory.mktemp("repositories") / family
            build_model(family, folder)
            built[family] = folder
        return built[family]

    return repository


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a CLIP of random weights. Only to be read."""
    from tests.tiny_clip import build_clip

    folder = tmp_path_factory.mktemp("clip")
    build_clip(folder)
    return folder


@pytest.fixture
def make_run(tiny_repo: Callable[[str], Path]) -> Callable[..., Run]:
    """A run on a family's tiny repository, without datasets: options by name, and `dtypes` if not all float32."""

    def run(family: str, *, dtypes: Dtypes = FLOAT32, **options: Any) -> Run:
        from simpletuner.examples.tiny import model_options

        family_class = find()[family]
        values = {"model_family": family, "mixed_precision": "no", **model_options(family, tiny_repo(family))}
        values |= {"lora_alpha": options.get("lora_rank", 16), **family_class.defaults, **options}
        sections = {}
        for name, section in {**SECTIONS, "family": family_class.Options}.items():
            sections[name] = section(**{key: values.pop(key) for key in list(values) if key in section.model_fields})
        assert values.keys() <= ImageDataset.model_fields.keys(), f"no such options: {values}"
        return Run(**sections, datasets=(), text_embeds=TextEmbedsDataset(), dtypes=dtypes, sources={})

    return run


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Any]]:
    """mechanism -> the queries that its kernels are given from now on; PyTorch's compute in their stead."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, _native_attention

    from simpletuner.config.catalogue import ATTENTION

    def stand_in(mechanism: str) -> list[Any]:
        queries: list[Any] = []

        def kernel(query: Any, key: Any, value: Any) -> Any:
            assert query.dtype == key.dtype == value.dtype
            queries.append(query)
            return _native_attention(query, key, value)

        name = AttentionBackendName(ATTENTION[mechanism].backend)
        monkeypatch.setitem(_AttentionBackendRegistry._backends, name, kernel)
        monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, name, {"query", "key", "value"})
        return queries

    return stand_in
