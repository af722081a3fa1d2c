"""The datasets' file: a list of entries -> typed entries, each key with its source; what is wrong is collected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from simpletuner.config.layers import Given, Where, merge, show, typed
from simpletuner.config.options import Option
from simpletuner.config.sources import Written
from simpletuner.config.spelling import TRUE, VALUES, canonical_key
from simpletuner.config.vocabulary import Vocabulary
from simpletuner.errors import Problem

__all__ = ["Entries", "Entry", "read_entries"]


@dataclass(frozen=True)
class Entry:
    """One enabled dataset entry: what it says itself, over what the main config says for all."""

    kind: str
    """Its `dataset_type`."""
    given: Mapping[str, Given]
    own: frozenset[str]
    """The keys that it says itself."""
    is_whole: bool
    """Whether nothing that it must say is missing or wrong."""


@dataclass(frozen=True)
class Entries:
    """The enabled entries, and what is to be said about the file."""

    entries: tuple[Entry, ...]
    problems: tuple[Problem, ...]
    notices: tuple[str, ...]


def read_entries(content: Any, source: str, defaults: Mapping[str, Given], vocabulary: Vocabulary, where: Where) -> Entries:
    """`defaults` are the dataset keys of the main config. Disabled entries are left out unread."""
    if not isinstance(content, list | tuple):
        what = f"The datasets ({source}) are no list."
        return Entries((), (Problem("data_backend_config", what, mend="Write [ {...}, {...} ]: one object for each set."),), ())
    entries: list[Entry] = []
    problems: list[Problem] = []
    notices: list[str] = []
    for number, item in enumerate(content, 1):
        read = _read_entry(item, number, source, defaults, vocabulary, where)
        entries += read.entries
        problems += read.problems
        notices += read.notices
    texts = [entry for entry in entries if entry.kind == "text_embeds"]
    if not texts:
        entries.append(Entry("text_embeds", _inherited(defaults, vocabulary.entries["text_embeds"], ()), frozenset(), True))
    problems += [*_duplicates(entries, source), *_second_text_cache(texts, source)]
    return Entries(tuple(entries), tuple(problems), (*notices, *_overruled(defaults, entries, vocabulary)))


def _overruled(defaults: Mapping[str, Given], entries: Iterable[Entry], vocabulary: Vocabulary) -> list[str]:
    """A line for each dataset key of the main config that every entry says itself."""
    owns = {key: [key in entry.own for entry in entries if key in vocabulary.entries[entry.kind]] for key in defaults}
    return [
        f"`{key}` ({given.source}) changes nothing: it is a default for datasets, and each of them says its own."
        for key, given in defaults.items()
        if owns[key] and all(owns[key])
    ]


def _read_entry(
    item: Any, number: int, source: str, defaults: Mapping[str, Given], vocabulary: Vocabulary, where: Where
) -> Entries:
    if not isinstance(item, Mapping):
        what = f"Entry {number} of the datasets ({source}) is {show(item)}."
        return Entries((), (Problem(f"{number}.", what, "an entry is an object.", 'Write {"id": ..., ...}.'),), ())
    plain = {canonical_key(key): value for key, value in item.items()}
    if _is_true(plain.get("disabled")):
        return Entries((), (), ())
    id_, name = _name(plain, number)
    kind = plain.get("dataset_type") or "image"
    kind = VALUES.get(("dataset_type", str(kind)), kind)
    if not isinstance(kind, str) or kind not in vocabulary.entries:
        what = f"{name}: `dataset_type` is {show(kind)} ({source})."
        why = f"it takes: one of {', '.join(vocabulary.entries)}."
        mend = 'Correct it, or set "disabled" to true for this entry.'
        return Entries((), (Problem(f"{id_}.dataset_type", what, why, mend),), ())
    options = vocabulary.entries[kind]
    merged = merge(
        [Written(key, value, source) for key, value in item.items() if canonical_key(key) != "dataset_type"],
        lambda key: options.get(vocabulary.synonyms.get(key, key)),
        where,
        unknown=lambda written: _unknown(written, name, options, vocabulary),
    )
    inherited = _inherited(defaults, options, {vocabulary.synonyms.get(key, key) for key in plain})
    read = typed({**inherited, **merged.given}, options, where, f"{name}: ")
    required = [option for option in options.values() if option.info.is_required()]
    missing = [_missing(option, name, source) for option in required if option.name not in merged.given]
    problems = [replace(one, option=f"{id_}.{one.option}") for one in (*merged.problems, *read.problems, *missing)]
    is_whole = all(option.name in read.given for option in required)
    notices = tuple(f"{name}: {notice}" for notice in merged.notices)
    return Entries((Entry(kind, read.given, frozenset(merged.given), is_whole),), tuple(problems), notices)


def _name(plain: Mapping[str, Any], number: int) -> tuple[str, str]:
    """(what names the entry among options, what names it in messages)."""
    if plain.get("id"):
        return str(plain["id"]), f"Dataset `{plain['id']}`"
    return str(number), f"Dataset number {number}"


def _inherited(defaults: Mapping[str, Given], options: Mapping[str, Option], own: Iterable[str]) -> dict[str, Given]:
    """The main config's dataset keys, without those that the entry says itself (an empty value there unsets them too)."""
    return {key: given for key, given in defaults.items() if key in options and key not in own}


def _is_true(value: Any) -> bool:
    return str(value).strip().lower() in TRUE


def _unknown(written: Written, name: str, options: Mapping[str, Option], vocabulary: Vocabulary) -> Problem:
    key = canonical_key(written.key)
    if key in vocabulary.in_main():
        mend = "It is an option of the main config: move it there."
        if any(key in keys for keys in vocabulary.entries.values()):
            mend = "It is a key of another kind of entry: move it there."
    else:
        near = vocabulary.near(key, options)
        mend = f"Did you mean `{near}`?" if near else "`simpletuner options` lists the keys of a dataset."
    return Problem(key, f"{name}: unknown key `{written.key}` ({written.source}).", mend=mend)


def _missing(option: Option, name: str, source: str) -> Problem:
    return Problem(option.name, f"{name}: `{option.name}` is missing ({source}).", option.help, f'Add "{option.name}": "...".')


def _duplicates(entries: Iterable[Entry], source: str) -> list[Problem]:
    ids = [entry.given["id"].value for entry in entries if "id" in entry.given]
    twice = [one for one in dict.fromkeys(ids) if ids.count(one) > 1]
    return [
        Problem(
            f"{one}.id",
            f"{ids.count(one)} datasets have the id `{one}` ({source}).",
            "it names caches and ledger.",
            "Rename one.",
        )
        for one in twice
    ]


def _second_text_cache(texts: Sequence[Entry], source: str) -> list[Problem]:
    if len(texts) < 2:
        return []
    what = f"{len(texts)} entries have the dataset_type `text_embeds` ({source})."
    why = "all prompts are kept in one cache, which sorts them by what encoded them."
    return [Problem("text_embeds.", what, why, 'Keep one; set "disabled" to true for the others.')]
