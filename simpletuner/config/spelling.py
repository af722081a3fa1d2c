"""The ONLY home of spelling quirks: the many ways in which users write keys and values, brought to one.

Pure functions on text; what is read from where is `sources.py`'s, what a value may be is the option's own type.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from simpletuner.config.options import Option, members

__all__ = [
    "MissingVariableError",
    "canonical_key",
    "canonical_value",
    "expand",
    "is_size_list",
    "nearest",
    "read_value",
    "relaxed_json",
    "uses_environment",
]

ENVIRONMENT_NAMES = {
    "CHECKPOINTING_LIMIT": "checkpoints_total_limit",
    "CHECKPOINTING_STEPS": "checkpoint_step_interval",
    "DATALOADER_CONFIG": "data_backend_config",
    "HUB_MODEL_NAME": "hub_model_id",
    "LR_SCHEDULE": "lr_scheduler",
    "MAX_NUM_STEPS": "max_train_steps",
    "MODEL_NAME": "pretrained_model_name_or_path",
    "NUM_EPOCHS": "num_train_epochs",
    "PUSH_CHECKPOINTS": "push_checkpoints_to_hub",
    "RESUME_CHECKPOINT": "resume_from_checkpoint",
    "TRAINING_DYNAMO_BACKEND": "dynamo_backend",
    "TRAINING_SEED": "seed",
    "USE_GRADIENT_CHECKPOINTING": "gradient_checkpointing",
    "VALIDATION_STEPS": "validation_step_interval",
}
"""Upper-case names of `config.env` that are not the option's own name in capitals."""

VALUES = {
    ("caption_strategy", "instance_prompt"): "instanceprompt",
    ("dataset_type", "images"): "image",
    ("dataset_type", "text-embeds"): "text_embeds",
    ("dataset_type", "image-embeds"): "image_embeds",
}
"""Other spellings of certain values."""

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class MissingVariableError(ValueError):
    """`{env:NAME}` names an environment variable that is not set."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"the environment variable {name} is not set")


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name that was probably meant by a mistyped one, by its beginning, or by its end after a dash. Case does not count."""
    known = {name.lower(): name for name in sorted(names)}
    meant = word.lower()
    parts = [name for name in known if len(meant) > 2 and name.startswith(meant)]
    parts += [name for name in known if len(meant) > 2 and name.endswith(f"-{meant}")]
    found = [*parts, *difflib.get_close_matches(meant, known, 1, 0.8)]
    return known[found[0]] if found else None


# keys


def canonical_key(written: str) -> str:
    """`--Learning-Rate`, `LEARNING_RATE` -> learning_rate; the irregular capitals of `config.env` too."""
    key = written.strip().lstrip("-").replace("-", "_")
    return ENVIRONMENT_NAMES.get(key, key.lower())


# values


def canonical_value(key: str, value: Any) -> Any:
    """The value under the option's own name: kohya's `num_repeats` counts all passes, our `repeats` the extra ones."""
    number = _number(value) if key == "num_repeats" and isinstance(value, str) else value
    return number - 1 if key == "num_repeats" and isinstance(number, int) else value


def expand(value: Any, environ: Mapping[str, str]) -> Any:
    """`{env:NAME}` in every string of `value` replaced by that environment variable. Raises MissingVariableError."""
    if isinstance(value, dict):
        return {key: expand(item, environ) for key, item in value.items()}
    if isinstance(value, list):
        return [expand(item, environ) for item in value]
    if not isinstance(value, str):
        return value

    def fetch(match: re.Match[str]) -> str:
        if match[1] not in environ:
            raise MissingVariableError(match[1])
        return environ[match[1]]

    return _VARIABLE.sub(fetch, value)


_VARIABLE = re.compile(r"\{env:([A-Za-z_][A-Za-z0-9_]*)\}")


def uses_environment(value: Any) -> bool:
    """Whether `{env:NAME}` stands anywhere in `value`."""
    return _VARIABLE.search(json.dumps(value, default=str)) is not None


def read_value(option: Option, value: Any) -> Any:
    """`value` as users write it -> as the option's type would have it; what cannot be read is left for the type to refuse."""
    types = members(option.info.annotation)
    if isinstance(value, list):
        return _items(value, types)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and types == (str,):
        return str(value)
    if not isinstance(value, str):
        return value
    value = VALUES.get((option.name, value), value)
    if value.strip().lower() in option.choices:
        return value.strip().lower()
    if str in types:
        if bool in types and (word := _boolean(value, bool)) is not None:
            return word
        for opening, kind in (("[", list), ("{", dict)):
            accepted = any((get_origin(member) or member) is (tuple if kind is list else dict) for member in types)
            if accepted and value.lstrip().startswith(opening) and (read := _json(value, kind)) is not None:
                return read
        return value
    for kind in types:
        is_object = isinstance(kind, type) and issubclass(kind, BaseModel)
        read = _object if is_object else _READERS.get(get_origin(kind) or kind)
        if read is not None and (result := read(value, kind)) is not None:
            return _items(result, types) if isinstance(result, list) else result
    return value


def _items(items: list[Any], types: tuple[Any, ...]) -> Any:
    """The items of a list, as its type would have them.

    A size in a list of sizes may be "1024x768", [1024, 768], {"width": 1024, "height": 768}, or 1024 for a square. Items such
    as {"aspect": 0.75, "weight": 2} of a list that may be an object as well are one: {0.75: 2}.
    """
    kinds = [get_args(kind)[0] for kind in types if get_origin(kind) is tuple]
    if any(get_origin(kind) is tuple for kind in kinds):
        return [_size(item) for item in items]
    is_weighted = any(get_origin(kind) is dict for kind in types) and all(isinstance(item, dict) for item in items)
    if is_weighted and items and all(item.keys() == {"aspect", "weight"} for item in items):
        return {item["aspect"]: item["weight"] for item in items}
    return items


def _size(item: Any) -> Any:
    """A size among others -> [width, height]; what is none is left for the type to refuse."""
    if isinstance(item, dict) and item.keys() == {"width", "height"}:
        return [item["width"], item["height"]]
    match = _SIZE.fullmatch(item.strip()) if isinstance(item, str) else None
    if match:
        return [int(match[1]), int(match[2])]
    edge = _number(item) if isinstance(item, str) else item
    return [edge, edge] if isinstance(edge, int) and not isinstance(edge, bool) else item


def _boolean(text: str, _kind: Any) -> bool | None:
    word = text.strip().lower()
    return True if word in TRUE else False if word in FALSE else None


def _number(text: str, _kind: Any = float) -> int | float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number.is_integer() else number


def _list(text: str, kind: Any) -> list[Any] | None:
    """A size ("1024x768"), a JSON list, or items by comma; an object is none."""
    if text.lstrip().startswith("{"):
        return None
    if get_args(kind)[-1] is not Ellipsis:
        size = _SIZE.fullmatch(text.strip())
        return [int(size[1]), int(size[2])] if size else None
    if text.lstrip().startswith("["):
        return _json(text, list)
    return [item.strip() for item in text.split(",") if item.strip()]


def _object(text: str, _kind: Any) -> dict[str, Any] | None:
    """A JSON object, or "k=v,k=v"; an item without "=" continues the value before it ("betas=0.9,0.99", "betas=(0.9,0.99)")."""
    if text.lstrip().startswith("{"):
        return _json(text, dict)
    lists: dict[str, list[str]] = {}
    for item in text.split(","):
        key, equals, value = item.partition("=")
        if equals:
            lists[key.strip()] = [value]
        elif lists:
            lists[list(lists)[-1]].append(item)
        else:
            return None
    return {key: _scalar(items[0]) if len(items) == 1 else [_scalar(item) for item in items] for key, items in lists.items()}


def _scalar(text: str) -> Any:
    text = text.strip(" ()[]")
    number = _number(text)
    return _WORDS.get(text.lower(), text) if number is None else number


def _json(text: str, kind: type) -> Any:
    try:
        value = json.loads(relaxed_json(text))
    except ValueError:
        return None
    return value if isinstance(value, kind) else None


_READERS: dict[Any, Callable[[str, Any], Any]] = {bool: _boolean, int: _number, float: _number, tuple: _list, dict: _object}
_WORDS = {"true": True, "false": False, "none": None, "null": None}
_SIZE = re.compile(r"([1-9]\d*)\s*[xX×]\s*([1-9]\d*)")
_EDGE = re.compile(r"[1-9]\d*")


def is_size_list(text: str) -> bool:
    """Whether `text` is sizes by comma: "1024x1024,1280x768"; a lone number is a square."""
    return all(_SIZE.fullmatch(part.strip()) or _EDGE.fullmatch(part.strip()) for part in text.split(","))


# JSON


def relaxed_json(text: str) -> str:
    """JSON with `//` comments and trailing commas -> plain JSON; blanks stand for both, so that lines and columns stay."""
    text = _COMMENT.sub(lambda match: match[0] if match[0][0] == '"' else " " * len(match[0]), text)
    return _TRAILING.sub(lambda match: match[0] if match[0][0] == '"' else " ", text)


_STRING = r'"(?:\\.|[^"\\\n])*"'
_COMMENT = re.compile(_STRING + r"|//[^\n]*")
_TRAILING = re.compile(_STRING + r"|,(?=\s*[}\]])")
