"""Uploads: the real client against a stand-in of the hub on loopback."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import huggingface_hub.constants
import pytest

from simpletuner.config.sections import Hub
from simpletuner.errors import UserError
from simpletuner.events import Event, Notice, Progress, ResultReady, Saved
from simpletuner.reporting import hub as module
from simpletuner.reporting.hub import HubUploads, Upload, by_hand, patience_s
from tests.reporting.hub_stand_in import TOKEN, StandInHub

Open = Callable[..., HubUploads]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    with StandInHub() as stand_in:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", stand_in.endpoint)
        monkeypatch.setattr(module, "LOOK_EVERY_S", 0.01)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield stand_in


def uploads(name: str = "mine", *, checkpoints: bool = True, **options: bool) -> HubUploads:
    wish = Hub(push_to_hub=True, push_checkpoints_to_hub=checkpoints, hub_model_id=name, **options)
    return HubUploads(wish, pauses_s=(0.05, 0.05))


def checkpoint(folder: Path, step: int, size_bytes: int = 10) -> Saved:
    path = folder / f"checkpoint-{step}"
    (path / "ema").mkdir(parents=True)
    (path / "weights.safetensors").write_bytes(bytes([step]) * size_bytes)
    (path / "ema" / "state.json").write_text('{"step": 1}')
    return Saved(path, step)


def lines(told: list[Event]) -> str:
    return "\n".join(event.text for event in told if isinstance(event, Notice))


def test_checkpoints_and_the_result_arrive_in_order_byte_for_byte(hub: StandInHub, tmp_path: Path) -> None:
    told: list[Event] = []
    sink = uploads()
    sink.sign_in()
    assert (sink.repository, hub.private) == ("tester/mine", {"tester/mine": True})
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: unknown\n---\n# mine\n")
    with sink.telling(told.append):
        sink(checkpoint(tmp_path, 1, size_bytes=2 << 20))
        sink(checkpoint(tmp_path, 2))
        sink(Saved(tmp_path / "result", 2, final=True))
        sink(ResultReady({"README.md": card}))
    assert [commit.message for commit in hub.commits] == ["Upload checkpoint-1", "Upload checkpoint-2", "Upload the result"]
    assert hub.commits[0].files == {
        "checkpoint-1/weights.safetensors": b"\1" * (2 << 20),
        "checkpoint-1/ema/state.json": b'{"step": 1}',
    }
    assert hub.commits[2].files == {"README.md": card.read_bytes()}
    assert "at most 10 minutes" in lines(told)
    assert lines(told).count("Uploaded ") == 3
    bars = [event for event in told if isinstance(event, Progress)]
    assert bars[-1].done == bars[-1].total
    assert "Not uploaded" not in lines(told)


def test_without_the_option_checkpoints_stay_here(hub: StandInHub, tmp_path: Path) -> None:
    sink = uploads(checkpoints=False)
    sink.sign_in()
    with sink.telling(lambda event: None):
        sink(checkpoint(tmp_path, 1))
    assert not hub.commits


def test_a_hub_out_of_order_is_tried_again(hub: StandInHub, tmp_path: Path) -> None:
    hub.failures += [503, 500]
    told: list[Event] = []
    sink = uploads()
    sink.sign_in()
    with sink.telling(told.append):
        sink(checkpoint(tmp_path, 1))
    assert len(hub.commits) == 1
    assert not hub.failures
    assert "failed" not in lines(told)


def test_that_uploads_fail_for_long_is_told_once(hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_PATIENCE_S", 1.0)
    monkeypatch.setattr(module, "TOLD_FROM_S", 0.1)
    hub.failures += [503] * 3
    told: list[Event] = []
    sink = HubUploads(Hub(hub_model_id="mine", push_to_hub=True, push_checkpoints_to_hub=True), pauses_s=(0.0, 0.1, 60.0))
    sink.sign_in()
    with sink.telling(told.append):
        sink(checkpoint(tmp_path, 1))
    assert lines(told).count("The upload of checkpoint-1 fails so far (") == 1
    assert "Not uploaded: checkpoint-1" in lines(told)


@pytest.mark.parametrize("failures", [[500] * 3, [422]])
def test_what_fails_in_the_end_is_told_with_the_command_and_the_next_goes_on(
    hub: StandInHub, tmp_path: Path, failures: list[int]
) -> None:
    hub.failures += failures
    told: list[Event] = []
    sink = uploads()
    sink.sign_in()
    with sink.telling(told.append):
        sink(checkpoint(tmp_path, 1))
        sink(checkpoint(tmp_path, 2))
    assert [commit.message for commit in hub.commits] == ["Upload checkpoint-2"]
    assert f"hf upload tester/mine {tmp_path} . --include 'checkpoint-1/*'" in lines(told)
    assert "The upload of checkpoint-1 failed: " in lines(told)


def test_a_hub_that_hangs_costs_the_loop_nothing_and_an_interruption_does_not_wait(hub: StandInHub, tmp_path: Path) -> None:
    hub.gate.clear()
    told: list[Event] = []
    sink = uploads()
    sink.sign_in()
    saved = [checkpoint(tmp_path, step) for step in range(1, 9)]
    began_s = time.monotonic()
    with suppress(KeyboardInterrupt), sink.telling(told.append):
        for event in saved:
            sink(event)
        raise KeyboardInterrupt
    assert time.monotonic() - began_s < 0.5
    assert lines(told).count("Not uploaded: checkpoint-") == 8


def test_the_end_waits_no_longer_than_it_says(hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_PATIENCE_S", 0.1)
    hub.gate.clear()
    told: list[Event] = []
    sink = uploads()
    sink.sign_in()
    with sink.telling(told.append):
        sink(checkpoint(tmp_path, 1))
    assert "Not uploaded: checkpoint-1" in lines(told)


def test_ten_gigabytes_are_given_the_time_of_a_slow_line() -> None:
    assert patience_s(10_000_000_000) == 600 + 10_000


def test_a_token_that_is_not_valid_is_found_before_any_work(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"401(.|\n)*hf auth login") as caught:
        uploads().sign_in()
    assert "hf_wrong" not in str(caught.value)


def test_another_s_namespace_is_found_before_any_work(hub: StandInHub) -> None:
    with pytest.raises(UserError, match="somebody/else"):
        uploads("somebody/else").sign_in()


def test_a_hub_out_of_reach_at_the_start_is_tried_again_when_an_upload_is_due(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    told: list[Event] = []
    sink = uploads()
    sink.sign_in()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    with sink.telling(told.append):
        sink(checkpoint(tmp_path, 1))
    assert "cannot be reached yet" in lines(told)
    assert len(hub.commits) == 1


def test_a_public_repository_that_is_there_is_told(hub: StandInHub) -> None:
    hub.private["tester/mine"] = False
    told: list[Event] = []
    sink = uploads()
    sink.sign_in()
    with sink.telling(told.append):
        pass
    assert "and public" in lines(told)


def test_a_checkpoint_that_rotation_took_is_passed_over(hub: StandInHub, tmp_path: Path) -> None:
    hub.gate.clear()
    told: list[Event] = []
    sink = uploads()
    sink.sign_in()
    with sink.telling(told.append):
        sink(checkpoint(tmp_path, 1))
        gone = checkpoint(tmp_path, 2)
        sink(gone)
        (gone.path / "weights.safetensors").unlink()
        hub.gate.set()
    assert [commit.message for commit in hub.commits] == ["Upload checkpoint-1"]
    assert "checkpoint-2 was removed before it was uploaded" in lines(told)


def test_the_command_by_hand_sends_a_pipeline_to_the_top_and_renamed_files_one_by_one() -> None:
    files = {
        "README.md": Path("my out/README.md"),
        "transformer/a.safetensors": Path("my out/pipeline/transformer/a.safetensors"),
        "model_index.json": Path("my out/pipeline/model_index.json"),
        "simpletuner_config.json": Path("my out/config.json"),
    }
    assert by_hand(Upload("the result", files), "me/it").splitlines() == [
        "hf upload me/it 'my out/config.json' simpletuner_config.json",
        "hf upload me/it 'my out' . --include README.md",
        "hf upload me/it 'my out/pipeline' . --include 'transformer/*' --include model_index.json",
    ]
