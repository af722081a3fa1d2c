from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace

import pytest

from simpletuner.reporting.outbox import Letter, Outbox, Patience, Worth
from simpletuner.reporting.posting import Answer, Post

QUICK = Patience(first_pause_s=0.01, longest_pause_s=0.02, longest_limit_s=0.5, attempts=3, closing_s=2.0)
OK = Answer(200, "answered 200")


def letter(text: str, worth: Worth = Worth.USEFUL, held_bytes: int = 0, replaces: str = "") -> Letter:
    return Letter(worth, lambda dropped: [Post(text.encode(), "text/plain")], held_bytes, replaces)


class Endpoint:
    """Answers as scripted, then 200; the first post waits until `go` is set."""

    def __init__(self, *answers: Answer, waits: bool = False) -> None:
        self.answers = list(answers)
        self.posted: list[str] = []
        self.taken: list[str] = []
        self.began = threading.Event()
        self.go = threading.Event()
        if not waits:
            self.go.set()

    def __call__(self, post: Post) -> Answer:
        self.posted.append(post.body.decode())
        self.began.set()
        self.go.wait(10)
        answer = self.answers.pop(0) if self.answers else OK
        if answer.is_done:
            self.taken.append(post.body.decode())
        return answer


def ended(outbox: Outbox) -> float:
    """Close it; the seconds that took."""
    began_s = time.monotonic()
    outbox.close()
    outbox.wait()
    return time.monotonic() - began_s


def busy(endpoint: Endpoint, patience: Patience = QUICK) -> Outbox:
    """An outbox whose thread is held up by its first letter, so that what follows waits."""
    outbox = Outbox("a webhook", endpoint, patience)
    outbox.put(letter("first", Worth.VITAL))
    assert endpoint.began.wait(5)
    return outbox


def test_letters_arrive_in_order_and_all_of_them() -> None:
    endpoint = Endpoint()
    outbox = Outbox("a webhook", endpoint, QUICK)
    for number in range(50):
        outbox.put(letter(str(number)))
    ended(outbox)
    assert endpoint.taken == [str(number) for number in range(50)]


def test_a_failed_post_is_tried_again_before_the_next_letter() -> None:
    endpoint = Endpoint(Answer(503, "answered 503"), Answer(None, "connection refused"))
    outbox = Outbox("a webhook", endpoint, QUICK)
    outbox.put(letter("one"))
    outbox.put(letter("two"))
    ended(outbox)
    assert endpoint.posted == ["one", "one", "one", "two"]
    assert endpoint.taken == ["one", "two"]


def test_of_several_posts_of_a_letter_only_the_failed_one_is_repeated() -> None:
    endpoint = Endpoint(OK, Answer(500, "answered 500"))
    outbox = Outbox("a webhook", endpoint, QUICK)
    outbox.put(Letter(Worth.USEFUL, lambda dropped: [Post(name, "text/plain") for name in (b"a", b"b")]))
    ended(outbox)
    assert endpoint.posted == ["a", "b", "b"]


def test_a_letter_that_is_refused_for_good_or_fails_too_often_makes_room_for_the_next(caplog: pytest.LogCaptureFixture) -> None:
    endpoint = Endpoint(Answer(400, "answered 400"), *[Answer(500, "answered 500")] * QUICK.attempts)
    outbox = Outbox("a webhook", endpoint, QUICK)
    for name in ("refused", "failing", "good"):
        outbox.put(letter(name))
    ended(outbox)
    assert endpoint.posted == ["refused", *["failing"] * QUICK.attempts, "good"]
    assert endpoint.taken == ["good"]
    first, last = caplog.messages
    assert first == "a webhook answered 400; that message is left out, and training goes on."
    assert last == "a webhook: 2 messages were not delivered (it answered 500)."


def test_too_many_requests_are_no_failures_and_the_server_is_left_alone_as_long_as_it_wants() -> None:
    limit = Answer(429, "answered 429", pause_s=0.06)
    endpoint = Endpoint(*[limit] * (QUICK.attempts + 2))
    outbox = Outbox("a webhook", endpoint, QUICK)
    outbox.put(letter("one"))
    assert ended(outbox) >= 0.06 * (QUICK.attempts + 2)
    assert endpoint.taken == ["one"]


def test_where_everything_cannot_be_kept_the_least_worth_goes_first_and_of_equals_the_oldest() -> None:
    endpoint = Endpoint(waits=True)
    outbox = busy(endpoint, replace(QUICK, letters=4))
    for number in range(3):
        outbox.put(letter(f"step {number}", Worth.PASSING))
    for name, worth in (("gallery", Worth.LASTING), ("notice", Worth.USEFUL), ("failed", Worth.VITAL)):
        outbox.put(letter(name, worth))
    outbox.put(letter("step 3", Worth.PASSING))
    endpoint.go.set()
    ended(outbox)
    assert endpoint.taken == ["first", "gallery", "notice", "failed", "step 3"]


def test_what_waits_is_bounded_in_bytes_too() -> None:
    endpoint = Endpoint(waits=True)
    outbox = busy(endpoint, replace(QUICK, held_bytes=100))
    for number in range(5):
        outbox.put(letter(f"preview {number}", Worth.PASSING, held_bytes=40))
    outbox.put(letter("too large alone", Worth.PASSING, held_bytes=101))
    endpoint.go.set()
    ended(outbox)
    assert endpoint.taken == ["first", "preview 3", "preview 4"]


def test_a_letter_that_overtakes_another_takes_its_place_in_the_count() -> None:
    endpoint = Endpoint(waits=True)
    outbox = busy(endpoint)
    for number in range(1000):
        outbox.put(letter(f"progress {number}", Worth.PASSING, replaces="progress"))
    endpoint.go.set()
    ended(outbox)
    assert endpoint.taken == ["first", "progress 999"]


def test_each_letter_is_told_how_many_were_dropped_before_it() -> None:
    endpoint = Endpoint(waits=True)
    outbox = busy(endpoint, replace(QUICK, letters=1))
    for _ in range(3):
        outbox.put(Letter(Worth.USEFUL, lambda dropped: [Post(str(dropped).encode(), "text/plain")]))
    endpoint.go.set()
    ended(outbox)
    assert endpoint.taken == ["first", "2"]


def test_putting_never_waits_for_an_endpoint_that_hangs() -> None:
    endpoint = Endpoint(waits=True)
    outbox = busy(endpoint)
    began_s = time.monotonic()
    for _ in range(1000):
        outbox.put(letter("x"))
    assert time.monotonic() - began_s < 1.0
    endpoint.go.set()


def test_closing_waits_a_bounded_time_for_one_that_hangs(caplog: pytest.LogCaptureFixture) -> None:
    endpoint = Endpoint(waits=True)
    outbox = busy(endpoint, replace(QUICK, closing_s=0.2))
    outbox.put(letter("second"))
    assert 0.2 <= ended(outbox) < 1.0
    assert caplog.messages == ["a webhook: 2 messages were not delivered (more than it took)."]
    endpoint.go.set()


def test_in_the_second_half_of_closing_only_what_is_vital_is_sent() -> None:
    endpoint = Endpoint(waits=True)
    outbox = busy(endpoint, replace(QUICK, closing_s=1.0))
    for name, worth in (("notice", Worth.USEFUL), ("gallery", Worth.LASTING), ("failed", Worth.VITAL)):
        outbox.put(letter(name, worth))
    threading.Timer(0.6, endpoint.go.set).start()
    ended(outbox)
    assert endpoint.taken == ["first", "failed"]


def test_a_pause_between_attempts_ends_with_the_time_of_closing() -> None:
    endpoint = Endpoint(*[Answer(503, "answered 503", pause_s=60)] * 3)
    patience = replace(QUICK, longest_limit_s=60, closing_s=0.3)
    outbox = Outbox("a webhook", endpoint, patience)
    outbox.put(letter("vital", Worth.VITAL))
    assert endpoint.began.wait(5)
    assert ended(outbox) < 1.0


def test_after_closing_nothing_is_taken() -> None:
    endpoint = Endpoint()
    outbox = Outbox("a webhook", endpoint, QUICK)
    ended(outbox)
    outbox.put(letter("late"))
    assert endpoint.posted == []


def test_trouble_is_told_once_and_not_for_every_letter(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    endpoint = Endpoint(*[Answer(None, "connection refused")] * 9)
    outbox = Outbox("a webhook", endpoint, QUICK)
    for number in range(3):
        outbox.put(letter(str(number)))
    ended(outbox)
    first, last = caplog.messages
    assert first == "a webhook failed: connection refused; it is tried again later, and training goes on."
    assert last == "a webhook: 3 messages were not delivered (it failed: connection refused)."


def test_a_letter_that_cannot_be_made_costs_itself_alone(caplog: pytest.LogCaptureFixture) -> None:
    endpoint = Endpoint()
    outbox = Outbox("a webhook", endpoint, QUICK)
    outbox.put(Letter(Worth.USEFUL, lambda dropped: [Post(b"." * (1 // dropped), "text/plain")]))
    outbox.put(letter("next"))
    ended(outbox)
    assert endpoint.taken == ["next"]
    first, last = caplog.messages
    assert first == "a webhook failed: ZeroDivisionError; that message is left out, and training goes on."
    assert last == "a webhook: 1 message was not delivered (it failed: ZeroDivisionError)."
