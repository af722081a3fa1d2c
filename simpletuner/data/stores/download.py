"""One picture from the web: fetched with retries and limits, from public addresses only, and whole or not at all."""

from __future__ import annotations

import email.message
import http.client
import io
import ipaddress
import random
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from functools import partial
from threading import Event, Lock
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from simpletuner.data.pixels import Unreadable, measure

__all__ = ["Dead", "Downloader"]

LARGEST_BYTES = 2**27
"""Of one picture; more is taken for a mistake."""
TIMEOUT_S = 30.0
"""Of each wait for the server."""
WHOLE_TIMEOUT_S = 300.0
"""Of one try altogether: a server that trickles is given up."""
TRIES = 4
BACK_OFF_S = 1.0
"""Before the second try; twice that before the third, and so on, give or take a half."""
LONGEST_WAIT_S = 60.0
"""A server that asks for more patience is taken at this."""
DEAD_HOST = 8
"""Failures to connect in a row after which a host is not asked again: ten thousand timeouts would take days."""
AGAIN = (408, 425, 429, 500, 502, 503, 504)
AGENT = "simpletuner (+https://pypi.org/project/simpletuner)"


class Dead(Exception):
    """A URL that gives no picture, and why. `is_passing`: perhaps it does in a moment."""

    def __init__(self, why: str, *, is_passing: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.is_passing = is_passing
        self.wait_s = wait_s


class Downloader:
    """Fetches pictures; may be called by several threads at once."""

    def __init__(self, *, allow_private: bool, back_off_s: float = BACK_OFF_S, timeout_s: float = TIMEOUT_S) -> None:
        self._back_off_s, self._timeout_s = back_off_s, timeout_s
        self._failures: Counter[str] = Counter()
        self._lock = Lock()
        self._is_over = Event()
        check = _any_address if allow_private else _public_address
        self._opener = urllib.request.OpenerDirector()  # no handlers for files and FTP, as `build_opener` would add
        handlers: list[urllib.request.BaseHandler] = [
            _Http(check),
            urllib.request.HTTPRedirectHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.UnknownHandler(),
        ]
        for handler in handlers:
            self._opener.add_handler(handler)

    def fetch(self, url: str) -> bytes:
        """The bytes of the picture there. Raises Dead."""
        try:
            host = urlsplit(url).netloc
        except ValueError as error:
            raise Dead(f"it is no URL: {error}") from error
        for tried in range(1, TRIES + 1):
            if self._failures[host] >= DEAD_HOST:
                raise Dead(f"{host} could not be reached {DEAD_HOST} times in a row")
            try:
                return self._try(url, host)
            except Dead as error:
                if not error.is_passing or tried == TRIES:
                    raise
                wait_s = self._back_off_s * 2 ** (tried - 1) * random.uniform(0.5, 1.5)
                if self._is_over.wait(max(wait_s, min(error.wait_s, LONGEST_WAIT_S))):
                    raise
        raise AssertionError("the last try returns or raises")

    def give_up(self) -> None:
        """Try nothing again from now on: what other threads wait for would hold up the end of an interrupted run."""
        self._is_over.set()

    def _try(self, url: str, host: str) -> bytes:
        try:
            request = urllib.request.Request(_ascii(url), headers={"User-Agent": AGENT, "Accept": "image/*"})
            with self._opener.open(request, timeout=self._timeout_s) as answer:
                raw = _body(answer)
                kind = answer.headers.get_content_type()
        except urllib.error.HTTPError as error:
            with error:
                raise Dead(
                    f"the server answers {error.code} {error.reason}",
                    is_passing=error.code in AGAIN,
                    wait_s=_patience(error.headers),
                ) from error
        except urllib.error.URLError as error:
            raise self._unreached(host, error.reason) from error
        except (OSError, http.client.HTTPException) as error:
            raise Dead(f"the connection broke off: {error or type(error).__name__}", is_passing=True) from error
        except ValueError as error:
            raise Dead(f"it is no URL: {error}") from error
        with self._lock:
            self._failures[host] = 0
        try:
            measure(io.BytesIO(raw))
        except Unreadable as error:
            raise Dead(f"the server sends {len(raw):,} bytes of {kind}: {error}") from error
        return raw

    def _unreached(self, host: str, reason: object) -> Dead:
        with self._lock:
            self._failures[host] += 1
        return Dead(f"{host} cannot be reached: {reason}", is_passing=True)


def _ascii(url: str) -> str:
    """The URL as it is sent: what is not ASCII, or a blank, is escaped. Raises Dead for a scheme that is not the web's."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Dead("it is no URL of http or https")
    netloc = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    path, query = (quote(part, safe="/%:=&?~#+!$,;'@()*[]") for part in (parts.path, parts.query))
    return urlunsplit((parts.scheme, netloc, path, query, ""))


def _body(answer: http.client.HTTPResponse) -> bytes:
    """All that the server sends. Raises Dead where that is too much, takes too long, or is less than it promised."""
    promised = answer.headers.get("Content-Length")
    if promised is not None and promised.isdigit() and int(promised) > LARGEST_BYTES:
        raise Dead(f"it is {int(promised):,} bytes, more than {LARGEST_BYTES:,}")
    ends_at, pieces, size = time.monotonic() + WHOLE_TIMEOUT_S, [], 0
    while piece := answer.read1(2**16):
        pieces.append(piece)
        size += len(piece)
        if size > LARGEST_BYTES:
            raise Dead(f"it is more than {LARGEST_BYTES:,} bytes")
        if time.monotonic() > ends_at:
            raise Dead(f"it took more than {WHOLE_TIMEOUT_S:g} s", is_passing=True)
    if promised is not None and promised.isdigit() and size != int(promised):
        raise Dead(f"the connection broke off after {size:,} of {int(promised):,} bytes", is_passing=True)
    return b"".join(pieces)


def _patience(headers: email.message.Message) -> float:
    """Seconds that the server asks to be left alone; a date in their place is not heeded."""
    after = headers.get("Retry-After", "")
    return float(after) if after.isdigit() else 0.0


# addresses

Check = Callable[[str, str], None]


class _Http(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens connections, also those of redirects, to addresses that were looked at: none is looked up a second time."""

    def __init__(self, check: Check) -> None:
        super().__init__()
        self._check = check
        self._tls = ssl.create_default_context()

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(partial(_Plain, check=self._check), request)

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(partial(_Secure, check=self._check, tls=self._tls), request)


class _Plain(http.client.HTTPConnection):
    def __init__(self, host: str, *, check: Check, **settings: Any) -> None:
        super().__init__(host, **settings)
        self._check = check

    def connect(self) -> None:
        self.sock = _connected(self.host, self.port, self.timeout, self._check)


class _Secure(http.client.HTTPSConnection):
    def __init__(self, host: str, *, check: Check, tls: ssl.SSLContext, **settings: Any) -> None:
        super().__init__(host, context=tls, **settings)
        self._check = check
        self._tls = tls

    def connect(self) -> None:
        plain = _connected(self.host, self.port, self.timeout, self._check)
        self.sock = self._tls.wrap_socket(plain, server_hostname=self.host)


def _connected(host: str, port: int, timeout_s: float | None, check: Check) -> socket.socket:
    """A connection to the first address of `host` that answers, after all of them passed."""
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for *_, place in addresses:
        check(host, str(place[0]))
    failure = OSError("it has no address")
    for family, kind, protocol, _, place in addresses:
        plain = socket.socket(family, kind, protocol)
        try:
            plain.settimeout(timeout_s)
            plain.connect(place)
            return plain
        except OSError as error:
            plain.close()
            failure = error
    raise failure


def _any_address(host: str, address: str) -> None:
    """Let every address pass."""


def _public_address(host: str, address: str) -> None:
    """Raise Dead for an address that not all the world can reach: a list of URLs must not look into the user's network."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner = (ip.ipv4_mapped or ip.sixtofour or ip) if isinstance(ip, ipaddress.IPv6Address) else ip
    if not inner.is_global or inner.is_multicast:
        raise Dead(f"{host} is at {address}, a private address (`csv_allow_private_addresses` allows them)")
