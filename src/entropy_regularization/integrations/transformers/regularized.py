"""A regularized transformers model: in training its loss includes the penalty."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from entropy_regularization.integrations.checkpointing import refuse_lost_gradient
from entropy_regularization.integrations.layers import attending, places_among
from entropy_regularization.integrations.sharding import is_data_parallel
from entropy_regularization.integrations.stack import (
    backward_enters_checkpoint,
    runs_forward,
    runs_in_backward,
)
from entropy_regularization.integrations.transformers.accumulation import share_of_step
from entropy_regularization.integrations.transformers.attention import RECORDERS
from entropy_regularization.integrations.transformers.loading import THRESHOLDS
from entropy_regularization.integrations.transformers.losses import (
    LossUse,
    TrainingPass,
    loss_of,
    reaching,
    with_loss,
)
from entropy_regularization.integrations.transformers.padding import arguments_of
from entropy_regularization.integrations.transformers.recorder import TransformersRecorder, names_of
from entropy_regularization.recording.recorder import Layers
from entropy_regularization.recording.recording import EntropyRecording
from entropy_regularization.reduction import has_ranks, mean_over_ranks
from entropy_regularization.regularization import EntropyRegularization
from entropy_regularization.thresholds import HeadThresholds, as_tensor

logger = logging.getLogger("entropy_regularization.integrations.transformers")
UNCOMPILED = (
    "a graph cannot hold the hooks of regularize; leave out fullgraph=True or strict=True, or call "
    "remove() on what regularize returned"
)


class Regularized:
    """What regularize returns: the hooks on the model, and what they saw last.

    Attributes:
        model: the transformers model inside whatever was given.
        regularization: settings.
        thresholds: HeadThresholds, or fixed numbers.
        loss: the model's own loss in the last training pass, detached; None before the first.
        penalty: the penalty of that pass, before any weight, detached.
        added: what was added to the loss: the penalty times the weight of the micro-batch,
            detached.
        recording: the entropies of that pass, detached.
        unadded: the penalty with its gradient, if the model returned no loss to add it to in the
            last training pass (loss functions outside the model); add it yourself. None otherwise.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        regularization: EntropyRegularization,
        thresholds: object,
        *,
        around: list[nn.Module],
        layers: Layers,
        allow_partial: bool,
    ) -> None:
        self.model = model
        self.regularization = regularization
        self.thresholds = thresholds
        self.loss: Tensor | None = None
        self.penalty: Tensor | None = None
        self.added: Tensor | None = None
        self.recording: EntropyRecording | None = None
        self.unadded: Tensor | None = None
        self._listening = False
        self._thread = 0  # in which the pass runs that is listened to
        self._fitted: set[str] = set()  # layers of passes whose calls the thresholds fitted
        self._use = LossUse()
        self._collected: list[TrainingPass] | None = None
        self._warned: set[str] = set()
        self._recorder = TransformersRecorder(
            model, layers=layers, allow_partial=allow_partial, around=around
        )
        # Before the thresholds, which are called within a pass and without one.
        self._hooks = [part.register_forward_pre_hook(self._check) for part in model.children()]
        if isinstance(thresholds, HeadThresholds):
            device = next(model.parameters()).device
            # on meta accelerate leaves what it offloads
            if device not in (torch.device("meta"), thresholds.fraction_bias.device):
                thresholds.to(device)
            model.add_module(THRESHOLDS, thresholds)
        self._learnable = self._learns()
        for part in (model, *around):  # the innermost that is called begins the pass and ends it
            self._hooks += [
                part.register_forward_pre_hook(self._before, with_kwargs=True),
                part.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            ]

    def __getstate__(self) -> dict[str, Any]:
        """A copied model takes its handle along; what has a gradient stays here."""
        return {**self.__dict__, "unadded": None, "_collected": None, "_use": LossUse()}

    def remove(self) -> None:
        """Give the model back as it was, without hooks and thresholds.

        After a checkpointed pass, which backward may compute again, the entropy attention and a
        hook stay until the next pass.
        """
        while self._hooks:
            self._hooks.pop().remove()
        self._recorder.close()
        if isinstance(self.thresholds, HeadThresholds) and hasattr(self.model, THRESHOLDS):
            delattr(self.model, THRESHOLDS)

    def backward_is_over(self) -> None:
        """Give a checkpointed model its own attention back, before its next pass does.

        A loop of one's own calls it where something else than the model itself looks at its
        attention between two steps, as ``generate_batch`` does.
        """
        self._recorder.backward_is_over()

    @contextmanager
    def collecting(self) -> Iterator[list[TrainingPass]]:
        """Give the training passes to a caller who adds whatever of them his loss does not hold."""
        outer, self._collected = self._collected, []
        try:
            yield self._collected
        finally:
            self._collected, self.unadded = outer, None

    # Not compiled with the model: they switch its attention, which a graph cannot hold.

    @torch.compiler.disable(reason=UNCOMPILED)  # type: ignore[untyped-decorator]
    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        model = self.model
        if self._listening:
            self._end_interrupted()
        if not torch.is_grad_enabled():
            if model.training and backward_enters_checkpoint():
                refuse_lost_gradient(model, type(model).__name__)
            return
        if not model.training and arguments_of(model, args, kwargs).get("labels") is not None:
            self._warn_once(
                "%s is given labels in evaluation mode, where no entropy penalty is added; call "
                "model.train() to train with it."
            )
        if model.training:
            self.unadded = None
            self._use.check(type(model).__name__)
            self._recorder.start((model, args, kwargs))
            self._listening, self._thread = True, threading.get_ident()

    def _end_interrupted(self) -> None:
        """End a pass that KeyboardInterrupt has ended, which runs no hooks.

        Raises:
            RuntimeError: if that pass is running still.
        """
        if runs_forward(self.model, self._thread):
            raise RuntimeError(
                f"{type(self.model).__name__} was called while a training pass of it runs (in a "
                "hook of its own, or another thread), whose entropies would mix with those of this "
                "one; call it before or after, or call a copy of it."
            )
        self._recorder.abort()
        self._listening = False

    @torch.compiler.disable(reason=UNCOMPILED)  # type: ignore[untyped-decorator]
    def _after(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        model = self.model
        if not self._listening or threading.get_ident() != self._thread:
            return None
        if output is None and runs_forward(model):  # a pass inside that was refused
            return None
        self._listening = False
        if output is None:  # always_call: forward has raised
            self._recorder.abort()
            return None
        recording = self._recorder.stop()
        penalty = self._penalty(recording)
        self.penalty, self.recording = penalty.detach(), recording.detach()
        given = arguments_of(model, args, kwargs)
        loss = loss_of(output, given)
        if loss is None:
            self.loss, self.added, self.unadded = None, None, penalty
            if self._collected is None:
                self._warn_once(
                    "%s returned no loss in a training pass, so the entropy penalty was not added; "
                    "add the handle's `unadded` to your loss, or use EntropyRegularizedTrainer."
                )
            else:
                self._collected.append(TrainingPass(penalty, self.recording))
            # Not where the model shards itself, whose own hooks look at the output.
            return (
                reaching(output, penalty) if has_ranks() and not is_data_parallel(model) else None
            )
        added = penalty.to(loss.device) * self._share(given)
        total = loss + added.to(loss.dtype)
        self.loss, self.added = loss.detach(), added.detach()
        if self._collected is None:
            self._use.watch(total, output)
        else:
            found = TrainingPass(penalty, self.recording, total.grad_fn, self.loss, self.added)
            self._collected.append(found)
        return with_loss(output, total)

    def _share(self, given: dict[str, Any]) -> Tensor | float:
        """Return the weight of this micro-batch's penalty in its step."""
        share = share_of_step(self.model, given)
        if isinstance(share, Tensor) and self.regularization.across_ranks:
            return mean_over_ranks(share)  # the penalty knows how large this rank's part is
        return share

    def _check(self, part: nn.Module, args: tuple[Any, ...]) -> None:
        """Refuse a training pass whose hooks were not called; warn of a part called by itself."""
        if self._listening or not self.model.training or not torch.is_grad_enabled():
            return
        if torch.compiler.is_compiling():
            return
        if runs_forward(self.model):
            raise ValueError(
                f"the forward of {type(self.model).__name__} was called directly, around the hooks "
                "that add the entropy penalty; call the model itself, and if PEFT wraps it, call "
                "regularize after that."
            )
        sentence = (
            f"the {type(part).__name__} of %s was called by itself in training, where no entropy "
            "penalty is added; call the model itself, or record the part with record_entropy and "
            "add regularization(recording) to your loss."
        )
        if sentence not in self._warned and _attends_unrecorded(part) and not runs_in_backward():
            self._warn_once(sentence)

    def _learns(self) -> bool:
        held = self.thresholds
        return isinstance(held, HeadThresholds) and held.fraction_bias.requires_grad

    def _penalty(self, recording: EntropyRecording) -> Tensor:
        if self._learnable and not self._learns():
            self._warn_once(
                "the entropy thresholds of %s are frozen since regularize was called; PEFT freezes "
                "whatever a model has, so call regularize after it, or "
                "entropy_thresholds.requires_grad_() on the model."
            )
        held = self.thresholds
        if isinstance(held, HeadThresholds):
            return self.regularization(recording, self._of_calls(held, recording))
        return self.regularization(recording, held)

    def _of_calls(
        self, held: HeadThresholds, recording: EntropyRecording
    ) -> HeadThresholds | Tensor:
        """Return the thresholds of the calls of a pass, which may leave layers out.

        Raises:
            ValueError: if it cannot be told which these are.
        """
        calls, heads = len(recording), max((layer.heads for layer in recording), default=0)
        recorded = [layer.name for layer in recording]
        if (calls, heads) == (held.layers, held.heads):
            self._fitted.update(recorded)
            return held
        places = None
        if calls < held.layers and heads <= held.heads:
            names = names_of(self.model)
            wanted = [name for name in names.values() if self._recorder.layers.takes(-1, name)]
            for others in (self._fitted, attending(names)):  # of the first passes little is known
                places = places or places_among(wanted, recorded, held.layers, others)
        if places is not None:
            self._fitted.update(recorded)
            return as_tensor(held, "thresholds")[places, :heads]
        if self._fitted:
            do = "other passes made another number; choose layers that every pass calls once "
            do += "(layers=...), or pass fixed thresholds"
        else:
            do = f"pass thresholds=HeadThresholds({calls}, {heads}) to regularize"
        raise ValueError(
            f"{type(self.model).__name__} made {calls} attention calls of up to {heads} heads, but "
            f"thresholds are for {held.layers} layers of {held.heads}; {do}."
        )

    def _warn_once(self, sentence: str) -> None:
        if sentence not in self._warned:
            self._warned.add(sentence)
            logger.warning(sentence, type(self.model).__name__)


def _attends_unrecorded(part: nn.Module) -> bool:
    """Tell whether a part of a model can attend and be trained, and nobody records it."""
    trained = any(each.requires_grad for each in part.parameters())
    return trained and not getattr(part, RECORDERS, ()) and bool(attending(names_of(part)))


def handle_of(model: nn.Module) -> Regularized | None:
    """Return the handle of a model that is regularized, or None."""
    for part in model.modules():
        for hook in part._forward_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Regularized):
                return owner
    return None
