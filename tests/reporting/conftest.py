"""A real HTTP server on loopback that delays, drops, refuses and hangs as a test tells it."""

from __future__ import annotations

import email
import json
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


@dataclass(frozen=True)
class Does:
    """How one request is answered."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes = b""
    delay_s: float = 0.0
    hangs: bool = False
    drops: bool = False


@dataclass(frozen=True)
class Request:
    """What arrived."""

    path: str
    headers: Message
    body: bytes
    at_s: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def parts(self) -> list[Message]:
        """Of a multipart body, as Python's parser of e-mails reads it."""
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        message = email.message_from_bytes(head + self.body)
        assert message.is_multipart()
        return message.get_payload()  # type: ignore[return-value]


class Server:
    """Answers 200, but for the next requests as `script` says; `always` overrules that for all the rest."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.received: list[Request] = []
        self.script: deque[Does] = deque()
        self.always = Does()
        self.arrived = threading.Condition()
        self._released = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        if context is not None:
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self.url = f"http{'s' if context else ''}://127.0.0.1:{self._http.server_port}/hooks/1/s3cr3t"
        threading.Thread(target=lambda: self._http.serve_forever(0.01), daemon=True).start()

    def wait_for(self, count: int, within_s: float = 5.0) -> list[Request]:
        """The first so many requests."""
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.received) >= count, within_s), f"only {len(self.received)} arrived"
            return self.received[:count]

    def release(self) -> None:
        """Let what hangs go on."""
        self._released.set()

    def stop(self) -> None:
        self.release()
        self._http.shutdown()
        self._http.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with server.arrived:
                    does = server.script.popleft() if server.script else server.always
                    server.received.append(Request(self.path, self.headers, body, time.monotonic()))
                    server.arrived.notify_all()
                time.sleep(does.delay_s)
                if does.hangs:
                    server._released.wait(30)
                if does.drops or does.hangs:
                    self.close_connection = True
                    return
                self.send_response(does.status)
                for name, value in {**does.headers, "Content-Length": str(len(does.content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(does.content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # of a machine that has a proxy
    started = Server()
    yield started
    started.stop()
