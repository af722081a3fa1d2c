"""Pictures in a bucket 50 ms away: how busy a slow encoder is kept meanwhile, and how long listing and measuring take.

The bucket is moto's, on loopback, in a process of its own that waits before every answer. The encoder stands for a device
beside the CPU: it sleeps, and whatever it does not sleep, it waited for us.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from common import Figure, arguments, say, scratch, tell
from precompute import EDGE_PX, Sleeper, painted, since

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.index import open_dataset
from simpletuner.data.precompute import fill_latents
from simpletuner.data.ranks import Alone
from simpletuner.data.samples import LatentSpec

LATENT = LatentSpec(32, 32, 32, EDGE_PX)
KEYS = {"aws_access_key_id": "any", "aws_secret_access_key": "any"}


def serve(latency_s: float, answer: Connection) -> None:
    """A bucket's server, until it is ended."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    moto = DomainDispatcherApplication(create_backend_app)

    class Quiet(WSGIRequestHandler):
        def log_request(self, *_: Any) -> None:
            pass

    def late(environ: dict[str, Any], start: Any) -> Any:
        time.sleep(latency_s)
        return moto(environ, start)

    server = make_server("127.0.0.1", 0, late, threaded=True, request_handler=Quiet)
    answer.send(server.server_port)
    server.serve_forever()


def uploaded(folder: Path, url: str, copies: int) -> int:
    """The pictures of a folder, each so many times, as so many different files."""
    import boto3

    client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **KEYS)
    client.create_bucket(Bucket="pictures")

    def upload(path: Path, copy: int) -> None:
        raw = path.read_bytes() + bytes([copy])  # a byte behind a JPEG's end: another digest
        client.put_object(Bucket="pictures", Key=f"{copy}/{path.name}", Body=raw)

    with ThreadPoolExecutor(8) as pool:
        return len([pool.submit(upload, path, copy).result for path in sorted(folder.iterdir()) for copy in range(copies)])


def figures(url: str, folder: Path, count: int) -> list[Figure]:
    entry = ImageDataset(
        id="cats", type="aws", aws_bucket_name="pictures", aws_endpoint_url=url, resolution=EDGE_PX, crop=True,
        cache_dir_vae=str(folder / "cache"), vae_batch_size=8, **KEYS,
    )  # fmt: skip
    began_s = time.perf_counter()
    images = open_dataset(entry, LATENT, tell=say)
    opened_s = since(began_s)
    rows, columns = LATENT.grid(EDGE_PX, EDGE_PX)
    encoder = Sleeper(0.02, lambda pixels_B3HW: torch.randn(len(pixels_B3HW), LATENT.channels, rows, columns))

    began_s = time.perf_counter()
    fill_latents([images], encoder, dtype="float16", device="cpu", ranks=Alone(), tell=say)
    return [
        Figure("bucket: a device of 50 pictures/s is busy", encoder.slept_s / since(began_s), "", least=0.8),
        Figure("bucket: first listing and measuring", count / opened_s, "pictures/s"),
    ]


def main() -> None:
    asked = arguments(__doc__, pictures=64, copies=6, latency_ms=50)
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(asked.latency_ms / 1000, theirs), daemon=True)
    server.start()
    try:
        url = f"http://127.0.0.1:{ours.recv()}"
        with scratch() as folder:
            painted(folder / "pictures", asked.pictures)
            tell(figures(url, folder, uploaded(folder / "pictures", url, asked.copies)), as_json=asked.json)
    finally:
        server.terminate()
        server.join()


if __name__ == "__main__":
    main()
