"""The command line: finds out what is wanted, and calls it. The only place that prints.

The answer goes to stdout, all else to stderr. Nothing heavy is imported before it is needed: `--help` answers at once.
"""
# ruff: noqa: T201

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner import __version__
from simpletuner.errors import SimpletunerError, UserError
from simpletuner.events import Event, Notice

if TYPE_CHECKING:
    from simpletuner.config.run import Run

__all__ = ["main", "text_cache_main"]

OVERVIEW = """\
Usage: simpletuner COMMAND ...

  train      train what the config says
  check      tell what is wrong, which pictures are used and how long it trains, without loading weights
  options    list every option; with --explain: the values of a run, and where each came from
  text-cache encode the prompts of a run ahead of it; loads nothing but tokenizer and text encoders
  cache      why something would be encoded again, whether all is whole, and what may go
  export     an adapter under the names that other tools read
  examples   list | copy [NAME [FOLDER]] | build-model FAMILY FOLDER

First steps:
  simpletuner train example=sana-emoji          a bundled example, from pictures to weights
  simpletuner examples copy                     config templates into config/
  simpletuner train                             config/config.json (.toml, .env), else ./config.json
  simpletuner train --env NAME                  config/NAME/config.json
  simpletuner train --config_file F --seed 7    any option may be given as --key value, --key=value or key=value

simpletuner train --help lists the options. `simpletuner --version` prints the version.
"""
TRAIN = """\
Usage: simpletuner {command} [--config_file FILE | --env NAME | example=NAME] [--OPTION VALUE | OPTION=VALUE] ...

Without --config_file, --env or example: config/config.json (.toml, .env), else ./config.json.
The command line wins over the environment (SIMPLETUNER_<OPTION>), which wins over the file.{more}
"""
EXAMPLES = """\
Usage: simpletuner examples list                          names of the bundled examples
       simpletuner examples copy NAME [FOLDER]            an example, to be changed there (default: a folder of its name)
       simpletuner examples copy                          the config templates into config/
       simpletuner examples build-model FAMILY FOLDER     a tiny base model in the real layout, for dry runs
"""
TEXT_CACHE = """
Without a flag every caption, the empty one and the gallery's prompts are encoded into the cache; what is there is skipped.
--dry-run   count them and their disk space, and load nothing
--verify    read them back; exit code 1 if one is missing or damaged"""
CHECK = """
--json           prints the answer as JSON; whatever is wrong is in its `problems`
--report F.html  writes a page to look at: buckets, crops, captions, what is left out
Exit code 0 if the run would start, 2 if it would not, 1 if that could not be told."""
CACHE = """
cache why TARGET   why a picture (its path, or its name in the set) or a prompt (its text) would be encoded, or that it is there
cache verify       reads every shard; exit code 1 if one is damaged
cache gc           drops what this config does not use, and merges small shards; never while a run holds the run folder
  --dry-run        tells what would go, and changes nothing
  --other-recipes  drops the folders of other recipes too: what other models, precisions or encoder settings were cached with"""
EXPORT = """\
Usage: simpletuner export --format comfyui IN OUT     a Stage C LoRA, for ComfyUI, kohya's scripts and OneTrainer

IN is a pytorch_lora_weights.safetensors or its folder, OUT a new file. Adapters of other families need no export: these tools
read them as they are.
"""
OPTIONS = """\
Usage: simpletuner options                  every option, as Markdown
       simpletuner options --support        what trains with what, as Markdown
       simpletuner options --explain ...    the values of a run that are no plain defaults, with their sources;
                                            config and options are named as for `simpletuner train`
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # OpenMP's threads spin while they wait; where cores are few they then take each other's time, and a small step takes five
    # times as long. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A file's name may hold bytes that are no UTF-8; to name it must not end in a traceback.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return _command(words)
    except SimpletunerError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted. What was finished is kept; the same command goes on from there.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `simpletuner options | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _command(words: list[str]) -> int:
    if not words:
        print(OVERVIEW, end="", file=sys.stderr)
        return 2
    name, *rest = words
    if name in ("-h", "--help", "help"):
        print(OVERVIEW, end="")
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        from simpletuner.config.spelling import nearest

        near = nearest(name, COMMANDS)
        mend = f"did you mean `simpletuner {near}`?" if near else f"the commands are: {', '.join(COMMANDS)}."
        raise UserError(f"There is no command `{name}`.", mend=mend)
    return COMMANDS[name](rest)


def train(words: list[str]) -> int:
    """Trains what the config says."""
    if _wants_help(words):
        return _print_options_help("train", "")
    run = _load(words)
    if run.reporting.log_level in ("debug", "info"):
        from simpletuner.config.resolved import explain

        _say(explain(run))
    from simpletuner import app

    app.train(run)
    return 0


def check(words: list[str]) -> int:
    """The whole pre-flight."""
    if _wants_help(words):
        return _print_options_help("check", CHECK)
    words, page = _without_value(words, "--report")
    as_json = "--json" in words
    try:
        return _check([word for word in words if word != "--json"], page, as_json=as_json)
    except SimpletunerError as error:
        if as_json:
            from simpletuner.checkup import failed_as_json

            print(json.dumps(failed_as_json(error), ensure_ascii=False))
        raise


def _check(words: list[str], page: str | None, *, as_json: bool) -> int:
    run = _load(words)
    from simpletuner.checkup import inspect
    from simpletuner.checkup_text import as_text
    from simpletuner.networks.libraries import import_model_libraries
    from simpletuner.reporting.console import Console

    import_model_libraries()

    with Console(run.reporting.log_level) as tell:
        for notice in run.notices:
            tell(Notice(notice))
        report, sets = inspect(run, tell)
        if page is not None:
            from simpletuner.checkup_page import write_page

            write_page(report, sets, Path(page))
    print(json.dumps(report.as_json(), ensure_ascii=False) if as_json else as_text(report))
    return report.exit_code


def options(words: list[str]) -> int:
    """The reference, or the provenance of a run's values."""
    if _wants_help(words):
        print(OPTIONS, end="")
        return 0
    if not words:
        from simpletuner import families
        from simpletuner.config.reference import markdown

        sys.stdout.write(markdown(families.find()))
        return 0
    if words == ["--support"]:
        from simpletuner import families
        from simpletuner.config.support_page import support_page

        sys.stdout.write(support_page(families.find()))
        return 0
    if "--explain" not in words:
        raise UserError(f"`simpletuner options` does not know `{' '.join(words)}`.", mend="simpletuner options --help")
    from simpletuner.config.resolved import explain

    run = _load([word for word in words if word != "--explain"])
    _say("\n".join(run.notices))
    print(explain(run))
    return 0


def examples(words: list[str]) -> int:
    """Lists, copies and builds what comes with the package."""
    if _wants_help(words):
        print(EXAMPLES, end="")
        return 0
    from simpletuner import examples as bundled

    match words:
        case ["list"]:
            print("\n".join(bundled.names()))
        case ["copy"]:
            print("\n".join(map(str, bundled.copy_templates(Path("config")))))
        case ["copy", name]:
            print("\n".join(map(str, bundled.copy(name, Path(name)))))
        case ["copy", name, folder]:
            print("\n".join(map(str, bundled.copy(name, Path(folder)))))
        case ["build-model", family, folder]:
            from simpletuner.networks.libraries import import_model_libraries, quiet_imports

            import_model_libraries()
            with quiet_imports():
                from simpletuner.examples.tiny import build_model, model_options

            build_model(family, Path(folder))
            _say("\n".join(f'"{option}": "{value}"' for option, value in model_options(family, Path(folder)).items()))
            print(folder)
        case []:
            print(EXAMPLES, end="", file=sys.stderr)
            return 2
        case _:
            raise UserError(f"`simpletuner examples {' '.join(words)}` is not understood.\n{EXAMPLES}".rstrip())
    return 0


def text_cache(words: list[str]) -> int:
    """Encodes the prompts of a run ahead of it."""
    if _wants_help(words):
        return _print_options_help("text-cache", TEXT_CACHE)
    flags = {"--dry-run", "--verify"}
    asked = flags.intersection(words)
    if len(asked) > 1:
        raise UserError("--dry-run and --verify are two different questions.", mend="ask one of them.")
    run = _load([word for word in words if word not in flags])
    from simpletuner.reporting.console import Console
    from simpletuner.text_cache import fill, take_stock, verify
    from simpletuner.training.engine import Engine

    with Engine(run) as engine, Console(run.reporting.log_level) as console:
        tell = console if engine.rank == 0 else _nobody
        for notice in run.notices:
            tell(Notice(notice))
        if asked:
            stock = (take_stock if "--dry-run" in asked else verify)(run, tell)
        else:
            stock = fill(run, device=engine.device, ranks=engine, tell=tell)
    if engine.rank == 0:
        print("\n".join(one.text for one in stock))
    return 0


def cache(words: list[str]) -> int:
    """Says what a cache holds and why, reads it all, or drops what is not used."""
    if _wants_help(words):
        return _print_options_help("cache why TARGET|verify|gc", CACHE)
    question, target, rest = words[0] if words else "", "", words[1:]
    if question == "why" and rest and not rest[0].startswith("--"):
        target, rest = rest[0], rest[1:]
    if question not in ("why", "verify", "gc") or (question == "why" and not target):
        raise UserError(f"`simpletuner cache {' '.join(words)}` is not understood.\n{CACHE}".rstrip())
    flags = {"--dry-run", "--other-recipes"}.intersection(rest) if question == "gc" else set()
    run = _load([word for word in rest if word not in flags])
    from simpletuner.cache_sweep import sweep
    from simpletuner.cache_tools import caches_of, verify, why
    from simpletuner.networks.libraries import import_model_libraries
    from simpletuner.reporting.console import Console

    import_model_libraries()
    with Console(run.reporting.log_level) as tell:
        if question == "gc":
            swept = sweep(run, tell, is_dry="--dry-run" in flags, with_other_recipes="--other-recipes" in flags)
            lines = [f"{'would be: ' if '--dry-run' in flags else ''}{swept.text}"]
        else:
            caches = caches_of(run, tell)
            lines = why(caches, target) if question == "why" else verify(caches)
    print("\n".join(lines))
    return 0


def text_cache_main() -> int:
    """The console script `simpletuner-text-cache`."""
    return main(["text-cache", *sys.argv[1:]])


def export(words: list[str]) -> int:
    """Writes an adapter under the names that other tools read."""
    if _wants_help(words):
        print(EXPORT, end="")
        return 0
    match [part for word in words for part in word.split("=", 1) if word.startswith("--") or part == word]:
        case ["--format", "comfyui", source, target]:
            from simpletuner.families.cascade_lora import export_comfyui

            print(export_comfyui(Path(source), Path(target)))
            return 0
        case _:
            raise UserError(f"`simpletuner export {' '.join(words)}` is not understood.\n{EXPORT}".rstrip())


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "check": check,
    "text-cache": text_cache,
    "cache": cache,
    "export": export,
    "options": options,
    "examples": examples,
}


def _load(words: list[str]) -> Run:
    """The run that the words, the environment and the config file ask for. Raises ConfigError before torch is imported."""
    from simpletuner import families
    from simpletuner.config.load import build, parse
    from simpletuner.reporting.logs import follow_log_level

    parsed = parse(_with_example(words), families=families.find(), environ=os.environ, cwd=Path.cwd())
    follow_log_level(parsed.log_level, os.environ)
    from simpletuner.training.engine import detect_hardware

    return build(parsed, detect_hardware())


def _without_value(words: list[str], name: str) -> tuple[list[str], str | None]:
    """The words without `--name VALUE` or `--name=VALUE`, and its value. Raises UserError if it has none."""
    for place, word in enumerate(words):
        if word.startswith(f"{name}="):
            return [*words[:place], *words[place + 1 :]], word.partition("=")[2]
        if word == name:
            if place + 1 == len(words) or words[place + 1].startswith("--"):
                raise UserError(f"`{name}` needs a value.", mend=f"{name} FILE")
            return [*words[:place], *words[place + 2 :]], words[place + 1]
    return words, None


def _with_example(words: list[str]) -> list[str]:
    """`example=NAME` becomes the example's config file."""
    from simpletuner.config.arguments import example_of

    name, rest = example_of(words)
    if name is None:
        return words
    from simpletuner import examples as bundled

    return ["--config_file", str(bundled.find(name)), *rest]


def _print_options_help(command: str, more: str) -> int:
    from simpletuner import families
    from simpletuner.config.reference import help_text

    print(TRAIN.format(command=command, more=more))
    print(help_text(families.find()))
    return 0


def _wants_help(words: list[str]) -> bool:
    return "-h" in words or "--help" in words


def _nobody(event: Event) -> None:
    """Hears everything and says nothing: the other processes of a launch."""


def _say(text: str) -> None:
    """Tells the user something beside the answer, once: the first process speaks for all. That nobody listens stops nothing."""
    if text and os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(BrokenPipeError):
            print(text, file=sys.stderr)
