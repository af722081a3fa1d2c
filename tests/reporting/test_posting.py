from __future__ import annotations

import socket
import ssl
import threading
import time
from datetime import datetime, timedelta, timezone
from email.utils import formatdate
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from simpletuner.reporting.posting import Post, Poster
from tests.reporting.conftest import Does, Server

NOTE = Post(b'{"a": 1}', "application/json")


def does(server: Server, status: int = 200, content: bytes = b"", **headers: str) -> None:
    server.always = Does(status, {name.replace("_", "-"): value for name, value in headers.items()}, content)


def test_the_body_arrives_with_its_type_the_token_and_a_name_of_our_own(server: Server) -> None:
    answer = Poster(f"{server.url}?a=b", token="t0ken")(NOTE)
    [request] = server.wait_for(1)
    assert answer.is_done
    assert (request.path, request.body) == ("/hooks/1/s3cr3t?a=b", NOTE.body)
    assert request.headers["Content-Type"] == "application/json"
    assert request.headers["Authorization"] == "Bearer t0ken"
    assert request.headers["User-Agent"].startswith("simpletuner/")


@pytest.mark.parametrize(
    ("status", "is_done", "is_final"),
    [(204, True, True), (302, False, True), (400, False, True), (404, False, True), (429, False, False), (503, False, False)],
)
def test_a_status_says_whether_to_try_again(server: Server, status: int, is_done: bool, is_final: bool) -> None:
    does(server, status, Location=server.url)
    answer = Poster(server.url, token="t0ken")(NOTE)
    assert (answer.status, answer.is_done, answer.is_final) == (status, is_done, is_final)
    assert len(server.received) == 1, "a redirection is not followed: the token would go along"


def test_the_server_says_how_long_to_leave_it_alone(server: Server) -> None:
    def pause_s(status: int, content: bytes = b"", **headers: str) -> float:
        does(server, status, content, **headers)
        return Poster(server.url)(NOTE).pause_s

    assert pause_s(429, Retry_After="1.5") == 1.5
    assert pause_s(503, Retry_After="7") == 7
    assert pause_s(429, b'{"retry_after": 0.25, "global": false}') == 0.25
    assert pause_s(429, b"[]") == pause_s(429, b"no json", Retry_After="soon") == pause_s(429, Retry_After="nan") == 0
    assert pause_s(429, Retry_After=formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=5)
    assert pause_s(204, X_RateLimit_Remaining="0", X_RateLimit_Reset_After="1.25") == 1.25
    assert pause_s(204, X_RateLimit_Remaining="4", X_RateLimit_Reset_After="1.25") == 0


def test_one_that_hangs_or_drops_the_connection_is_a_failure_in_time(server: Server) -> None:
    server.script += [Does(drops=True), Does(hangs=True)]
    poster = Poster(server.url, timeout_s=0.2)
    dropped, hung = poster(NOTE), poster(NOTE)
    assert (dropped.status, dropped.is_done, dropped.is_final) == (None, False, False)
    assert (hung.status, hung.reason) == (None, "no answer in time")


def test_one_that_is_not_there_is_a_failure_whose_reason_holds_no_address() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answer = Poster(f"http://127.0.0.1:{port}/s3cr3t")(NOTE)
    assert (answer.status, answer.reason) == (None, "connection refused")


def test_what_is_no_http_is_a_failure_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/s3cr3t"

        def speak() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"220 mail.example ESMTP\r\n")

        threading.Thread(target=speak, daemon=True).start()
        answer = Poster(url, timeout_s=2)(NOTE)
    assert not answer.is_done
    assert "s3cr3t" not in answer.reason


def self_signed(folder: Path) -> ssl.SSLContext:
    """A server's context with a certificate that nobody vouches for."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(timezone.utc)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(days=1), now + timedelta(days=1))
    pem = made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    pem += key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "server.pem").write_bytes(pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    return context


def test_a_certificate_that_nobody_vouches_for_is_refused_unless_it_is_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(self_signed(tmp_path))
    refused = Poster(server.url, timeout_s=2)(NOTE)
    taken = Poster(server.url, timeout_s=2, verifies=False)(NOTE)
    server.stop()
    assert not refused.is_done
    assert refused.reason.startswith("its certificate is not trusted: ")
    assert taken.is_done
    assert [request.body for request in server.received] == [NOTE.body]


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".org"])
def test_a_host_that_can_be_none_is_a_failure_and_no_crash(host: str) -> None:
    answer = Poster(f"http://{host}/s3cr3t")(NOTE)
    assert (answer.status, answer.is_done) == (None, False)
    assert answer.reason == "its host is no name"
