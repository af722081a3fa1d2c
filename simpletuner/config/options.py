"""One declaration per option: a typed field with its help in the docstring beneath.

Everything else (routing of flat keys, command line, error messages, reference) is derived from the sections' fields.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.fields import FieldInfo

__all__ = ["Level", "Option", "PathKind", "Section", "members", "option", "options_of"]

Level = Literal["essential", "advanced", "experimental"]
PathKind = Literal["", "input", "output", "repository"]


class Section(BaseModel):
    """A small group of options that one part of the program needs."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


def option(
    default: Any = ...,
    *,
    level: Level = "advanced",
    when: str = "",
    also: tuple[str, ...] = (),
    path: PathKind = "",
    empty: bool = False,
    **limits: Any,
) -> Any:
    """A field of a Section: its default, and what a type cannot say.

    `level` sorts the reference; `when` names the condition under which it is obeyed ("a=x|y and b=true", "c>0", "d" for any
    value that is set); `also` are other accepted names. `path`: an `input` must exist, an `output` is made, a `repository` is a
    folder or a hub name. `empty`: the empty string is a value of its own, where it otherwise means unset. `limits` go to
    pydantic (`ge`, `gt`, ...). A default of None means: derived by `config/derive.py`, or none.
    """
    extra: dict[str, Any] = {"level": level, "when": when, "also": also, "path": path, "empty": empty}
    return Field(default, json_schema_extra=extra, **limits)


@dataclass(frozen=True)
class Option:
    """One declared option, as parser, messages and reference see it."""

    name: str
    section: str
    """Attribute of `Run` that holds it; `dataset` for the keys of a dataset entry."""
    owner: type[Section]
    info: FieldInfo

    def _extra(self, key: str) -> Any:
        assert isinstance(self.info.json_schema_extra, dict), f"{self.name} was not declared with option()"
        return self.info.json_schema_extra[key]

    @property
    def level(self) -> Level:
        """Who needs to know of it."""
        return self._extra("level")

    @property
    def when(self) -> str:
        """The condition under which it is obeyed; "" is always."""
        return self._extra("when")

    @property
    def also(self) -> tuple[str, ...]:
        """Other accepted names."""
        return self._extra("also")

    @property
    def path(self) -> PathKind:
        """Whether its value is a path, and of what kind."""
        return self._extra("path")

    @property
    def keeps_empty(self) -> bool:
        """Whether the empty string is a value of its own."""
        return self._extra("empty")

    @property
    def help(self) -> str:
        """What it does, on one line."""
        return " ".join((self.info.description or "").split())

    @property
    def is_switch(self) -> bool:
        """Whether it is true or false, so that the command line may name it alone."""
        return bool in members(self.info.annotation)

    @property
    def wants(self) -> str:
        """What it takes, in words: "whole number, at least 1"."""
        words = _wants(self.info.annotation, self.info.metadata)
        is_object = all(get_origin(member) is dict for member in members(self.info.annotation))
        return f'{words}, or "key=value,key=value"' if is_object else words

    @property
    def choices(self) -> tuple[str, ...]:
        """The names it takes, if it takes only certain names."""
        literals = [m for m in members(self.info.annotation) if get_origin(m) is Literal]
        return tuple(str(choice) for literal in literals for choice in get_args(literal))

    def typed(self, value: Any) -> Any:
        """`value` as the field's type. Raises ValueError (pydantic's) if it is not one, or out of range."""
        if isinstance(value, bool) and not self.is_switch:
            raise ValueError("true and false are no value of this option")  # pydantic would take them as 1 and 0
        return dict(_lenient(self.owner).model_validate({self.name: value}))[self.name]


@cache
def _lenient(section: type[Section]) -> type[BaseModel]:
    """The section without required fields, so that one field can be validated alone."""
    required: dict[str, Any] = {n: (info.annotation, None) for n, info in section.model_fields.items() if info.is_required()}
    return create_model(section.__name__, __base__=section, **required) if required else section


def options_of(section: str, cls: type[Section]) -> Iterator[Option]:
    """The options that a section declares, in its order."""
    return (Option(name, section, cls, info) for name, info in cls.model_fields.items())


def members(annotation: Any) -> tuple[Any, ...]:
    """The types a value may have: those of a union without None, else the type itself. Limits of `Annotated` are taken off."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(m for part in get_args(annotation) if part is not type(None) for m in members(part))
    return (annotation,)


_NAMES = {bool: "true or false", int: "whole number", float: "number", str: "text"}
_BOUNDS = {Ge: ("ge", "at least"), Gt: ("gt", "above"), Le: ("le", "at most"), Lt: ("lt", "below")}


def _wants(annotation: Any, limits: list[Any]) -> str:
    if get_origin(annotation) is Annotated:
        base, *extra = get_args(annotation)
        inner = [limit for field in extra for limit in (field.metadata if isinstance(field, FieldInfo) else [field])]
        return _wants(base, [*limits, *inner])
    if get_origin(annotation) in (Union, types.UnionType):
        return ", or ".join(_wants(part, limits) for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Literal:
        choices = [str(choice) for choice in get_args(annotation)]
        return choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
    if get_origin(annotation) in (tuple, list):
        return _wants_tuple(get_args(annotation))
    if get_origin(annotation) is dict:
        return "object"
    if issubclass(annotation, BaseModel):
        return f"object ({', '.join(annotation.model_fields)})"
    bounds = [
        f"{word} {getattr(limit, attribute):g}"
        for limit in limits
        for kind, (attribute, word) in _BOUNDS.items()
        if isinstance(limit, kind)
    ]
    return ", ".join([_NAMES[annotation], *([" and ".join(bounds)] if bounds else [])])


def _wants_tuple(parts: tuple[Any, ...]) -> str:
    if len(parts) == 2 and parts[-1] is not Ellipsis:
        return 'size such as "1024x768"'
    element = parts[0]
    return "list of objects" if get_origin(element) is dict else f"list ({_wants(element, [])} each)"
