from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from simpletuner import examples
from simpletuner.config.sources import read_json
from simpletuner.errors import UserError

FOLDER = examples.find("sana-emoji").parent
PICTURES = sorted((FOLDER / "fluent_emoji").iterdir())


def test_the_example_is_listed_under_the_name_that_finds_it() -> None:
    assert examples.names() == ["sana-emoji"]
    assert examples.find("sana-emoji").name == "config.json"


def test_an_unknown_example_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean `sana-emoji`"):
        examples.find("sana-emojis")


def test_there_are_real_pictures_with_captions_for_names_in_little_space() -> None:
    assert 24 <= len(PICTURES) <= 32
    assert sum(path.stat().st_size for path in PICTURES) < 600_000
    for path in PICTURES:
        assert path.stem.startswith("a_3d_emoji_of_")
        with Image.open(path) as image:
            image.load()
            assert image.size == (256, 256)


def test_no_two_pictures_are_the_same() -> None:
    assert len({path.read_bytes() for path in PICTURES}) == len(PICTURES)


def test_their_licence_lies_beside_them() -> None:
    text = (FOLDER / "LICENSE").read_text()
    assert "MIT License" in text
    assert "Microsoft" in text
    assert "@lobehub/fluent-emoji-3d 1.1.0" in text


def test_what_the_config_names_lies_beside_it() -> None:
    config = read_json(FOLDER / "config.json", FOLDER)
    (dataset,) = read_json(FOLDER / "multidatabackend.json", FOLDER)
    assert (FOLDER / config["validation_prompt_library"]).is_file()
    assert (FOLDER / dataset["instance_data_dir"]).is_dir()


def test_the_gallery_shows_every_bundled_picture_and_two_that_are_not_taught() -> None:
    config = read_json(FOLDER / "config.json", FOLDER)
    library = read_json(FOLDER / config["validation_prompt_library"], FOLDER)
    prompts = {config["validation_prompt"], *library.values()}
    captions = {path.stem.replace("_", " ") for path in PICTURES}
    assert captions <= prompts
    assert prompts - captions == {"a 3d emoji of a pineapple", "a 3d emoji of a banana"}


def test_its_base_model_comes_with_the_package() -> None:
    config = read_json(FOLDER / "config.json", FOLDER)
    assert (FOLDER / config["pretrained_model_name_or_path"]).resolve() == examples.MINIATURE
    assert (examples.MINIATURE / "model_index.json").is_file()


def test_a_copied_example_still_finds_its_base_model(tmp_path: Path) -> None:
    examples.copy("sana-emoji", tmp_path / "mine")
    config = read_json(tmp_path / "mine" / "config.json", tmp_path)
    assert Path(config["pretrained_model_name_or_path"]) == examples.MINIATURE


def test_a_copy_is_whole_and_nothing_is_overwritten(tmp_path: Path) -> None:
    copied = examples.copy("sana-emoji", tmp_path / "mine")
    names = {path.relative_to(tmp_path / "mine").as_posix() for path in copied}
    assert {"config.json", "multidatabackend.json", "emoji_prompts.json", "LICENSE"} <= names
    assert {path.name for path in PICTURES} <= {Path(name).name for name in names}
    with pytest.raises(UserError, match="not empty"):
        examples.copy("sana-emoji", tmp_path / "mine")


@pytest.fixture
def template_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "config.json.example").write_text("{}")
    (folder / "config.json").write_text("a user's own")
    monkeypatch.setattr(examples, "TEMPLATE_FOLDERS", (tmp_path / "not there", folder))
    return folder


def test_templates_are_copied_but_never_over_a_file(template_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "config"
    assert examples.copy_templates(target) == [target / "config.json.example"]
    assert examples.copy_templates(target) == [target / "config.json.example"], "what is there unchanged is left as it is"
    (target / "config.json.example").write_text("mine")
    with pytest.raises(UserError, match="Already there"):
        examples.copy_templates(target)
    assert (target / "config.json.example").read_text() == "mine"
