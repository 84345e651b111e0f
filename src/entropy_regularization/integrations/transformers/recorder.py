"""TransformersRecorder: listens to the attention modules of a transformers model."""

import inspect
import threading
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from entropy_regularization.attention.api import AttentionOutput
from entropy_regularization.integrations import interception
from entropy_regularization.integrations.calls import CallRecorder
from entropy_regularization.integrations.compiled import WRAPPED, name_of, refuse_export
from entropy_regularization.integrations.layers import kind_of
from entropy_regularization.integrations.modules import having, qualified_names
from entropy_regularization.integrations.source import IF_COMPILED
from entropy_regularization.integrations.stack import runs_compiled
from entropy_regularization.integrations.transformers.attention import RECORDERS, refuse_matrices
from entropy_regularization.integrations.transformers.padding import (
    PaddingTracker,
    arguments_of,
    plain_part,
)
from entropy_regularization.integrations.transformers.switching import AttentionSwitch, switch_on
from entropy_regularization.recording.recorder import ForwardCall, Layers
from entropy_regularization.recording.recording import EntropyRecording

_lock = threading.Lock()  # threads may record models that share modules
# Packages whose classes only hand a model on.
WRAPPERS = ("torch", "peft", "accelerate", "lightning", "lightning_fabric")


def outermost(names: Mapping[nn.Module, str]) -> dict[str, PreTrainedModel]:
    """Return the transformers models that are in no other one, by their names.

    Args:
        names: the modules of a model and their qualified names.
    """
    found: dict[str, PreTrainedModel] = {}
    for part, name in names.items():
        if isinstance(part, PreTrainedModel) and not _is_inside(found, name):
            found[name] = part
    return found


def _is_inside(others: Iterable[str], name: str) -> bool:
    return any(other == "" or name.startswith(f"{other}.") for other in others)


def _names_torch(part: nn.Module) -> bool:
    """Tell whether a module's forward would call torch's attention for another configuration."""
    forward = getattr(inspect.unwrap(type(part).forward), "__code__", None)
    return forward is not None and "scaled_dot_product_attention" in forward.co_names


def _handed_on(names: Mapping[nn.Module, str], models: Collection[str]) -> str:
    """Return the name of the one transformers model that wrappers only hand on; else nothing."""
    if len(models) != 1 or "" in models:
        return ""
    (found,) = models
    around = [part for part, name in names.items() if _is_inside([name], found)]
    packages = {type(part).__module__.partition(".")[0] for part in around}
    return found if packages.issubset(WRAPPERS) else ""


class TransformersRecorder(CallRecorder):
    """Listens to one model; start and stop may be called again and again.

    Attention that goes through the attention interface of transformers is computed by
    entropy_attention while the recorder listens; torch's own functions, which some families and
    models around them call, are heard too. Whatever attends in another way is found by a Watch and
    refused by name.

    Args:
        model: holds one or several transformers models, and perhaps modules of its own.
        layers: which layers to keep, see record_entropy.
        around: modules around the model that may call its forward, and so none of its hooks.
        **options: as CallRecorder.

    Raises:
        ValueError: if there is no transformers model in the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Layers = None,
        around: Iterable[nn.Module] = (),
        **options: bool,
    ) -> None:
        if not any(isinstance(part, PreTrainedModel) for part in model.modules()):
            raise ValueError(f"{type(model).__name__} holds no transformers model.")
        super().__init__(model, layers, **options)
        self.layers.check(self.model, names_of)
        self._parts: list[PreTrainedModel] = []
        self._around = list(around)
        self._switches: list[AttentionSwitch] = []
        self._padding = PaddingTracker()
        self._depth = 0  # of transformers models that run
        self._makes_matrices = False
        self._kept: list[RemovableHandle] = []
        self._waits = False  # for a pass with a gradient, which alone is to be recorded

    @property
    def listens(self) -> bool:
        """Whether the recorder was started and not yet stopped."""
        return self._padding.active

    def _start(self, call: ForwardCall | None) -> None:
        self._depth = 0
        # now, not when built: a copied or wrapped model has other modules and names
        names = qualified_names(self.model)
        models = outermost(names)
        self._parts = list(models.values())
        self._know(without_wrappers(names, models))
        for model in self._parts:
            modules = self._names if model is self.model else qualified_names(model)
            switches = switch_on(model, modules, self)
            self._switches += [each for each in switches if each not in self._switches]
        inside = (part for part in self._names if isinstance(part, PreTrainedModel))
        self._makes_matrices = not any(part._can_set_attn_implementation() for part in inside)
        self._waits = self._training_only and not self.keeps_hooks
        if self._waits:
            self._pause()  # text is generated by the model's own attention
        self._enter_modules()
        self._padding.active = True
        self._watch.begin()
        if self.keeps_hooks or runs_compiled():
            self._watch.read(self._names, torch_is_heard=False)
        if call is not None and not self._kept:
            # Hooks of a module whose pass has begun must not change: torch walks over them.
            self._kept = self._padding.follow(self._models_inside())
        elif call is None and self.keeps_hooks and not self._kept:
            self._kept = self._follow()
        elif call is None and not self.keeps_hooks:
            self._hooks = self._follow()
        if call is not None and call[0] is self.model:
            self._enter(*call)
            self._padding.enter(*call)

    def _follow(self) -> list[RemovableHandle]:
        """Hook the model, and the transformers models in it, which may be called alone.

        So may an encoder that is no model: generate does it.
        """
        inside = self._models_inside()
        encoders = [each for part in self._parts for each in plain_part(part, "encoder")]
        parts = [self.model, *inside, *encoders]
        begins = [part.register_forward_pre_hook(self._enter, with_kwargs=True) for part in parts]
        models = [self.model, *inside] if isinstance(self.model, PreTrainedModel) else inside
        masks = self._padding.follow(models)
        ends = [part.register_forward_hook(self._leave, always_call=True) for part in parts]
        return [*begins, *masks, *ends]

    def _models_inside(self) -> list[nn.Module]:
        """Return the transformers models inside the model."""
        parts = [part for part in self._names if isinstance(part, PreTrainedModel)]
        return [part for part in parts if part is not self.model]

    def runs_uncalled(self) -> bool:
        """Tell whether a module of the model is running in a pass of which no hook told."""
        return self._depth == 0 and super().runs_uncalled()

    def close(self) -> None:
        """Remove the hooks that were left for the next pass, and whatever an interrupt left."""
        if self.listens:
            self.abort()
        while self._kept:
            self._kept.pop().remove()

    def stop(self) -> EntropyRecording:
        """Leave the model as it was found; return the recording.

        Raises:
            ValueError: if the model attended where it cannot be heard, or no call was asked for.
        """
        self._end_watch(torch_is_heard=False)
        recording = self._recording
        self.abort()
        # compiled from outside, as Trainer does: the next hooks stay
        self.keeps_hooks = self.keeps_hooks or (self._training_only and self._ran_compiled)
        self._refuse_unheard(recording)
        self._refuse_nothing(recording)
        return recording

    def abort(self) -> None:
        """Leave the model as it was found.

        If backward computes a part of the pass again, the attention stays until the next pass.
        """
        self._watch.leave(finished=False)
        self._forget()
        lingers = self._recomputes_in_backward()
        interception.stop_listening(self, lingers=lingers)
        self._leave_modules()
        while self._hooks:
            self._hooks.pop().remove()
        self._padding.active = False
        self._padding.clear()
        self._depth = 0
        if lingers:
            self._next_forward.wait({self.model, *self._parts, *self._around})
        else:
            self._stop_lingering()

    def backward_is_over(self) -> None:
        """Compute nothing again in backward any more: the model runs its own attention."""
        if not self.listens:
            self._stop_lingering()

    def _enter_modules(self) -> None:
        """Let attention that runs in a module of the model deposit here.

        With its name: the compiler cannot look up a module that may be compiled by itself.
        """
        with _lock:
            for part, name in self._names.items():
                part.__dict__[RECORDERS] = (*part.__dict__.get(RECORDERS, ()), (self, name))

    def _leave_modules(self) -> None:
        """Deposit no more; what other recorders hear, in other threads too, misses no call."""
        with _lock:
            for part in self._names:
                given = part.__dict__.get(RECORDERS, ())
                others = tuple(each for each in given if each[0] is not self)
                if others:
                    part.__dict__[RECORDERS] = others
                elif given:
                    del part.__dict__[RECORDERS]

    def _leave_interrupted(self) -> None:
        super()._leave_interrupted()
        self._padding.clear()
        self._depth = 0

    def _stop_lingering(self) -> None:
        self._next_forward.cancel()
        super()._stop_lingering()
        while self._switches:
            self._switches.pop().off(self)

    def _pause(self) -> None:
        for switch in self._switches:
            switch.pause(self)

    def _resume(self) -> None:
        self._switches = [switch.resumed(self) for switch in self._switches]

    def deposit(
        self,
        module: nn.Module,
        name: str,
        found: AttentionOutput,
        n_keys: int,
        key_padding: Tensor | None,
    ) -> None:
        """Take the rows of one call of the attention interface.

        Raises:
            RuntimeError: if reentrant checkpointing has cut the gradient of the entropy.
        """
        if self.listens:  # not a copy
            if key_padding is not None and kind_of(name, module) == "cross":
                key_padding = None  # it tells nothing of the rows
            self._take(name, module, found, n_keys, key_padding)

    def _real_rows(self, entropy: Tensor, n_keys: int, key_padding: Tensor | None) -> Tensor | None:
        return self._padding.rows(entropy, n_keys, key_padding)

    def _refuse_unheard(self, recording: EntropyRecording) -> None:
        """Raise if some attention was not heard and that was not accepted."""
        unheard = self._watch.found
        self._note_missing(recording)
        if not (self._ran or unheard) or (self._attended and (self.allow_partial or not unheard)):
            return
        listed = "; ".join(f"{part} {how}" for part, how in sorted(unheard.items())[:8])
        if len(unheard) > 8:
            listed += f"; and {len(unheard) - 8} more"
        elsewhere = "load it with attn_implementation='sdpa'."
        eager = any(part.config._attn_implementation == "eager" for part in self._parts)
        if IF_COMPILED.issuperset(unheard.values()):
            elsewhere = "record it without torch.compile."
        elif interception.UNCALLED in unheard.values():
            elsewhere = "call the model, not its forward, nor a part of it."
        elif not (eager and any(_names_torch(self._module_of(part)) for part in unheard)):
            elsewhere = "load it with attn_implementation='eager' and use compute_loss on "
            elsewhere += "output_attentions=True."
        if self._attended:
            why = f"a part of its attention cannot be recorded: {listed}; pass allow_partial=True "
            why += f"to leave that part out, or {elsewhere}"
        elif listed:
            why = f"its attention cannot be recorded: {listed}; {elsewhere}"
        else:
            why = "it ran, but nothing in it was seen to attend; there is no entropy to record."
        raise ValueError(f"{type(self.model).__name__}: {why}")

    def _enter(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward pass of the model begins, or of a part."""
        if not self.listens:
            if not self.keeps_hooks:  # a copy that was made while its original listened
                self._stop_lingering()
            return
        refuse_export(self.model)
        self._depth += 1
        if not torch.compiler.is_compiling() and self._is_asked_for_matrices(part, kwargs):
            refuse_matrices()
        if self._depth > 1 or self._is_computed_again():
            return
        if self._waits:
            if not torch.is_grad_enabled():
                return
            self._waits = False
            self._resume()
        self._ran = True
        self._index = 0
        self._grad_at_entry = torch.is_grad_enabled()
        if runs_compiled():
            self._ran_compiled = True
        else:
            self._watch.enter(self._names, part, arguments_of(part, args, kwargs))
            interception.places().append((self, None))

    def _is_asked_for_matrices(self, part: nn.Module, kwargs: dict[str, Any]) -> bool:
        """Tell whether a pass asks for attention matrices: not every family tells its attention.

        A configuration that asks for them gets none from other attention than eager; models that
        have no other make them as ever.
        """
        if self._makes_matrices or not isinstance(part, PreTrainedModel):
            return False
        asked = kwargs.get("output_attentions")
        if asked is None and getattr(part.config, "output_attentions", False):
            asked = any(each.replaces("eager", part.config) for each in self._switches)
        return bool(asked)

    def _leave(self, part: nn.Module, args: Any, output: Any) -> None:
        """The forward pass has ended, or raised: its output is None then."""
        if not self.listens:
            if not self.keeps_hooks:
                self.abort()
            return
        self._depth -= 1
        if self._depth == 0 and not torch.compiler.is_compiling():
            self._watch.leave(finished=output is not None)
            interception.leave_place(self, None)

    # Checkpointing must find in backward, after the context, the attention that ran in forward.

    def _recomputes_in_backward(self) -> bool:
        """Tell whether backward, after the context, will run the attention of this pass again."""
        if self._checkpointed or not (self.model.training and self._attended):
            return self._checkpointed
        name = "gradient_checkpointing"
        return any(getattr(part, name) for part in having(self._names, name))


def names_of(model: nn.Module) -> dict[nn.Module, str]:
    """Return the names of the modules as the model in its wrappers has them."""
    names = qualified_names(model)
    return without_wrappers(names, outermost(names))


def without_wrappers(
    names: Mapping[nn.Module, str], models: Collection[str]
) -> dict[nn.Module, str]:
    """Return qualified names as the model in its wrappers has them.

    Args:
        names: the modules of a model and their qualified names.
        models: the names of the outermost transformers models.
    """
    prefix = _handed_on(names, models)
    if not prefix and not any(name.endswith(WRAPPED) for name in names.values()):
        return dict(names)
    found = {}
    for part, name in names.items():
        inside = name == prefix or name.startswith(f"{prefix}.")
        found[part] = name_of(name[len(prefix) + 1 :] if prefix and inside else name)
    return found
