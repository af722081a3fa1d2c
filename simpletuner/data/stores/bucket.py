"""A bucket of Amazon S3, or of anything that speaks like it, as a store. Nothing is ever written into it.

s3fs does the talking, and tries again what failed on the way; headers are measured by reading the beginning of a file alone.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from threading import Lock
from typing import Any

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.geometry import WH
from simpletuner.data.pixels import measure
from simpletuner.data.stores.base import Files, Listing, Stamp, kind_of
from simpletuner.errors import DataError
from simpletuner.events import Progress, Tell

__all__ = ["Bucket"]

IN_FLIGHT = 32
"""At 50 ms a read, 640 pictures a second."""
HEADER_BYTES = 2**16
"""Read at once of a picture to be measured: EXIF data, thumbnail included, are at most this."""
TRIES = 3
"""By botocore, which waits longer and longer, and as often by s3fs, which also tries again an answer that breaks off."""
TIMEOUT_S = 15
"""Of each wait for the service: one that is silent is given up after TRIES x TRIES of them, two to three minutes."""


class Bucket:
    """Pictures below a prefix of a bucket."""

    key = "aws_data_prefix"
    in_flight = IN_FLIGHT
    captions_from = ""

    def __init__(self, entry: ImageDataset) -> None:
        self._dataset = entry.id
        self._bucket = entry.aws_bucket_name
        prefix = entry.aws_data_prefix.strip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        at = f" at {entry.aws_endpoint_url}" if entry.aws_endpoint_url else ""
        self.root = f"s3://{self._bucket}/{self._prefix}{at}"
        self._secrets = [secret for secret in (entry.aws_secret_access_key, entry.aws_access_key_id) if secret]
        self._settings = {
            "key": entry.aws_access_key_id,
            "secret": entry.aws_secret_access_key,
            "endpoint_url": entry.aws_endpoint_url,
            "client_kwargs": {"region_name": entry.aws_region_name} if entry.aws_region_name else {},
        }
        self._opened: Any = None
        self._lock = Lock()

    def listing(self, tell: Tell) -> Listing:
        """All pictures and caption files there, hidden ones left out, page by page. An ETag stands for the time."""
        found = Files()
        page: dict[str, Any] = {"IsTruncated": True}
        total = 0
        try:
            while page.get("IsTruncated"):
                token = page.get("NextContinuationToken")
                more = {"ContinuationToken": token} if token else {}
                with self._failures_told():
                    page = self._s3().call_s3("list_objects_v2", Bucket=self._bucket, Prefix=self._prefix, **more)
                total += len(page.get("Contents", ()))  # not every service tells a KeyCount
                for one in page.get("Contents", ()):
                    file = one["Key"][len(self._prefix) :]
                    if not any(part.startswith(".") for part in file.split("/")):
                        found.add(file, kind_of(file), Stamp(one["Size"], _number(one["ETag"])))
                tell(Progress(f"{self._dataset}: listing {self.root}", total, total, "files"))
        except OSError as error:
            raise DataError(
                f"Dataset `{self._dataset}`: {self.root} cannot be listed: {error.strerror}.",
                mend="correct the `aws_...` keys of the dataset, or the credentials that boto3 finds in their place.",
            ) from error
        return found.listing()

    def measure(self, file: str) -> WH:
        """From the header of a file, of which the rest is not read."""
        return measure(io.BufferedReader(_Ranged(lambda start, end: self._range(file, start, end)), HEADER_BYTES))

    def read(self, file: str) -> bytes:
        """All of a file, in one request."""
        with self._failures_told():
            return self._s3().cat_file(self._path(file), max_concurrency=1)

    def _range(self, file: str, start: int, end: int | None) -> bytes:
        """Bytes `start` up to `end`, or to the end of the file; none if it ends before `start`."""
        try:
            with self._failures_told():
                return self._s3().cat_file(self._path(file), start=start, end=end)
        except OSError as error:
            if error.errno == errno.EINVAL and start:
                return b""
            raise

    def _path(self, file: str) -> str:
        return f"{self._bucket}/{self._prefix}{file}"

    def _s3(self) -> Any:
        """The file system, made at the first call. Not one of those that fsspec keeps, which would remember the secrets."""
        with self._lock:
            if self._opened is None:
                import s3fs

                self._opened = s3fs.S3FileSystem(
                    **self._settings,
                    config_kwargs={
                        "max_pool_connections": self.in_flight,
                        "read_timeout": TIMEOUT_S,
                        "retries": {"mode": "standard", "total_max_attempts": TRIES},
                    },
                    skip_instance_cache=True,
                    use_listings_cache=False,
                )
                self._opened.retries = TRIES
            return self._opened

    @contextmanager
    def _failures_told(self) -> Iterator[None]:
        """Whatever goes wrong is an OSError, whose words hold no secret."""
        from botocore.exceptions import BotoCoreError

        try:
            yield
        except (OSError, BotoCoreError, ValueError) as error:  # a ValueError: an endpoint that is no address
            words = str(error.strerror or error) if isinstance(error, OSError) else str(error)
            for secret in self._secrets:
                words = words.replace(secret, "***")
            words = words.rstrip(".")
            raise OSError(error.errno if isinstance(error, OSError) and error.errno else errno.EIO, words) from None


class _Ranged(io.RawIOBase):
    """A file of which only the parts that are asked for are fetched. Its end is where a fetch comes up short."""

    def __init__(self, fetch: Callable[[int, int | None], bytes]) -> None:
        self._fetch = fetch
        self._place = 0
        self._size: int | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self._size is None:
            self._size = self._place + len(self._fetch(self._place, None))
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size or 0}[whence]
        self._place = base + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        raw = self._part(self._place + len(buffer))
        buffer[: len(raw)] = raw
        return len(raw)

    def readall(self) -> bytes:
        return self._part(None)

    def _part(self, end: int | None) -> bytes:
        """From here to `end`, or to the end of the file."""
        start = self._place
        if self._size is not None and start >= self._size:
            return b""
        raw = self._fetch(start, end)
        self._place += len(raw)
        if end is None or len(raw) < end - start:
            self._size = self._place
        return raw


def _number(etag: str) -> int:
    """An ETag as a number that a column of int64 holds."""
    return int.from_bytes(blake2b(etag.encode(), digest_size=8).digest(), "big") >> 1
