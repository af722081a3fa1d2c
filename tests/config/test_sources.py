from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.config.sources import environment, find_config, read_file, read_json
from simpletuner.errors import ConfigError


def said(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_file(path, path.parent, {})
    return str(caught.value)


def put(folder: Path, name: str, text: str | bytes = "{}") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_config_folder_is_looked_at_before_the_working_directory(tmp_path: Path) -> None:
    beside = put(tmp_path, "config.json")
    assert find_config(None, None, tmp_path)[0] == beside
    toml = put(tmp_path, "config/config.toml")
    assert find_config(None, None, tmp_path)[0] == toml
    plain = put(tmp_path, "config/config.json")
    path, notices = find_config(None, None, tmp_path)
    assert path == plain
    assert notices == ("config/config.json is read; config/config.toml beside it is not.",)


def test_an_environment_names_a_folder_below_config(tmp_path: Path) -> None:
    put(tmp_path, "config/config.json")
    wanted = put(tmp_path, "config/portraits/config.toml")
    assert find_config(None, "portraits", tmp_path)[0] == wanted


def test_an_unknown_environment_is_told_with_the_nearest(tmp_path: Path) -> None:
    put(tmp_path, "config/portraits/config.json")
    with pytest.raises(ConfigError, match=r"config/portrait/(.|\n)*env=portraits"):
        find_config(None, "portrait", tmp_path)


def test_a_missing_config_file_is_told_with_the_nearest_name(tmp_path: Path) -> None:
    put(tmp_path, "config.json")
    with pytest.raises(ConfigError, match=r"no config file confg.json(.|\n)*config.json"):
        find_config("confg.json", None, tmp_path)


def test_a_file_wins_over_an_environment_and_that_is_said(tmp_path: Path) -> None:
    wanted = put(tmp_path, "mine.json")
    assert find_config("mine.json", "portraits", tmp_path) == (wanted, ("mine.json is read; env=portraits is not.",))


def test_a_folder_is_no_config_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        find_config(".", None, tmp_path)


def test_bad_json_is_told_with_line_column_and_the_place(tmp_path: Path) -> None:
    text = said(put(tmp_path, "config.json", '{\n  "a": 1\n  "b": 2\n}'))
    assert "line 3, column 3" in text
    assert '  "b": 2\n        ^' in text


def test_the_place_is_right_after_a_comment(tmp_path: Path) -> None:
    assert "line 2, column 8" in said(put(tmp_path, "config.json", '{ // why\n  "a": oops }'))


def test_an_empty_file_is_told_as_empty(tmp_path: Path) -> None:
    assert "the file is empty" in said(put(tmp_path, "config.json", ""))


def test_bad_toml_is_told_with_line_and_column(tmp_path: Path) -> None:
    assert "line 2, column" in said(put(tmp_path, "config.toml", "seed = 1\noutput_dir = oops\n"))


def test_a_key_twice_in_one_object_is_told(tmp_path: Path) -> None:
    text = said(put(tmp_path, "config.json", '{"seed": 1, "seed": 2}'))
    assert text.splitlines()[2:] == ["config.json says `seed` twice: 1 and 2.", "Mend: Keep one of them."]


def test_text_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    assert "not UTF-8" in said(put(tmp_path, "config.json", b'{"a": "\xff"}'))


def test_an_env_file_that_is_not_utf8_is_told_as_such(tmp_path: Path) -> None:
    assert "not UTF-8" in said(put(tmp_path, "config.env", b"A=\xff"))


def test_a_list_is_no_config(tmp_path: Path) -> None:
    assert "holds a list" in said(put(tmp_path, "config.json", "[]"))


def test_nan_is_no_number(tmp_path: Path) -> None:
    assert "NaN" in said(put(tmp_path, "config.json", '{"learning_rate": NaN}'))


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    assert read_json(put(tmp_path, "a.json", b'\xef\xbb\xbf{"a": 1}'), tmp_path) == {"a": 1}


def test_toml_is_read(tmp_path: Path) -> None:
    content = read_file(put(tmp_path, "config.toml", 'model_family = "sana"\nseed = 3\n'), tmp_path, {})
    assert [(item.key, item.value, item.source) for item in content.items] == [
        ("model_family", "sana", "file config.toml"),
        ("seed", 3, "file config.toml"),
    ]


def test_only_prefixed_variables_are_options() -> None:
    items = environment({"SEED": "1", "ENV": "x", "OUTPUT_DIR": "y", "SIMPLETUNER_SEED": "7", "SIMPLETUNER_": ""})
    assert [(item.key, item.value) for item in items] == [("SEED", "7")]
