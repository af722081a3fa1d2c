"""A CSV of URLs as a store, against a web server on loopback that delays, drops, errs, redirects and sends pages."""

from __future__ import annotations

import io
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.index import ImageSet, open_dataset
from simpletuner.data.ledger import Note
from simpletuner.data.samples import LatentSpec
from simpletuner.data.stores import choice, download
from simpletuner.data.stores.download import LARGEST_BYTES, Dead, Downloader
from simpletuner.data.stores.urls import Urls
from simpletuner.errors import DataError, RunError
from simpletuner.events import Event, Progress

LATENT = LatentSpec(channels=32, cell_px=32, alignment_px=64, native_edge_px=256)


def png(size: tuple[int, int] = (256, 256)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


class Web:
    """Each path is a way to answer; `asked` counts the requests for it, `mended` paths answer well from then on."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.mended: set[str] = set()
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked[self.path] += 1
                web.answer(self, self.path)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def answer(self, handler: BaseHTTPRequestHandler, path: str) -> None:
        word, raw, code, headers = path.strip("/").partition(".")[0], png(), 200, {"Content-Type": "image/png"}
        if path in self.mended or (word == "flaky" and self.asked[path] > 2):
            word = "good"
        if word in ("gone", "flaky"):
            code, raw = {"gone": 404, "flaky": 503}[word], b""
        elif word == "page":
            raw, headers = b"<html>please log in</html>", {"Content-Type": "text/html"}
        elif word == "moved":
            code, raw, headers = 302, b"", {"Location": "/good.png"}
        elif word == "inside":
            code, raw, headers = 302, b"", {"Location": "http://10.1.2.3/good.png"}
        elif word == "circle":
            code, raw, headers = 302, b"", {"Location": path}
        elif word == "slow":
            time.sleep(0.4)
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name, value)
        lengths = {"huge": LARGEST_BYTES + 1, "short": len(raw) + 10}
        handler.send_header("Content-Length", str(lengths.get(word, len(raw))))
        handler.end_headers()
        handler.wfile.write(raw)

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture(scope="module")
def _web() -> Iterator[Web]:
    web = Web()
    yield web
    web.stop()


@pytest.fixture
def web(_web: Web) -> Web:
    _web.asked.clear()
    _web.mended.clear()
    return _web


@pytest.fixture
def downloader() -> Downloader:
    return Downloader(allow_private=True, back_off_s=0.01, timeout_s=0.2)


class List:
    """A CSV of URLs, opened as often as one likes."""

    def __init__(self, path: Path, web: Web) -> None:
        self.path, self.web = path, web
        self.told: list[Event] = []

    def write(self, *rows: str, head: str = "url,caption") -> None:
        lines = [row if "://" in row else f"{self.web.url}/{row}" for row in rows]
        (self.path / "list.csv").write_text("\n".join([head, *lines]), encoding="utf-8")

    def open(self, **keys: Any) -> ImageSet:
        said = {"type": "csv", "csv_file": str(self.path / "list.csv"), "caption_strategy": "csv", **keys}
        folders = {"csv_cache_dir": str(self.path / "downloads"), "cache_dir_vae": str(self.path / "cache")}
        return open_dataset(ImageDataset(id="cats", **{**folders, **said}), LATENT, tell=self.told.append)

    def refused(self, **keys: Any) -> str:
        with pytest.raises(DataError) as caught:
            self.open(**keys)
        return str(caught.value)

    def downloads(self) -> list[Path]:
        return [path for path in (self.path / "downloads").rglob("*") if path.is_file()]


@pytest.fixture
def urls(tmp_path: Path, web: Web, downloader: Downloader, monkeypatch: pytest.MonkeyPatch) -> List:
    monkeypatch.setattr(choice, "Urls", lambda entry: Urls(entry, downloader))
    return List(tmp_path, web)


def test_pictures_are_downloaded_once_and_read_from_there(urls, web):
    urls.write('good.png?size=1,"a fox, red"', "good.png?size=2,a hen", "moved.png, a cow ")
    images = urls.open()
    assert [images.file(sample) for sample in range(3)] == [f"{web.url}/{name}" for name in
                                                            ("good.png?size=1", "good.png?size=2", "moved.png")]  # fmt: skip
    assert [images.captions(sample) for sample in range(3)] == [("a fox, red",), ("a hen",), ("a cow",)]
    assert images.read(2) == png()
    assert [event.done for event in urls.told if isinstance(event, Progress)][:3] == [1, 2, 3]
    asked = web.asked.total()
    assert len(urls.open()) == 3
    assert web.asked.total() == asked == 4
    assert len(urls.downloads()) == 3


def test_what_cannot_be_downloaded_is_in_the_ledger_and_tried_again(urls, web):
    words = ("gone", "page", "huge", "circle", "short", "slow")
    urls.write("good.png,a", *(f"{word}.png,b" for word in words), "ftp://x/a.png,c", "no url://,d")
    ledger = urls.open().ledger
    assert (ledger.found, ledger.used) == (9, 1)
    assert {one.reason for one in ledger.excluded} == {"cannot be downloaded"}
    why = {one.file.rpartition("/")[2] or one.file: one.detail for one in ledger.excluded}
    assert why["gone.png"] == "the server answers 404 Not Found"
    assert why["page.png"].startswith("the server sends 26 bytes of text/html: not a picture")
    assert f"more than {LARGEST_BYTES:,}" in why["huge.png"]
    assert "redirect" in why["circle.png"]
    assert "broke off after" in why["short.png"]
    assert "timed out" in why["slow.png"]
    assert why["a.png"] == why["no url://"] == "it is no URL of http or https"
    assert len(urls.downloads()) == 1, "a file is whole, or not there"
    assert web.asked["/gone.png"] == web.asked["/page.png"] == web.asked["/huge.png"] == 1, "hopeless: asked once"
    assert web.asked["/short.png"] == web.asked["/slow.png"] == download.TRIES

    web.mended.update({"/gone.png", "/short.png"})
    ledger = urls.open().ledger
    assert (ledger.found, ledger.used) == (9, 3)


def test_a_failure_that_passes_is_waited_for(web, downloader):
    assert downloader.fetch(f"{web.url}/flaky.png") == png()
    assert web.asked["/flaky.png"] == 3


def test_an_interrupted_run_does_not_wait_for_what_would_be_tried_again(web):
    patient = Downloader(allow_private=True, back_off_s=60)
    threading.Timer(0.2, patient.give_up).start()
    with pytest.raises(Dead, match="the server answers 503"):
        patient.fetch(f"{web.url}/flaky.png")
    assert web.asked["/flaky.png"] == 1


def test_a_host_that_is_down_is_given_up(web, downloader):
    for number in range(download.DEAD_HOST // download.TRIES):
        with pytest.raises(Dead, match=r"cannot be reached: .*refused"):
            downloader.fetch(f"http://127.0.0.1:9/{number}.png")
    with pytest.raises(Dead, match=r"127\.0\.0\.1:9 could not be reached 8 times in a row"):
        downloader.fetch("http://127.0.0.1:9/last.png")
    assert downloader.fetch(f"{web.url}/good.png") == png()


def test_private_addresses_are_refused_by_what_the_name_resolves_to(web, monkeypatch):
    guarded = Downloader(allow_private=False, back_off_s=0.01)
    for host in ("127.0.0.1", "localhost"):
        with pytest.raises(Dead, match=r"a private address \(`csv_allow_private_addresses` allows them\)"):
            guarded.fetch(web.url.replace("127.0.0.1", host) + "/good.png")
    assert not web.asked


def test_a_redirect_to_a_private_address_is_refused(web, monkeypatch):
    check = download._public_address
    monkeypatch.setattr(download, "_public_address", lambda host, at: None if at == "127.0.0.1" else check(host, at))
    guarded = Downloader(allow_private=False, back_off_s=0.01)
    assert guarded.fetch(f"{web.url}/moved.png") == png()
    with pytest.raises(Dead, match=r"10\.1\.2\.3 is at 10\.1\.2\.3, a private address"):
        guarded.fetch(f"{web.url}/inside.png")


@pytest.mark.parametrize(
    ("address", "is_public"),
    [("8.8.8.8", True), ("2606:4700::1111", True), ("10.0.0.1", False), ("169.254.169.254", False), ("::1", False),
     ("::ffff:192.168.0.1", False), ("2002:0a00:0001::1", False), ("fe80::1%eth0", False), ("0.0.0.0", False),
     ("100.64.0.1", False), ("224.0.0.1", False)],
)  # fmt: skip
def test_public_addresses_are_told_from_others(address, is_public):
    try:
        download._public_address("x", address)
        assert is_public
    except Dead:
        assert not is_public


def test_a_url_that_stands_twice_is_one_picture(urls, web):
    urls.write("good.png,first", "good.png,second", ",none")
    images = urls.open()
    assert images.captions(0) == ("first",)
    assert images.ledger.notes == (Note(f"{web.url}/good.png", "stands 2 times in list.csv, and counts once"),)


def test_what_is_no_url_is_in_the_ledger(urls):
    urls.write("good.png,a", "http://[::1/a.png,b", "data://x,c", "http://h:port/a.png,d")
    images = urls.open()
    details = [one.detail for one in images.ledger.excluded]
    assert len(details) == 3
    assert "it is no URL: Invalid IPv6 URL" in details


def test_a_full_disk_stops_the_run(urls, monkeypatch):
    def full(path: Path, pieces: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("simpletuner.data.stores.urls.write_pieces", full)
    urls.write("good.png,a")
    with pytest.raises(RunError, match="No space left on device"):
        urls.open()


def test_a_list_that_is_no_use_is_one_clear_error(urls):
    urls.write(head="url,caption")
    assert "holds no URL in the column `url`" in urls.refused()
    urls.write("good.png,x", head="link,captions")
    error = urls.refused()
    assert "has no column `url` (csv_url_column) and `caption` (csv_caption_column)" in error
    assert "its columns: link, captions." in error
    urls.write("good.png;x", head="url;caption")
    assert "columns that stand apart by ';'" in urls.refused()
    (urls.path / "list.csv").write_bytes(b"url\n\xff\xfe\n")
    assert "cannot be read" in urls.refused(caption_strategy="filename")
    urls.write("gone.png,x")
    assert "the server answers 404" in urls.refused()


def test_a_folder_for_downloads_that_cannot_be_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "urls.csv").write_text("url\nhttp://127.0.0.1:9/cat.png\n")
    entry = ImageDataset(
        id="web", type="csv", csv_file=str(tmp_path / "urls.csv"), csv_cache_dir=str(tmp_path / "file" / "web")
    )
    with pytest.raises(DataError, match="where its pictures are downloaded to, cannot be used"):
        Urls(entry).listing(lambda event: None)
