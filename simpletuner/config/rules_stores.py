"""What is wrong with where a dataset says its pictures are kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simpletuner.config.datasets import ImageDataset
from simpletuner.config.options import options_of
from simpletuner.config.secrets import MASK
from simpletuner.config.spelling import nearest
from simpletuner.errors import Problem, missing

__all__ = ["check"]

NEEDED = {"local": "instance_data_dir", "aws": "aws_bucket_name", "csv": "csv_file", "huggingface": "dataset_name"}
"""Type of store -> the key that says where it is."""

PARQUET = {
    "path": str,
    "filename_column": str,
    "caption_column": str,
    "fallback_caption_column": str,
    "width_column": str,
    "height_column": str,
    "identifier_includes_extension": bool,
}
"""The keys of `parquet`."""

TABLES = (".parquet", ".jsonl", ".json")


def check(dataset: ImageDataset) -> Iterator[Problem]:
    """All of it, for one dataset."""
    name, values = f"Dataset `{dataset.id}`", dict(dataset)
    needed = NEEDED[dataset.type]
    if values[needed] is None:
        what = f"{name}: `{needed}` is missing."
        why = f'`type` is "{dataset.type}", and this says where the pictures are.'
        yield Problem(f"{dataset.id}.{needed}", what, why, f'Add "{needed}": "...".')
    yield from _foreign(dataset, name, values)
    yield from _captions(dataset, name)
    if dataset.type == "aws":
        yield from _aws(dataset, name)
    if dataset.type == "huggingface" and (problem := missing("datasets", option="type=huggingface", extra="huggingface")):
        yield problem
    if dataset.revision is not None and dataset.dataset_name is not None and Path(dataset.dataset_name).expanduser().is_dir():
        what = f"{name}: `revision` is {dataset.revision}, but `dataset_name` is a folder."
        yield Problem(f"{dataset.id}.revision", what, "only the hub has revisions.", "Remove `revision`, or name the hub's.")
    if dataset.metadata_backend == "parquet":
        if problem := missing("pyarrow", option="metadata_backend=parquet", extra="parquet"):
            yield problem
        yield from _parquet(dataset, name)


def _foreign(dataset: ImageDataset, name: str, values: dict[str, Any]) -> Iterator[Problem]:
    """Keys of another type of store: one of the two is not meant."""
    for option in options_of("dataset", ImageDataset):
        types = option.when.partition(" and ")[0].removeprefix("type=")
        if not option.when.startswith("type=") or dataset.type in types.split("|"):
            continue
        if values[option.name] == option.info.default:
            continue
        what = f'{name}: `{option.name}` is set, but `type` is "{dataset.type}".'
        mend = f'Set "type" to "{types.replace("|", ", or ")}", or remove `{option.name}`.'
        yield Problem(f"{dataset.id}.{option.name}", what, f"it belongs to the type {types.replace('|', ', ')}.", mend)


def _aws(dataset: ImageDataset, name: str) -> Iterator[Problem]:
    if problem := missing("s3fs", option="type=aws", extra="aws"):
        yield problem
    pair = {"aws_access_key_id": dataset.aws_access_key_id, "aws_secret_access_key": dataset.aws_secret_access_key}
    unset = [key for key, value in pair.items() if value is None]
    if len(unset) == 1:
        mend = f"Add `{unset[0]}`, or remove the other: credentials are then found as every AWS tool finds them."
        yield Problem(f"{dataset.id}.{unset[0]}", f"{name}: `{unset[0]}` is missing.", "the two go together.", mend)
    endpoint = dataset.aws_endpoint_url
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        what = f"{name}: `aws_endpoint_url` is {endpoint}."
        yield Problem(f"{dataset.id}.aws_endpoint_url", what, "an address begins with http:// or https://.", "Write it whole.")
    for key, value in pair.items():
        if value == MASK:
            what = f'{name}: `{key}` is "{MASK}".'
            mend = 'Write "{env:NAME}" in its place, and export that variable.'
            yield Problem(f"{dataset.id}.{key}", what, "that is how a saved config hides a secret.", mend)


def _captions(dataset: ImageDataset, name: str) -> Iterator[Problem]:
    """A strategy that takes captions from a table needs that table."""
    option, strategy = f"{dataset.id}.caption_strategy", dataset.caption_strategy
    what = f'{name}: `caption_strategy` is "{strategy}"'
    if strategy in ("csv", "huggingface") and dataset.type != strategy:
        mend = f'Set "type" to "{strategy}", or take another strategy.'
        yield Problem(option, f'{what}, but `type` is "{dataset.type}".', "captions come from a column of it.", mend)
    elif strategy == "textfile" and dataset.type in ("csv", "huggingface"):
        mend = f'Set it to "{dataset.type}", or take another strategy.'
        yield Problem(option, f'{what}, but `type` is "{dataset.type}".', "there are no text files beside the pictures.", mend)
    elif strategy == "parquet" and dataset.metadata_backend != "parquet":
        mend = 'Set "metadata_backend" to "parquet" and add "parquet": {...}, or take another strategy.'
        yield Problem(option, f"{what}, but there is no table.", "captions come from the table.", mend)
    elif strategy == "parquet" and dataset.parquet and "caption_column" not in dataset.parquet:
        mend = 'Add "caption_column": "..." to `parquet`.'
        yield Problem(option, f"{what}, but `parquet` has no `caption_column`.", "captions come from there.", mend)


def _parquet(dataset: ImageDataset, name: str) -> Iterator[Problem]:
    option = f"{dataset.id}.parquet"
    said = dataset.parquet
    for key in ("path", "filename_column"):
        if key not in said:
            what = f"{name}: `parquet` has no `{key}`."
            why = "it says where the table is, and which column names the pictures."
            yield Problem(option, what, why, f'Add "{key}": "..." to `parquet`.')
    for key, value in said.items():
        if key not in PARQUET:
            near = nearest(key, PARQUET)
            mend = f"Did you mean `{near}`?" if near else "Remove it."
            yield Problem(option, f"{name}: `parquet` has no setting `{key}`.", f"it takes: {', '.join(PARQUET)}.", mend)
        elif not isinstance(value, PARQUET[key]) or value == "":
            wants = "true or false" if PARQUET[key] is bool else "a name, in quotes"
            yield Problem(option, f"{name}: `{key}` of `parquet` is {value!r}.", f"it takes {wants}.", "Correct it.")
    if ("width_column" in said) != ("height_column" in said):
        what = f"{name}: `parquet` names only one of `width_column` and `height_column`."
        yield Problem(option, what, "a size is both.", "Add the other, or remove both: sizes are then read from the headers.")
    path = said.get("path")
    if isinstance(path, str) and path:
        yield from _table_file(option, name, path)


def _table_file(option: str, name: str, written: str) -> Iterator[Problem]:
    path = Path(written).expanduser()
    what = f"{name}: `path` of `parquet` is {written}"
    if not path.exists():
        mend = "Correct the path; a relative one is from the working directory."
        yield Problem(option, f"{what}, which does not exist.", f"looked for {path.absolute()}.", mend)
    elif path.is_file() and path.suffix.lower() not in TABLES:
        why = f"a table is a file ending in {', '.join(TABLES)}, or a folder of .parquet files."
        yield Problem(option, f"{what}.", why, "Name such a file.")
