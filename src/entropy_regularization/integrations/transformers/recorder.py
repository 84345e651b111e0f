"""TransformersRecorder: listens to the attention modules of a transformers model."""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from entropy_regularization.attention.api import AttentionOutput
from entropy_regularization.integrations import interception
from entropy_regularization.integrations.compiled import is_compiled
from entropy_regularization.integrations.layers import is_wanted, kind_of
from entropy_regularization.integrations.stack import (
    calling_module,
    in_reentrant_checkpoint,
    runs_compiled,
    runs_in_backward,
)
from entropy_regularization.integrations.transformers.attention import RECORDER
from entropy_regularization.integrations.transformers.padding import PaddingTracker, arguments_of
from entropy_regularization.integrations.transformers.switching import AttentionSwitch
from entropy_regularization.integrations.unseen import Watch
from entropy_regularization.recording.recorder import ForwardCall, Layers
from entropy_regularization.recording.recording import EntropyRecording, LayerEntropy


def find_pretrained(model: nn.Module) -> PreTrainedModel | None:
    """Return the outermost transformers model inside any wrapper, or None."""
    return next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)


class TransformersRecorder:
    """Listens to one model; start and stop may be called again and again.

    Attention that goes through the attention interface of transformers is computed by
    entropy_attention while the recorder listens; torch's own functions, which some families call,
    are heard too. Whatever attends in another way is found by a Watch and refused by name.

    Args:
        model: a transformers model, wrapped or not.
        layers: which layers to keep, see record_entropy.
        gradient: False detaches what is recorded.
        allow_partial: accept modules that attend unheard; they are in ``missing``.

    Raises:
        ValueError: if there is no transformers model in the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Layers = None,
        gradient: bool = True,
        allow_partial: bool = False,
    ) -> None:
        found = find_pretrained(model)
        if found is None:
            raise ValueError(f"{type(model).__name__} holds no transformers model.")
        self.model = found
        self.layers = layers
        self.gradient = gradient
        self.allow_partial = allow_partial
        self._switch = AttentionSwitch(found)
        self._watch = Watch(found)
        self._padding = PaddingTracker()
        self._names: dict[nn.Module, str] = {}
        self._recording = EntropyRecording()
        self._calls = 0
        self._forwards = 0
        self._grad_at_entry = False
        self._hooks: list[RemovableHandle] = []
        # New hooks at every pass would have a compiled model compiled anew at every pass.
        self._keeps_hooks = any(map(is_compiled, model.modules()))
        self._kept: list[RemovableHandle] = []
        self._pending: RemovableHandle | None = None
        self._outer: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copied model takes a recorder along that is not listening; entropies stay here."""
        return {**self.__dict__, "_recording": EntropyRecording()}

    @property
    def listens(self) -> bool:
        """Whether the recorder was started and not yet stopped."""
        return self._padding.active

    def start(self, call: ForwardCall | None = None) -> EntropyRecording:
        """Switch the model to the entropy attention and listen; return the recording to fill.

        Args:
            call: the forward pass that is already beginning, see Recorder.
        """
        self._recording = EntropyRecording()
        self._calls = self._forwards = 0
        self._switch_on()
        # now, not when built: a copied or wrapped model has other modules and names
        self._names = {part: name for name, part in self.model.named_modules()}
        for part in self._names:
            if RECORDER in part.__dict__:
                self._outer[id(part)] = part.__dict__[RECORDER]
            part.__dict__[RECORDER] = self
        interception.listen(self)
        self._padding.active = True
        if self._keeps_hooks or runs_compiled():
            self._watch.read(self._names, torch_is_heard=False)
        if call is not None and not self._kept:
            # Hooks of a module whose pass has begun must not change: torch walks over them.
            self._kept = self._padding.follow(*self.model.children())
        elif call is None and self._keeps_hooks and not self._kept:
            self._kept = self._follow()
        elif call is None and not self._keeps_hooks:
            self._hooks = self._follow()
        if call is not None and call[0] is self.model:
            self._enter(*call)
            self._padding.enter(*call)
        return self._recording

    def _follow(self) -> list[RemovableHandle]:
        root = self.model.register_forward_pre_hook(self._enter, with_kwargs=True)
        end = self.model.register_forward_hook(self._leave, always_call=True)
        return [root, *self._padding.follow(self.model), end]

    def close(self) -> None:
        """Remove the hooks that were left for the next pass."""
        while self._kept:
            self._kept.pop().remove()

    def stop(self) -> EntropyRecording:
        """Leave the model as it was found; return the recording.

        Raises:
            ValueError: if the model attended where it cannot be heard.
        """
        self.abort()
        self._refuse_unheard()
        return self._recording

    def abort(self) -> None:
        """Leave the model as it was found."""
        self._watch.leave()
        interception.stop_listening(self)
        for part in self.model.modules():
            part.__dict__.pop(RECORDER, None)
            if id(part) in self._outer:
                part.__dict__[RECORDER] = self._outer.pop(id(part))
        while self._hooks:
            self._hooks.pop().remove()
        self._padding.active = False
        self._padding.clear()
        if self._recomputes_in_backward():
            self._switch_off_at_next_forward()
        else:
            self._switch_off()

    def deposit(self, module: nn.Module, found: AttentionOutput, n_keys: int) -> None:
        """Take the rows of one call of the attention interface.

        Raises:
            RuntimeError: if reentrant checkpointing has cut the gradient of the entropy.
        """
        if not self.listens:  # a copy
            return
        outer = self._outer.get(id(module))
        if outer is not None:
            outer.deposit(module, found, n_keys)
        self._deposit(self._names.get(module, type(module).__name__), module, found, n_keys)

    def deposit_call(self, place: str | None, found: AttentionOutput, n_keys: int) -> None:
        """Take the rows of one call of torch's own attention function."""
        name = place or calling_module(self._names) or type(self.model).__name__
        module = next((part for part, each in self._names.items() if each == name), self.model)
        self._deposit(name, module, found, n_keys)

    def _deposit(self, name: str, module: nn.Module, found: AttentionOutput, n_keys: int) -> None:
        if runs_in_backward():
            return
        self._check_gradient(module, name)
        index = self._calls
        self._calls += 1
        if not is_wanted(self.layers, index, name):
            return
        entropy = found.entropy if self.gradient else found.entropy.detach()
        rows = self._padding.rows(entropy) & (found.allowed_keys > 0).any(1)
        kind = kind_of(name, module)
        self._recording.layers.append(
            LayerEntropy(name, kind, entropy, found.allowed_keys, rows, n_keys)
        )

    def _check_gradient(self, module: nn.Module, name: str) -> None:
        if not self.gradient or not self._grad_at_entry or torch.is_grad_enabled():
            return
        trained = any(parameter.requires_grad for parameter in module.parameters())
        if trained and in_reentrant_checkpoint():
            raise RuntimeError(
                f"{name} runs without a gradient inside a forward pass that has one, as reentrant "
                "checkpointing does, which would lose the penalty silently; use "
                "gradient_checkpointing_enable(gradient_checkpointing_kwargs="
                "{'use_reentrant': False})."
            )

    def _refuse_unheard(self) -> None:
        """Raise if some attention was not heard and that was not accepted."""
        unheard = self._watch.found
        self._recording.missing = sorted(unheard)
        if not self._forwards or (self._calls and (self.allow_partial or not unheard)):
            return
        listed = "; ".join(f"{part} {how}" for part, how in sorted(unheard.items())[:8])
        if len(unheard) > 8:
            listed += f"; and {len(unheard) - 8} more"
        elsewhere = "load it with attn_implementation='eager' and use compute_loss on "
        elsewhere += "output_attentions=True."
        if self._calls:
            why = f"a part of its attention cannot be recorded: {listed}; pass allow_partial=True "
            why += f"to leave that part out, or {elsewhere}"
        elif listed:
            why = f"its attention cannot be recorded: {listed}; {elsewhere}"
        else:
            why = "it ran, but nothing in it was seen to attend; there is no entropy to record."
        raise ValueError(f"{type(self.model).__name__}: {why}")

    def _enter(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward pass of the whole model begins."""
        if not self.listens:
            return
        self._forwards += 1
        self._grad_at_entry = torch.is_grad_enabled()
        if not torch.compiler.is_compiling() and not runs_compiled():
            self._watch.enter(self._names, arguments_of(part, args, kwargs))
            interception.places().append((self, None))

    def _leave(self, part: nn.Module, args: Any, output: Any) -> None:
        """The forward pass of the whole model has ended."""
        if self.listens and not torch.compiler.is_compiling():
            self._watch.leave()
            interception.leave_place(self, None)

    # Checkpointing must find in backward, after the context, the attention that ran in forward.

    def _switch_on(self) -> None:
        if self._pending is not None:
            self._pending.remove()
            self._pending = None
            return
        self._switch.on()

    def _switch_off(self) -> None:
        if self._pending is not None:
            self._pending.remove()
            self._pending = None
        self._switch.off()

    def _recomputes_in_backward(self) -> bool:
        """Tell whether backward, after the context, will run the attention of this pass again."""
        return (
            self.gradient
            and self.model.training
            and self._forwards > 0
            and any(getattr(part, "gradient_checkpointing", False) for part in self.model.modules())
        )

    def _switch_off_at_next_forward(self) -> None:
        self._pending = self.model.register_forward_pre_hook(self._switch_off_if_pending)

    def _switch_off_if_pending(self, *_: Any) -> None:
        if self._pending is not None:  # a hook before this one may have started the recorder again
            self._switch_off()
