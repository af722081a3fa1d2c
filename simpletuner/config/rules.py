"""What is wrong between options, as pure functions `Run` -> problems; and the one place that lets a user override."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from simpletuner.config import rules_caches, rules_memory, rules_publishing, rules_stores
from simpletuner.config.catalogue import OPTIMIZERS, OptimizerRow
from simpletuner.config.datasets import ImageDataset
from simpletuner.config.hardware import COMPILERS, has_compiler
from simpletuner.config.lycoris import lycoris_problems
from simpletuner.config.rules_precision import check_precision
from simpletuner.config.run import Hardware, Run
from simpletuner.config.spelling import is_size_list, nearest
from simpletuner.config.vocabulary import FamilyFacts
from simpletuner.config.webhooks import webhook_problems
from simpletuner.errors import Problem, missing

__all__ = ["check", "check_adapter", "judge"]

MANIFESTS = ("vae", "aspect", "metadata", "text")
"""What `skip_file_discovery` may name."""


def judge(run: Run, problems: Iterable[Problem]) -> tuple[list[Problem], list[str]]:
    """(what refuses the run, what is only a warning): `i_know_what_i_am_doing` is obeyed here and nowhere else."""
    found = list(problems)
    waived = [problem for problem in found if problem.overridable and run.training.i_know_what_i_am_doing]
    return [problem for problem in found if problem not in waived], [_warning(problem) for problem in waived]


def _warning(problem: Problem) -> str:
    return f"{problem.what} {problem.why}".strip() + " Going on, since i_know_what_i_am_doing is set."


def check(run: Run) -> Iterator[Problem]:
    """Everything that the sections' types cannot see."""
    yield from _flow(run)
    yield from _optimizer(run)
    yield from check_precision(run)
    yield from _validation(run)
    yield from _folders(run)
    yield from _datasets(run)
    yield from _text_cache(run)
    yield from rules_caches.check(run)
    yield from rules_memory.check(run)
    yield from rules_publishing.check(run)
    yield from webhook_problems(run)
    for dataset in run.picture_sets:
        yield from rules_stores.check(dataset)
        yield from _captions(dataset)
        yield from _sizes(dataset)
        yield from _crops(dataset)
        yield from _spans(dataset)
        yield from _discovery(dataset)


def check_adapter(run: Run, family: FamilyFacts) -> Iterator[Problem]:
    """What a family's layers have to say to the adapter that is asked for."""
    adapter = run.adapter
    if run.model.model_type != "lora":
        return
    if adapter.lora_type == "standard" and adapter.lora_target_preset not in family.adapter_presets:
        near = nearest(adapter.lora_target_preset, family.adapter_presets)
        what = f'Unknown `lora_target_preset` "{adapter.lora_target_preset}".'
        why = f"{run.model.model_family} has: {', '.join(family.adapter_presets)}."
        yield Problem("lora_target_preset", what, why, f'Did you mean "{near}"?' if near else "Take one of these.")
    if adapter.peft_lora_target_modules == ():
        what = "`peft_lora_target_modules` is an empty list."
        yield Problem("peft_lora_target_modules", what, "no layer would get an adapter.", "Name layers, or remove it.")
    if adapter.lora_type == "lycoris" and (problem := missing("lycoris", option="lora_type=lycoris", extra="lycoris")):
        yield problem
    yield from lycoris_problems(run, family.lycoris_presets)


def _flow(run: Run) -> Iterator[Problem]:
    if run.flow.flow_use_uniform_schedule and run.flow.flow_use_beta_schedule:
        yield Problem(
            "flow_use_beta_schedule",
            "`flow_use_uniform_schedule` and `flow_use_beta_schedule` are both true.",
            "noise levels are drawn in one way only.",
            "Set one of them to false.",
        )


# optimiser


def _optimizer(run: Run) -> Iterator[Problem]:
    name = run.optimizer.optimizer
    if name not in OPTIMIZERS:
        near = nearest(str(name), OPTIMIZERS)
        mend = f'Did you mean "{near}"?' if near else "Take one of these."
        yield Problem("optimizer", f'Unknown `optimizer` "{name}".', f"known: {', '.join(OPTIMIZERS)}.", mend)
        return
    row = OPTIMIZERS[name]
    for key, value in run.optimizer.optimizer_config.items():
        if key not in row.accepts:
            near = nearest(key, row.accepts)
            mend = f"Did you mean `{near}`?" if near else "Remove it."
            why = f"it takes: {', '.join(row.accepts)}."
            yield Problem("optimizer_config", f"`optimizer_config`: {name} has no setting `{key}`.", why, mend)
        elif not row.accepts[key].fits(value):
            why = f"it takes: {row.accepts[key].words}."
            what = f"`optimizer_config`: `{key}` is {json.dumps(value, default=str)}."
            yield Problem("optimizer_config", what, why, "Write such a value, or leave it out.")
    package = row.target.partition(":")[0].partition(".")[0]
    if row.extra and (problem := missing(package, option=f"optimizer={name}", extra=row.extra)):
        yield problem
    if row.averages and run.ema.use_ema:
        why = f"{name} averages the weights itself, and its average is what is shown and saved."
        yield Problem("use_ema", f"`use_ema` is true, and `optimizer` is {name}.", why, "Set one of them otherwise.")
    yield from _optimizer_hardware(name, row, run.hardware)


def _optimizer_hardware(name: str, row: OptimizerRow, hardware: Hardware) -> Iterator[Problem]:
    """What the update rule cannot do on this machine."""
    mend = f'Set "optimizer" to "{row.instead}".'
    if hardware.device not in row.devices:
        what = f"`optimizer` {name} is not known to work on {hardware.device}."
        yield Problem("optimizer", what, "its package is written for CUDA, and tested on the CPU.", mend, overridable=True)
    if hardware.capability is not None and hardware.capability < row.capability:
        needs, has = (".".join(map(str, pair)) for pair in (row.capability, hardware.capability))
        what = f"`optimizer` {name} needs a card of compute capability {needs}; this one has {has}."
        yield Problem("optimizer", what, "older ones have no kernels for its 8-bit floats.", mend)
    if row.is_compiled and not has_compiler():
        what = f"`optimizer` {name} compiles its step, and there is no C++ compiler ({', '.join(COMPILERS)})."
        yield Problem("optimizer", what, "torch.compile calls one.", f'Install one, or set "optimizer" to "{row.instead}".')


# gallery and folders


def _validation(run: Run) -> Iterator[Problem]:
    sizes = run.validation.validation_resolution
    if sizes is not None and not is_size_list(sizes):
        what = f'`validation_resolution` is "{sizes}".'
        yield Problem("validation_resolution", what, 'it takes sizes by comma: "1024x1024,1280x768".', "Write such sizes.")


def _folders(run: Run) -> Iterator[Problem]:
    output = run.checkpointing.output_dir
    if os.path.isfile(output):  # pathlib raises where it may not look
        yield Problem("output_dir", f"`output_dir` is {output}, which is a file.", mend="Name a folder; it is made if missing.")
    written = {"output_dir": output, f"{run.text_embeds.id}.cache_dir": run.text_embeds.cache_dir}
    for key in ("cache_dir_vae", "csv_cache_dir"):
        written.update({f"{dataset.id}.{key}": dict(dataset)[key] for dataset in run.picture_sets})
    theirs = [(each.id, each.instance_data_dir) for each in (*run.datasets, *run.eval_datasets)]
    theirs += [(each.id, each.instance_data_dir) for each in run.conditioning]
    theirs += [
        (each.id, each.dataset_name) for each in run.picture_sets if each.dataset_name and Path(each.dataset_name).is_dir()
    ]
    for option, folder in written.items():
        for id_, pictures in theirs:
            if folder is None or pictures is None or not _lies_in(folder, pictures):
                continue
            is_told = option != "output_dir" and _lies_in(folder, output) and _lies_in(output, pictures)
            if not is_told:
                what = f"`{option}` is {folder}, within the pictures of dataset `{id_}` ({pictures})."
                why = "nothing is written into a folder of yours, and the gallery would be trained on next time."
                yield Problem(option, what, why, "Name a folder elsewhere.")


def _lies_in(folder: str, other: str) -> bool:
    """Whatever links lead there."""
    return Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(other))


# datasets


def _datasets(run: Run) -> Iterator[Problem]:
    if not run.datasets:
        what = "There is no image dataset."
        mend = 'Add an entry with "id" and "instance_data_dir", or set "disabled" to false.'
        yield Problem("data_backend_config", what, "the datasets' file has no enabled entry of pictures.", mend)
    elif run.model.model_type == "lora" and all(dataset.is_regularisation_data for dataset in run.datasets):
        yield Problem(
            f"{run.datasets[0].id}.is_regularisation_data",
            "Every dataset is regularisation data.",
            "an adapter is held to the base's own answers on those, so nothing would be learnt.",
            "Set `is_regularisation_data` to false for the set that is to be learnt.",
            overridable=True,
        )


def _text_cache(run: Run) -> Iterator[Problem]:
    if not run.text_embeds.default:
        what = f"Dataset `{run.text_embeds.id}`: `default` is false, and there is no other entry of its kind."
        why = "all prompts need a cache."
        yield Problem(f"{run.text_embeds.id}.default", what, why, "Set it to true, or leave the entry out.")


def _of(dataset: ImageDataset, option: str, what: str, why: str, mend: str, *, overridable: bool = False) -> Problem:
    return Problem(f"{dataset.id}.{option}", f"Dataset `{dataset.id}`: {what}", why, mend, overridable)


def _captions(dataset: ImageDataset) -> Iterator[Problem]:
    mend = 'Add "instance_prompt": "...".'
    if dataset.instance_prompt:
        return
    for option, what in (
        ("only_instance_prompt", "it is the caption of every picture."),
        ("prepend_instance_prompt", "every caption begins with it."),
    ):
        if dict(dataset)[option]:
            yield _of(dataset, "instance_prompt", f"`{option}` is true but there is no `instance_prompt`.", what, mend)
    if dataset.caption_strategy == "instanceprompt":
        what = '`caption_strategy` is "instanceprompt" but there is no `instance_prompt`.'
        yield _of(dataset, "instance_prompt", what, "it is the caption of every picture.", mend)
    elif dataset.caption_missing == "instance_prompt":
        what = '`caption_missing` is "instance_prompt" but there is no `instance_prompt`.'
        yield _of(dataset, "instance_prompt", what, "it is the caption of pictures without one.", mend)


def _sizes(dataset: ImageDataset) -> Iterator[Problem]:
    largest, target = dataset.maximum_image_size, dataset.target_downsample_size
    if (largest is None) != (target is None):
        there, absent = ("target_downsample_size", "maximum_image_size")
        if target is None:
            there, absent = absent, there
        what = f"`{there}` is set without `{absent}`."
        why = "pictures above the first are reduced to the second: they come as a pair."
        yield _of(dataset, absent, what, why, f"Add `{absent}`, or remove `{there}`.")
    elif largest is not None and target is not None and target > largest:
        what = f"`target_downsample_size` ({target:g}) is above `maximum_image_size` ({largest:g})."
        yield _of(dataset, "target_downsample_size", what, "reducing cannot enlarge.", "Lower it to at most that.")
    if dataset.minimum_aspect_ratio > dataset.maximum_aspect_ratio:
        what = f"`minimum_aspect_ratio` ({dataset.minimum_aspect_ratio:g}) is above `maximum_aspect_ratio`."
        yield _of(dataset, "minimum_aspect_ratio", what, "no picture could be used.", "Swap them.")
    yield from _units(dataset)


def _units(dataset: ImageDataset) -> Iterator[Problem]:
    """Numbers that are plainly meant in another unit."""
    is_area = dataset.resolution_type == "area"
    for option in ("resolution", "minimum_image_size", "maximum_image_size", "target_downsample_size"):
        value = dict(dataset)[option]
        if not isinstance(value, int | float) or value == 0:
            continue
        if is_area and value > 64:
            why = '`resolution_type` "area" counts megapixels.'
            mend = 'Write megapixels, or set `resolution_type` to "pixel_area" or "pixel".'
            yield _of(dataset, option, f"`{option}` is {value:g} megapixels.", why, mend, overridable=True)
        elif not is_area and value < 16:
            why = f'`resolution_type` "{dataset.resolution_type}" counts pixels along an edge.'
            mend = 'Write pixels, or set `resolution_type` to "area" for megapixels.'
            yield _of(dataset, option, f"`{option}` is {value:g} pixels.", why, mend, overridable=True)


def _crops(dataset: ImageDataset) -> Iterator[Problem]:
    if dataset.crop and dataset.crop_aspect in ("closest", "random") and not dataset.crop_aspect_buckets:
        what = f'`crop_aspect` is "{dataset.crop_aspect}" but there are no `crop_aspect_buckets`.'
        mend = 'Add such as "crop_aspect_buckets": [0.75, 1.0, 1.33].'
        yield _of(dataset, "crop_aspect_buckets", what, "they are the shapes to choose from.", mend)
    if dataset.crop and dataset.crop_aspect == "closest" and isinstance(dataset.crop_aspect_buckets, dict):
        what = '`crop_aspect_buckets` has weights but `crop_aspect` is "closest".'
        why = "the closest aspect is taken, whatever its weight."
        yield _of(dataset, "crop_aspect_buckets", what, why, 'Write a list of aspects, or set "crop_aspect" to "random".')


def _spans(dataset: ImageDataset) -> Iterator[Problem]:
    for unit in ("epoch", "step"):
        start, end = (dict(dataset)[f"{name}_{unit}"] for name in ("start", "end"))
        if end and end < start:
            what = f"`end_{unit}` ({end}) is before `start_{unit}` ({start})."
            yield _of(dataset, f"end_{unit}", what, "the set would never be drawn from.", "Swap them, or remove one.")


def _discovery(dataset: ImageDataset) -> Iterator[Problem]:
    names = [name.strip() for name in dataset.skip_file_discovery.split(",") if name.strip()]
    wrong = [name for name in names if name not in MANIFESTS]
    if wrong:
        what = f"`skip_file_discovery` names {', '.join(wrong)}."
        yield _of(dataset, "skip_file_discovery", what, f"it takes: {', '.join(MANIFESTS)}, by comma.", "Correct the list.")
