"""Whatever stands in the files, it gives a run or a ConfigError, never another exception."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simpletuner.config.datasets import ENTRIES
from simpletuner.config.resolved import resolved
from simpletuner.config.sections import SECTIONS
from simpletuner.errors import ConfigError

Project = Any

scalars = st.none() | st.booleans() | st.integers(-3, 2048) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
words = st.sampled_from(
    ["true", "no", "bf16", "lora", "full", "1024x768", "0.5", "[1, 2]", "betas=1,2", "{env:X}", "{}", "../x"]
)
values = st.recursive(
    scalars | words, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
options = st.sampled_from([name for section in SECTIONS.values() for name in section.model_fields])
keys = st.sampled_from([name for section in ENTRIES.values() for name in section.model_fields])
entries = st.fixed_dictionaries({"id": st.just("a"), "instance_data_dir": st.just("datasets/pictures")}) | st.just({})


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(options | keys | st.text(), values, max_size=4), entries, st.dictionaries(keys, values, max_size=3))
def test_any_config_gives_a_run_or_a_config_error(
    project: Project, main: dict[str, Any], entry: dict[str, Any], more: dict[str, Any]
) -> None:
    project.config({"model_family": "fake", **main})
    project.datasets([{**entry, **more}])
    with suppress(ConfigError):
        json.dumps(resolved(project.run()), allow_nan=False)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=12) | options.map(lambda name: f"--{name}"), max_size=5))
def test_any_command_line_gives_a_run_or_a_config_error(project: Project, argv: list[str]) -> None:
    with suppress(ConfigError):
        project.run(*argv)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["config.json", "config.toml", "config.env", "multidatabackend.json"]), st.text())
def test_any_text_in_a_file_gives_a_run_or_a_config_error(project: Project, name: str, text: str) -> None:
    path = project.root / "config" / name
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with suppress(ConfigError):
        project.run("--config_file", f"config/{name}" if name != "multidatabackend.json" else "config/config.json")
