"""Defaults that follow from other values or from the machine: pure functions of what is known. What is written always wins."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from simpletuner.config.catalogue import OPTIMIZERS
from simpletuner.config.run import Dtypes, Hardware
from simpletuner.config.vocabulary import FamilyFacts

__all__ = [
    "DEFAULT_STEPS",
    "Derived",
    "Known",
    "derive",
    "derive_image",
    "derive_image_embeds",
    "derive_text_embeds",
    "dtypes",
    "repository_name",
]

DEFAULT_STEPS = 2000
DEFAULT_WARMUP_STEPS = 100

DTYPES = {"no": "float32", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Torch's names of the formats that options name."""


@dataclass(frozen=True)
class Known:
    """Core and family defaults with what was written over them; None where nothing is known yet."""

    values: Mapping[str, Any]
    written: Set[str]
    """Options that the user wrote."""
    family: FamilyFacts


@dataclass(frozen=True)
class Derived:
    """What follows."""

    values: Mapping[str, Any]
    notices: tuple[str, ...]


def derive(known: Known, hardware: Hardware) -> Derived:
    """Values for options that are still unset, and what the user should be told of them."""
    values = dict(known.values)
    for name, value in _steps(values, hardware):
        if values[name] is None or (name == "max_train_steps" and values[name] == 0):
            values[name] = value
    fresh = {name: value for name, value in values.items() if value != known.values[name]}
    if _wants_flavour(values):
        fresh["model_flavour"] = known.family.default_flavour
    return Derived(fresh, tuple(_notices(known, {**values, **fresh}, hardware)))


def _steps(values: Mapping[str, Any], hardware: Hardware) -> Iterator[tuple[str, Any]]:
    """(option, what it is if unset); each may look at those before it, so the order matters."""
    yield "mixed_precision", "bf16" if hardware.has_bf16 else "no"
    yield "optimizer", "adamw_bf16" if values["mixed_precision"] == "bf16" else "torch-adamw"
    if values["base_model_precision"] != "no_change":
        without = "bf16" if hardware.has_bf16 else "fp32"
        yield "base_model_default_dtype", without if values["mixed_precision"] == "no" else values["mixed_precision"]
    yield "learning_rate", _rate(values)
    yield "lr_warmup_steps", DEFAULT_WARMUP_STEPS if values["lr_scheduler"] == "constant_with_warmup" else 0
    yield "lora_alpha", float(values["lora_rank"])
    if not values["num_train_epochs"]:
        yield "max_train_steps", DEFAULT_STEPS
    yield "validation_seed", values["seed"]
    yield "validation_step_interval", 0 if values["validation_epoch_interval"] else values["checkpoint_step_interval"]
    yield "eval_steps_interval", 0 if values["eval_epoch_interval"] else values["checkpoint_step_interval"]
    folder = PurePath(values["output_dir"]).name or "simpletuner"
    if "wandb" in values["report_to"]:
        yield "tracker_run_name", folder
    if values["push_to_hub"]:
        yield "hub_model_id", repository_name(folder)


def repository_name(folder: str) -> str:
    """A folder's name as the hub takes it: ASCII letters, digits, ".", "-", "_", none of them first or last, none doubled."""
    plain = re.sub(r"[^A-Za-z0-9._-]+|[-.]{2,}", "-", folder).strip("-._")
    return re.sub(r"-{2,}", "-", plain)[:96].strip("-._") or "simpletuner"


def _rate(values: Mapping[str, Any]) -> float:
    row = OPTIMIZERS.get(values["optimizer"])
    if row and row.rate is not None:
        return row.rate
    usual = 1e-4 if values["model_type"] == "lora" else 1e-5
    return round(usual * row.rate_factor, 12) if row else usual  # a fifth of 1e-5 would be 2.0000000000000003e-06


def _wants_flavour(values: Mapping[str, Any]) -> bool:
    """A path says which model it is; without one a flavour does."""
    return values["model_flavour"] is None and values["pretrained_model_name_or_path"] is None


def _notices(known: Known, values: Mapping[str, Any], hardware: Hardware) -> Iterator[str]:
    written, machine = known.written, hardware.name or hardware.device
    if values["mixed_precision"] == "no" and known.values["mixed_precision"] is None:
        other = ' "fp16" is quicker there, and needs half the memory.' if hardware.device == "cuda" else ""
        yield f"mixed_precision is no: this machine ({machine}) has no fast bf16.{other}"
    if values["mixed_precision"] == "bf16" and not hardware.has_bf16:
        yield f"mixed_precision is bf16, as asked; this machine ({machine}) has no fast bf16, so steps will be slow."
    if values["optimizer"] == "adamw_bf16" and (values["mixed_precision"] != "bf16" or known.family.keeps_float32):
        is_bf16 = values["mixed_precision"] == "bf16"
        why = f"{known.family.title} trains well in no other" if is_bf16 else f"mixed_precision is {values['mixed_precision']}"
        yield f"adamw_bf16 keeps float32 weights here, since {why}."
    yield from _optimizer_notices(values, hardware)
    if "model_flavour" not in written and values["model_flavour"] is not None:
        yield f"model_flavour is {values['model_flavour']}: no model was named."
    repositories = {flavour.repository for flavour in known.family.flavours.values()}
    if {"model_flavour", "pretrained_model_name_or_path"} <= written and len(repositories) > 1:
        yield f"pretrained_model_name_or_path wins over the flavour {values['model_flavour']}."
    if values["model_type"] == "lora" and values["lora_type"] == "lycoris" and values["lycoris_config"] is None:
        yield "lycoris_config is not set: LoKr of factor 16 with whole factors, in attention and feed-forward layers."
    yield from _length_notices(values, is_written=bool(known.values["max_train_steps"]))


def _optimizer_notices(values: Mapping[str, Any], hardware: Hardware) -> Iterator[str]:
    name, schedule, rate = values["optimizer"], values["lr_scheduler"], values["learning_rate"]
    row = OPTIMIZERS.get(name)
    if row is None:
        return
    if row.unpaged and hardware.device != "cuda":
        yield f"{name} pages its state by CUDA; on this machine ({hardware.device}) it is {row.unpaged}, with the same numbers."
    if row.averages and not schedule.startswith("constant"):
        yield f"{name} averages its weights in place of a falling rate: lr_scheduler constant is advised, not {schedule}."
    if row.rate is not None and rate < row.rate / 10:
        yield f"{name} finds its own step size, which learning_rate scales: {row.rate:g} is advised, not {rate:g}."


def _length_notices(values: Mapping[str, Any], *, is_written: bool) -> Iterator[str]:
    steps, epochs, warmup = values["max_train_steps"], values["num_train_epochs"], values["lr_warmup_steps"]
    if steps and epochs:
        yield f"Training ends after {steps} steps or {epochs:g} epochs, whichever comes first."
    if not is_written and not epochs:
        yield f"Training ends after {DEFAULT_STEPS} steps: neither max_train_steps nor num_train_epochs is set."
    if steps and warmup > steps and values["lr_scheduler"] != "constant":
        yield f"lr_warmup_steps {warmup} is more than max_train_steps {steps}: the full learning rate is never reached."


def derive_image(entry: Mapping[str, Any], output_dir: str) -> dict[str, Any]:
    """What an image set leaves unset."""
    name = _folder_name(entry["id"])
    folders = {"cache_dir_vae": f"{output_dir}/cache/vae/{name}"}
    if entry.get("type") == "csv":
        folders["csv_cache_dir"] = f"{output_dir}/cache/csv/{name}"
    return {key: folder for key, folder in folders.items() if entry.get(key) is None}


def derive_text_embeds(entry: Mapping[str, Any], output_dir: str) -> dict[str, Any]:
    """What a text cache leaves unset."""
    return {} if entry.get("cache_dir") is not None else {"cache_dir": f"{output_dir}/cache/text"}


def derive_image_embeds(entry: Mapping[str, Any], output_dir: str) -> dict[str, Any]:
    """What a place for latents leaves unset."""
    return {} if entry.get("cache_dir") is not None else {"cache_dir": f"{output_dir}/cache/vae/{_folder_name(entry['id'])}"}


def _folder_name(name: str) -> str:
    """`name` without what some file system forbids in a folder's name."""
    return re.sub(r'[\\/:*?"<>|\x00-\x1f]', "_", name).strip(". ") or "_"


def dtypes(values: Mapping[str, Any], *, keeps_float32: bool = False) -> Dtypes:
    """Number formats of a run, whose options are derived already. `keeps_float32` is the family's."""
    mixed = values["mixed_precision"]
    row = OPTIMIZERS.get(values["optimizer"])
    trained = row.trained_dtype if row and mixed == "bf16" else "float32"
    latents = "float32" if mixed == "no" else "float16"
    text = "bfloat16" if mixed == "bf16" else "float32"  # in float16 T5 and Gemma overflow
    is_quantised = values["base_model_precision"] != "no_change"
    if keeps_float32:
        base = DTYPES[values["base_model_default_dtype"]] if is_quantised else "float32"
        autocast = DTYPES[mixed] if mixed != "no" and base == "float32" else None
        return Dtypes(base=base, trained="float32", autocast=autocast, text=text, latents=latents)
    if values["model_type"] == "lora":  # PEFT casts between float32 adapters and a half-precision base
        base = DTYPES[values["base_model_default_dtype"] if is_quantised else mixed]
        return Dtypes(base=base, trained=trained, autocast=None, text=text, latents=latents)
    autocast = DTYPES[mixed] if mixed != "no" and trained == "float32" else None
    return Dtypes(base=trained, trained=trained, autocast=autocast, text=text, latents=latents)
