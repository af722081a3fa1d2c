from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training_fakes import Told, Trainer, make_run, trainer_of

from simpletuner.config.run import Run
from simpletuner.errors import RunError, UserError
from simpletuner.events import Notice, Saved
from simpletuner.training.checkpoints import find_checkpoint, has_result, whole_checkpoints
from simpletuner.training.optimizers import averaged


def trained(run: Run, steps: int) -> tuple[dict[str, Tensor], Told]:
    told = Told()
    with trainer_of(run, steps=steps, told=told) as trainer:
        trainer.fit()
        return trainer.tuning.weights(), told


def names(folder: Path) -> list[str]:
    return [found.path.name for found in whole_checkpoints(folder)]


KINDS: list[dict[str, Any]] = [
    {"model_type": "lora", "lora_dropout": 0.1, "optimizer": "torch-adamw"},
    {"model_type": "lora", "lora_dropout": 0.1, "optimizer": "adamw_bf16", "trained": "bfloat16", "mixed_precision": "bf16"},
    {"model_type": "lora", "use_dora": True, "lora_dropout": 0.1, "optimizer": "torch-adamw"},
    *(
        {
            "model_type": "lora",
            "optimizer": "torch-adamw",
            "lora_type": "lycoris",
            "lycoris_config": {"algo": algo, "dropout": 0.1, "rank_dropout": 0.1, "module_dropout": 0.2},
        }
        for algo in ("lokr", "loha", "locon", "full")
    ),
    {"model_type": "full", "optimizer": "torch-adamw"},
    {"model_type": "full", "optimizer": "adamw_bf16", "trained": "bfloat16", "mixed_precision": "bf16"},
    {"model_type": "full", "optimizer": "optimi-lion", "trained": "bfloat16", "mixed_precision": "bf16"},
    {"model_type": "lora", "optimizer": "prodigy", "learning_rate": 1.0},
    {"model_type": "lora", "optimizer": "adamw_schedulefree"},
    {"model_type": "full", "optimizer": "adamw_schedulefree"},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind['model_type']}-{kind['optimizer']}")
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(tmp_path: Path, kind: dict[str, Any]) -> None:
    options = {"checkpoint_step_interval": 4, "gradient_accumulation_steps": 2, "log_step_interval": 3} | kind
    weights, told = trained(make_run(tmp_path / "whole", **options), 9)
    broken = make_run(tmp_path / "broken", **options)
    with trainer_of(broken, steps=9) as trainer:
        trainer.jobs = (*trainer.jobs, Killer(6))
        with pytest.raises(KilledError):
            trainer.fit()
    assert names(tmp_path / "broken") == ["checkpoint-4"]
    resumed, told_later = trained(broken, 9)
    assert told.losses.keys() == {3, 6, 9}
    assert told_later.losses == {step: told.losses[step] for step in (6, 9)}
    assert weights.keys() == resumed.keys()
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_of_a_schedule_free_run_the_average_is_saved_and_training_goes_on_beside_it(tmp_path: Path, model_type: str) -> None:
    run = make_run(tmp_path, model_type=model_type, optimizer="adamw_schedulefree", learning_rate=0.1)
    with trainer_of(run, steps=6) as trainer:
        trainer.fit()
        exact = trainer.tuning.weights()
        with averaged(trainer.optimizer, trainer.tuning.parameters()):
            average = trainer.tuning.weights()
        saved, result = (trainer.tuning.read(folder) for folder in (tmp_path / "checkpoint-6", tmp_path / RESULT[model_type]))
    assert any(not torch.equal(average[name], exact[name]) for name in average)
    for name, weight in average.items():
        assert torch.equal(saved[name], weight)
        assert torch.equal(result[name], weight)
    with trainer_of(run, steps=6) as resumed:
        assert all(torch.equal(weight, exact[name]) for name, weight in resumed.tuning.weights().items())


RESULT = {"lora": "", "full": "pipeline"}
"""The folder of a run's result."""


class KilledError(Exception):
    """As by kill -9: nothing is saved."""


class Killer:
    def __init__(self, step: int) -> None:
        from simpletuner.training.jobs import Due

        self.due = Due(steps=step)

    def run(self, trainer: Trainer) -> None:
        raise KilledError


def test_a_checkpoint_lists_every_file_with_size_and_hash(tmp_path: Path) -> None:
    trained(make_run(tmp_path), 2)
    folder = tmp_path / "checkpoint-2"
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there == {*listed, "manifest.json"}
    assert there >= {"pytorch_lora_weights.safetensors", "optimizer.safetensors", "state.json", "config.json"}
    assert all(len(facts["sha256"]) == 64 for facts in listed.values())


def test_the_state_says_step_epoch_cursor_seed_and_samples(tmp_path: Path) -> None:
    trained(make_run(tmp_path, gradient_accumulation_steps=2), 3)
    state = json.loads((tmp_path / "checkpoint-3" / "state.json").read_text())
    assert (state["step"], state["epoch"], state["samples_seen"], state["seed"]) == (3, 1, 12, 7)
    assert state["cursor"] == {"epoch": 1, "position": 1}


def test_old_checkpoints_go_after_the_new_one_is_whole(tmp_path: Path) -> None:
    told = Told()
    present: list[list[str]] = []
    with trainer_of(make_run(tmp_path, checkpoint_step_interval=1, checkpoints_total_limit=2), steps=5, told=told) as trainer:
        trainer.tell = lambda event: (told(event), present.append(names(tmp_path)) if isinstance(event, Saved) else None)
        trainer.fit()
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5"]
    assert present[2] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"], "when the third was told, none had gone"


def test_a_limit_of_zero_keeps_all(tmp_path: Path) -> None:
    trained(make_run(tmp_path, checkpoint_step_interval=1, checkpoints_total_limit=0), 7)
    assert len(names(tmp_path)) == 7


def test_a_run_that_was_killed_before_its_result_writes_it_when_started_again(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    trained(run, 3)
    result = tmp_path / "pytorch_lora_weights.safetensors"
    before = load_file(result)
    result.unlink()
    assert not has_result(run)
    trained(run, 3)
    after = load_file(result)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("wish", ["latest", ""])
def test_a_result_without_a_checkpoint_is_never_overwritten(tmp_path: Path, wish: str) -> None:
    run = make_run(tmp_path, resume_from_checkpoint=wish)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"hours of work")
    with pytest.raises(UserError, match="holds another run"):
        find_checkpoint(run, Told())


def test_a_run_that_ended_has_its_result_after_its_last_checkpoint(tmp_path: Path) -> None:
    _, told = trained(make_run(tmp_path), 3)
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()
    assert [(event.path.name, event.final) for event in told.of(Saved)] == [
        ("checkpoint-3", False),
        ("pytorch_lora_weights.safetensors", True),
    ]


def test_a_checkpoint_that_is_there_already_is_left_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    trained(run, 2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoint-2").iterdir()}
    trained(run, 2)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoint-2").iterdir()} == before
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint-2"]


def test_a_longer_run_goes_on_and_replaces_the_result(tmp_path: Path) -> None:
    for kind, result in (
        ("lora", "pytorch_lora_weights.safetensors"),
        ("full", "pipeline/transformer/diffusion_pytorch_model.safetensors"),
    ):
        run = make_run(tmp_path / kind, model_type=kind)
        trained(run, 2)
        before = (tmp_path / kind / result).read_bytes()
        trained(run, 4)
        assert (tmp_path / kind / result).read_bytes() != before
        assert names(tmp_path / kind) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize(
    "spoil", [lambda folder: (folder / "manifest.json").unlink(), lambda folder: (folder / "optimizer.json").write_text("{")]
)
def test_an_unfinished_checkpoint_is_passed_over_and_told(tmp_path: Path, spoil: Any) -> None:
    run, told = make_run(tmp_path, checkpoint_step_interval=1), Told()
    trained(run, 3)
    spoil(tmp_path / "checkpoint-3")
    found = find_checkpoint(run, told)
    assert found is not None
    assert found.step == 2
    assert "checkpoint-3 is not whole" in told.of(Notice)[0].text


def test_a_broken_folder_in_the_way_is_set_aside_not_deleted(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (tmp_path / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "checkpoint-2" / "mine.txt").write_text("precious")
    trained(run, 2)
    assert names(tmp_path) == ["checkpoint-2"]
    assert (tmp_path / "checkpoint-2.broken" / "mine.txt").read_text() == "precious"


def test_a_damaged_checkpoint_is_never_trained_on(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    trained(run, 2)
    file = tmp_path / "checkpoint-2" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError, match="its hash differs"):
        trained(run, 3)


@pytest.mark.parametrize("left", ["checkpoint-2", "pytorch_lora_weights.safetensors"])
def test_starting_afresh_in_a_used_folder_is_refused(tmp_path: Path, left: str) -> None:
    trained(make_run(tmp_path), 2)
    for path in tmp_path.iterdir():
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=f"holds another run: {left}(.|\n)*Mend: choose another output_dir"):
        find_checkpoint(make_run(tmp_path, resume_from_checkpoint=""), Told())


def test_starting_afresh_over_mere_caches_is_fine(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    assert find_checkpoint(make_run(tmp_path, resume_from_checkpoint=""), Told()) is None


def test_a_checkpoint_can_be_named_or_given_by_path(tmp_path: Path) -> None:
    trained(make_run(tmp_path / "first", checkpoint_step_interval=1), 2)
    by_name = find_checkpoint(make_run(tmp_path / "first", resume_from_checkpoint="checkpoint-2"), Told())
    path = tmp_path / "first" / "checkpoint-1"
    by_path = find_checkpoint(make_run(tmp_path / "second", resume_from_checkpoint=str(path)), Told())
    assert by_name is not None
    assert by_path is not None
    assert (by_name.step, by_path.step, by_path.path) == (2, 1, path)


def test_a_name_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    trained(make_run(tmp_path, checkpoint_step_interval=1), 2)
    with pytest.raises(UserError, match=r"checkpoint-7(.|\n)*checkpoint-1, checkpoint-2"):
        find_checkpoint(make_run(tmp_path, resume_from_checkpoint="checkpoint-7"), Told())


def test_going_back_behind_later_checkpoints_is_refused(tmp_path: Path) -> None:
    trained(make_run(tmp_path, checkpoint_step_interval=1), 3)
    with pytest.raises(UserError, match=r"goes back behind checkpoint-2, checkpoint-3"):
        find_checkpoint(make_run(tmp_path, resume_from_checkpoint="checkpoint-1"), Told())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lora_rank": 4}, "lora_rank was 2, now 4"),
        ({"use_dora": True}, "use_dora was False, now True"),
        ({"lora_target_preset": "text"}, "lora_target_preset was attention, now text"),
        ({"peft_lora_target_modules": ("text",)}, r"peft_lora_target_modules was None, now \['text'\]"),
        ({"lora_type": "lycoris"}, "lora_type was standard, now lycoris"),
        ({"optimizer": "adamw_bf16"}, "optimizer was torch-adamw, now adamw_bf16"),
        ({"model_type": "full"}, "model_type was lora, now full"),
        ({"model_family": "other"}, "model_family was fake, now other"),
    ],
)
def test_options_that_decide_the_tensors_cannot_change(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    trained(make_run(tmp_path), 1)
    with pytest.raises(UserError, match=said):
        find_checkpoint(make_run(tmp_path, **changed), Told())


def test_other_changes_are_listed(tmp_path: Path) -> None:
    trained(make_run(tmp_path), 1)
    _, told = trained(make_run(tmp_path, learning_rate=0.5), 2)
    assert any("learning_rate 0.01 -> 0.5" in notice.text for notice in told.of(Notice))


def test_another_format_of_the_frozen_base_is_no_reason_to_refuse(tmp_path: Path) -> None:
    """It decides what the base answers, not which tensors there are: listed with the other changes."""
    trained(make_run(tmp_path), 1)
    assert find_checkpoint(make_run(tmp_path, base_model_precision="nf4-bnb", base_model_default_dtype="bf16"), Told())


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, checkpoint_step_interval=2)
    trained(run, 2)

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("simpletuner.training.checkpoints.save_file", full)
        with pytest.raises(RunError, match="checkpoint-4 could not be written"):
            trained(run, 4)
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]
    trained(run, 4)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
