"""The steps of a run: train, check, tell, validate, save, stop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modellink_lora.config.errors import UserError
from modellink_lora.config.train import TrainConfig
from modellink_lora.data.batches import Batch
from modellink_lora.device import Device
from modellink_lora.parallel.context import ParallelContext
from modellink_lora.reporting.report import Reporter, log_line
from modellink_lora.reporting.telemetry import Telemetry
from modellink_lora.training.data import RunData
from modellink_lora.training.guards import Guards
from modellink_lora.training.optimizer import learning_rate, sync_parameters
from modellink_lora.training.state import Progress
from modellink_lora.training.step import Passes, StepResult, run_micro_batches, train_step, validation_loss


@dataclass
class Loop:
    """One run, from where `progress` stands to its end.

    Args:
        chunks: the model's chunks of this rank, wrapped for data parallelism.
        save: writes a checkpoint of the current state; None where the run keeps none.
        stop: name of a signal that asks this process to stop, or None.
        passes: computes the gradients of a step.
    """

    train: TrainConfig
    data: RunData
    chunks: Sequence[Any]
    optimizer: Any
    scheduler: Any
    progress: Progress
    guards: Guards
    reporter: Reporter
    telemetry: Telemetry
    context: ParallelContext
    device: Device
    save: Callable[[bool], None] | None  # whether it is the best so far
    stop: Callable[[], str | None]
    passes: Passes
    _told_memory: bool = False

    def run(self) -> None:
        """All steps that are left. Ends early when some process is asked to stop; saves what is not saved yet."""
        progress, train = self.progress, self.train
        if progress.iteration >= train.train_iters:
            self._nothing_left()
            return
        if progress.iteration == 0:  # what the base, or the adapter started from, scores
            self.validate("valid")
        self.guards.check_replicas(progress.iteration, frozen=True)
        self.guards.check_replicas(progress.iteration)
        stream = self.data.stream("train", iteration=progress.iteration, consumed_samples=progress.consumed_samples)
        losses: list[float] = []
        saved = progress.iteration  # nothing to save before the first step
        start = dataclasses.replace(progress)
        while progress.iteration < train.train_iters:
            with self.telemetry.step(progress.iteration + 1):
                with self.telemetry.part("data"):
                    batches = stream.take(self.data.micro_batches)
                result = self.step(batches)
            self.telemetry.count(lengths=stream.lengths, trained_tokens=0 if result.skipped else result.totals.tokens)
            losses += [] if result.skipped else [result.totals.loss]
            if progress.iteration % train.log_interval == 0:
                self.log(result, losses)
                losses = []
            last = progress.iteration == train.train_iters
            best = False
            if progress.iteration % train.eval_interval == 0 or last:
                best = self.validate("valid")
            interval = train.check_weight_hash_across_dp_replicas_interval
            due = train.save_interval and progress.iteration % train.save_interval == 0
            exits = train.exit_interval and progress.iteration % train.exit_interval == 0
            ends = last or exits or result.totals.stop
            # what no step has changed is no result
            saves = self.save is not None and progress.updates > 0 and (due or ends or (best and train.save_best))
            if saves or (interval and progress.iteration % interval == 0):
                sync_parameters(train, self.chunks)
                self.guards.check_replicas(progress.iteration)
            if ends:
                self.guards.at_end()
                self._require_steps(start, stopped=result.totals.stop)
            if saves or ends:
                self._check_weights()
            if self.save and saves:
                with self.telemetry.paused():
                    self.save(best)
                saved = progress.iteration
            if ends:
                break
        if progress.iteration == train.train_iters:
            self.validate("test")
        elif result.totals.stop:
            self._tell_stop(saved)
        elif exits:
            self.reporter.say(f"--exit-interval: stopping after iteration {progress.iteration}")

    def _nothing_left(self) -> None:
        """A resumed run that stands at its end, or beyond: nothing is trained or saved."""
        iteration, wanted = self.progress.iteration, self.train.train_iters
        self.reporter.say(
            f"nothing left to do: the resumed run stands at iteration {iteration}, --train-iters says {wanted}; raise "
            f"--train-iters above {iteration} to go on, or give --finetune to start again from this adapter's weights"
        )
        # the run may have been killed before its test; beyond --train-iters it would be the test of another run
        if iteration == wanted:
            self.guards.check_replicas(iteration, frozen=True)
            self.guards.check_replicas(iteration)
            self.validate("test")

    def step(self, batches: list[Batch]) -> StepResult:
        """One optimizer step over this replica's share of a global batch."""
        train, progress = self.train, self.progress
        self.stop()  # from its first call on there is something to save

        def forward_again() -> None:
            with torch.no_grad():
                run_micro_batches(self.chunks, batches, self.context, loss_reduction=train.loss_reduction, train=False)

        result = train_step(
            self.chunks, self.optimizer, batches, self.context, self.device,
            loss_reduction=train.loss_reduction, telemetry=self.telemetry,
            inspect=lambda totals: self.guards.before_update(progress.iteration + 1, totals, forward_again),
            stop=self.stop, passes=self.passes,
        )  # fmt: skip
        progress.iteration += 1
        progress.consumed_samples += self.data.batch_size
        progress.skipped += result.skipped
        progress.updates += not result.skipped
        # an overflow of fp16 is counted as skipped: it is how the loss scale is found
        finite = math.isfinite(result.totals.loss) and (not result.totals.alarm or result.skipped)
        progress.not_finite += result.totals.tokens > 0 and not finite
        if not result.skipped:
            self.scheduler.step(self.data.batch_size)
        self._count_empty(result)
        loss, tokens = result.totals.loss, result.totals.tokens
        self.reporter.step(None if result.skipped else loss)
        # the loss of a skipped step is under a name of its own: it is no point of the curve of what was learned
        told = {"skipped step loss": loss} if result.skipped else {"lm loss": loss}
        self.reporter.record(
            progress.iteration,
            {**told, "grad norm": result.grad_norm, "learning rate": learning_rate(self.optimizer),
             "trained tokens": 0 if result.skipped else tokens, "loss scale": self._loss_scale},
        )  # fmt: skip
        return result

    @property
    def _loss_scale(self) -> float:
        return float(self.optimizer.get_loss_scale())

    def _count_empty(self, result: StepResult) -> None:
        empty = self.data.micro_batches * self.context.dp_size - result.totals.micro_batches
        if empty and not self.progress.empty_micro_batches:
            self.reporter.say(
                f"warning: iteration {self.progress.iteration}: {empty} micro-batches hold no trained token; they add "
                "nothing and are left out of the mean (further ones are counted in metrics.jsonl only)"
            )
        if empty:
            self.reporter.record(self.progress.iteration, {"empty micro-batches": empty})
        self.progress.empty_micro_batches += empty

    def validate(self, split: str) -> bool:
        """Loss over the same samples of `split` every time; whether it is the best validation so far."""
        count = self.data.validation_batches(split) * self.data.micro_batches
        if not count:
            return False
        progress, name = self.progress, {"valid": "validation", "test": "test"}[split]
        with self.telemetry.paused():
            sync_parameters(self.train, self.chunks)
            totals = validation_loss(
                self.chunks, self.data.stream(split).take(count), self.context, self.device,
                loss_reduction=self.train.loss_reduction,
            )  # fmt: skip
        loss = totals.loss
        if not math.isfinite(loss):
            why = f"is {loss}, outputs are not finite" if totals.tokens else "is not known, no token is trained"
            self.reporter.record(progress.iteration, {f"{name} loss": None})
            self.reporter.say(f"warning: the {name} loss at iteration {progress.iteration} {why}: it counts as none")
            return False
        best = split == "valid" and progress.updates > 0 and _is_better(loss, progress.best)
        if best:
            progress.best = {"iteration": progress.iteration, "loss": loss}
        self.reporter.record(progress.iteration, {f"{name} loss": loss})
        self.reporter.say(
            f" {name} loss at iteration {progress.iteration} | lm loss value: {loss:.6E} | "
            f"lm loss PPL: {math.exp(min(20, loss)):.6E} |"
        )
        return best

    def log(self, result: StepResult, losses: Sequence[float]) -> None:
        """Megatron's log line about the steps since the last one, and where the time went."""
        train, progress = self.train, self.progress
        window = self.telemetry.window()
        self.reporter.say(
            log_line(
                iteration=progress.iteration, train_iters=train.train_iters,
                consumed_samples=progress.consumed_samples, milliseconds=window.milliseconds,
                tflops=window.tflops if train.log_throughput else None,
                learning_rate=learning_rate(self.optimizer), batch_size=self.data.batch_size,
                loss=sum(losses) / len(losses) if losses else None, loss_scale=self._loss_scale,
                grad_norm=result.grad_norm, skipped=progress.skipped, not_finite=progress.not_finite,
            )
        )  # fmt: skip
        self.reporter.performance(progress.iteration, window)
        if not self._told_memory:
            self._told_memory = True
            numbers = " | ".join(f"{name}: {value / 2**20:.1f}" for name, value in self.device.memory().items())
            who = f"[Rank {self.context.rank}] (after {progress.iteration} iterations)"
            print(f"{who} memory (MB) | {numbers}", flush=True)

    def _check_weights(self) -> None:
        """Stop before a save, or at the end, when a trained weight is not finite; say so where the user goes on."""
        name = self.guards.weight_not_finite()
        if name is None:
            return
        found = f"iteration {self.progress.iteration}: {name} is not finite after the update"
        if self.train.check_nan:
            raise UserError(
                f"{found}, so this state is not saved. Resume from an earlier checkpoint with a lower --lr, or use "
                "--bf16 instead of --fp16"
            )
        self.reporter.say(f"warning: {found}: this adapter cannot be used")

    def _require_steps(self, start: Progress, *, stopped: bool) -> None:
        """At the end: say how little was learned since `start` where more steps were skipped than taken.

        Raises:
            UserError: no step of the run was taken, though nobody stopped it before its end.
        """
        skipped, taken = self.progress.skipped - start.skipped, self.progress.updates - start.updates
        why = "they hold no trained token"
        mend = "look at the data with preprocess_data.py --preview, or raise --seq-length"
        if self.train.fp16:
            why = f"their gradients overflowed (the loss scale is now {self._loss_scale:g})"
            mend = (
                "use --bf16, give more --train-iters, in which the loss scale falls, or a smaller --initial-loss-scale"
            )
        if not self.progress.updates and not stopped:
            raise UserError(
                f"no step was taken: all {skipped} were skipped because {why}, so the adapter is as it was and is not "
                f"saved; {mend}"
            )
        if skipped > taken:
            self.reporter.say(f"warning: {skipped} steps were skipped because {why}, only {taken} were taken; {mend}")

    def _tell_stop(self, saved: int) -> None:
        signal, iteration = self.stop() or "a signal to another process", self.progress.iteration
        kept = f"iteration {saved} is saved; resume with --lora-load" if self.save else "no --save: nothing was kept"
        if self.save and not saved:
            kept = "no step was taken yet, so there is nothing to save"
        self.reporter.say(f"{signal}: stopping after iteration {iteration}; {kept}")
        self.reporter.ending = f"stopped by {signal} after iteration {iteration}"


def _is_better(loss: float, best: Mapping[str, float] | None) -> bool:
    """Whether a validation is the best so far.

    A best loss of 0 or nan does not count: older versions kept it of a validation without a trained token.
    """
    return best is None or not best["loss"] > 0 or loss < best["loss"]
