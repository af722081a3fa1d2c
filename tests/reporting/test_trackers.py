"""What trackers keep, read back from their files by other means than ours; one test for both of what they share."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simpletuner.config.sections import Trackers
from simpletuner.events import Bus, Event, Measured, Notice, Painted, RunFinished, RunStarted, Stepped
from simpletuner.reporting.tensorboard_tracker import TensorboardTracker
from simpletuner.reporting.trackers import tag
from simpletuner.reporting.wandb_tracker import WandbTracker

CONFIG = {"model_family": "sana", "learning_rate": 1e-4, "data_backend_config": [{"id": "pictures"}]}


def stepped(step: int, loss: float = 0.5, **extra: float) -> Stepped:
    return Stepped(step, 100, 1, loss, 1e-4, 0.1, 33.0, "2026-11-20T07:00:00+00:00", extra)


def painted(folder: Path, step: int, nickname: str = "你好") -> Painted:
    path = folder / "validation" / f"step_{step}_{nickname}_1_64x32.png"
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (64, 32), (step, 9, 9)).save(path)
    return Painted(path, nickname, "a cat", step)


def training(folder: Path, steps: range) -> list[Event]:
    """What a run tells, up to the last of these steps."""
    last = steps[-1]
    measured = Measured("eval", last, {"eval_loss": 0.25}, {"eval_loss": [(0.25, 1.0), (0.29, 0.5), (1.0, 0.5)]})
    taken: list[Event] = [stepped(step, 1 / step, **{"loss/t_0.1": 2.0 * step}) for step in steps]
    return [RunStarted(steps[0] - 1, 100), *taken, measured, painted(folder, last), RunFinished(last)]


def test_a_picture_s_tag_is_the_same_at_every_step_and_another_for_the_base(tmp_path: Path) -> None:
    at = [tag(Painted(tmp_path / "validation" / f"step_{step}_cat_ema_1_64x32.png", "cat", "", step)) for step in (0, 10)]
    assert at == ["validation/cat_ema_1_64x32"] * 2
    assert tag(Painted(tmp_path / "benchmark" / "step_0_cat_1_64x32.png", "cat", "", 0)) == "benchmark/cat_1_64x32"


@pytest.mark.parametrize("content", [None, b"", b"no picture"])
def test_a_picture_that_cannot_be_read_costs_a_tracker_nothing_else(
    content: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost = painted(tmp_path, 1)
    lost.path.unlink()
    if content is not None:
        lost.path.write_bytes(content)
    tracker, shown = TensorboardTracker(tmp_path / "logs", CONFIG), list[Any]()
    wandb = WandbTracker(Trackers(report_to="wandb"), tmp_path / "logs", CONFIG, lambda event: None)
    wandb._run = SimpleNamespace(log=shown.append)
    bus = Bus([tracker, wandb])
    for event in (lost, painted(tmp_path, 2), stepped(2)):
        bus(event)
    tracker.close()
    assert [one.step for one in read(tmp_path / "logs").Images("validation/你好_1_64x32")] == [2]
    assert [one.keys() & {"validation/你好_1_64x32", "loss"} for one in shown] == [{"validation/你好_1_64x32"}, {"loss"}]
    assert [message.partition(":")[0] for message in caplog.messages] == ["A picture is left out of the tracker"] * 2


# tensorboard


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()


def test_tensorboard_reads_back_figures_curves_pictures_and_the_config(tmp_path: Path) -> None:
    tracker = TensorboardTracker(tmp_path / "logs" / "tensorboard", CONFIG)
    for event in training(tmp_path, range(1, 4)):
        tracker(event)
    tracker.close()
    found = read(tmp_path / "logs" / "tensorboard")
    assert [(one.step, one.value) for one in found.Scalars("loss/t_0.1")] == [(1, 2.0), (2, 4.0), (3, 6.0)]
    assert found.Scalars("loss")[1].value == pytest.approx(0.5)
    assert {"learning_rate", "grad_norm", "epoch", "samples_per_s"} <= set(found.Tags()["scalars"])
    names = ("eval_loss", "eval_loss_by_time/0.2-0.3", "eval_loss_by_time/0.9-1.0")
    assert [found.Scalars(name)[0].value for name in names] == [0.25, 0.75, 0.5]
    (picture,) = found.Images("validation/你好_1_64x32")
    assert (picture.step, picture.width, picture.height) == (3, 64, 32)
    assert picture.encoded_image_string == (tmp_path / "validation" / "step_3_你好_1_64x32.png").read_bytes()
    (text,) = (
        found.Tensors("config/text_summary") if "config/text_summary" in found.Tags()["tensors"] else found.Tensors("config")
    )
    assert '"model_family": "sana"' in text.tensor_proto.string_val[0].decode()


def test_a_resumed_run_goes_on_in_tensorboard_and_steps_taken_again_count_once(tmp_path: Path) -> None:
    for steps in (range(1, 6), range(4, 8)):  # killed after step 5, gone on from the checkpoint of step 3
        tracker = TensorboardTracker(tmp_path, CONFIG)
        for event in training(tmp_path, steps):
            tracker(event)
        tracker.close()
    assert [one.step for one in read(tmp_path).Scalars("loss")] == [1, 2, 3, 4, 5, 6, 7]


def test_tensorboard_writes_nothing_before_training_starts(tmp_path: Path) -> None:
    tracker = TensorboardTracker(tmp_path / "logs", CONFIG)
    tracker(Notice("hello"))
    tracker.close()
    assert not (tmp_path / "logs").exists()


def test_a_tracker_that_cannot_write_is_switched_off_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    tracker = TensorboardTracker(tmp_path / "logs", CONFIG)
    bus = Bus([tracker])
    for event in training(tmp_path, range(1, 4)):
        bus(event)
    tracker.close()
    assert [record.getMessage().partition(" failed")[0] for record in caplog.records] == ["The tracker tensorboard"]


# wandb: in a process of its own, for it changes the one it is in

TRAIN = """
import os
import sys
import time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.reporting.test_trackers import CONFIG, training
from simpletuner.config.sections import Trackers
from simpletuner.reporting import waiting, wandb_tracker
from simpletuner.reporting.wandb_tracker import WandbTracker
wandb_tracker.REACH_S, wandb_tracker.FINISH_S, waiting.MOMENT_S = float(os.environ.get("REACH_S", "2")), 1.0, 0.5
options = Trackers(report_to="wandb", tracker_run_name="a run")
tracker = WandbTracker(options, Path("logs"), CONFIG, lambda event: print("told:", event.text))
begun, *middle, ended = training(Path(), range(int(sys.argv[2]), int(sys.argv[3])))
tracker(begun)
began_s = time.monotonic()
for event in middle:
    tracker(event)
took_s = time.monotonic() - began_s
tracker(ended)
print(f"trained: {took_s:.3f}")
"""


def wandb_run(folder: Path, first: int, end: int, **environment: str) -> str:
    """What a run of these steps said."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, root, str(first), str(end)],
        cwd=folder,
        env={**clean, "HOME": str(folder), "NETRC": str(folder / "none"), **environment},
        stdin=subprocess.PIPE,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if not kind:
            return
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            yield Record.FromString(whole)
            whole = b""


def test_without_a_login_wandb_keeps_the_run_offline_and_a_resumed_one_goes_on_in_it(tmp_path: Path) -> None:
    said = wandb_run(tmp_path, 1, 4)
    assert "told: wandb keeps this run offline: nobody is logged in" in said
    assert "wandb sync logs/wandb/offline-run" in said
    assert said.count("\n") == 2, f"and wandb itself says nothing: {said}"
    wandb_run(tmp_path, 3, 6, WANDB_MODE="offline")
    files = sorted((tmp_path / "logs" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({path.name for path in files}) == 1, "one run of wandb"
    kept = list(records(files[0]))
    begun = next(record.run for record in kept if record.HasField("run"))
    assert (begun.project, begun.display_name) == ("simpletuner", "a run")
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert {key: config[key] for key in CONFIG} == CONFIG
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in kept
        if record.HasField("history")
    ]
    assert [(row["step"], row["loss"], row["loss/t_0.1"]) for row in rows if "loss" in row] == [
        (1, 1.0, 2.0),
        (2, 0.5, 4.0),
        (3, pytest.approx(1 / 3), 6.0),
    ]
    (picture,) = [row for row in rows if "validation/你好_1_64x32/path" in row]
    assert picture["validation/你好_1_64x32/caption"] == "你好: a cat"
    assert (files[0].parent / "files" / picture["validation/你好_1_64x32/path"]).is_file()
    assert [row["eval_loss"] for row in rows if "eval_loss" in row] == [0.25]
    by_time = [(row["eval_loss_by_time/0.2-0.3"], row["eval_loss_by_time/0.9-1.0"]) for row in rows if "eval_loss" in row]
    assert by_time == [(0.75, 0.5)]


def test_wandb_out_of_reach_or_turned_off_is_a_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    told: list[Any] = []
    tracker = WandbTracker(Trackers(report_to="wandb"), tmp_path / "logs", CONFIG, told.append)
    for event in training(tmp_path, range(1, 3)):
        tracker(event)
    assert "WANDB_MODE is disabled" in told[0].text


def test_wandb_that_cannot_be_reached_goes_on_offline(tmp_path: Path) -> None:
    said = wandb_run(tmp_path, 1, 3, WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    assert "told: wandb keeps this run offline: it cannot be reached" in said
    assert "0" * 40 not in said
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or ("0" * 40).encode() not in path.read_bytes(), path


class HangingWandb(BaseHTTPRequestHandler):
    """Lets a run begin, and answers nothing else."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        if "UpsertBucket" not in asked.get("query", "") and "RunResumeStatus" not in asked.get("query", ""):
            time.sleep(60)
        project = {"id": "UA==", "name": "simpletuner", "entity": {"id": "RQ==", "name": "me"}}
        names = {"id": "QQ==", "name": asked["variables"]["name"], "displayName": "a run", "description": "", "config": "{}"}
        bucket = {**names, "sweepName": None, "project": project, "historyLineCount": 0}
        content = {"model": {**project, "bucket": None}, "upsertBucket": {"bucket": bucket, "inserted": True}}
        body = json.dumps({"data": content}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_wandb_that_hangs_holds_up_no_step_and_the_end_for_a_bounded_time_that_is_told(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), HangingWandb)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    began_s = time.monotonic()
    said = wandb_run(tmp_path, 1, 20, WANDB_API_KEY="0" * 40, WANDB_BASE_URL=address, no_proxy="127.0.0.1", REACH_S="20")
    took_s = time.monotonic() - began_s
    server.shutdown()
    server.server_close()
    online, waits, trained = (line for line in said.splitlines() if "waiting for its server" not in line)
    assert online.startswith(f"told: wandb: {address}/me/simpletuner/runs/")
    assert waits.startswith("told: wandb: sending what is left, at most 1 s; `wandb sync logs/wandb/run-")
    assert float(trained.removeprefix("trained: ")) < 1.0
    assert took_s < 15.0, "begun, and ended in a second"
