from __future__ import annotations

import json
from typing import Any

import pytest

from simpletuner.config.run import Run
from simpletuner.config.webhooks import Endpoint, endpoints_of, secrets_of

Project = Any

URL = "https://chat.example/hooks/1"


def endpoints(run: Run) -> tuple[Endpoint, ...]:
    return endpoints_of(run.reporting, {})


def test_without_the_option_there_is_no_endpoint(project: Project) -> None:
    assert endpoints(project.run()) == ()


def test_an_object_is_one_endpoint_with_everything_it_says(project: Project) -> None:
    project.options(
        webhook_config={
            "webhook_type": "RAW",
            "webhook_url": URL,
            "message_prefix": "mine: ",
            "log_level": "Warning",
            "auth_token": "abcd",
            "ssl_no_verify": True,
        }
    )
    assert endpoints(project.run()) == (Endpoint("raw", URL, "mine: ", "warning", "abcd", verifies=False),)


def test_a_list_is_several_and_the_kind_follows_the_address_s_name(project: Project) -> None:
    project.options(webhook_config=[{"webhook_url": URL}, {"callback_url": URL, "auth_token": None}])
    assert endpoints(project.run()) == (Endpoint("discord", URL), Endpoint("raw", URL))


def test_a_file_beside_the_config_is_read_and_its_variables_filled_in(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write("config/hooks.json", '[{"webhook_url": "{env:HOOK}"},]  // mine')
    project.options(webhook_config="hooks.json")
    monkeypatch.setenv("HOOK", URL)
    run = project.run()
    assert endpoints_of(run.reporting, {"HOOK": URL}) == (Endpoint("discord", URL),)
    assert secrets_of(run, {"HOOK": URL}) == (URL,)


def test_the_command_line_and_the_environment_take_json(project: Project) -> None:
    written = json.dumps([{"webhook_url": URL}])
    assert endpoints(project.run("--webhook_config", written)) == (Endpoint("discord", URL),)
    assert endpoints(project.run(environ={"SIMPLETUNER_WEBHOOK_CONFIG": written})) == (Endpoint("discord", URL),)


def test_an_endpoint_is_called_by_its_host_alone() -> None:
    endpoint = Endpoint("discord", "https://chat.example:8443/api/webhooks/1/secret", token="secret")
    assert endpoint.title == "discord webhook at chat.example"
    assert "secret" not in repr(endpoint)


def test_everything_wrong_is_told_at_once(project: Project) -> None:
    project.options(
        webhook_config=[
            {"webhook_url": "chat.example/hooks", "webhook_typ": "raw", "log_level": "loud", "ssl_no_verify": "no"},
            {"message_prefix": 3},
            {"webhook_url": URL, "callback_url": f"{URL}1"},
            {"webhook_url": URL, "auth_token": "abcd"},
        ]
    )
    said = [problem.partition("\n")[0].removeprefix("`webhook_config`: endpoint ") for problem in project.problems()]
    assert said == [
        '1: `webhook_url` is "***".',
        "1: it has no setting `webhook_typ`.",
        '1: `log_level` is "loud".',
        '1: `ssl_no_verify` is "no".',
        "2: `message_prefix` is 3.",
        "2: there is no address.",
        "3: `webhook_url` and `callback_url` differ.",
        "4: there is an `auth_token`.",
    ]


@pytest.mark.parametrize(
    ("entry", "mend"),
    [
        ({"webhok_url": URL}, "Did you mean `webhook_url`?"),
        ({"webhook_url": URL, "webhook_type": "discrod"}, 'Did you mean "discord"?'),
        ({"webhook_url": URL, "log_level": "warn"}, 'Did you mean "warning"?'),
    ],
)
def test_a_mistyped_name_is_answered_with_the_nearest(project: Project, entry: dict[str, str], mend: str) -> None:
    project.options(webhook_config=entry)
    assert mend in project.problem()


@pytest.mark.parametrize("content", [None, "{", '"text"', "[1]", '{"webhook_url": "{env:NOWHERE_SET}"}'])
def test_a_file_that_is_not_there_or_is_no_object_is_one_problem(project: Project, content: str | None) -> None:
    if content is not None:
        project.write("config/hooks.json", content)
    project.options(webhook_config="hooks.json")
    assert "hooks.json" in project.problem()


NO_ADDRESSES = [
    "ftp://host/",
    "https://",
    "https://host:99999/",
    "https://ho st/",
    "https://[::1/",
    "https://hóst/",
    "https://a..b/",
    "",
    7,
]


@pytest.mark.parametrize("url", NO_ADDRESSES)
def test_what_cannot_be_an_address_is_refused(project: Project, url: Any) -> None:
    project.options(webhook_config={"callback_url": url})
    assert "it takes: an address such as https://host/path" in project.problem()
