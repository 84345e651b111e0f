"""The eyes on a training: records, progress, whole checkpoints, and the reasons to stop."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from entropy_regularization.cli.errors import RunProblem
from entropy_regularization.cli.progress import TrainingProgress
from entropy_regularization.cli.runs import RunFolder
from entropy_regularization.cli.signals import StopSignals
from entropy_regularization.integrations.transformers.regularized import handle_of
from entropy_regularization.monitoring.monitor import EntropyMonitor
from entropy_regularization.monitoring.records import RecordWriter
from entropy_regularization.monitoring.statistics import Band, mean_of_heads
from entropy_regularization.recording.recorder import make_recorder

KEPT = 2  # checkpoints: a damaged one has another before it


class MicroBatch(NamedTuple):
    """What a forward pass in training gave, detached scalars."""

    loss: Tensor  # the model's own
    penalty: Tensor


class NothingLeft(Exception):  # noqa: N818
    """The checkpoint that a training goes on from is that of its last step."""


class Watch(TrainerCallback):
    """Writes records, shows progress, marks checkpoints, and stops a run that has to stop.

    Args:
        model: what is trained; regularized already, if it is to be.
        folder: of the run.
        writer: of its records.
        band: in which row entropies are wanted.
        console: where progress is shown.
        tokens: seen by all ranks when so many steps are done.
        elapsed: seconds of training before, in a resumed run.
        evaluate: writes an evaluation "during" training; called with the step.
        evaluate_every: steps between two of them, 0 for none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        folder: RunFolder,
        writer: RecordWriter,
        band: Band,
        console: Console,
        *,
        tokens: Callable[[int], int],
        elapsed: float,
        evaluate: Callable[[int], None],
        evaluate_every: int,
    ) -> None:
        self.model, self.folder, self.writer, self.console = model, folder, writer, console
        self.tokens, self.elapsed = tokens, elapsed
        self.evaluate, self.evaluate_every = evaluate, evaluate_every
        self.signals = StopSignals(self.say)
        self.progress: TrainingProgress | None = None
        self._monitor = EntropyMonitor(band)
        self._recorder = make_recorder(model, gradient=False)
        self._listening = False
        self._step: list[MicroBatch] = []
        self._summed = False  # whether the losses of micro-batches add up to that of the step
        self._hook = model.register_forward_hook(self._keep_loss, with_kwargs=True)
        self._window = (time.monotonic(), 0)  # when the speed was last written, and at which step

    def say(self, sentence: str) -> None:
        """Print a sentence above the bar."""
        self.console.print(sentence)

    def close(self) -> None:
        """Take the bar and the hook away."""
        if self.progress is not None:
            self.progress.close()
        self._hook.remove()

    # what is listened to

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Show the bar.

        Raises:
            NothingLeft: if every step is done; Trainer would make one more.
        """
        if state.global_step >= state.max_steps:
            raise NothingLeft
        self.progress = TrainingProgress(state.max_steps, state.global_step, self.console)
        self._window = (time.monotonic(), state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Listen to the heads in the steps that are recorded."""
        self._step.clear()
        step = state.global_step + 1
        if step == 1 or step % args.logging_steps == 0 or step == state.max_steps:
            self._recorder.start()
            self._listening = True

    def _keep_loss(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Keep the loss of a micro-batch: Trainer logs means that depend on where it resumed."""
        loss = getattr(output, "loss", None)
        if not model.training or loss is None:
            return
        # With num_items_in_batch the losses of a step add up to its loss, else they are averaged.
        self._summed = kwargs.get("num_items_in_batch") is not None
        handle, loss = handle_of(model), loss.detach()
        if handle is None or handle.loss is None or handle.added is None:
            self._step.append(MicroBatch(loss, torch.zeros_like(loss)))
        else:
            self._step.append(MicroBatch(handle.loss, handle.added.to(loss)))

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take the heads of a micro-batch, and listen to the next one."""
        if self._listening:
            self._monitor.update(self._recorder.stop())
            self._recorder.start()

    # what is decided at the end of a step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Check the loss, and stop if a signal came.

        Raises:
            RunProblem: if the loss, or a weight that is to be saved, is not finite.
        """
        if self._listening:
            self._listening = False
            self._monitor.update(self._recorder.stop())
        if self.progress is not None:
            self.progress.step(state.global_step)
        if state.global_step >= state.max_steps:
            control.should_log = True
        if self.signals.came_to_any(self.model.device):
            control.should_save = True
            control.should_training_stop = True
        if control.should_log or control.should_save or self.model.device.type == "cpu":
            self._check_finite(state.global_step, saving=control.should_save)
        every = self.evaluate_every
        if every and state.global_step % every == 0 and state.global_step < state.max_steps:
            start = time.monotonic()
            self.evaluate(state.global_step)
            self._window = (self._window[0] + time.monotonic() - start, self._window[1])

    def _check_finite(self, step: int, *, saving: bool) -> None:
        """Stop before a checkpoint holds weights that are not finite."""
        wrong = None
        last = self._step[-1] if self._step else None
        if last and step == 1 and not math.isfinite(loss := last.loss.item()):
            raise RunProblem(
                f"the loss is {loss} at step 1, before any weight was changed; pass another "
                "--model or --precision."
            )
        if last and not math.isfinite(loss := (last.loss + last.penalty).item()):
            wrong = f"the loss became {loss}"
        elif saving and not all(p.isfinite().all() for p in self.model.parameters()):
            wrong = "a weight became infinite or NaN"
        if wrong is not None:
            found = self.folder.checkpoints.last()
            kept = (
                "no checkpoint was written before it"
                if found is None
                else f"the checkpoint of step {found[0]} is kept in {found[1]}"
            )
            raise RunProblem(
                f"{wrong} at step {step}; {kept}. Start again with a lower --learning-rate or "
                "--loss-coeff."
            )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Mark the checkpoint as whole, and remove older ones."""
        if args.world_size > 1:
            dist.barrier()  # every rank has written its part
        if state.is_world_process_zero:
            self.folder.checkpoints.mark_complete(state.global_step)
            self.folder.checkpoints.keep_last(KEPT)

    # what is written

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write a record of the step."""
        if logs is None or "loss" not in logs or not self._monitor.updates or not self._step:
            return
        speed = self._speed(state.global_step)
        statistics = self._monitor.summary(over_ranks=True)
        self._monitor.reset()
        loss, penalty = self._loss_of_step()
        numbers: dict[str, Any] = {
            "loss": loss,
            "penalty": penalty,
            "learning_rate": logs.get("learning_rate", math.nan),
            "gradient_norm": float(logs.get("grad_norm", math.nan)),
            "tokens": self.tokens(state.global_step),
            "tokens_per_second": speed,
            "elapsed": self.elapsed,
        }
        if state.is_world_process_zero:
            self.writer.write("train", state.global_step, statistics, **numbers)
        if self.progress is not None:
            shown = {**numbers, "entropy": mean_of_heads(statistics.entropy)}
            self.progress.numbers(state.global_step, shown)

    def _speed(self, step: int) -> float:
        """Return tokens a second since the last record, and begin anew."""
        (start, first), now = self._window, time.monotonic()
        self._window = (now, step)
        self.elapsed += now - start
        return (self.tokens(step) - self.tokens(first)) / max(now - start, 1e-9)

    def _loss_of_step(self) -> tuple[float, float]:
        """Return the model's own loss and the penalty of this step, over all ranks."""
        sums = torch.stack([torch.stack(part).sum() for part in zip(*self._step, strict=True)])
        ranks = 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
            ranks = dist.get_world_size()
        if not self._summed:
            sums = sums / (ranks * len(self._step))
        loss, penalty = sums.tolist()
        return loss, penalty
