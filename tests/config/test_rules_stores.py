"""Where a dataset says its pictures are kept, and what is wrong with it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from simpletuner.config.resolved import explain, resolved

PARQUET = {"path": "table.parquet", "filename_column": "id", "caption_column": "caption"}


@pytest.fixture(autouse=True)
def _table(project) -> None:
    project.write("table.parquet", "")
    project.write("table.xlsx", "")
    project.write("list.csv", "url")


def test_a_table_is_taken_as_written(project):
    project.dataset(metadata_backend="parquet", caption_strategy="parquet", parquet=PARQUET)
    [dataset] = project.run().datasets
    assert dataset.parquet == PARQUET


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"caption_strategy": "parquet"}, ['"parquet", but there is no table']),
        ({"metadata_backend": "parquet"}, ["`parquet` has no `path`", "`parquet` has no `filename_column`"]),
        ({"caption_strategy": "parquet", "parquet": {"caption_column": None}}, ["has no `caption_column`"]),
        ({"parquet": {"filenam_column": "id"}}, ["no setting `filenam_column`", "Did you mean `filename_column`"]),
        ({"parquet": {"identifier_includes_extension": "yes"}}, ["takes true or false"]),
        ({"parquet": {"caption_column": 3}}, ["`caption_column` of `parquet` is 3"]),
        ({"parquet": {"width_column": "w"}}, ["names only one of"]),
        ({"parquet": {"path": "none.parquet"}}, ["none.parquet, which does not exist"]),
        ({"parquet": {"path": "table.xlsx"}}, ["ending in .parquet, .jsonl, .json"]),
    ],
)
def test_what_is_wrong_with_a_table_is_told(project, keys: dict[str, Any], words: list[str]):
    if "parquet" in keys:
        table = {key: value for key, value in {**PARQUET, **keys["parquet"]}.items() if value is not None}
        keys = {"metadata_backend": "parquet", **keys, "parquet": table}
    project.dataset(**keys)
    problems = project.problems()
    assert len(problems) == (2 if len(words) == 2 and "has no" in words[1] else 1)
    assert all(any(word in problem for problem in problems) for word in words)


def test_a_table_that_is_not_asked_for_is_told(project):
    project.dataset(parquet=PARQUET)
    assert any("`parquet` has no effect here" in notice for notice in project.run().notices)


CSV = {"instance_data_dir": None, "type": "csv", "csv_file": "list.csv"}
ROWS = {"instance_data_dir": None, "type": "huggingface"}
AWS = {"instance_data_dir": None, "type": "aws", "aws_bucket_name": "pictures"}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({**AWS, "aws_bucket_name": None}, ["`aws_bucket_name` is missing"]),
        ({**AWS, "instance_data_dir": "datasets/pictures"}, ["`instance_data_dir` is set", 'Set "type" to "local"']),
        ({"aws_bucket_name": "pictures"}, ["`aws_bucket_name` is set", 'Set "type" to "aws"']),
        ({**AWS, "aws_secret_access_key": "abc"}, ["`aws_access_key_id` is missing"]),
        ({**AWS, "aws_access_key_id": "abc", "aws_secret_access_key": "***"}, ['`aws_secret_access_key` is "***"']),
        ({**AWS, "aws_endpoint_url": "localhost:9000"}, ["`aws_endpoint_url` is localhost:9000", "begins with http://"]),
        ({"instance_data_dir": None}, ["`instance_data_dir` is missing"]),
        ({**CSV, "csv_file": None}, ["`csv_file` is missing"]),
        ({**CSV, "instance_data_dir": "datasets/pictures"}, ["`instance_data_dir` is set", 'Set "type" to "local"']),
        ({**CSV, "caption_strategy": "textfile"}, ["no text files beside", 'Set it to "csv"']),
        ({**CSV, "metadata_backend": "parquet", "parquet": PARQUET}, ["`metadata_backend` is set", '"local, or aws"']),
        ({"caption_strategy": "csv"}, ['`type` is "local"', 'Set "type" to "csv"']),
        (ROWS, ["`dataset_name` is missing"]),
        ({**ROWS, "dataset_name": "datasets", "revision": "main"}, ["`revision` is main", "is a folder"]),
        ({**CSV, "split": "validation"}, ["`split` is set", 'Set "type" to "huggingface"']),
    ],
)
def test_keys_that_do_not_go_with_a_store_are_one_clear_problem(project, keys: dict[str, Any], words: list[str]):
    project.dataset(**keys)
    problem = project.problem()
    assert all(word in problem for word in words)


def test_a_buckets_secrets_are_saved_nowhere(project):
    secrets = {"aws_access_key_id": "AKIDEXAMPLE", "aws_secret_access_key": "{env:AWS_SECRET}"}
    project.dataset(**AWS, **secrets)
    run = project.run(environ={"AWS_SECRET": "wJalrXUtnFEMI"})
    assert run.datasets[0].aws_secret_access_key == "wJalrXUtnFEMI"
    texts = json.dumps(resolved(run)) + explain(run) + "".join(run.notices)
    assert '"aws_access_key_id": "***"' in texts
    assert '"aws_secret_access_key": "{env:AWS_SECRET}"' in texts
    assert "AKIDEXAMPLE" not in texts
    assert "wJalrXUtnFEMI" not in texts


def test_nothing_is_downloaded_into_a_folder_of_pictures_or_cached_in_a_saved_dataset_whatever_links_lead_there(project):
    (project.root / "link").symlink_to(project.root / "datasets" / "pictures")
    pictures = {"id": "pictures", "instance_data_dir": "datasets/pictures"}
    project.datasets([pictures, {"id": "web", **CSV, "csv_cache_dir": "link/web"}])
    assert "`web.csv_cache_dir` is link/web, within the pictures of dataset `pictures`" in project.problem()
    (project.root / "rows").mkdir()
    said = {"type": "huggingface", "dataset_name": "rows", "caption_strategy": "huggingface", "instance_data_dir": None}
    project.datasets([{"id": "rows", **said, "cache_dir_vae": "rows/cache"}])
    assert "`rows.cache_dir_vae` is rows/cache, within the pictures of dataset `rows`" in project.problem()


def test_downloads_have_a_folder_of_their_own(project):
    project.dataset(**CSV)
    assert project.run().datasets[0].csv_cache_dir == "output/cache/csv/pictures"
    project.dataset(**CSV, csv_cache_dir="elsewhere")
    assert project.run().datasets[0].csv_cache_dir == "elsewhere"


def test_a_datasets_revision_is_not_the_models(project):
    project.dataset(instance_data_dir=None, type="huggingface", dataset_name="owner/pictures", revision="v2")
    run = project.run("--revision", "main")
    assert (run.datasets[0].revision, run.model.revision) == ("v2", "main")
    project.dataset()
    assert project.run("--revision", "main").datasets[0].revision is None
