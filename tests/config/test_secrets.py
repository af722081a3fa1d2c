from __future__ import annotations

import json
from typing import Any

import pytest

from simpletuner.config.resolved import explain, resolved
from simpletuner.config.secrets import hidden, masked, masked_words, secrets_in

Project = Any

URL = "https://chat.example/api/webhooks/17/s3cr3t-part"
TOKEN = "t0ken-of-mine"
ENDPOINTS: list[Any] = [{"webhook_url": URL}, {"callback_url": "{env:PLACE}", "auth_token": TOKEN}]


def test_an_object_keeps_all_but_its_secrets_and_a_variable_its_name() -> None:
    assert masked(ENDPOINTS, "webhook_config") == [
        {"webhook_url": "***"},
        {"callback_url": "{env:PLACE}", "auth_token": "***"},
    ]


@pytest.mark.parametrize("key", ["auth_token", "AUTH-TOKEN", "--auth_token"])
def test_a_secret_key_is_known_however_it_is_spelt(key: str) -> None:
    assert masked(TOKEN, key) == "***"


def test_the_longest_secret_goes_first_and_what_is_too_short_stays() -> None:
    assert hidden("https://a.example/key and key, a b", ["key-of-no-use", "https://a.example/key", "a"]) == "*** and key, a b"


def test_secrets_are_found_at_any_depth() -> None:
    entry = {"aws_secret_access_key": "deep", "resolution": 512}
    assert set(secrets_in([{"webhook_config": ENDPOINTS}, entry])) == {URL, TOKEN, "{env:PLACE}", "deep"}


@pytest.mark.parametrize("written", [ENDPOINTS, json.dumps(ENDPOINTS)], ids=["list", "text"])
def test_a_saved_or_explained_run_holds_no_secret(project: Project, written: Any) -> None:
    project.options(webhook_config=written)
    run = project.run(environ={"PLACE": "https://two.example/hidden"})
    for text in (json.dumps(resolved(run)), explain(run)):
        assert not [secret for secret in (URL, TOKEN, "two.example") if secret in text]
        assert "{env:PLACE}" in text


def test_a_blotted_out_secret_is_asked_for_anew(project: Project) -> None:
    project.options(webhook_config={"callback_url": URL, "auth_token": TOKEN})
    project.config(resolved(project.run()))
    url, token = project.problems()
    assert "`callback_url` is" in url
    assert "`auth_token` is" in token
    assert "blotted out when the config was saved" in token


WRONG: list[Any] = [
    URL,  # an address where an object is wanted
    f'{{"webhook_url": "{URL}"',  # cut off
    [{"webhook_url": URL}, 3],
    {"webhook_url": f"{URL} and more"},
    {"callback_url": "https://user:s3cr3t-part@host/"},
    {"auth_token": f"{TOKEN}\n", "callback_url": URL},
    {"auth_token": "{env:UNSET}", "callback_url": URL},
]


@pytest.mark.parametrize("written", WRONG, ids=range(len(WRONG)))
def test_no_message_about_a_wrong_value_holds_a_secret(project: Project, written: Any) -> None:
    project.options(webhook_config=written)
    said = "\n".join(project.problems())
    assert "webhook_config" in said
    assert "s3cr3t" not in said
    assert TOKEN not in said


def test_a_stray_address_on_the_command_line_is_named_by_its_host_alone(project: Project) -> None:
    said = "\n".join(project.problems("--webhook_config", "{webhook_url:", URL))
    assert "https://chat.example/***" in said
    assert "s3cr3t" not in said


BROKEN = [
    f'{{"webhook_config": {{"webhook_url": "{URL}" "auth_token": "{TOKEN}"}}}}',
    f'{{"auth_token": "{TOKEN}", "auth_token": "another-{TOKEN}"}}',
    f'{{"webhook_config": {{"webhook_url": "{URL}"}}, "webhook-config": {{"auth_token": "{TOKEN}"}}}}',
]


@pytest.mark.parametrize("text", BROKEN, ids=["no comma", "twice", "two spellings"])
def test_a_file_that_cannot_be_read_is_quoted_without_its_secrets(project: Project, text: str) -> None:
    project.write("config/config.json", text)
    said = "\n".join(project.problems())
    assert "auth_token" in said
    assert "s3cr3t" not in said
    assert TOKEN not in said


@pytest.mark.parametrize("written", [["--webhook_config", "{}"], ["--webhook-config={}"], ["webhook_config={}"]])
def test_a_command_line_is_shown_without_secrets_however_they_are_written(written: list[str]) -> None:
    hook = '{"callback_url": "https:\\/\\/chat.example\\/s3cr3t", "auth_token": "{env:T}"}'
    words = [word.replace("{}", hook) for word in written]
    shown = masked_words(["train", *words, "--seed=1"])
    assert "s3cr3t" not in " ".join(shown)
    assert (shown[0], shown[-1]) == ("train", "--seed=1")
    assert '{"callback_url": "***", "auth_token": "{env:T}"}' in shown[-2]
