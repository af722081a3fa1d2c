"""Dataset entries: what one object of `multidatabackend.json` may say.

Only types and limits stand here; spelling quirks are `load.py`'s, derived defaults `derive.py`'s.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from simpletuner.config.caption_shuffle import CaptionShuffle
from simpletuner.config.options import Section, option

__all__ = ["ENTRIES", "ConditioningDataset", "Filled", "ImageDataset", "ImageEmbedsDataset", "TextEmbedsDataset"]

Positive = Annotated[float, Field(gt=0)]
Edge = Annotated[int, Field(gt=0)]


Filled = Literal["before", "ondemand", "never"]
"""When a cache is filled: before the training; while training (`..._ondemand`); not at all (`..._disable`)."""


def _filled(*, is_never: bool, is_ondemand: bool) -> Filled:
    return "never" if is_never else "ondemand" if is_ondemand else "before"


class ImageDataset(Section):
    """A set of pictures: to train on (`image`), or to judge by and never to train on (`eval`)."""

    id: str = option(level="essential", min_length=1)
    """Name of the set, unique in the file; it names caches and ledger."""

    dataset_type: Literal["image", "eval"] = option("image")
    """`image`: trained on. `eval`: never trained on; the loss on it is told every so often (`eval_steps_interval`)."""

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

    resolution: Positive | tuple[Edge, Edge] | None = option(None, level="essential", when="bucket_resolutions=unset")
    """Training size: an edge or megapixels as `resolution_type` says, or a size as "1024x768". Unset: the model's own edge."""

    resolution_type: Literal["pixel", "area", "pixel_area"] = option("pixel_area")
    """`pixel`: the shorter edge. `area`: megapixels. `pixel_area`: an edge whose square is the area."""

    crop: bool = option(False)
    """Cut pictures to `crop_aspect`. Off: keep their shape and trim only what alignment asks."""

    bucket_resolutions: tuple[tuple[Edge, Edge], ...] | None = option(None)
    """Exactly the sizes to train at, such as ["1024x1024", "896x1152"]. A picture goes to the nearest aspect, is scaled to
    cover that size and cut; of sizes of one aspect, to the largest that needs no enlarging. Off the model's grid they snap."""

    crop_aspect: Literal["square", "preserve", "closest", "random"] | None = option(None, when="crop=true")
    """Shape of the cut, unless `resolution` is a size; `closest` and `random` choose from `crop_aspect_buckets`. Unset:
    `square`, or with `bucket_resolutions` the picture's own. One that is set is rounded to the nearest of those."""

    crop_style: Literal["center", "random", "corner"] = option("random", when="crop=true")
    """Where the cut lies; `random` is fixed for each file, `corner` is the upper left."""

    crop_aspect_buckets: tuple[Positive, ...] | dict[Positive, Positive] = option(
        (), when="crop=true and crop_aspect=closest|random"
    )
    """Aspects (width / height) to choose from: [0.75, 1, 1.5], or for `random` with weights: {"1": 3, "0.75": 1}."""

    minimum_edge_px: int = option(16, ge=1)
    """Exclude pictures whose shorter side has fewer pixels, whatever else is set: there is nothing to learn from them."""

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

    instance_prompt: str | None = option(
        None,
        when="caption_strategy=instanceprompt or caption_missing=instance_prompt or prepend_instance_prompt=true "
        "or only_instance_prompt=true",
    )
    """The caption of every picture under `instanceprompt`, or of those without one under `caption_missing=instance_prompt`;
    what `prepend_instance_prompt` puts first."""

    prepend_instance_prompt: bool = option(False, when="caption_strategy!=instanceprompt and only_instance_prompt=false")
    """Begin every caption with `instance_prompt` and a space."""

    only_instance_prompt: bool = option(False, when="caption_strategy!=instanceprompt")
    """Caption every picture with `instance_prompt` alone, as `instanceprompt` does; other captions are not read."""

    caption_shuffle: bool | CaptionShuffle = option(
        False, when="caption_strategy!=instanceprompt and only_instance_prompt=false"
    )
    """Train tags in other orders too: each caption gets variants with its comma-separated parts shuffled, encoded ahead like
    any caption, and one is drawn at each visit. `true` is one variant beside the original; the object's keys say more: `count`
    (1) variants, `position_start` (0) tags that stay in front, `include_original` (true), `split_on` (comma, space or period),
    `seed` (0)."""

    disable_multiline_split: bool = option(False, when="caption_strategy=textfile")
    """Take a caption file as one caption, line breaks included."""

    caption_missing: Literal["error", "skip", "instance_prompt"] = option("error", when="caption_strategy!=instanceprompt")
    """What a picture without a caption means."""

    repeats: int = option(0, ge=0, also=("num_repeats",), when="dataset_type=image")
    """Extra passes over this set in each epoch; 0 is one pass."""

    max_num_samples: int | None = option(None, ge=1)
    """Use at most so many of the usable pictures; which ones is drawn by their names, and stays when others are added."""

    train_batch_size: int | None = option(None, ge=1)
    """Micro-batch of this set. Unset: `train_batch_size` of the main config."""

    probability: float = option(1.0, gt=0, when="dataset_type=image")
    """Weight of this set among those drawn from, beside its size (`data_backend_sampling`): a set of 0.5 lasts twice as long
    into the epoch. Every picture still comes in every epoch."""

    start_epoch: int = option(1, ge=0, when="dataset_type=image")
    """First epoch that draws from this set, counted from 1."""

    end_epoch: int = option(0, ge=0, when="dataset_type=image")
    """Last epoch that draws from this set; 0 is without end."""

    start_step: int = option(0, ge=0, when="dataset_type=image")
    """First optimiser step that draws from this set, counted from 1; its share of the epoch until then is passed over."""

    end_step: int = option(0, ge=0, when="dataset_type=image")
    """Last optimiser step that draws from this set; 0 is without end."""

    is_regularisation_data: bool = option(False, also=("is_regularization_data",), when="dataset_type=image")
    """Hold the model to the base's own answers on this set (adapters); in full tuning it is trained like any other."""

    skip_file_discovery: str = option("")
    """Comma list of vae, aspect, metadata, text: if given, the last manifest is reused without searching the folder."""

    preserve_data_backend_cache: bool = option(False)
    """Reuse the last manifest without searching the folder, as `skip_file_discovery` does."""

    cache_dir_vae: str | None = option(None, path="output")
    """Folder for encoded latents and the manifest. Unset: `<output_dir>/cache/vae/<id>`."""

    image_embeds: str | None = option(None)
    """Id of the `image_embeds` entry in whose folder latents and the manifest are kept. Unset: `cache_dir_vae`, else the entry
    that is `default`, if there is one."""

    text_embeds: str | None = option(None)
    """Id of the `text_embeds` entry that keeps the captions' embeds: all sets share one, so there is nothing to choose."""

    conditioning_data: str | None = option(None, when="dataset_type=image")
    """Id of the `conditioning` entry that holds its masks: a mask has its picture's path and name, whatever their endings.
    Pictures without a mask are left out."""

    vae_batch_size: int = option(4, ge=1)
    """Pictures encoded at once; never a limit on the size of the set. With `vae_cache_disable` 1 encodes no more than is
    trained on next."""

    vae_cache_disable: bool = option(False)
    """Encode pictures while training, and write no latents: the image encoder stays in memory beside the denoiser. What
    trains is the same to the bit. A picture that proves unreadable is replaced by the next of its bucket, and told."""

    vae_cache_ondemand: bool = option(False)
    """Encode pictures while training, when they are first trained on, into the cache. Otherwise like `vae_cache_disable`."""

    read_batch_size: int | None = option(None, ge=1)
    """At most so many pictures are read and decoded ahead of the image encoder, but the next `vae_batch_size` in any case.
    Unset: twice as many as there are reading threads."""

    write_batch_size: int = option(128, ge=1)
    """Items in one shard of the cache."""

    @field_validator("crop_style", mode="before")
    @classmethod
    def _without_faces(cls, value: Any) -> Any:
        if str(value).lower() == "face":
            raise ValueError(
                "A cut is placed by a picture's size alone, before anything is decoded, and no detector of faces is among our "
                "libraries: cut the faces out beforehand, or take center."
            )
        return value

    @property
    def filled(self) -> Filled:
        """When its latents come into their cache."""
        return _filled(is_never=self.vae_cache_disable, is_ondemand=self.vae_cache_ondemand)


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
    """Prompts encoded at once. With `text_cache_disable` 1 encodes no more than is trained on next."""

    text_cache_disable: bool = option(False)
    """Encode captions while training, and write none: all text encoders stay in memory beside the denoiser. What trains is
    the same to the bit."""

    text_cache_ondemand: bool = option(False)
    """Encode captions while training, when they are first told, into the cache. Otherwise like `text_cache_disable`."""

    write_batch_size: int = option(128, ge=1)
    """Prompts in one shard of the cache."""

    @property
    def filled(self) -> Filled:
        """When embeds come into their cache."""
        return _filled(is_never=self.text_cache_disable, is_ondemand=self.text_cache_ondemand)


class ImageEmbedsDataset(Section):
    """Where the latents of those sets are kept that name it by `image_embeds`."""

    id: str = option(level="essential", min_length=1)
    """Name of the entry, unique in the file."""

    dataset_type: Literal["image_embeds"] = option("image_embeds")
    """What the entry is."""

    type: Literal["local"] = option("local")
    """Where the cache is kept."""

    disabled: bool = option(False)
    """Leave this entry out."""

    default: bool = option(False)
    """Use it also for every set that says neither `image_embeds` nor `cache_dir_vae`."""

    cache_dir: str | None = option(None, path="output")
    """Folder for encoded latents and manifests, of several sets too. Unset: `<output_dir>/cache/vae/<id>`."""

    write_batch_size: int = option(128, ge=1)
    """Latents in one shard of the cache, for the sets that do not say it themselves."""


class ConditioningDataset(Section):
    """Pictures that go with those of a set: masks that say where its loss counts."""

    id: str = option(level="essential", min_length=1)
    """Name of the entry, unique in the file; image sets name it by `conditioning_data`."""

    dataset_type: Literal["conditioning"] = option("conditioning")
    """What the entry is."""

    type: Literal["local"] = option("local")
    """Where the pictures are kept."""

    disabled: bool = option(False)
    """Leave this entry out."""

    conditioning_type: Literal["mask"] = option("mask", level="essential")
    """`mask`: the loss counts where the first channel is white, not at all where it is black, and by shares between."""

    instance_data_dir: str = option(level="essential", path="input", min_length=1)
    """Folder of masks, in sub-folders as the pictures. A mask may be smaller than its picture, but must have its shape; it is
    cropped and scaled with it. Nothing is ever written into it."""


ENTRIES: dict[str, type[Section]] = {
    "image": ImageDataset,
    "eval": ImageDataset,
    "text_embeds": TextEmbedsDataset,
    "image_embeds": ImageEmbedsDataset,
    "conditioning": ConditioningDataset,
}
"""`dataset_type` -> what such an entry may say."""
