"""Dataset entries: what one object of `multidatabackend.json` may say.

Only types and limits stand here; spelling quirks are `load.py`'s, derived defaults `derive.py`'s.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from simpletuner.config.options import Section, option

__all__ = ["ENTRIES", "ImageDataset", "TextEmbedsDataset"]

Positive = Annotated[float, Field(gt=0)]
Edge = Annotated[int, Field(gt=0)]


class ImageDataset(Section):
    """A set of pictures to train on."""

    id: str = option(level="essential", min_length=1)
    """Name of the set, unique in the file; it names caches and ledger."""

    dataset_type: Literal["image"] = option("image")
    """What the entry is."""

    type: Literal["local", "aws", "csv", "huggingface"] = option("local")
    """Where the pictures are kept: in a folder, in a bucket of S3 or of a service that speaks like it (`aws`), on the web, by
    a CSV of URLs (`csv`), or in a dataset of the `datasets` library (`huggingface`)."""

    disabled: bool = option(False)
    """Leave this entry out."""

    # where the pictures are kept (wrong combinations: `rules_stores.py`)

    instance_data_dir: str | None = option(None, level="essential", path="input", when="type=local")
    """Folder of pictures, searched with its sub-folders. Nothing is ever written into it."""

    aws_bucket_name: str | None = option(None, level="essential", when="type=aws")
    """The bucket. Nothing is ever written into it."""

    aws_data_prefix: str = option("", when="type=aws")
    """Where in the bucket the pictures are, as a folder's path. Unset: everywhere."""

    aws_region_name: str | None = option(None, when="type=aws")
    """The bucket's region. Unset: what the machine's AWS configuration says."""

    aws_endpoint_url: str | None = option(None, when="type=aws")
    """The service's address, if it is not Amazon's."""

    aws_access_key_id: str | None = option(None, when="type=aws")
    """Best written as "{env:NAME}": it is never shown or saved. Unset: found as every AWS tool finds it."""

    aws_secret_access_key: str | None = option(None, when="type=aws")
    """Goes with `aws_access_key_id`."""

    csv_file: str | None = option(None, level="essential", path="input", when="type=csv")
    """A CSV in UTF-8 whose first line names its columns."""

    csv_url_column: str = option("url", when="type=csv")
    """The column of the pictures' URLs."""

    csv_caption_column: str = option("caption", when="type=csv and caption_strategy=csv")
    """The column of their captions."""

    csv_cache_dir: str | None = option(None, path="output", when="type=csv")
    """Folder that pictures are downloaded into, once. Unset: `<output_dir>/cache/csv/<id>`."""

    csv_allow_private_addresses: bool = option(False, when="type=csv")
    """Also download from addresses within a private network, or of this machine."""

    dataset_name: str | None = option(None, level="essential", when="type=huggingface")
    """A dataset on the hub (`owner/name`), a folder of such files, or one that `save_to_disk` made."""

    split: str = option("train", when="type=huggingface")
    """The part of it that is used."""

    revision: str | None = option(None, when="type=huggingface")
    """Branch, tag or commit on the hub."""

    image_column: str = option("image", when="type=huggingface")
    """The column of the pictures."""

    caption_column: str = option("caption", when="type=huggingface and caption_strategy=huggingface")
    """The column of their captions: text, or lists of alternatives."""

    metadata_backend: Literal["discovery", "parquet"] = option("discovery", when="type=local|aws")
    """What is known of the pictures beforehand: nothing (`discovery`), or what a Parquet or JSON Lines table says."""

    parquet: dict[str, Any] = option({}, when="metadata_backend=parquet")
    """The table: `path` (.parquet, .jsonl or a folder of .parquet files), `filename_column` (paths within the store, with their
    ending only if `identifier_includes_extension` is true), `caption_column` and `fallback_caption_column` (text, or lists of
    alternatives), `width_column` and `height_column` (as the picture stands upright; headers are then not read)."""

    # how they are seen

    resolution: Positive | tuple[Edge, Edge] | None = option(None, level="essential")
    """Training size: an edge or megapixels as `resolution_type` says, or a size as "1024x768". Unset: the model's own edge."""

    resolution_type: Literal["pixel", "area", "pixel_area"] = option("pixel_area")
    """`pixel`: the shorter edge. `area`: megapixels. `pixel_area`: an edge whose square is the area."""

    crop: bool = option(False)
    """Cut pictures to `crop_aspect`. Off: keep their shape and trim only what alignment asks."""

    crop_aspect: Literal["square", "preserve", "closest", "random"] = option("square", when="crop=true")
    """Shape of the cut, unless `resolution` is a size; `closest` and `random` choose from `crop_aspect_buckets`."""

    crop_style: Literal["center", "random", "corner"] = option("random", when="crop=true")
    """Where the cut lies; `random` is fixed for each file, `corner` is the upper left."""

    crop_aspect_buckets: tuple[Positive, ...] = option((), when="crop=true and crop_aspect=closest|random")
    """Aspects (width / height) to choose from."""

    minimum_image_size: float = option(0, ge=0)
    """Exclude smaller pictures, in the unit of `resolution_type`; 0 means no minimum."""

    maximum_image_size: float | None = option(None, gt=0)
    """Larger pictures are first reduced to `target_downsample_size`, so that crops show more than a corner."""

    target_downsample_size: float | None = option(None, gt=0)
    """What `maximum_image_size` reduces to, never below what covers the bucket. They come as a pair."""

    minimum_aspect_ratio: float = option(0.25, gt=0)
    """Exclude pictures narrower than this (width / height)."""

    maximum_aspect_ratio: float = option(4.0, gt=0)
    """Exclude pictures wider than this (width / height)."""

    caption_strategy: Literal["filename", "textfile", "instanceprompt", "parquet", "csv", "huggingface"] = option(
        "filename", level="essential"
    )
    """Where captions come from: the file's name, a .txt beside it (each line an alternative), `instance_prompt`, or a column
    of the table (`parquet`), of the list of URLs (`csv`) or of the dataset (`huggingface`)."""

    instance_prompt: str | None = option(None, when="caption_strategy=instanceprompt or caption_missing=instance_prompt")
    """The caption of every picture under `instanceprompt`, or of those without one under `caption_missing=instance_prompt`."""

    disable_multiline_split: bool = option(False, when="caption_strategy=textfile")
    """Take a caption file as one caption, line breaks included."""

    caption_missing: Literal["error", "skip", "instance_prompt"] = option("error", when="caption_strategy!=instanceprompt")
    """What a picture without a caption means."""

    repeats: int = option(0, ge=0, also=("num_repeats",))
    """Extra passes over this set in each epoch; 0 is one pass."""

    is_regularisation_data: bool = option(False, also=("is_regularization_data",))
    """Hold the model to the base's own answers on this set (adapters); in full tuning it is trained like any other."""

    skip_file_discovery: str = option("")
    """Comma list of vae, aspect, metadata, text: if given, the last manifest is reused without searching the folder."""

    cache_dir_vae: str | None = option(None, path="output")
    """Folder for encoded latents and the manifest. Unset: `<output_dir>/cache/vae/<id>`."""

    vae_batch_size: int = option(4, ge=1)
    """Pictures encoded at once; never a limit on the size of the set."""

    write_batch_size: int = option(128, ge=1)
    """Items in one shard of the cache."""


class TextEmbedsDataset(Section):
    """Where encoded prompts are kept."""

    id: str = option("text-embeds", min_length=1)
    """Name of the entry, unique in the file."""

    dataset_type: Literal["text_embeds"] = option("text_embeds")
    """What the entry is."""

    type: Literal["local"] = option("local")
    """Where the cache is kept."""

    disabled: bool = option(False)
    """Leave this entry out."""

    default: bool = option(True)
    """Use it for every set and for validation prompts."""

    cache_dir: str | None = option(None, path="output")
    """Folder for encoded prompts. Unset: `<output_dir>/cache/text`."""

    text_encoder_batch_size: int = option(8, ge=1)
    """Prompts encoded at once."""

    write_batch_size: int = option(128, ge=1)
    """Prompts in one shard of the cache."""


ENTRIES: dict[str, type[Section]] = {"image": ImageDataset, "text_embeds": TextEmbedsDataset}
"""`dataset_type` -> what such an entry may say."""
