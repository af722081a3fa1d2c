"""One HTTP POST, and what its answer means: done, later, or never.

The standard library's client: it keeps no log of addresses, which are secrets here, and heeds the environment's proxies.
"""

from __future__ import annotations

import json
import math
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPMessage
from typing import IO, Any

from simpletuner import __version__

__all__ = ["Answer", "Post", "Poster"]

AGENT = f"simpletuner/{__version__}"
"""Discord turns away clients that call themselves Python's urllib."""
ANSWER_BYTES = 65_536
"""As much of an answer is read."""
LATER = (408, 409, 425, 429)
"""Refusals that another time may not be."""
TOO_MANY = 429


@dataclass(frozen=True)
class Post:
    """What is sent."""

    body: bytes = field(repr=False)
    content_type: str


@dataclass(frozen=True)
class Answer:
    """What came of it."""

    status: int | None
    """HTTP's; None where no answer came."""
    reason: str
    """For people, without the address: "answered 503", "connection refused"."""
    pause_s: float = 0.0
    """How long the server wants to be left alone."""

    @property
    def is_done(self) -> bool:
        """Whether it was delivered."""
        return self.status is not None and 200 <= self.status < 300

    @property
    def is_final(self) -> bool:
        """Whether to send the same again is useless."""
        return self.status is not None and self.status < 500 and self.status not in LATER

    @property
    def is_limited(self) -> bool:
        """Whether only the rate was at fault: no failure of the server's, nor of the message's."""
        return self.status == TOO_MANY


class Poster:
    """Posts to one address."""

    def __init__(self, url: str, *, token: str = "", verifies: bool = True, timeout_s: float = 10.0) -> None:
        """`timeout_s` is for each wait for the server: to connect, to take some bytes, to give some."""
        self._url = url
        self._headers = {"User-Agent": AGENT, **({"Authorization": f"Bearer {token}"} if token else {})}
        self._timeout_s = timeout_s
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
        if url.startswith("https"):
            handlers.append(urllib.request.HTTPSHandler(context=_context(verifies=verifies)))
        self._opener = urllib.request.build_opener(*handlers)

    def __call__(self, post: Post) -> Answer:
        """Send it and wait for the answer."""
        headers = {**self._headers, "Content-Type": post.content_type}
        request = urllib.request.Request(self._url, post.body, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout_s) as answer:
                return _answer(answer.status, answer.headers, answer.read(ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                return _answer(error.code, error.headers, _read(error))
        except urllib.error.URLError as error:
            return Answer(None, _reason(error.reason))
        except (OSError, HTTPException) as error:
            return Answer(None, _reason(error))
        except UnicodeError:  # "a..b", or a part of more than 63 letters
            return Answer(None, "its host is no name")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """To follow one would turn the POST into a GET, and hand the token to whoever is named."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        return None


def _context(*, verifies: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not verifies:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _read(answer: IO[bytes]) -> bytes:
    """What a refusal says; that it breaks off changes nothing."""
    try:
        return answer.read(ANSWER_BYTES)
    except (OSError, HTTPException):
        return b""


def _answer(status: int, headers: Message, content: bytes) -> Answer:
    return Answer(status, f"answered {status}", _pause_s(status, headers, content))


def _pause_s(status: int, headers: Message, content: bytes) -> float:
    """From `Retry-After` (seconds or a date) or, as Discord has it, the answer's `retry_after` and the limit's headers."""
    if status < 400:
        is_spent = headers.get("X-RateLimit-Remaining") == "0"
        return _seconds(headers.get("X-RateLimit-Reset-After")) if is_spent else 0.0
    return max(_seconds(headers.get("Retry-After")), _told_s(content) if status == TOO_MANY else 0.0)


def _seconds(written: Any) -> float:
    """A number of seconds, or a date; 0 for anything else."""
    try:
        seconds = float(written)
    except (TypeError, ValueError):
        try:
            seconds = parsedate_to_datetime(str(written)).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _told_s(content: bytes) -> float:
    try:
        told = json.loads(content)
    except ValueError:
        return 0.0
    return _seconds(told.get("retry_after")) if isinstance(told, dict) else 0.0


def _reason(error: object) -> str:
    """What went wrong in the words of the system: they never hold an address."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return type(error).__name__
