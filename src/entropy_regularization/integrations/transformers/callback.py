"""EntropyCallback: watch the heads with any Trainer, without a penalty."""

import functools
import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from entropy_regularization.monitoring.statistics import HeadStatistics, HeadSums, head_sums
from entropy_regularization.recording.recorder import Layers, Recorder, make_recorder

logger = logging.getLogger("entropy_regularization.integrations.transformers")


class EntropyCallback(TrainerCallback):
    """Records the first micro-batch, on every rank, of every step that Trainer logs.

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
        self._sums = HeadSums({})
        self._listening = False

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
            self._listening = True

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take what the first micro-batch gave."""
        self._take()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take what the only micro-batch gave."""
        self._take()

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

    def _take(self) -> None:
        if self._listening and self._recorder is not None:
            self._listening = False
            recording = self._recorder.stop()
            if recording.layers:
                self._sums = self._sums.plus(head_sums(recording))
            else:
                _warn_of_no_training_pass()


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
