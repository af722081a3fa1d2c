"""One run that takes pictures from every kind of store."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from tests.e2e.conftest import SIZES, Workspace

SECRET = "wJalrXUtnFEMI-K7MDENG"


@pytest.fixture
def web(workspace: Workspace) -> Iterator[str]:
    """The workspace's pictures on the web."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(workspace.folder / "pictures"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def bucket(workspace: Workspace) -> Iterator[str]:
    """The workspace's pictures in a bucket `pictures`."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    keys = {"aws_access_key_id": "any", "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=url, **keys)
    client.create_bucket(Bucket="pictures")
    for path in (workspace.folder / "pictures").iterdir():
        client.upload_file(str(path), "pictures", f"set/{path.name}")
    yield url
    server.stop()


def said(folder: Path) -> Iterator[str]:
    """Every text that a run left behind."""
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.read_bytes().decode("utf-8", "replace")


def test_pictures_come_from_a_table_a_bucket_the_web_and_a_dataset(workspace, web, bucket):
    folder, names = workspace.folder, list(SIZES)
    captions = [name.replace("_", " ") for name in names]
    pq.write_table(pa.table({"id": [*names, "gone"], "caption": [*captions, "x"]}), folder / "table.parquet")
    (folder / "list.csv").write_text("\n".join(["url,caption", *(f"{web}/{name}.png,{name}" for name in (*names, "gone"))]))
    cells = [{"bytes": (folder / "pictures" / f"{name}.png").read_bytes(), "path": None} for name in names]
    rows = datasets.Dataset.from_dict({"image": cells, "caption": [[caption, "a picture"] for caption in captions]})
    rows.cast_column("image", datasets.Image()).save_to_disk(folder / "rows")

    said_of_table = {"path": "table.parquet", "filename_column": "id", "caption_column": "caption"}
    keys = {"aws_bucket_name": "pictures", "aws_data_prefix": "set", "aws_endpoint_url": bucket}
    secrets = {"aws_access_key_id": "any-of-them", "aws_secret_access_key": SECRET}
    common = {"resolution": 128, "crop": True}
    table = {"instance_data_dir": "pictures", "metadata_backend": "parquet", "caption_strategy": "parquet"}
    workspace.datasets = [
        {"id": "table", **common, **table, "parquet": said_of_table},
        {"id": "bucket", "type": "aws", **common, **keys, **secrets},
        {"id": "web", "type": "csv", **common, "csv_file": "list.csv", "caption_strategy": "csv",
         "csv_allow_private_addresses": True},
        {"id": "rows", "type": "huggingface", **common, "dataset_name": "rows", "caption_strategy": "huggingface"},
    ]  # fmt: skip
    workspace.config |= {"max_train_steps": 1, "validation_prompt": ""}
    told = workspace.run("train")
    ledgers = json.loads((folder / "output/ledger.json").read_text())["datasets"]
    counts = {name: (ledger["found"], ledger["used"]) for name, ledger in ledgers.items()}
    assert counts == {"table": (4, 4), "bucket": (4, 4), "web": (5, 4), "rows": (4, 4)}
    assert [note["file"] for note in ledgers["table"]["notes"] if "named by" in note["note"]] == ["gone"]
    assert ledgers["web"]["excluded"][0]["detail"] == "the server answers 404 File not found"
    assert SECRET not in told
    assert not [text for text in said(folder / "output") if SECRET in text]
