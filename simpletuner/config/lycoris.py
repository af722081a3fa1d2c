"""`lycoris_config`: what a LyCORIS file may say, read and judged before any weights are loaded. No torch here.

Which layers its names match needs the denoiser: `training/lycoris.py` sees to that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from simpletuner.config.run import Run
from simpletuner.config.sections import Adapter
from simpletuner.config.sources import read_json
from simpletuner.config.spelling import nearest
from simpletuner.errors import ConfigError, Problem

__all__ = ["BUILT_IN", "LYCORIS_CONFIG_FILE", "effective", "lycoris_problems", "settings_of", "wasted"]

LYCORIS_CONFIG_FILE = "lycoris_config.json"
"""Beside the weights: the settings that they were trained with."""

BUILT_IN: Mapping[str, Any] = {
    "algo": "lokr",
    "linear_dim": 10000,  # larger than any layer: whole Kronecker factors, no low-rank product
    "linear_alpha": 1,
    "factor": 16,
    "apply_preset": "attn-mlp",
}
"""Without `lycoris_config`."""

DEFAULTS: Mapping[str, Any] = {"algo": "lora", "multiplier": 1.0, "linear_dim": 4, "linear_alpha": 1}
"""The library's own, for what a file leaves out."""

COMMON = ("algo", "multiplier", "dropout", "rank_dropout", "module_dropout", "apply_preset")
SIZES = ("linear_dim", "linear_alpha", "conv_dim", "conv_alpha")
LOW_RANK = (*COMMON, *SIZES, "dora_wd", "bypass_mode")
ALGORITHMS: Mapping[str, tuple[str, ...]] = {
    "lora": (*LOW_RANK, "use_tucker"),
    "locon": (*LOW_RANK, "use_tucker"),
    "loha": (*LOW_RANK, "use_tucker"),
    "lokr": (*LOW_RANK, "factor", "full_matrix", "decompose_both"),
    "full": COMMON,
}
"""Algorithm -> the settings that it obeys. The library's others wait until our tests prove that they train and load."""

Judge = Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


WHOLE: tuple[Judge, str] = (lambda value: _is_whole(value) and value > 0, "a whole number, at least 1")
ABOVE: tuple[Judge, str] = (lambda value: _is_number(value) and value > 0, "a number above 0")
SHARE: tuple[Judge, str] = (lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to below 1")
SWITCH: tuple[Judge, str] = (lambda value: isinstance(value, bool), "true or false")
FACTOR: tuple[Judge, str] = (
    lambda value: _is_whole(value) and (value == -1 or value > 0),
    "a whole number above 0, or -1 for the most even split",
)
ALGO: tuple[Judge, str] = (lambda value: value in ALGORITHMS, f"one of {', '.join(ALGORITHMS)}")
NAMES: tuple[Judge, str] = (_is_names, "a list of names")
OBJECT: tuple[Judge, str] = (lambda value: isinstance(value, dict), "an object")
OFF: tuple[Judge, str] = (lambda value: value is False, "false: what it does could not be resumed or loaded elsewhere exactly")
ON: tuple[Judge, str] = (lambda value: value is True, "true: its opposite could not be loaded elsewhere")

SETTINGS: Mapping[str, tuple[Judge, str]] = {
    "algo": ALGO,
    "multiplier": ABOVE,
    "linear_dim": WHOLE,
    "linear_alpha": ABOVE,
    "conv_dim": WHOLE,
    "conv_alpha": ABOVE,
    "factor": FACTOR,
    "dropout": SHARE,
    "rank_dropout": SHARE,
    "module_dropout": SHARE,
    "bypass_mode": SWITCH,
    "full_matrix": SWITCH,
    "decompose_both": SWITCH,
    "use_tucker": SWITCH,
    "dora_wd": SWITCH,
    "wd_on_output": ON,
    "use_scalar": OFF,
    "unbalanced_factorization": OFF,
    "train_norm": OFF,
    "apply_preset": (lambda value: isinstance(value, dict | str), "an object, or the name of a preset"),
}
PRESET: Mapping[str, tuple[Judge, str]] = {
    "target_module": NAMES,
    "target_name": NAMES,
    "module_algo_map": OBJECT,
    "name_algo_map": OBJECT,
    "exclude_name": NAMES,
    "enable_conv": SWITCH,
    "use_fnmatch": SWITCH,
    "lora_prefix": (lambda value: value == "lycoris", '"lycoris": the library finds its weights by that'),
}
LAYER: Mapping[str, tuple[Judge, str]] = {
    "algo": ALGO,
    "dim": WHOLE,
    "alpha": ABOVE,
    "factor": FACTOR,
    "full_matrix": SWITCH,
    "decompose_both": SWITCH,
}


def settings_of(adapter: Adapter) -> dict[str, Any]:
    """What `lycoris_config` says, read from its file if it is one; null unsets. Raises ConfigError."""
    written = adapter.lycoris_config
    if written is None:
        return dict(BUILT_IN)
    content = read_json(Path(written).absolute(), Path.cwd()) if isinstance(written, str) else written
    if not isinstance(content, dict):
        what = f"{written} holds no object."
        raise ConfigError([Problem("lycoris_config", what, 'it is such as {"algo": "lokr", "factor": 16}.')])
    return {key: value for key, value in content.items() if value is not None}


def effective(adapter: Adapter, presets: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The settings with every default filled in: what is saved beside the weights. `presets` are the family's."""
    settings = {**DEFAULTS, **settings_of(adapter)}
    settings.setdefault("conv_dim", settings["linear_dim"])
    settings.setdefault("conv_alpha", settings["linear_alpha"])
    preset = settings.get("apply_preset", {})
    named = {"target_module": list(presets[preset])} if isinstance(preset, str) else dict(preset)
    if not any(key in named for key in ("target_module", "target_name", "module_algo_map", "name_algo_map")):
        named["target_module"] = list(presets["full"])
    return {**settings, "apply_preset": named}


def wasted(settings: Mapping[str, Any]) -> list[str]:
    """Settings that the chosen algorithms do not look at."""
    obeyed = {key for algo in _algorithms(settings) for key in ALGORITHMS[algo]}
    neutral = {key for key, (judge, _) in SETTINGS.items() if judge in (OFF[0], ON[0])}
    return sorted(key for key in settings if key not in obeyed | neutral and settings[key] is not False)


def lycoris_problems(run: Run, presets: Mapping[str, Sequence[str]]) -> Iterator[Problem]:
    """What is wrong with `lycoris_config`, all at once. Reads its file."""
    if run.model.model_type != "lora" or run.adapter.lora_type != "lycoris":
        return
    try:
        settings = settings_of(run.adapter)
    except ConfigError as error:
        yield from (Problem("lycoris_config", one.what, one.why, one.mend) for one in error.problems)
        return
    problems = [*_judged(settings, SETTINGS, ""), *_preset(settings.get("apply_preset", {}), presets)]
    yield from problems
    if not problems:
        yield from _together(run, settings)


def _judged(values: Mapping[str, Any], known: Mapping[str, tuple[Judge, str]], path: str) -> Iterator[Problem]:
    for key, value in values.items():
        if key not in known:
            near = nearest(key, known)
            mend = f"Did you mean `{near}`?" if near else "Remove it."
            yield _problem(f"it has no setting `{path}{key}`", f"known there: {', '.join(known)}.", mend)
        elif not known[key][0](value):
            near = nearest(str(value), ALGORITHMS) if key == "algo" else None
            mend = f'Did you mean "{near}"?' if near else ""
            yield _problem(f"`{path}{key}` is {value!r}", f"it takes: {known[key][1]}.", mend)


def _preset(preset: Any, presets: Mapping[str, Sequence[str]]) -> Iterator[Problem]:
    if isinstance(preset, str):
        if preset not in presets:
            near = nearest(preset, presets)
            mend = f'Did you mean "{near}"?' if near else "Take one of these, or write an object."
            yield _problem(f'`apply_preset` is "{preset}"', f"this family's: {', '.join(presets)}.", mend)
        return
    if not isinstance(preset, dict):
        return
    yield from _judged(preset, PRESET, "apply_preset.")
    for kind in ("module_algo_map", "name_algo_map"):
        layers = preset.get(kind, {})
        for name, layer in layers.items() if isinstance(layers, dict) else ():
            path = f"apply_preset.{kind}.{name}"
            if isinstance(layer, dict):
                yield from _judged(layer, LAYER, f"{path}.")
            else:
                yield _problem(f"`{path}` is {layer!r}", 'it takes: an object such as {"factor": 8}.')


def _together(run: Run, settings: Mapping[str, Any]) -> Iterator[Problem]:
    """What does not go together, of settings that are right in themselves."""
    precision = run.precision.base_model_precision
    if "lokr" in _algorithms(settings) and settings.get("use_tucker"):
        why = "the library does not load such a LoKr again (4.1.3)."
        yield _problem('`use_tucker` is true and `algo` is "lokr"', why, "Remove `use_tucker`.")
    decomposes, rebuilds = settings.get("dora_wd", False), settings.get("bypass_mode") is False
    if precision != "no_change":
        why = f"`base_model_precision` is {precision}: there is no weight to add to, only what a layer answers."
        if "full" in _algorithms(settings):
            yield _problem('`algo` "full" cannot train here', why, 'Take "lokr", or set `base_model_precision` to no_change.')
        if rebuilds or decomposes:
            name = "dora_wd" if decomposes else "bypass_mode"
            yield _problem(f"`{name}` is {str(settings[name]).lower()}", why, f"Remove `{name}`.")
    if decomposes and settings.get("bypass_mode"):
        why = "weights are decomposed (`dora_wd`) as a whole, which bypassing never builds."
        yield _problem("`bypass_mode` and `dora_wd` are both true", why, "Remove one of them.")
    for name in ("dropout", "rank_dropout", "module_dropout") if decomposes or rebuilds else ():
        if settings.get(name):
            why = (
                "dropouts act on what an adapter adds to its layer's answer; where weights are rebuilt there is no such thing."
            )
            other = "dora_wd" if decomposes else "bypass_mode"
            yield _problem(f"`{name}` is {settings[name]} beside `{other}`", why, f"Remove `{name}` or `{other}`.")


def _algorithms(settings: Mapping[str, Any]) -> set[str]:
    preset = settings.get("apply_preset", {})
    maps = [] if isinstance(preset, str) else [preset.get(kind, {}) for kind in ("module_algo_map", "name_algo_map")]
    return {
        settings.get("algo", DEFAULTS["algo"]),
        *(layer["algo"] for each in maps for layer in each.values() if "algo" in layer),
    }


def _problem(what: str, why: str, mend: str = "") -> Problem:
    return Problem("lycoris_config", f"`lycoris_config`: {what}.", why, mend or "Correct it.")
