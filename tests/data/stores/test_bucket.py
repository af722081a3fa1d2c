"""A bucket as a store, against moto's server on loopback."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from PIL import Image
from werkzeug.serving import make_server

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.discovery import CANNOT_OPEN
from simpletuner.data.index import ImageSet, open_dataset
from simpletuner.data.pixels import Unreadable
from simpletuner.data.samples import LatentSpec
from simpletuner.data.stores.bucket import HEADER_BYTES, Bucket
from simpletuner.errors import DataError
from simpletuner.events import Event

LATENT = LatentSpec(channels=32, cell_px=32, alignment_px=64, native_edge_px=256)
KEYS = {"aws_access_key_id": "AKIDEXAMPLE", "aws_secret_access_key": "wJalrXUtnFEMI"}


class Service:
    """S3 on loopback: what is asked of it, and how often it fails."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        """(path, range) of each GET."""
        self.failures = 0
        """Requests that are still to be answered with 503."""
        self.silence_s = 0.0
        """Before each answer."""
        moto = DomainDispatcherApplication(create_backend_app)

        def answer(environ: dict[str, Any], start: Any) -> Any:
            if environ["REQUEST_METHOD"] == "GET":
                self.asked.append((environ["PATH_INFO"], environ.get("HTTP_RANGE", "")))
                time.sleep(self.silence_s)
                if self.failures:
                    self.failures -= 1
                    start("503 Slow Down", [])
                    return []
            return moto(environ, start)

        self._server = make_server("127.0.0.1", 0, answer, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        keys = {"aws_access_key_id": "any", "aws_secret_access_key": "any", "region_name": "us-east-1"}
        self.client = boto3.client("s3", endpoint_url=self.url, **keys)

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture(scope="module")
def _service() -> Iterator[Service]:
    service = Service()
    service.client.create_bucket(Bucket="pictures")
    yield service
    service.stop()


@pytest.fixture
def service(_service: Service) -> Service:
    for one in _service.client.list_objects_v2(Bucket="pictures").get("Contents", ()):
        _service.client.delete_object(Bucket="pictures", Key=one["Key"])
    _service.asked.clear()
    _service.failures, _service.silence_s = 0, 0.0
    return _service


def noise(size: tuple[int, int], kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def entry(service: Service, cache: Path | str = "x", **keys: Any) -> ImageDataset:
    said = {"id": "cats", "type": "aws", "aws_bucket_name": "pictures", "aws_endpoint_url": service.url, **KEYS, **keys}
    return ImageDataset(cache_dir_vae=str(cache), **said)


def opened(service: Service, cache: Path, **keys: Any) -> ImageSet:
    return open_dataset(entry(service, cache, **keys), LATENT, tell=lambda event: None)


def put(service: Service, files: dict[str, bytes]) -> None:
    for name, raw in files.items():
        service.client.put_object(Bucket="pictures", Key=name, Body=raw)


def test_pictures_and_captions_below_a_prefix_are_found_and_read(service, tmp_path):
    raw = noise((300, 256))
    put(service, {"set/a b.jpg": raw, "set/a b.txt": b"a fox", "set/in/ü.jpg": raw, "set/in/ü.txt": b"a hen"})
    put(service, {"set/.hidden.jpg": raw, "set/.x/a.jpg": raw, "settee/a.jpg": raw, "set/notes.pdf": b"x", "set/": b""})
    images = opened(service, tmp_path, aws_data_prefix="/set", caption_strategy="textfile")
    assert [images.file(sample) for sample in images.alive()] == ["a b.jpg", "in/ü.jpg"]
    assert [images.captions(sample) for sample in (0, 1)] == [("a fox",), ("a hen",)]
    assert images.place(0).original_WH == (300, 256)
    assert images.read(1) == raw


def test_headers_are_measured_by_their_beginning_and_once(service, tmp_path):
    big = noise((1200, 900), quality=95)
    assert len(big) > 10 * HEADER_BYTES
    put(service, {"a.jpg": big, "b.png": noise((256, 256), "PNG"), "c.jpg": b"no picture", "d.webp": noise((320, 256), "WEBP")})
    images = opened(service, tmp_path)
    assert images.place(0).original_WH == (1200, 900)
    assert [(one.file, one.reason) for one in images.ledger.excluded] == [("c.jpg", "not a picture")]
    assert [ranged for path, ranged in service.asked if path == "/pictures/a.jpg"] == [f"bytes=0-{HEADER_BYTES - 1}"]
    service.asked.clear()
    opened(service, tmp_path)
    assert [path for path, _ in service.asked] == ["/pictures"], "the second start lists, and reads no file"


def test_a_header_at_the_end_of_a_file_is_found(service, tmp_path):
    """A TIFF's, that is: its directory stands behind its pixels."""
    put(service, {"a.tif": noise((400, 300), "TIFF")})
    assert opened(service, tmp_path).place(0).original_WH == (400, 300)


def test_a_replaced_file_is_measured_again_though_its_size_is_the_same(service, tmp_path):
    first, second = noise((256, 256), "BMP"), noise((512, 128), "BMP")
    assert len(first) == len(second)
    put(service, {"a.bmp": first})
    opened(service, tmp_path)
    put(service, {"a.bmp": second})
    assert opened(service, tmp_path).place(0).original_WH == (512, 128)


def test_more_files_than_a_page_holds_are_all_listed(service, monkeypatch):
    put(service, {f"{number}.txt": b"" for number in range(5)} | {f"{number}.jpg": b"x" for number in range(5)})
    bucket = Bucket(entry(service))
    call = bucket._s3().call_s3
    monkeypatch.setattr(bucket._s3(), "call_s3", lambda name, **keys: call(name, **keys, MaxKeys=3))
    listing = bucket.listing(lambda event: None)
    assert listing.files == [f"{number}.jpg" for number in range(5)]
    assert sorted(listing.texts) == [f"{number}.txt" for number in range(5)]
    assert len(service.asked) == 4


def test_a_failure_on_the_way_is_tried_again(service):
    put(service, {"a.jpg": b"bytes"})
    service.failures = 2
    assert Bucket(entry(service)).read("a.jpg") == b"bytes"


@pytest.mark.slow
def test_a_service_that_is_silent_is_given_up(service, monkeypatch):
    monkeypatch.setattr("simpletuner.data.stores.bucket.TRIES", 2)
    monkeypatch.setattr("simpletuner.data.stores.bucket.TIMEOUT_S", 0.1)
    service.silence_s = 1.0
    with pytest.raises(DataError, match="cannot be listed: Read timeout"):
        Bucket(entry(service)).listing(lambda event: None)
    assert len(service.asked) == 4


def test_a_file_that_vanished_is_told(service, tmp_path):
    put(service, {"a.jpg": noise((256, 256))})
    images = opened(service, tmp_path)
    service.client.delete_object(Bucket="pictures", Key="a.jpg")
    with pytest.raises(Unreadable) as caught:
        images.read(0)
    assert (caught.value.reason, caught.value.detail) == (CANNOT_OPEN, "The specified key does not exist")


def test_a_bucket_that_is_not_there_and_an_empty_one_are_errors(service, tmp_path):
    with pytest.raises(DataError, match=r"s3://nothing/ at http.* cannot be listed: The specified bucket does not exist"):
        opened(service, tmp_path, aws_bucket_name="nothing")
    with pytest.raises(DataError, match="no images detected in dataset cats: s3://pictures/none/") as caught:
        opened(service, tmp_path, aws_data_prefix="none")
    assert caught.value.problem.mend == "put pictures into it, or correct aws_data_prefix."


def test_an_address_that_answers_with_no_list_or_is_none_is_an_error(service, tmp_path, monkeypatch):
    bucket = Bucket(entry(service))
    monkeypatch.setattr(bucket._s3(), "call_s3", lambda name, **keys: {})  # what botocore makes of a web page
    assert not bucket.listing(lambda event: None).files
    with pytest.raises(DataError, match="cannot be listed: Invalid endpoint: localhost:9000"):
        opened(service, tmp_path, aws_endpoint_url="localhost:9000")


def test_without_keys_the_machines_own_credentials_are_used(service, monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    bare = entry(service, aws_access_key_id=None, aws_secret_access_key=None)
    with pytest.raises(DataError, match="Unable to locate credentials"):
        Bucket(bare).listing(lambda event: None)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    assert not Bucket(bare).listing(lambda event: None).files


def test_secrets_are_in_no_message(service, monkeypatch):
    bucket, told = Bucket(entry(service)), list[Event]()

    def speaks(name: str, **keys: Any) -> None:
        raise OSError(f"the key {KEYS['aws_access_key_id']} with {KEYS['aws_secret_access_key']} is wrong")

    monkeypatch.setattr(bucket._s3(), "call_s3", speaks)
    with pytest.raises(DataError) as caught:
        bucket.listing(told.append)
    assert "the key *** with *** is wrong" in str(caught.value)
    assert caught.value.__cause__ is not None
    assert not any(secret in repr(caught.value.__cause__) for secret in KEYS.values())
