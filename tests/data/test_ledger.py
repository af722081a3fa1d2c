"""The account of found, used and excluded pictures."""

from __future__ import annotations

import json

from simpletuner.data.ledger import Exclusion, Ledger, Note, write_ledger

CATS = Ledger(
    "cats",
    found=1204,
    excluded=(Exclusion("a.jpg", "damaged", "truncated"), Exclusion("b.jpg", "no caption"), Exclusion("c.jpg", "damaged")),
    notes=(Note("d.jpg", "identical to e.jpg"),),
)


def test_found_is_used_plus_excluded():
    assert CATS.used == 1201
    assert CATS.summary == "cats: 1,204 found = 1,201 used + 3 excluded (2 damaged, 1 no caption)"
    assert Ledger("dogs", found=2).summary == "dogs: 2 found = 2 used + 0 excluded"
    assert Ledger("dogs", found=2, kind="eval").summary == "dogs (eval): 2 found = 2 used + 0 excluded"


def test_the_file_has_the_schema_that_tools_rely_on(tmp_path):
    path = tmp_path / "run" / "ledger.json"
    write_ledger(path, [CATS, Ledger("dogs", found=2, kind="eval")])
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "version": 1,
        "datasets": {
            "cats": {
                "dataset_type": "image",
                "found": 1204,
                "used": 1201,
                "excluded": [
                    {"file": "a.jpg", "reason": "damaged", "detail": "truncated"},
                    {"file": "b.jpg", "reason": "no caption", "detail": ""},
                    {"file": "c.jpg", "reason": "damaged", "detail": ""},
                ],
                "notes": [{"file": "d.jpg", "note": "identical to e.jpg"}],
            },
            "dogs": {"dataset_type": "eval", "found": 2, "used": 2, "excluded": [], "notes": []},
        },
    }
    assert [file.name for file in path.parent.iterdir()] == ["ledger.json"]


def test_any_file_name_can_be_told(tmp_path):
    names = ["キツネ 🦊.jpg", b"caf\xe9.jpg".decode("utf-8", "surrogateescape"), 'a"b\\c.jpg']
    write_ledger(tmp_path / "ledger.json", [Ledger("x", 3, tuple(Exclusion(name, "damaged") for name in names))])
    text = (tmp_path / "ledger.json").read_text(encoding="utf-8")
    assert [one["file"] for one in json.loads(text)["datasets"]["x"]["excluded"]] == names
    assert "キツネ 🦊" in text
