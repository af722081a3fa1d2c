from __future__ import annotations

import base64
import io
import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from PIL import Image

from simpletuner.config.datasets import TextEmbedsDataset
from simpletuner.config.sections import Checkpointing, Reporting
from simpletuner.config.webhooks import Endpoint
from simpletuner.events import (
    Event,
    Measured,
    Notice,
    Painted,
    Previewed,
    Progress,
    RunFailed,
    RunFinished,
    RunStarted,
    Saved,
    Stepped,
)
from simpletuner.reporting import waiting
from simpletuner.reporting.outbox import Patience
from simpletuner.reporting.webhooks import Webhook, webhooks
from tests.reporting.conftest import Does, Request, Server

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "webhook-events.schema.json").read_text())
STRICT = jsonschema.Draft202012Validator({**SCHEMA, "unevaluatedProperties": False})
QUICK = Patience(first_pause_s=0.01, longest_pause_s=0.02, attempts=3, answer_s=0.5, closing_s=5.0)


def png(shade: int = 0, size: tuple[int, int] = (4, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(file, format="PNG")
    return file.getvalue()


def stepped(step: int) -> Stepped:
    return Stepped(step, 100, 1, 0.5, 1e-4, math.nan, 33.0, "2026-11-20T07:00:00+00:00", {"a": math.inf}, {"checkpoint": 4})


def preview(inference_step: int) -> Previewed:
    return Previewed(png(inference_step), "cat", "a cat", 100, inference_step, 20)


def painted(folder: Path, name: str, step: int = 100) -> Painted:
    path = folder / f"{name}.png"
    path.write_bytes(png())
    return Painted(path, name, f"a {name}", step)


@contextmanager
def told(server: Server, kind: str = "raw", *, url: str = "", **facts: Any) -> Iterator[Webhook]:
    """A webhook of that kind; afterwards everything that it was told has been sent."""
    settings = {key: facts.pop(key) for key in ("secrets", "clock", "patience") if key in facts}
    webhook = Webhook(Endpoint(kind, url or server.url, **facts), run="mine", **{"patience": QUICK, **settings})
    yield webhook
    webhook.close()
    webhook.wait()


def events_of(folder: Path) -> list[Event]:
    """One of each kind, in the order in which a run tells them; nan and infinity among the figures."""
    return [
        Notice("hello \ud800 你好"),
        RunStarted(0, 100),
        Progress("encoding", 0, 2, "pictures"),
        stepped(10),
        preview(5),
        painted(folder, "cat"),
        painted(folder, "dog"),
        Measured("eval", 100, {"eval_loss": math.nan}, {"by time": [(0.5, 1.0)]}),
        Saved(folder / "checkpoint-100", 100),
        Notice("careful", "warning"),
        RunFailed("It broke.", "for a reason.", "mend it."),
        RunFinished(100),
    ]


def test_every_event_is_as_the_schema_says_and_pictures_are_base64_png(server: Server, tmp_path: Path) -> None:
    with told(server, level="debug", prefix="box: ", token="t0ken") as webhook:
        for event in events_of(tmp_path):
            webhook(event)
    sent = [request.json for request in server.received]
    for content in sent:
        STRICT.validate(content)
    kinds = "notice run_started progress step preview gallery measured saved notice run_failed run_finished"
    assert [content["type"] for content in sent] == kinds.split()
    assert {content["type"] for content in sent} == set(SCHEMA["properties"]["type"]["enum"])
    assert {content["prefix"] for content in sent} == {"box: "}
    assert [content["sequence"] for content in sent] == list(range(1, len(sent) + 1))
    assert {request.headers["Authorization"] for request in server.received} == {"Bearer t0ken"}
    assert all(datetime.fromisoformat(content["time"]).utcoffset() == timedelta(0) for content in sent)
    by_type = {content["type"]: content for content in sent}
    assert base64.b64decode(by_type["preview"]["png"]) == png(5)
    assert [one["nickname"] for one in by_type["gallery"]["pictures"]] == ["cat", "dog"]
    assert {one["weights"] for one in (by_type["preview"], *by_type["gallery"]["pictures"])} == {"trained"}
    assert base64.b64decode(by_type["gallery"]["pictures"][0]["png"]) == (tmp_path / "cat.png").read_bytes()
    assert (by_type["step"]["grad_norm"], by_type["step"]["figures"]) == (None, {"a": None})


def test_previews_arrive_one_by_one_in_order_while_the_picture_is_being_made(server: Server) -> None:
    with told(server) as webhook:
        for count, inference_step in enumerate((5, 10, 15, 20), 1):
            webhook(Progress("gallery", 0, 1, "pictures"))
            webhook(preview(inference_step))
            newest = server.wait_for(count)[-1].json  # before anything else is told
            assert (newest["inference_step"], newest["inference_steps"]) == (inference_step, 20)


def test_pictures_of_one_gallery_are_grouped_but_not_of_two_nor_more_than_ten(server: Server, tmp_path: Path) -> None:
    with told(server) as webhook:
        for number in range(12):
            webhook(painted(tmp_path, f"p{number}"))
        webhook(preview(5))  # of the next picture: the gallery goes on
        webhook(painted(tmp_path, "p12"))
        webhook(painted(tmp_path, "next", step=200))
        webhook(Progress("gallery", 1, 1))
        webhook(painted(tmp_path, "other", step=200))
    galleries = [request.json for request in server.received if request.json["type"] == "gallery"]
    names = [[one["nickname"] for one in gallery["pictures"]] for gallery in galleries]
    assert names == [[f"p{n}" for n in range(10)], ["p10", "p11", "p12"], ["next"], ["other"]]


def test_a_picture_that_is_gone_when_its_turn_comes_is_null(server: Server, tmp_path: Path) -> None:
    event = painted(tmp_path, "gone")
    event.path.unlink()
    with told(server) as webhook:
        webhook(event)
    [request] = server.received
    STRICT.validate(request.json)
    assert request.json["pictures"][0]["png"] is None


ALWAYS = ["run_started", "preview", "gallery", "measured", "saved", "run_failed", "run_finished"]


@pytest.mark.parametrize(
    ("level", "more"),
    [
        ("info", ["notice", "step", "notice"]),
        ("warning", ["notice"]),
        ("error", []),
        ("critical", []),
    ],
)
def test_the_level_governs_lines_only(server: Server, tmp_path: Path, level: str, more: list[str]) -> None:
    with told(server, level=level) as webhook:
        for event in events_of(tmp_path):
            webhook(event)
    assert sorted(request.json["type"] for request in server.received) == sorted([*ALWAYS, *more])


def test_a_long_task_is_told_every_ten_seconds_and_at_its_end(server: Server) -> None:
    now = [0.0]
    with told(server, level="debug", clock=lambda: now[0]) as webhook:
        for done in range(31):
            now[0] = done * 1.0
            webhook(Progress("encoding", done, 30))
            if done % 10 == 0:
                server.wait_for(done // 10 + 1)  # else the newest would overtake those that wait
    assert [request.json["done"] for request in server.received] == [0, 10, 20, 30]


def test_what_drops_hangs_and_errors_is_tried_again_and_nothing_lost_or_out_of_order(server: Server) -> None:
    server.script += [Does(drops=True), Does(500), Does(429, {"Retry-After": "0.1"}), Does(), Does(hangs=True), Does(503)]
    with told(server) as webhook:
        for number in range(4):
            webhook(Notice(str(number)))
    sent = [(request.json["sequence"], request.json["text"]) for request in server.received]
    assert list(dict.fromkeys(sent)) == [(1, "0"), (2, "1"), (3, "2"), (4, "3")]
    assert len(sent) == 9
    third, fourth = (request.at_s for request in server.received[2:4])
    assert fourth - third >= 0.1, "Retry-After is heeded"


def test_an_endpoint_that_hangs_holds_up_neither_the_run_nor_its_end(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.always = Does(hangs=True)
    patience = replace(QUICK, answer_s=10, closing_s=0.3)
    began_s = time.monotonic()
    with told(server, patience=patience) as webhook:
        for step in range(200):
            webhook(stepped(step))
            webhook(preview(5))
    assert time.monotonic() - began_s < 2.0
    assert caplog.messages == ["raw webhook at 127.0.0.1: 400 messages were not delivered (more than it took)."]


def test_no_message_and_no_log_holds_a_secret(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server.script += [Does(400)]
    with told(server, secrets=[server.url, "t0ken-of-mine"], token="t0ken-of-mine") as webhook:
        webhook(Notice("first"))
        webhook(RunFailed(f"{server.url} did not answer to t0ken-of-mine"))
    assert server.received[-1].json["what"] == "*** did not answer to ***"
    assert "s3cr3t" not in caplog.text
    assert "t0ken" not in caplog.text
    assert "s3cr3t" not in str(webhook)


def discord_content(request: Request) -> dict[str, Any]:
    is_multipart = request.headers["Content-Type"].startswith("multipart/form-data")
    return json.loads(request.parts[0].get_payload(decode=True)) if is_multipart else request.json


def test_discord_is_sent_pictures_as_files_beside_their_names(server: Server, tmp_path: Path) -> None:
    with told(server, "discord", prefix="box: ") as webhook:
        webhook(painted(tmp_path, "cat"))
        webhook(replace(painted(tmp_path, 'odd "名前'), weights="base"))
        webhook(preview(5))
        webhook(RunFinished(100))
    gallery = next(request for request in server.received if "Gallery" in discord_content(request)["content"])
    note, first, second = gallery.parts
    assert gallery.path.endswith("?wait=true")
    assert note.get_content_type() == "application/json"
    assert discord_content(gallery) == {
        "content": 'box: **Gallery at step 100**\ncat: a cat\nodd "名前 (base model): a odd "名前',
        "allowed_mentions": {"parse": []},
    }
    assert first.get_param("name", header="content-disposition") == "files[0]"
    assert first.get_filename() == "cat.png"
    assert first.get_payload(decode=True) == (tmp_path / "cat.png").read_bytes()
    assert second.get_param("name", header="content-disposition") == "files[1]"
    frame = server.received[0].parts[1]
    assert (frame.get_filename(), frame.get_payload(decode=True)) == ("preview_5.png", png(5))


def test_discord_s_limits_of_files_and_letters_hold(server: Server, tmp_path: Path) -> None:
    with told(server, "discord", prefix="p" * 50) as webhook:
        for number in range(23):
            webhook(replace(painted(tmp_path, f"p{number}"), prompt="long " * 100))
        webhook(Notice("\n".join("😀_" * 20 for _ in range(100))))
        webhook(Notice("x" * 50_000))
        webhook(Notice("\n"))
    contents = [discord_content(request)["content"] for request in server.received]
    assert all(len(content.encode("utf-16-le")) // 2 <= 2000 for content in contents)
    assert all(contents), "an empty message is refused"
    files = [len(r.parts) - 1 for r in server.received if r.headers["Content-Type"].startswith("multipart")]
    assert files == [10, 10, 3]
    assert contents[-2].endswith("…")


def test_a_picture_beyond_discord_s_limit_goes_as_jpeg(server: Server, tmp_path: Path) -> None:
    import numpy as np

    noise = np.random.default_rng(0).integers(0, 256, (1800, 1800, 3), dtype=np.uint8)
    path = tmp_path / "large.png"
    Image.fromarray(noise).save(path, compress_level=0)
    assert path.stat().st_size > 9_000_000
    with told(server, "discord") as webhook:
        webhook(Painted(path, "large", "noise", 1))
    file = server.received[0].parts[1]
    content = file.get_payload(decode=True)
    assert (file.get_filename(), file.get_content_type()) == ("large.jpg", "image/jpeg")
    assert len(content) < 9_000_000
    assert Image.open(io.BytesIO(content)).size == (1800, 1800)


def test_discord_s_markup_in_names_and_prompts_stays_text(server: Server) -> None:
    with told(server, "discord") as webhook:
        webhook(Notice("anime_<token> *a* @everyone"))
    content = discord_content(server.received[0])
    assert content["content"] == r"anime\_\<token\> \*a\* @everyone"
    assert content["allowed_mentions"] == {"parse": []}


def test_figures_that_discord_has_no_time_for_are_overtaken_by_newer_ones(server: Server) -> None:
    server.script.append(Does(delay_s=0.3))
    with told(server, "discord") as webhook:
        webhook(RunStarted(0, 100))
        server.wait_for(1)
        for step in range(1, 50):
            webhook(stepped(step))
        webhook(Saved(Path("checkpoint-50"), 50))
    assert [discord_content(request)["content"].split(":")[0] for request in server.received] == [
        "**Training begins** at step 0 of 100.",
        "Step 49 of 100",
        "Saved the checkpoint of step 50",
    ]


def test_a_run_s_endpoints_are_each_told_and_share_one_wait_of_which_the_user_hears(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Server()
    other.always = Does(hangs=True)
    config = [{"callback_url": server.url}, *[{"webhook_url": f"{other.url}{n}"} for n in range(3)]]
    run: Any = SimpleNamespace(
        reporting=Reporting(webhook_config=config),
        checkpointing=Checkpointing(output_dir="output/cats"),
        datasets=(),
        eval_datasets=(),
        text_embeds=TextEmbedsDataset(),
    )
    monkeypatch.setattr(waiting, "MOMENT_S", 0.2)
    waits: list[Event] = []
    began_s = time.monotonic()
    with webhooks(run, waits.append, replace(QUICK, answer_s=10, closing_s=1.0)) as sinks:
        for sink in sinks:
            sink(Notice("hello"))
    assert time.monotonic() - began_s < 1.9
    assert waits == [Notice("Waiting for webhooks to take what is left, at most 1 s. Ctrl-C ends that.")]
    assert server.received[0].json["run"] == "cats"
    other.stop()
