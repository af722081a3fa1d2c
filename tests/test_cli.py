from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simpletuner import __version__
from simpletuner.cli import main
from simpletuner.config.run import Hardware, Run
from simpletuner.errors import Interrupted, RunError

ROOT = Path(__file__).parents[1]
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a config that is in order."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps({"model_family": "sana", "max_train_steps": 5}))
    datasets = [{"id": "pictures", "instance_data_dir": "pictures"}]
    (tmp_path / "config" / "multidatabackend.json").write_text(json.dumps(datasets))
    return tmp_path


def test_an_export_says_how_it_is_asked_and_where_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    asked: list[Any] = []

    def export_comfyui(source: Path, target: Path) -> Path:
        asked.append((source, target))
        return target

    replace_module(monkeypatch, "simpletuner.families.cascade_lora", export_comfyui=export_comfyui)
    for words in (["--format", "comfyui", "in", "out.safetensors"], ["--format=comfyui", "in", "out.safetensors"]):
        assert main(["export", *words]) == 0
        assert capsys.readouterr().out == "out.safetensors\n"
    assert asked == [(Path("in"), Path("out.safetensors"))] * 2
    assert main(["export", "--format", "onnx", "in", "out"]) == 2
    assert "is not understood" in capsys.readouterr().err
    assert main(["export", "--help"]) == 0


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What reached the application, which only notes it here."""
    calls: list[Any] = []

    def train(run: Run) -> Path:
        calls.append(run)
        return Path("output")

    replace_module(monkeypatch, "simpletuner.app", train=train)
    replace_module(monkeypatch, "simpletuner.training.engine", detect_hardware=lambda: Hardware())
    return calls


def replace_module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Callable[..., Any]) -> None:
    module: Any = SimpleNamespace(**content)
    monkeypatch.setitem(sys.modules, name, module)
    package, _, attribute = name.rpartition(".")
    monkeypatch.setattr(importlib.import_module(package), attribute, module, raising=False)


def in_fresh_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environ, capture_output=True, text=True, timeout=60)


HEAVY = (
    "print(*sorted({'torch', 'diffusers', 'transformers', 'accelerate', 'numpy', 'PIL'} & sys.modules.keys()), file=sys.stderr)"
)


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["options"], ["examples", "list"]])
def test_what_needs_no_model_imports_no_torch(words: list[str], tmp_path: Path) -> None:
    done = in_fresh_python(f"import sys\nfrom simpletuner.cli import main\nassert main({words}) == 0\n{HEAVY}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == ""
    assert done.stdout


def test_a_config_error_is_told_without_importing_torch(project: Path) -> None:
    code = f"import sys\nfrom simpletuner.cli import main\nassert main(['train', '--lerning_rate=1']) == 2\n{HEAVY}"
    done = in_fresh_python(code, project)
    assert done.returncode == 0, done.stderr
    assert "Did you mean `learning_rate`?" in done.stderr
    assert done.stderr.splitlines()[-1] == ""


def test_the_module_is_the_command(tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "simpletuner", "--version"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout.strip()) == (0, __version__)


def test_the_script_finds_its_package_from_anywhere(project: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, ROOT / "simpletuner" / "train.py", "--config_file", "nowhere.json"],
        cwd=project,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert "There is no config file nowhere.json" in done.stderr


def test_the_script_leaves_no_module_of_ours_at_the_top(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.path[0] = {str(ROOT / 'simpletuner')!r}\n"
        f"sys.argv = ['train.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'simpletuner' / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit as done:\n"
        "    assert done.code == 0\n"
        f"assert {str(ROOT / 'simpletuner')!r} not in sys.path\n"
    )
    done = in_fresh_python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_train_hands_the_run_to_the_application_and_explains_it(project: Path, called: list[Any], capsys: Captured) -> None:
    assert main(["train", "--seed", "7"]) == 0
    [run] = called
    assert (run.training.seed, run.training.max_train_steps) == (7, 5)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split() for line in err.splitlines()[-2:]] == [["command", "line:"], ["seed", "7"]]


def test_only_the_first_process_speaks(
    project: Path, called: list[Any], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["train"]) == 0
    assert capsys.readouterr().err == ""


def test_a_log_that_nobody_reads_on_does_not_stop_the_run(
    project: Path, called: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Gone())
    assert main(["train"]) == 0
    assert called


def test_a_quiet_log_level_leaves_the_explanation_out(project: Path, called: list[Any], capsys: Captured) -> None:
    assert main(["train", "log_level=warning"]) == 0
    assert capsys.readouterr().err == ""


def test_a_word_that_is_no_utf_8_can_be_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, encoding="utf-8", write_through=True))
    assert main(["train", "\udcff.json"]) == 2
    assert b"`\\udcff.json` is no option" in written.getvalue()


def test_explain_prints_the_values_and_their_sources(project: Path, called: list[Any], capsys: Captured) -> None:
    assert main(["options", "--explain", "seed=3"]) == 0
    out, err = capsys.readouterr()
    assert "max_train_steps" in out
    assert "no model was named" in err
    assert not called


@pytest.mark.parametrize(
    ("error", "code"),
    [(RunError("Broken."), 1), (Interrupted(2, "Saved."), 130), (Interrupted(15, "Saved."), 143), (KeyboardInterrupt(), 130)],
)
def test_what_ends_a_run_decides_the_exit_code(
    project: Path, called: list[Any], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fail(run: Run) -> Path:
        raise error

    replace_module(monkeypatch, "simpletuner.app", train=fail)
    assert main(["train"]) == code


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "did you mean `simpletuner train`?"),
        (["train", "--config_file", "nowhere.json"], "nowhere.json"),
        (["train", "env=nowhere"], "config/nowhere/"),
        (["train", "example=nowhere"], "no example `nowhere`"),
        (["options", "--wrong"], "does not know"),
        (["examples", "oops"], "is not understood"),
        (["examples"], "examples list"),
        (["train", "example=one", "--env", "two"], "each name a config"),
    ],
)
def test_what_is_wrong_before_any_work_exits_with_2(project: Path, capsys: Captured, words: list[str], said: str) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert out == ""


def test_without_a_command_the_overview_is_shown(capsys: Captured) -> None:
    assert main([]) == 2
    assert "simpletuner COMMAND" in capsys.readouterr().err


def test_an_example_is_the_config_that_is_read(project: Path, called: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = project / "example" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps({"model_family": "sana", "data_backend_config": "sets.json", "lora_rank": 2}))
    (config.parent / "sets.json").write_text(json.dumps([{"id": "emoji", "instance_data_dir": "emoji"}]))
    (config.parent / "emoji").mkdir()
    replace_module(monkeypatch, "simpletuner.examples", find=lambda name: config)
    assert main(["train", "example=mine", "--seed", "4"]) == 0
    [run] = called
    assert (run.adapter.lora_rank, run.training.seed) == (2, 4)
    assert run.datasets[0].instance_data_dir == "example/emoji"


def test_examples_are_listed_and_templates_copied(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    copies: list[Any] = []

    def copy(name: str, folder: Path) -> list[Path]:
        copies.append((name, folder))
        return [folder / "config.json"]

    def copy_templates(folder: Path) -> list[Path]:
        copies.append(folder)
        return [folder / "config.json.example"]

    replace_module(monkeypatch, "simpletuner.examples", names=lambda: ["one", "two"], copy=copy, copy_templates=copy_templates)
    assert [main(["examples", *words]) for words in (["list"], ["copy", "one", "mine"], ["copy", "one"], ["copy"])] == [0] * 4
    assert copies == [("one", Path("mine")), ("one", Path("one")), Path("config")]
    assert capsys.readouterr().out.splitlines()[:3] == ["one", "two", "mine/config.json"]


def test_help_on_examples_is_no_name_of_an_example(project: Path, capsys: Captured) -> None:
    assert main(["examples", "copy", "--help"]) == 0
    assert "build-model FAMILY FOLDER" in capsys.readouterr().out
