"""EntropyCallback: watch the heads with any Trainer, without a penalty."""

import functools
import logging
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from entropy_regularization.integrations.transformers.recorder import TransformersRecorder
from entropy_regularization.monitoring.statistics import HeadStatistics, HeadSums, head_sums
from entropy_regularization.recording.recorder import Layers, Recorder, make_recorder

logger = logging.getLogger("entropy_regularization.integrations.transformers")


class EntropyCallback(TrainerCallback):
    """Records, on every rank, the first training pass of every step that Trainer logs.

    Each rank needs one: they wait for each other when the numbers of all are joined.
    Other steps run the model's own attention, untouched (with ``logging_strategy="epoch"`` every
    step is recorded). The numbers are added to the line in
    ``trainer.state.log_history``, to what later callbacks see of it, and kept in ``history``.

    Args:
        layers: which layers to watch, see record_entropy.
        allow_partial: accept that some attention modules cannot be seen, see record_entropy.

    Attributes:
        history: (step, statistics of every head), one per logged step.

    Example:
        >>> trainer = Trainer(model=model, callbacks=[EntropyCallback()])  # doctest: +SKIP
    """

    def __init__(self, *, layers: Layers = None, allow_partial: bool = False) -> None:
        self.layers = layers
        self.allow_partial = allow_partial
        self.history: list[tuple[int, HeadStatistics]] = []
        self._recorder: Recorder | None = None
        self._model: nn.Module | None = None
        self._sums = HeadSums({})
        self._listens = False
        self._ends: RemovableHandle | None = None  # hook on the model while it is listened to
        self._keeps_hook = False  # a new one would have the model compiled anew

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Find the attention of the model, or refuse it before the first step.

        Raises:
            ValueError: if the model's attention cannot be recorded.
        """
        if model is None:
            raise ValueError("EntropyCallback was called without a model; use it with Trainer.")
        self._end()  # what an exception left of a training before
        self._sums, self._model = HeadSums({}), model
        self._keeps_hook = args.torch_compile
        self._recorder = make_recorder(
            model,
            layers=self.layers,
            gradient=False,
            allow_partial=self.allow_partial,
            training_only=True,  # trainers of TRL generate text within a step
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen, if Trainer logs at the end of this step."""
        if self._recorder is not None and _is_logged(args, state, state.global_step + 1):
            self._recorder.start()
            assert self._model is not None
            # after the hooks of the recorder, which are still to run when it is stopped
            if self._ends is None:
                self._ends = self._model.register_forward_hook(self._pass_ends, always_call=True)
            self._listens = True

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take what the first micro-batch gave, if it did not call the model as a whole."""
        self._take()
        self._let_go()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take what the only micro-batch gave, if it did not call the model as a whole."""
        self._take()
        self._let_go()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the numbers to the line that is logged."""
        if logs is None or "loss" not in logs:
            return
        sums, self._sums = self._sums.over_ranks(), HeadSums({})
        if not sums.layers:
            return
        statistics = sums.statistics()
        self.history.append((state.global_step, statistics))
        logs.update(statistics.metrics())
        if state.log_history:
            state.log_history[-1].update(statistics.metrics())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was found."""
        self._end()

    def _end(self) -> None:
        """Remove what was kept from step to step."""
        self._keeps_hook = False
        self._abort()
        if isinstance(self._recorder, TransformersRecorder):
            self._recorder.close()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _pass_ends(self, _: nn.Module, args: Any, output: Any) -> None:
        """Stop listening: what comes next in the step may fail, and nobody would tell."""
        if output is None:  # always_call: forward has raised
            self._abort()
        elif torch.is_grad_enabled():
            self._take()

    def _abort(self) -> None:
        if self._recorder is not None and self._hears_no_more():
            self._recorder.abort()

    def _hears_no_more(self) -> bool:
        """Remove the hook; tell whether the model was listened to."""
        if self._ends is not None and not self._keeps_hook:
            self._ends.remove()
            self._ends = None
        heard, self._listens = self._listens, False
        return heard

    def _take(self) -> None:
        if self._recorder is not None and self._hears_no_more():
            recording = self._recorder.stop()
            if recording.layers:
                self._sums = self._sums.plus(head_sums(recording))
            else:
                _warn_of_no_training_pass()

    def _let_go(self) -> None:
        """Give a checkpointed model, of which backward is over, its own attention back."""
        if self._recorder is not None:
            self._recorder.backward_is_over()


@functools.cache
def _warn_of_no_training_pass() -> None:
    logger.warning(
        "no pass of the model had a gradient in a step that is logged, so that there are no "
        "entropies to log: EntropyCallback records the passes that train it."
    )


def _is_logged(args: TrainingArguments, state: TrainerState, step: int) -> bool:
    """Tell whether Trainer logs after this step, by the rule of its DefaultFlowCallback."""
    if step == 1 and args.logging_first_step:
        return True
    if args.logging_strategy == "epoch":
        return True  # which step is an epoch's last is not known before it
    return args.logging_strategy == "steps" and step % state.logging_steps == 0
