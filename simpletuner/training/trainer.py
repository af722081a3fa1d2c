"""The loop: micro-batches in, optimiser steps out, jobs in between.

Shape letters:  B batch,  C latent channels,  H W latent rows and columns.  Time t is 0 for clean and 1 for noise.
"""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Protocol

import torch
from torch import Tensor, nn

from simpletuner.config.run import Run
from simpletuner.config.secrets import hidden, masked_words
from simpletuner.config.webhooks import written_secrets
from simpletuner.data.samples import Batch, Cursor, draw_seed
from simpletuner.diffusion.density import stratified
from simpletuner.diffusion.objective import perturbation, sample_loss
from simpletuner.errors import Interrupted, RunError
from simpletuner.events import Notice, RunFinished, RunStarted, Stepped, Tell
from simpletuner.families.base import ModelFamily
from simpletuner.training.ema import Ema
from simpletuner.training.engine import Engine
from simpletuner.training.headroom import Headroom
from simpletuner.training.jobs import Asked, Inbox, Job, Upcoming
from simpletuner.training.meter import Meter
from simpletuner.training.optimizers import build_optimizer, set_rate
from simpletuner.training.schedules import learning_rate
from simpletuner.training.state import TrainState
from simpletuner.training.tuning import Tuning

__all__ = ["BatchStream", "Group", "Trainer"]


class Group(Protocol):
    """This rank's micro-batches of one optimiser step."""

    @property
    def batches(self) -> Sequence[Batch]:
        """One for each turn of accumulation."""

    @property
    def after(self) -> Cursor:
        """Where the stream goes on."""


class BatchStream(Protocol):
    """Where micro-batches come from: the same from the same cursor, without end but where all sets have one."""

    def groups(self, cursor: Cursor) -> Generator[Group, None, None]:
        """Groups from `cursor` on; closing the generator ends its prefetching."""
        ...


class Trainer:
    """A run from its first step, or a checkpoint's, to its last. Jobs find here what they need."""

    def __init__(
        self,
        run: Run,
        engine: Engine,
        family: ModelFamily,
        denoiser: nn.Module,
        tuning: Tuning,
        batches: BatchStream,
        jobs: Sequence[Job],
        tell: Tell,
        *,
        steps: int,
    ) -> None:
        self.run = run
        self.engine = engine
        self.family = family
        self.denoiser = denoiser
        self.tuning = tuning
        self.batches = batches
        self.jobs = tuple(jobs)
        self.tell = tell
        self.steps = steps
        self.state = TrainState()
        self.meter = Meter(engine, may_skip=engine.scales)
        self.headroom = Headroom(engine)
        self._upcoming = Upcoming((), steps)
        self._samples_per_step = 1
        self.predict = engine.prepare(family, denoiser)
        self.optimizer = build_optimizer(run.optimizer, tuning.parameters())
        self.ema = self._build_ema()
        self.adaptive = family.adaptive_weights(engine.device)

    @property
    def is_done(self) -> bool:
        """Whether the last optimiser step was taken."""
        return self.state.step >= self.steps

    def fit(self) -> None:
        """Train to the end. Raises Interrupted if the user stops it, RunError if the loss is not finite or batches run out."""
        self.tell(RunStarted(self.state.step, self.steps))
        self._upcoming = Upcoming([job.due for job in self.jobs], self.steps)
        with Inbox() as inbox:
            self._work(Asked(), is_start=True)
            if not self.is_done:
                self._loop(inbox)
        self.tell(RunFinished(self.state.step))

    def loss(self, batch: Batch) -> Tensor:
        """Loss of each sample, (B,) float32."""
        return self.timed_loss(batch)[0]

    def timed_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss of each sample, (B,) float32, and its time, (B,) float32 on the CPU.

        All its draws, dropout too, are keyed by the micro-batch, not by the rank.
        """
        self.engine.seed(draw_seed(self.run.training.seed, batch.micro.epoch, batch.micro.index))
        x0_BCHW = self.engine.to_device(batch.latents_BCHW).float()
        cond = {name: self.engine.to_device(tensor) for name, tensor in batch.cond.items()}
        density = self.family.density((x0_BCHW.shape[-2], x0_BCHW.shape[-1]))
        drawn_B = density(stratified(batch.slot, len(x0_BCHW), batch.slots)).float()
        t_B = self.engine.to_device(drawn_B)
        noise_BCHW = torch.randn_like(x0_BCHW)
        x_BCHW = self.family.process.diffuse(x0_BCHW, self._perturbed(noise_BCHW), t_B)
        if batch.is_regularisation and self.tuning.keeps_base:
            with self.tuning.disabled(), torch.no_grad():
                target_BCHW = self.predict(x_BCHW, t_B, cond)
        else:
            target_BCHW = self.family.process.target(x0_BCHW, noise_BCHW, t_B)
        answer_BCHW = self.predict(x_BCHW, t_B, cond)
        flow_time_B = self.family.process.flow_time(t_B)
        mask_B1HW = None if batch.mask_B1HW is None else self.engine.to_device(batch.mask_B1HW)
        loss_B = sample_loss(
            self.run.objective, answer_BCHW, target_BCHW, t_B=t_B, flow_time_B=flow_time_B, mask_B1HW=mask_B1HW
        )
        if self.adaptive is None:
            return self.family.weight(t_B) * loss_B, drawn_B
        if not batch.is_regularisation:  # held to the base's own answer: its loss says nothing of how hard a time is
            self.adaptive.note(t_B, loss_B, mask_B1HW)
        return self.adaptive.weight(t_B) * loss_B, drawn_B

    def _perturbed(self, noise_BCHW: Tensor) -> Tensor:
        """The noise that the input is made with. Without perturbation nothing is drawn: all other draws stay what they were."""
        share = perturbation(self.run.objective, self.state.step)
        return noise_BCHW + share * torch.randn_like(noise_BCHW) if share else noise_BCHW

    def _build_ema(self) -> Ema | None:
        options = self.run.ema
        if not options.use_ema:
            return None
        device = self.engine.device if options.ema_device == "accelerator" else "cpu"
        return Ema(
            self.tuning.parameters(), decay=options.ema_decay, interval=options.ema_update_interval, device=device
        )  # fmt: skip

    def _loop(self, inbox: Inbox) -> None:
        with closing(self.batches.groups(self.state.cursor)) as groups:
            for group in groups:
                self._step(group)
                if self.is_done or self.state.step % self.run.reporting.log_step_interval == 0:
                    self._report()
                asked = self.engine.agree(inbox.take())
                self._work(asked)
                if asked.stop:
                    raise self._interrupted(asked)
                if self.is_done:
                    return
        # The length was reckoned from the first step on, and as if the pictures had always been these.
        raise RunError(
            f"After step {self.state.step} of {self.steps} no dataset has anything left.",
            "the pictures, or when their sets end (`end_epoch`, `end_step`), have changed since the run began.",
            f'set "max_train_steps" to {self.state.step}, or let a set last longer, and start the same command again.',
        )

    def _step(self, group: Group) -> None:
        losses_B, times_B = [], []
        for turn, batch in enumerate(group.batches, start=1):
            with self.engine.accumulate(last=turn == len(group.batches)):
                loss_B, t_B = self.timed_loss(batch)
                self.engine.backward(loss_B.mean() / len(group.batches))
            losses_B.append(loss_B)
            times_B.append(t_B)
        self.engine.unscale(self.optimizer)
        options = self.run.optimizer
        weights = self.tuning.parameters().values()
        grad_norm = self.engine.clip(weights, options.max_grad_norm, method=options.grad_clip_method)
        set_rate(self.optimizer, learning_rate(self.state.step, options, self.steps))
        self.engine.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=self.run.memory.set_grads_to_none)
        self._samples_per_step = group.batches[0].slots
        self.state.advance(group.after, samples=self._samples_per_step)
        if self.ema is not None:
            self.ema.update(self.state.step)
        if self.adaptive is not None:
            self.adaptive.update(self.engine.total)
        self.meter.add(self.state.step, group.batches, losses_B, times_B, grad_norm)

    def _report(self) -> None:
        figures = self.meter.figures()
        if figures.skipped_steps:
            steps = "1 step was" if figures.skipped_steps == 1 else f"{figures.skipped_steps} steps were"
            self.tell(
                Notice(f"{steps} skipped up to step {self.state.step}: gradients overflowed float16; the scale is lower now.")
            )
        extra = {
            "regularisation_loss": figures.regularisation_loss,
            "skipped_steps": figures.skipped_steps,
            "peak_memory_gib": self.engine.peak_memory_gib(),
            "peak_memory_share": self.headroom.share(),
            **{f"loss_by_time/{part}": loss for part, loss in figures.loss_by_time.items()},
        }
        self.tell(
            Stepped(
                step=self.state.step,
                steps=self.steps,
                epoch=self.state.epoch,
                loss=figures.loss,
                learning_rate=learning_rate(self.state.step - 1, self.run.optimizer, self.steps),
                grad_norm=figures.grad_norm,
                samples_per_s=figures.samples_per_s,
                time=figures.time,
                extra={name: value for name, value in extra.items() if value is not None},
                upcoming=self._upcoming.after(self.state.step),
                steps_per_s=figures.samples_per_s / self._samples_per_step,
            )
        )

    def _work(self, asked: Asked, *, is_start: bool = False) -> None:
        if asked.stop:
            self.tell(Notice(f"{signal.Signals(asked.signal_number).name}: saving step {self.state.step}, then stopping."))
        due = [job for job in self.jobs if job.due.met(self.state.step, asked, is_start=is_start, is_end=self.is_done)]
        if not due:
            return
        if warning := self.headroom.warning():
            self.tell(Notice(warning, "warning"))
        self.meter.read()  # nothing is saved or painted of weights that a non-finite loss has spoiled
        with self.meter.paused():
            for job in due:
                job.run(self)

    def _interrupted(self, asked: Asked) -> Interrupted:
        arguments = sys.argv[1:] if sys.argv[1:2] == ["train"] else ["train", *sys.argv[1:]]
        command = shlex.join(["simpletuner", *masked_words(arguments)])
        return Interrupted(
            asked.signal_number,
            f"Stopped at step {self.state.step} of {self.steps}; it is saved in {self.run.checkpointing.output_dir}.",
            mend=f"start it again as before, and it goes on from there: {hidden(command, written_secrets(self.run))}",
        )
