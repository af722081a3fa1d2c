"""Checkpoints: saved whole or not at all, found again, and restored so that the run goes on as if it had never stopped.

A checkpoint is a folder `checkpoint-<step>` whose `manifest.json`, written last, names every file with its size and hash.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from simpletuner.config.lycoris import settings_of
from simpletuner.config.resolved import changes
from simpletuner.config.run import Run
from simpletuner.config.sections import Adapter
from simpletuner.data.ranks import together
from simpletuner.errors import RunError, UserError
from simpletuner.events import Notice, Saved, Tell
from simpletuner.training.jobs import Due
from simpletuner.training.optimizers import averaged, optimizer_state, restore_optimizer
from simpletuner.training.staging import move_into_place, remove, staged

if TYPE_CHECKING:
    from simpletuner.training.ema import Ema
    from simpletuner.training.trainer import Trainer

__all__ = ["EMA", "RESULTS", "Checkpoint", "Checkpoints", "find_checkpoint", "has_result", "restore", "whole_checkpoints"]

NAME = re.compile(r"checkpoint-(\d+)")
RESULTS = {"lora": "pytorch_lora_weights.safetensors", "full": "pipeline"}
"""What a finished run leaves, by `model_type`."""
EMA = "ema"
"""Folder of the average, in a checkpoint and beside the result."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    step: int


class Checkpoints:
    """The job that saves: every so many steps, when asked, and at the end, with the result after it."""

    def __init__(self, run: Run, config: Mapping[str, Any]) -> None:
        """`config` is the resolved configuration, option -> value, kept beside the weights."""
        options = run.checkpointing
        self.due = Due(steps=options.checkpoint_step_interval, at_end=True, asked="save", name="checkpoint")
        self._output_dir = Path(options.output_dir)
        self._limit = options.checkpoints_total_limit
        self._config = config

    def run(self, trainer: Trainer) -> None:
        """Save where the trainer stands. Rank 0 writes (all hold the same weights); all stop if it cannot."""
        together(trainer.engine, lambda: self._save(trainer) if trainer.engine.rank == 0 else None)

    def _save(self, trainer: Trainer) -> None:
        target = self._output_dir / f"checkpoint-{trainer.state.step}"
        if not is_whole(target):
            if target.exists():  # not ours: we never leave half a one
                target.rename(_free_name(target))
            with staged(target) as folder:
                write_checkpoint(folder, trainer, self._config)
                move_into_place(folder, target)
            trainer.tell(Saved(target, trainer.state.step))
        if trainer.is_done:
            self._save_result(trainer)
        if self._limit > 0:
            for old in whole_checkpoints(self._output_dir)[: -self._limit]:
                remove(old.path)

    def _save_result(self, trainer: Trainer) -> None:
        with staged(self._output_dir / "result") as folder:
            with averaged(trainer.optimizer, trainer.tuning.parameters()):
                made = trainer.tuning.save_result(folder)
            result = self._output_dir / made.name
            for path in sorted(folder.iterdir(), key=lambda path: path == made):  # what lies beside it first
                move_into_place(path, self._output_dir / path.name)
            if trainer.ema is not None:
                with trainer.ema.applied():
                    trainer.tuning.save_result(folder / EMA)
                move_into_place(folder / EMA, self._output_dir / EMA)
        trainer.tell(Saved(result, trainer.state.step, final=True))


def write_checkpoint(folder: Path, trainer: Trainer, config: Mapping[str, Any]) -> None:
    """All that a resumed run needs, the manifest last."""
    parameters = trainer.tuning.parameters()
    with averaged(trainer.optimizer, parameters):
        trainer.tuning.save(folder)
    if trainer.ema is not None:
        trainer.tuning.save(folder / EMA, trainer.ema.weights())
    tensors, scalars = optimizer_state(trainer.run.optimizer, trainer.optimizer, parameters)
    save_file(tensors, folder / "optimizer.safetensors")
    _write_json(folder / "optimizer.json", scalars)
    _write_json(folder / "config.json", config)
    facts = {"version": 1, **trainer.state.as_json(), "seed": trainer.run.training.seed}
    if trainer.adaptive is not None:
        facts["adaptive_weights"] = trainer.adaptive.as_json()
    figures = {"window": trainer.meter.as_json(), "scaler": trainer.engine.scaler_state()}
    _write_json(folder / "state.json", {**facts, "fixed": fixed_facts(trainer.run), **figures})
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    _write_json(folder / "manifest.json", {"version": 1, "files": listed})


def fixed_facts(run: Run) -> dict[str, Any]:
    """What a run cannot change when it goes on: it decides which tensors there are."""
    facts: dict[str, Any] = {
        "model_family": run.model.model_family,
        "model_type": run.model.model_type,
        "optimizer": run.optimizer.optimizer,
        "mixed_precision": run.precision.mixed_precision,
    }
    if run.model.model_type == "lora":
        facts |= {"lora_type": run.adapter.lora_type}
        facts |= _lycoris_facts(run) if run.adapter.lora_type == "lycoris" else _lora_facts(run.adapter)
    return facts


def _lora_facts(adapter: Adapter) -> dict[str, Any]:
    facts: dict[str, Any] = {"lora_rank": adapter.lora_rank, "use_dora": adapter.use_dora}
    if adapter.peft_lora_target_modules is None:
        return facts | {"lora_target_preset": adapter.lora_target_preset}
    return facts | {"peft_lora_target_modules": sorted(adapter.peft_lora_target_modules)}


def _lycoris_facts(run: Run) -> dict[str, Any]:
    free = {"multiplier", "dropout", "rank_dropout", "module_dropout", "bypass_mode"}
    return {f"lycoris_config.{key}": value for key, value in settings_of(run.adapter).items() if key not in free}


def whole_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """The whole checkpoints of a run folder, oldest first."""
    return sorted((found for found in _named(output_dir) if is_whole(found.path)), key=lambda found: found.step)


def is_whole(folder: Path) -> bool:
    """Whether every file that the manifest names is there in its size."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return False
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError):
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == facts["bytes"] for name, facts in files.items())


def find_checkpoint(run: Run, tell: Tell) -> Checkpoint | None:
    """Where the run goes on, or None for its beginning. Raises UserError if the wish and the folder do not agree."""
    output_dir, wish = Path(run.checkpointing.output_dir), run.checkpointing.resume_from_checkpoint
    if not wish:
        _check_unused(output_dir, 'resume_from_checkpoint is "", which starts afresh, and nothing is overwritten.')
        return None
    own = whole_checkpoints(output_dir)
    for broken in (found.path for found in _named(output_dir) if found not in own):
        tell(Notice(f"{broken} is not whole and is passed over.", "warning"))
    newest = own[-1] if own else None
    if newest is None:
        _check_unused(output_dir, "there is no checkpoint in it to go on from, and nothing is overwritten.")
    found = newest if wish == "latest" else _by_name(wish, output_dir, own)
    if found is not None:
        _check_fixed(found, run)
    return found


def restore(found: Checkpoint, trainer: Trainer, config: Mapping[str, Any]) -> None:
    """Put the trainer where the checkpoint stands, bit for bit, and say which options changed since. Called on every rank."""
    _verify(found)
    parameters = trainer.tuning.parameters()
    trainer.tuning.load(trainer.tuning.read(found.path), str(found.path))
    restore_optimizer(
        trainer.run.optimizer,
        trainer.optimizer,
        parameters,
        load_file(found.path / "optimizer.safetensors"),
        _read_json(found.path / "optimizer.json"),
    )
    if trainer.ema is not None:
        _restore_ema(found, trainer.ema, trainer)
    facts = _read_json(found.path / "state.json")
    trainer.state.restore(facts)
    trainer.meter.restore(facts["window"])
    if trainer.adaptive is not None and "adaptive_weights" in facts:
        trainer.adaptive.restore(facts["adaptive_weights"])
    trainer.engine.restore_scaler(facts.get("scaler", {}))  # checkpoints of 0.1 have none, nor had they fp16
    trainer.tell(Notice(f"Going on from {found.path}, step {found.step} of {trainer.steps}."))
    own = {"resume_from_checkpoint": None}
    former, now = _read_json(found.path / "config.json"), json.loads(json.dumps(config))
    if listed := changes({**former, **own}, {**now, **own}):
        trainer.tell(Notice(f"Changed since that checkpoint: {', '.join(listed)}."))


def _restore_ema(found: Checkpoint, ema: Ema, trainer: Trainer) -> None:
    if (found.path / EMA).is_dir():
        ema.load(trainer.tuning.read(found.path / EMA))
        return
    ema.restart()
    trainer.tell(
        Notice(f"{found.path} holds no average (it was saved without use_ema): the average begins at step {found.step}.")
    )


def has_result(run: Run) -> bool:
    """Whether the weights, and their average if one is kept, lie where stock pipelines look for them."""
    folder = Path(run.checkpointing.output_dir)
    folders = [folder, folder / EMA] if run.ema.use_ema else [folder]
    return all((folder / RESULTS[run.model.model_type]).exists() for folder in folders)


def _check_unused(output_dir: Path, why: str) -> None:
    results = [name for name in RESULTS.values() if (output_dir / name).exists()]
    used = [found.path.name for found in _named(output_dir) if is_whole(found.path)] + results
    if used:
        raise UserError(
            f'output_dir "{output_dir}" holds another run: {", ".join(sorted(used))}.',
            why=why,
            mend='choose another output_dir, move these away, or go on with "resume_from_checkpoint": "latest".',
        )


def _by_name(wish: str, output_dir: Path, own: list[Checkpoint]) -> Checkpoint:
    path = output_dir / wish if (output_dir / wish).is_dir() else Path(wish)
    match = NAME.fullmatch(path.name)
    listed = ", ".join(found.path.name for found in own) or "none"
    if match is None or not is_whole(path):
        raise UserError(
            f'resume_from_checkpoint "{wish}" is not a whole checkpoint.',
            why=f"there is no `checkpoint-<step>` folder of that name with all its files. In {output_dir}: {listed}.",
            mend="name one of these, give a path, or set it to latest.",
        )
    found = Checkpoint(path, int(match[1]))
    later = [other.path.name for other in own if other.step > found.step]
    if later:
        raise UserError(
            f"resume_from_checkpoint {found.path.name} goes back behind {', '.join(later)} in {output_dir}.",
            why="going on from there would overwrite them.",
            mend="choose another output_dir and give the checkpoint's path, or move the later ones away.",
        )
    return found


def _check_fixed(found: Checkpoint, run: Run) -> None:
    former, now = _read_json(found.path / "state.json")["fixed"], fixed_facts(run)
    changed = sorted(_changed(former, now))
    if changed:
        raise UserError(
            f"{found.path} cannot go on with these options: "
            + "; ".join(f"{name} was {former.get(name)}, now {now.get(name)}" for name in changed)
            + ".",
            why="they decide which tensors a checkpoint holds.",
            mend="set them back, or start a new run in another output_dir (init_lora takes over an adapter's weights).",
        )


def _changed(former: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    return {name for name in former.keys() | now.keys() if former.get(name) != now.get(name)}


def _verify(found: Checkpoint) -> None:
    for name, facts in _read_json(found.path / "manifest.json")["files"].items():
        if _sha256(found.path / name) != facts["sha256"]:
            raise RunError(
                f"{found.path / name} is not what was saved: its hash differs.",
                why="the file was changed, or the disk is failing.",
                mend="move this checkpoint away; the same command then goes on from the one before.",
            )


def _named(output_dir: Path) -> list[Checkpoint]:
    matches = [(path, NAME.fullmatch(path.name)) for path in output_dir.glob("checkpoint-*") if path.is_dir()]
    return [Checkpoint(path, int(match[1])) for path, match in matches if match]


def _free_name(target: Path) -> Path:
    names = (target.with_name(f"{target.name}.broken{number or ''}") for number in range(10_000))
    return next(name for name in names if not name.exists())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
