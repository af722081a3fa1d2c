from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from simpletuner.config.reference import help_text, markdown
from simpletuner.config.support_page import support_page
from simpletuner.config.vocabulary import PERSONAL, Vocabulary
from simpletuner.families import find

DOCS = Path(__file__).parents[2] / "docs"
FAMILIES: Any = find()


def every_name() -> set[str]:
    vocabulary = Vocabulary.of(FAMILIES)
    parts = (vocabulary.core, *vocabulary.families.values(), *vocabulary.entries.values())
    return {name for part in parts for name in part}


def test_the_page_of_options_is_up_to_date() -> None:
    """If not: simpletuner options > docs/options.md"""
    assert (DOCS / "options.md").read_text(encoding="utf-8") == markdown(FAMILIES)


def test_the_page_of_what_trains_with_what_is_up_to_date() -> None:
    """If not: simpletuner options --support > docs/support.md"""
    assert (DOCS / "support.md").read_text(encoding="utf-8") == support_page(FAMILIES)


def test_the_reference_names_every_option() -> None:
    page = markdown(FAMILIES)
    assert [name for name in every_name() if f"| `{name}` |" not in page] == []


def test_a_row_shows_type_default_condition_level_and_help() -> None:
    rows = [line for line in markdown(FAMILIES).splitlines() if line.startswith("| `lora_rank`")]
    assert rows == [
        "| `lora_rank` | whole number, at least 1 | `16` | model_type=lora and lora_type=standard | essential "
        "| Width of the low-rank matrices. 4-32 for a style or a subject, 64-128 for many concepts. |"
    ]


def test_a_familys_other_default_is_shown() -> None:
    [row] = [line for line in markdown(FAMILIES).splitlines() if line.startswith("| `max_grad_norm`")]
    assert re.search(r"`1\.0` \(.*sana: `0\.1`", row)


def test_the_terminals_help_names_every_option() -> None:
    text = help_text(FAMILIES)
    assert [name for name in every_name() if f"  --{name}  " not in text and name not in PERSONAL] == []


def test_what_only_an_entry_can_say_is_no_flag() -> None:
    text = help_text(FAMILIES)
    assert [name for name in PERSONAL if f"  {name}  " not in text] == []
    core = Vocabulary.of(FAMILIES).core  # a dataset has a `revision` of its own, apart from the model's
    assert [name for name in PERSONAL if f"--{name} " in text and name not in core] == []
