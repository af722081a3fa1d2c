"""From what the user wrote to a `Run`: `parse` reads and types everything, `build` adds what depends on the machine.

No torch here. Both tell all problems at once: `parse` also judges a provisional run, as if on the plainest machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simpletuner.config import rules, rules_attention, rules_memory, rules_publishing, rules_sets
from simpletuner.config.arguments import LAUNCH, Arguments, read_arguments
from simpletuner.config.compose import compose
from simpletuner.config.entries import Entries, Entry, read_entries
from simpletuner.config.layers import Given, Merged, Typed, Where, merge, show, typed
from simpletuner.config.options import Option
from simpletuner.config.resolved import resolved
from simpletuner.config.rules_gallery import gallery_notices
from simpletuner.config.run import Hardware, Run
from simpletuner.config.sections import Reporting
from simpletuner.config.sources import (
    ENVIRONMENT,
    PREFIX,
    FileContent,
    Written,
    environment,
    find_config,
    read_file,
    read_json,
    shown,
)
from simpletuner.config.spelling import canonical_key, nearest
from simpletuner.config.vocabulary import FamilyFacts, Vocabulary
from simpletuner.errors import ConfigError, Problem

__all__ = ["FamilyFacts", "Parsed", "build", "parse", "resolved"]

DATASETS = "multidatabackend.json"


@dataclass(frozen=True)
class Parsed:
    """Everything the user wrote, typed; defaults are not filled in yet."""

    family: FamilyFacts
    given: Mapping[str, Given]
    """Core and family options."""
    entries: tuple[Entry, ...]
    """Enabled dataset entries."""
    config_path: Path | None
    notices: tuple[str, ...] = ()

    @property
    def log_level(self) -> str:
        """What libraries must know when they are imported, which is before there is a run."""
        given = self.given.get("log_level")
        return given.value if given else Reporting.model_fields["log_level"].default


def parse(argv: Sequence[str], *, families: Mapping[str, FamilyFacts], environ: Mapping[str, str], cwd: Path) -> Parsed:
    """Files, environment and command line -> typed values. Raises ConfigError with all problems; loads no torch."""
    vocabulary = Vocabulary.of(families)
    arguments = read_arguments(argv, vocabulary)
    config_path, content, notices = _read_config(arguments, environ, cwd)
    where = Where(cwd, config_path.parent if config_path else cwd, environ)
    inner = read_arguments(content.arguments, vocabulary, f"file {shown(config_path, cwd)}" if config_path else "")
    items = [*content.items, *inner.items, *environment(environ), *arguments.items]
    if config_path is None and not any(canonical_key(item.key) == "model_family" for item in items):
        raise ConfigError(arguments.problems or [_nothing(cwd)])

    merged = merge(items, _finder(vocabulary), where, unknown=_unknown(vocabulary, content.helpers))
    main = _type_main(merged, vocabulary, families, where)
    datasets = _read_datasets(main, vocabulary, where)
    problems = [*arguments.problems, *inner.problems, *merged.problems, *main.problems, *datasets.problems]
    family = families.get(main.family) or next(iter(families.values()))
    own = {name: given for name, given in main.given.items() if not vocabulary.is_dataset_default(name)}
    own.setdefault("data_backend_config", _default_datasets(where))
    parsed = Parsed(family, own, datasets.entries, config_path, (*notices, *merged.notices, *datasets.notices))
    problems += _survey(parsed, problems, knows_family=main.family in families)
    if problems:
        raise ConfigError(problems)
    return parsed


def build(parsed: Parsed, hardware: Hardware) -> Run:
    """Defaults layered beneath what was written, and everything judged. Raises ConfigError."""
    run = compose(parsed.family, parsed.given, parsed.entries, hardware, parsed.config_path, parsed.notices)
    problems = [*rules.check(run), *rules.check_adapter(run, parsed.family), *rules_memory.check_hardware(run)]
    problems += rules_attention.check_family(run, parsed.family)
    refused, warnings = rules.judge(run, [*problems, *parsed.family.check(run)])
    if refused:
        raise ConfigError(refused)
    notices = [*rules_memory.notices(run), *rules_sets.notices(run), *rules_publishing.notices(run)]
    notices += gallery_notices(run, has_webhook=run.reporting.webhook_config is not None)
    return replace(run, notices=(*run.notices, *notices, *parsed.family.notices(run), *warnings))


def _survey(parsed: Parsed, known: Sequence[Problem], *, knows_family: bool) -> list[Problem]:
    """What the rules find besides the `known` problems; an option at fault has its default there and is not judged twice."""
    given = parsed.given if knows_family else {**parsed.given, "model_family": Given("", "", "")}
    entries = tuple(entry for entry in parsed.entries if entry.is_whole)
    run = compose(parsed.family, given, entries, Hardware(), parsed.config_path, ())
    found = [*rules.check(run)]
    if knows_family:
        found += [*rules.check_adapter(run, parsed.family), *parsed.family.check(run)]
        found += rules_attention.check_family(run, parsed.family)
    at_fault = {problem.option for problem in known}
    if any("." in option for option in at_fault):
        at_fault.add("data_backend_config")  # a set that could not be read is not a set that is not there
    return [problem for problem in rules.judge(run, found)[0] if problem.option not in at_fault]


# reading


def _read_config(
    arguments: Arguments, environ: Mapping[str, str], cwd: Path
) -> tuple[Path | None, FileContent, tuple[str, ...]]:
    """The config file and what it says. Raises ConfigError if it cannot be read; the command line's own problems go along."""
    try:
        path, notices = find_config(arguments.launch.get("config_file"), arguments.launch.get("env"), cwd)
        content = read_file(path, cwd, environ) if path else FileContent(())
    except ConfigError as error:
        raise ConfigError([*error.problems, *arguments.problems]) from error
    return path, content, (*notices, *content.notices)


def _nothing(cwd: Path) -> Problem:
    return Problem(
        "config_file",
        "There is no configuration to train.",
        f"neither config/config.json (.toml, .env) nor config.json is in {cwd}, and no `model_family` was given.",
        f"{_copied('config.json', cwd)} config/config.json and edit it, or try: simpletuner train example=sana-emoji",
    )


def _copied(name: str, cwd: Path) -> str:
    """The command that makes a file of a template, up to the file's name; templates that are not there are fetched first."""
    fetch = "" if (cwd / f"config/{name}.example").is_file() else "simpletuner examples copy, then "
    return f"{fetch}cp config/{name}.example"


def _finder(vocabulary: Vocabulary) -> Callable[[str], Option | None]:
    """Finds the option that a key of the main config means."""
    names = vocabulary.in_main()

    def find(key: str) -> Option | None:
        name = vocabulary.synonyms.get(key, key)
        return vocabulary.anywhere(name) if name in names else None

    return find


def _unknown(vocabulary: Vocabulary, helpers: frozenset[str]) -> Callable[[Written], Problem | str | None]:
    """What a key of the main config that nobody declares means."""

    def judge(item: Written) -> Problem | str | None:
        key = canonical_key(item.key)
        near = vocabulary.near(key, vocabulary.in_main())
        if item.key in helpers:
            return None
        if item.source == ENVIRONMENT:  # perhaps another program's: told, but no reason to stop
            hint = f" Did you mean {PREFIX}{near.upper()}?" if near else ""
            return f"The environment variable {PREFIX}{item.key} is no option and changes nothing.{hint}"
        mend = f"Did you mean `{near}`?" if near else "Remove it; `simpletuner options` lists those that there are."
        if vocabulary.anywhere(key):
            mend = "It is a key of a dataset: write it in the datasets' file."
        elif near is None and (launch := nearest(key, LAUNCH)):
            mend = f"Did you mean `{launch}`? That goes on the command line."
        why = "" if near else "this version has no such option, and none is silently ignored."
        return Problem(key, f"Unknown option `{item.key}` ({item.source}).", why, mend)

    return judge


# typing


@dataclass(frozen=True)
class Main:
    """The main config, typed."""

    family: str
    given: Mapping[str, Given]
    problems: tuple[Problem, ...]


def _type_main(merged: Merged, vocabulary: Vocabulary, families: Mapping[str, FamilyFacts], where: Where) -> Main:
    """Types every value and settles which family's options are meant."""
    name = str(merged.given["model_family"].value) if "model_family" in merged.given else ""
    own = vocabulary.families.get(name, {})
    options: dict[str, Option] = {}
    problems: list[Problem] = [] if name in families else [_family_problem(merged.given.get("model_family"), families)]
    for key, given in merged.given.items():
        option = vocabulary.core.get(key) or own.get(key)
        if option is None and vocabulary.is_dataset_default(key):
            option = vocabulary.anywhere(key)
        if option is not None:
            options[key] = option
        elif name in families:
            problems.append(_foreign(key, given, name, vocabulary))
    read = typed({key: merged.given[key] for key in options}, options, where)
    problems += read.problems
    wrong_flavour = _flavour_problem(read, families[name], name) if name in families else []
    right = {key: one for key, one in read.given.items() if not (wrong_flavour and key == "model_flavour")}
    return Main(name, right, (*problems, *wrong_flavour))


def _family_problem(given: Given | None, families: Mapping[str, FamilyFacts]) -> Problem:
    known = ", ".join(families)
    if given is None:
        return Problem(
            "model_family", "`model_family` is missing.", "it says which architecture is trained.", f"One of: {known}."
        )
    near = nearest(str(given.value).lower().replace("-", "_"), families)
    mend = f"Did you mean {show(near)}?" if near else f"One of: {known}."
    what = f"Unknown `model_family` {show(given.written)} ({given.source})."
    return Problem("model_family", what, f"families of this version: {known}.", mend)


def _foreign(key: str, given: Given, family: str, vocabulary: Vocabulary) -> Problem:
    what = f"`{key}` is no option of {family} ({given.source})."
    return Problem(key, what, f"it belongs to {' and '.join(vocabulary.owners(key))}.", "Remove it.")


def _flavour_problem(read: Typed, family: FamilyFacts, name: str) -> list[Problem]:
    given = read.given.get("model_flavour")
    if given is None or given.value in family.flavours:
        return []
    near = nearest(given.value, family.flavours)
    what = f"{name} has no flavour {show(given.written)} ({given.source})."
    why = f"its flavours: {', '.join(family.flavours)}."
    return [Problem("model_flavour", what, why, f"Did you mean {show(near)}?" if near else "Take one of these.")]


def _read_datasets(main: Main, vocabulary: Vocabulary, where: Where) -> Entries:
    """The entries of `data_backend_config`; a list in its place is read as it stands."""
    defaults = {name: given for name, given in main.given.items() if vocabulary.is_dataset_default(name)}
    given = main.given.get("data_backend_config")
    content: Any
    if any(problem.option == "data_backend_config" for problem in main.problems):
        return Entries((), (), ())
    if given is not None and not isinstance(given.value, str):
        content = given.value if isinstance(given.written, str) else given.written
        return read_entries(content, given.source, defaults, vocabulary, where)
    path = where.cwd / (given or _default_datasets(where)).value
    if not path.is_file():
        return Entries((), (_no_datasets(path, given, where),), ())
    try:
        content = read_json(path, where.cwd)
    except ConfigError as error:
        return Entries((), tuple(replace(problem, option="data_backend_config") for problem in error.problems), ())
    return read_entries(content, f"file {shown(path, where.cwd)}", defaults, vocabulary, where)


def _default_datasets(where: Where) -> Given:
    path = shown(where.config_folder / DATASETS, where.cwd)
    return Given(path, "derived", path)


def _no_datasets(path: Path, given: Given | None, where: Where) -> Problem:
    if given is not None:
        return Problem("data_backend_config", f"`data_backend_config` is {show(given.written)}, which is no file.")
    return Problem(
        "data_backend_config",
        f"There is no file {shown(path, where.cwd)} that lists the datasets.",
        f"`data_backend_config` is unset: {DATASETS} beside the config file is read.",
        f"{_copied(DATASETS, where.cwd)} {shown(path, where.cwd)} and edit it, or set `data_backend_config`.",
    )
