"""regularize: add the penalty to the loss that a transformers model returns."""

import inspect
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from entropy_regularization.integrations.checkpointing import refuse_lost_gradient
from entropy_regularization.integrations.layers import Wanted, heads_of, places_among
from entropy_regularization.integrations.modules import qualified_names
from entropy_regularization.integrations.stack import backward_enters_checkpoint, runs_forward
from entropy_regularization.integrations.transformers.accumulation import share_of_step
from entropy_regularization.integrations.transformers.loading import THRESHOLDS
from entropy_regularization.integrations.transformers.losses import (
    LossUse,
    TrainingPass,
    loss_of,
    reaching,
    with_loss,
)
from entropy_regularization.integrations.transformers.padding import arguments_of
from entropy_regularization.integrations.transformers.recorder import (
    TransformersRecorder,
    names_of,
    outermost,
)
from entropy_regularization.recording.recorder import Layers
from entropy_regularization.recording.recording import EntropyRecording
from entropy_regularization.reduction import has_ranks, mean_over_ranks
from entropy_regularization.regularization import EntropyRegularization
from entropy_regularization.thresholds import HeadThresholds, as_tensor, check_fixed

logger = logging.getLogger("entropy_regularization.integrations.transformers")


def regularize(
    model: nn.Module,
    regularization: EntropyRegularization | None = None,
    *,
    thresholds: object = None,
    layers: Layers = None,
    allow_partial: bool = False,
) -> "Regularized":
    """Make the loss that a model returns in training include the entropy penalty.

    Any training loop that calls ``backward`` on the model's loss then trains with the penalty:
    transformers.Trainer, Accelerate, Lightning, one's own. Only documented hooks are used; the
    model's class, forward and configuration stay as they are. In evaluation mode nothing is added
    and the model runs its own attention.

    A loop that makes its loss from other outputs (TRL's trainers do) does not see what was added to
    the model's loss; the next training pass refuses that. Give the model no labels there and add
    the handle's ``unadded``, or derive from EntropyRegularizedTrainer.

    Learnable thresholds become a submodule ``entropy_thresholds`` of the model, so that they are
    optimised (without weight decay by Trainer, see HeadThresholds), moved, sharded, saved by
    ``save_pretrained`` and restored by ``Trainer(...).train(resume_from_checkpoint=...)`` with it.
    ``from_pretrained`` builds a model that does not know them yet (and says that a key is not
    used), so attach them again:

        model = AutoModelForCausalLM.from_pretrained(folder)
        regularize(model, regularization, thresholds=load_thresholds(folder))

    Call it before the optimizer is made and before DistributedDataParallel or FSDP wraps the model,
    but after PEFT does, which freezes whatever the model has (the log warns of frozen thresholds).
    Thresholds are float32 in a model of any precision; ``fully_shard`` takes one precision a unit,
    so shard ``model.entropy_thresholds`` by itself first if the model has another.
    PEFT saves its adapters alone: EntropyRegularizedTrainer saves the thresholds beside them; with
    another trainer keep ``model.entropy_thresholds.state_dict()``.

    When Trainer normalises the loss over the tokens of all accumulated micro-batches and ranks
    (``num_items_in_batch``), the penalty of a micro-batch is weighted with its share of these
    tokens, so that the weights of a step add up to 1.

    Args:
        model: a transformers model, wrapped (PEFT) or not.
        regularization: settings; EntropyRegularization() unless given.
        thresholds: HeadThresholds to learn; or a number, ``[heads]`` or ``[layers, heads]``, which
            stay fixed. None takes those of the regularization, and if it has none, learnable
            ones that start at 0.5, one per head of every attention call.
        layers: which layers to penalise: indices in the order of the calls or name patterns, see
            record_entropy; all unless given.
        allow_partial: accept that some attention modules cannot be seen, see record_entropy.

    Returns:
        A handle: the last loss, penalty and recording, and ``remove()``.

    Raises:
        TypeError: if the model holds no transformers model, or regularization is something else.
        ValueError: if the model is regularized already, wrapped by data parallelism or holds
            several, its attention cannot be recorded, its configuration does not tell its heads, or
            thresholds do not fit.
    """
    inside = outermost(qualified_names(model)) if isinstance(model, nn.Module) else {}
    if not inside:
        raise TypeError(
            f"model is a {type(model).__name__} without a transformers model inside; for any other "
            "model add regularization(recording) to the loss, see record_entropy."
        )
    if len(inside) > 1:
        raise ValueError(
            f"{type(model).__name__} holds several transformers models ({', '.join(inside)}); "
            "regularize each of them, or add regularization(recording) to the loss, see "
            "record_entropy."
        )
    (found,) = inside.values()
    if regularization is None:
        regularization = EntropyRegularization()
    if not isinstance(regularization, EntropyRegularization):
        raise TypeError(
            f"regularization is a {type(regularization).__name__}; pass an EntropyRegularization."
        )
    if handle_of(found) is not None:
        raise ValueError(
            f"{type(found).__name__} is regularized already; call remove() on what regularize "
            "returned before."
        )
    wanted = Wanted(layers)
    wanted.check(found, names_of)
    chosen = thresholds if thresholds is not None else regularization.thresholds
    if chosen is None:
        chosen = HeadThresholds(*_layers_and_heads(found, wanted))
    check_fixed(chosen, "thresholds")
    if not isinstance(chosen, HeadThresholds) and as_tensor(chosen, "thresholds").requires_grad:
        raise ValueError(
            "thresholds is a tensor that requires a gradient, which no optimizer of the model "
            "would find; pass HeadThresholds(layers, heads, initial=tensor)."
        )
    wrapper = next((part for part in model.modules() if _shards(part)), None)
    learned = isinstance(chosen, HeadThresholds) and chosen.fraction_bias.requires_grad
    if wrapper is not None and learned:
        raise ValueError(
            f"the model is wrapped by {type(wrapper).__name__}, which learns of no thresholds that "
            "are added now, so that every rank would learn its own; call regularize before it "
            "wraps, or pass fixed thresholds."
        )
    return Regularized(
        found,
        regularization,
        chosen,
        around=_tuners_of(model, found),
        layers=layers,
        allow_partial=allow_partial,
    )


def _shards(module: nn.Module) -> bool:
    """Tell whether torch's data parallelism has wrapped a module, by name: it need not be there."""
    wrappers = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
    return any(kind.__name__ in wrappers for kind in type(module).__mro__)


def _tuners_of(model: nn.Module, found: PreTrainedModel) -> list[nn.Module]:
    """Return the module of PEFT right around a model if it calls its forward, and so no hooks.

    What this misses is refused in training, see ``_check``.
    """
    return [
        part
        for part in model.modules()
        if type(part).__module__.startswith("peft.")
        and found in part.children()
        and "forward" in inspect.unwrap(type(part).forward).__code__.co_names
    ]


def handle_of(model: nn.Module) -> "Regularized | None":
    """Return the handle of a model that is regularized, or None."""
    for part in model.modules():
        for hook in part._forward_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Regularized):
                return owner
    return None


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

    @contextmanager
    def collecting(self) -> Iterator[list[TrainingPass]]:
        """Give the training passes to a caller who adds whatever of them his loss does not hold."""
        outer, self._collected = self._collected, []
        try:
            yield self._collected
        finally:
            self._collected, self.unadded = outer, None

    # Not compiled with the model: they switch its attention, which a graph cannot hold.

    @torch.compiler.disable  # type: ignore[untyped-decorator]
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

    @torch.compiler.disable  # type: ignore[untyped-decorator]
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
            return reaching(output, penalty) if has_ranks() and not _shards(model) else None
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
        """Refuse a training pass of the model whose hooks were not called."""
        if self._listening or not self.model.training or torch.compiler.is_compiling():
            return
        if torch.is_grad_enabled() and runs_forward(self.model):  # not a part used alone
            raise ValueError(
                f"the forward of {type(self.model).__name__} was called directly, around the hooks "
                "that add the entropy penalty; call the model itself, and if PEFT wraps it, call "
                "regularize after that."
            )

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
            names = names_of(self.model).values()
            wanted = [name for name in names if self._recorder.layers.takes(-1, name)]
            places = places_among(wanted, recorded, held.layers, self._fitted)
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


def _layers_and_heads(model: PreTrainedModel, layers: Wanted) -> tuple[int, int]:
    """Return how many attention calls the configuration promises, and the most heads of one.

    Patterns are held against the modules that are attention by the names of their classes.
    """
    config = model.config.get_text_config()
    heads = heads_of(config)
    if isinstance(heads, list | tuple):
        heads = max(heads)
    calls = getattr(config, "num_hidden_layers", None)
    if getattr(config, "is_encoder_decoder", False):
        encoder = getattr(config, "encoder_layers", None) or calls
        decoder = getattr(config, "decoder_layers", None) or getattr(
            config, "num_decoder_layers", None
        )
        # one call a layer of the encoder, self and cross of the decoder
        calls = encoder + 2 * decoder if encoder and decoder else None
    if layers.given is not None:
        parts = names_of(model).items()
        names = [name for part, name in parts if "attention" in type(part).__name__.lower()]
        calling = [n for n in names if not any(other.startswith(f"{n}.") for other in names)]
        indices = sum(not isinstance(want, str) for want in layers)
        calls = indices + sum(layers.takes(-1, name) for name in calling)
        if calls == 0:
            raise ValueError(
                f"layers={layers.given!r} matches no attention module of {type(model).__name__}; "
                "pass patterns of their names, or thresholds=HeadThresholds(calls, heads)."
            )
    if not isinstance(heads, int) or not isinstance(calls, int):
        wanted = "how many attention calls it makes"
        raise ValueError(
            f"the configuration of {type(model).__name__} does not tell {wanted} and of how many "
            "heads; pass thresholds=HeadThresholds(calls, heads)."
        )
    return calls, heads
