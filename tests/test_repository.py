"""What a clone and a wheel carry, and what the two scripts do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from simpletuner import families
from simpletuner.config.load import parse
from simpletuner.evaluation.prompts import read_library
from simpletuner.examples import names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def applies(requirement: Requirement, python: str) -> bool:
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def pins(python: str) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    found: dict[str, str] = {}
    for requirement in (Requirement(line) for line in lines if line):
        if applies(requirement, python):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} is pinned twice on {python}"
            (pin,) = requirement.specifier
            assert pin.operator == "=="
            found[name] = pin.version
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_is_pinned_to_a_version_it_allows(python: str) -> None:
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    for requirement in (Requirement(line) for group in groups for line in group):
        if requirement.name != "simpletuner" and applies(requirement, python):
            assert requirement.specifier.contains(pins(python)[canonicalize_name(requirement.name)]), requirement


def test_every_platform_s_extra_brings_every_feature_of_the_quickstarts() -> None:
    extras = PROJECT["project"]["optional-dependencies"]

    def packages(extra: str) -> set[str]:
        wanted = [Requirement(line) for line in extras[extra]]
        own = {requirement.name for requirement in wanted if requirement.name != "simpletuner"}
        inner = (name for requirement in wanted if requirement.name == "simpletuner" for name in requirement.extras)
        return own.union(*(packages(name) for name in inner))

    named = {"wandb", "optimum-quanto", "torchao", "bitsandbytes", "torch-optimi", "lycoris-lora"}
    named |= {"prodigyopt", "schedulefree", "came-pytorch"}
    for platform in ("cuda", "cuda13", "rocm", "apple"):
        assert packages(platform) >= named


def test_no_file_that_installs_names_an_index_and_torchvision_is_not_asked_for() -> None:
    for name in ("pyproject.toml", "constraints.txt", "train.sh", "test.sh", "tools/environment.sh"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"index-url|find-links|https?://|torchvision", text), name


def test_a_clone_carries_only_examples_in_its_config_folder() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no clone")
    listed = subprocess.run(["git", "ls-files", "config"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert listed
    assert all(name.endswith(".example") for name in listed)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names of the files in a wheel of this clone."""
    from hatchling.builders.wheel import WheelBuilder

    folder = tmp_path_factory.mktemp("wheel")
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_a_wheel_holds_every_source_and_example(wheel: list[str]) -> None:
    package = ROOT / "simpletuner"
    kept = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert {path.relative_to(ROOT).as_posix() for path in kept} <= set(wheel)
    assert any(name.endswith("sana_emoji/LICENSE") for name in wheel)


def test_a_wheel_holds_the_config_templates_and_no_user_s_own(wheel: list[str]) -> None:
    templates = {f"simpletuner/examples/config/{path.name}" for path in (ROOT / "config").glob("*.example")}
    assert len(templates) >= 3
    assert {name for name in wheel if "/config/" in name and name.startswith("simpletuner/examples/")} == templates


def test_a_wheel_leaves_tools_and_tests_at_home(wheel: list[str]) -> None:
    assert {name.split("/")[0].split("-")[0] for name in wheel} == {"simpletuner"}


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_readme_names_the_two_commands_and_only_links_to_what_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "bash train.sh" in text
    assert "bash test.sh" in text
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def json_blocks(page: str) -> list[str]:
    return re.findall(r"```json\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_guide_to_sana_is_a_configuration_as_it_stands(tmp_path: Path) -> None:
    datasets, config, library = json_blocks("families/sana.md")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "multidatabackend.json").write_text(datasets)
    (tmp_path / "config" / "config.json").write_text(config)
    (tmp_path / "config" / "user_prompt_library.json").write_text(library)
    (tmp_path / "datasets" / "my-subject").mkdir(parents=True)
    words = ["--validation_prompt_library", "config/user_prompt_library.json"]
    parsed = parse(words, families=families.find(), environ={}, cwd=tmp_path)
    assert parsed.given["model_flavour"].value in families.find()["sana"].flavours
    assert len(read_library(tmp_path / "config" / "user_prompt_library.json")) == 3


def test_the_guide_to_sd3_says_what_skip_layer_guidance_takes(tmp_path: Path) -> None:
    (block,) = json_blocks("families/sd3.md")
    (tmp_path / "config.json").write_text(json.dumps({"model_family": "sd3", **json.loads(block)}))
    (tmp_path / "multidatabackend.json").write_text('[{"id": "pictures", "instance_data_dir": "pictures"}]')
    (tmp_path / "pictures").mkdir()
    given = parse([], families=families.find(), environ={}, cwd=tmp_path).given
    assert given["validation_guidance_skip_layers"].value == (7, 8, 9)


def test_the_guide_to_stable_cascade_is_a_configuration_as_it_stands(tmp_path: Path) -> None:
    datasets, config = json_blocks("families/stable_cascade.md")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "stable_cascade_data.json").write_text(datasets)
    (tmp_path / "config" / "stable-cascade.json").write_text(config)
    (tmp_path / "datasets" / "my-pictures").mkdir(parents=True)
    words = ["--config_file", "config/stable-cascade.json"]
    parsed = parse(words, families=families.find(), environ={}, cwd=tmp_path)
    assert parsed.given["model_flavour"].value in families.find()["stable_cascade"].flavours
    assert len(parsed.entries) == 2


@pytest.mark.parametrize("page", ["data.md", "evaluation.md"])
def test_the_pages_entries_are_entries(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text('{"model_family": "sana"}')
    for name in ("portraits", "masks", "held-out"):
        (tmp_path / "datasets" / name).mkdir(parents=True)
    for name in ("urls.csv", "table.parquet"):
        (tmp_path / "datasets" / name).touch()
    blocks = json_blocks(page)
    assert blocks
    for datasets in blocks:
        (tmp_path / "multidatabackend.json").write_text(datasets)
        entries = parse([], families=families.find(), environ={}, cwd=tmp_path).entries
        assert {entry.given["id"].value for entry in entries if "id" in entry.given} >= {
            entry["id"] for entry in json.loads(datasets)
        }


def test_every_option_that_a_page_writes_as_code_is_one() -> None:
    """`word_with_underscores` in a guide is an option, or a name that is listed here."""
    reference = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    names = {"from_pretrained", "max_sequence_length", "decoder_lite", "pos_embed_max_size", "prior_lite"}
    names |= {"eval_loss_base", "run_id", "huggingface_hub", "image_encoder", "feature_extractor"}
    pages = ("families/sana.md", "families/sd3.md", "families/stable_cascade.md", "data.md", "evaluation.md", "reporting.md")
    for page in pages:
        for word in re.findall(r"`([a-z]+(?:_[a-z]+)+)`", (ROOT / "docs" / page).read_text(encoding="utf-8")):
            assert f"`{word}`" in reference or word in names, f"{page} names {word}"


# the scripts, in a clone of their own with stand-ins for Python


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "a clone"
    for name in ("train.sh", "test.sh", "tools/environment.sh", "pyproject.toml", "constraints.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def fake_python(tmp_path: Path) -> Callable[..., Path]:
    """An environment whose `python` notes what it is asked; asked for the clone it imports, it gives `imports`."""

    def make(prefix: Path, *, imports: bool) -> Path:
        answer = f"echo '{prefix}'" if imports else "exit 1"
        script = f'#!/bin/bash\nif [[ "$1" == - ]]; then {answer}; else echo "{prefix.name}: $*" >>"{tmp_path}/asked"; fi\n'
        (prefix / "bin").mkdir(parents=True)
        (prefix / "bin" / "python").write_text(script)
        (prefix / "bin" / "python").chmod(0o755)
        return prefix / "bin"

    return make


def stamp(clone: Path, kind: str = "core") -> None:
    script = f'clone="{clone}"; source "$clone/tools/environment.sh"; stamp_now >"$(stamp_file {kind})"'
    subprocess.run(["bash", "-c", script], check=True)


@pytest.fixture
def train(clone: Path, tmp_path: Path) -> Callable[..., tuple[list[str], str]]:
    """Runs train.sh; returns what Python was asked, and what the user was told."""

    def run(*arguments: str, path: Path | None = None) -> tuple[list[str], str]:
        environment = {**os.environ, "PATH": f"{path or tmp_path}:/usr/bin:/bin"}
        command = ["bash", str(clone / "train.sh"), *arguments]
        done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=True)
        return (tmp_path / "asked").read_text().splitlines(), done.stderr

    return run


def test_without_a_config_the_bundled_example_is_trained_and_named(
    clone: Path, fake_python: Callable[..., Path], train: Callable[..., tuple[list[str], str]]
) -> None:
    fake_python(clone / ".venv", imports=True)
    stamp(clone)
    asked, told = train()
    assert asked == [".venv: -m simpletuner train example=sana-emoji"]
    assert "sana-emoji" in told
    assert "sana-emoji" in names()


@pytest.mark.parametrize("config", ["config/config.json", "config/config.toml", "config/config.env", "config.json"])
def test_a_config_that_is_there_is_trained_and_named(
    config: str, clone: Path, fake_python: Callable[..., Path], train: Callable[..., tuple[list[str], str]]
) -> None:
    fake_python(clone / ".venv", imports=True)
    stamp(clone)
    (clone / config).parent.mkdir(exist_ok=True)
    (clone / config).touch()
    asked, told = train()
    assert asked == [".venv: -m simpletuner train"]
    assert config in told


def test_arguments_are_handed_on_as_they_are(
    clone: Path, fake_python: Callable[..., Path], train: Callable[..., tuple[list[str], str]]
) -> None:
    fake_python(clone / ".venv", imports=True)
    stamp(clone)
    assert train("--config_file", "my config.json")[0] == [".venv: -m simpletuner train --config_file my config.json"]


def test_an_active_environment_that_imports_this_clone_is_used_as_it_is(
    clone: Path, tmp_path: Path, fake_python: Callable[..., Path], train: Callable[..., tuple[list[str], str]]
) -> None:
    active = fake_python(tmp_path / "conda", imports=True)
    assert train(path=active)[0] == ["conda: -m simpletuner train example=sana-emoji"]
    assert not (clone / ".venv").exists()


def test_an_active_environment_that_does_not_is_left_alone(
    clone: Path, tmp_path: Path, fake_python: Callable[..., Path], train: Callable[..., tuple[list[str], str]]
) -> None:
    active = fake_python(tmp_path / "conda", imports=False)
    fake_python(clone / ".venv", imports=True)
    stamp(clone)
    assert train(path=active)[0] == [".venv: -m simpletuner train example=sana-emoji"]


def test_a_venv_that_the_user_made_by_hand_is_used_as_it_is(
    clone: Path, fake_python: Callable[..., Path], train: Callable[..., tuple[list[str], str]]
) -> None:
    fake_python(clone / ".venv", imports=True)
    assert train()[0] == [".venv: -m simpletuner train example=sana-emoji"]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_our_venv_is_refreshed_when_what_it_should_hold_changed(
    name: str, clone: Path, fake_python: Callable[..., Path], train: Callable[..., tuple[list[str], str]]
) -> None:
    active = fake_python(clone / ".venv", imports=True)
    stamp(clone)
    with (clone / name).open("a") as file:
        file.write("# changed\n")
    asked, _ = train(path=active)
    (install,) = (line for line in asked if " install " in line)
    assert install.endswith(f"-e {clone} -c {clone}/constraints.txt")
    count = len(asked)
    assert len(train(path=active)[0]) == count + 1, "the second time it only trains"


def test_an_install_that_was_cut_short_is_taken_up_again(
    clone: Path, fake_python: Callable[..., Path], train: Callable[..., tuple[list[str], str]]
) -> None:
    python = fake_python(clone / ".venv", imports=True) / "python"
    stamp(clone, "core")
    with (clone / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    whole = python.read_text()
    python.write_text(whole.replace("#!/bin/bash\n", '#!/bin/bash\n[[ "$*" == *" install "* ]] && exit 1\n'))
    with pytest.raises(subprocess.CalledProcessError):
        train()
    python.write_text(whole)
    asked, _ = train()
    assert [" install " in line for line in asked[-2:]] == [True, False]


def test_a_venv_for_development_serves_training_too(
    clone: Path, fake_python: Callable[..., Path], train: Callable[..., tuple[list[str], str]]
) -> None:
    fake_python(clone / ".venv", imports=True)
    (clone / ".venv" / ".simpletuner-core").write_text("old")
    stamp(clone, "dev")
    assert train()[0] == [".venv: -m simpletuner train example=sana-emoji"]


def test_where_no_python_will_do_one_is_asked_for(clone: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools only"
    tools.mkdir()
    for name in ("bash", "cat", "cksum", "dirname", "rm"):
        os.symlink(shutil.which(name) or name, tools / name)
    bash = str(tools / "bash")
    done = subprocess.run([bash, str(clone / "train.sh")], env={"PATH": str(tools)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "apt install python3.12" in done.stderr


def test_the_tests_run_in_the_venv_with_the_narrowing_arguments(
    clone: Path, tmp_path: Path, fake_python: Callable[..., Path]
) -> None:
    fake_python(clone / ".venv", imports=True)
    stamp(clone, "dev")
    subprocess.run(["bash", str(clone / "test.sh"), "tests/data", "-k", "crop"], check=True, capture_output=True)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.split()[2] for line in asked] == ["ruff", "ruff", "mypy", "pytest"]
    assert asked[-1].endswith("tests/data -k crop")
