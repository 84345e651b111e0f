"""SdpaRecorder: listens to any PyTorch model that calls scaled_dot_product_attention."""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from entropy_regularization.attention.api import AttentionOutput
from entropy_regularization.integrations import interception
from entropy_regularization.integrations.compiled import is_compiled
from entropy_regularization.integrations.layers import is_wanted, kind_of
from entropy_regularization.integrations.stack import runs_compiled, runs_in_backward
from entropy_regularization.integrations.unseen import Watch
from entropy_regularization.recording.recorder import ForwardCall, Layers
from entropy_regularization.recording.recording import EntropyRecording, LayerEntropy


class SdpaRecorder:
    """Listens to one model; start and stop may be called again and again.

    Args:
        model: any module.
        layers: which layers to keep, see record_entropy.
        gradient: False detaches what is recorded. Otherwise call backward inside the context if the
            model uses checkpointing.
        allow_partial: accept modules that compute a softmax of their own; they are in ``missing``.

    Raises:
        ValueError: if the model is compiled and holds nn.MultiheadAttention, which then records
            tensors without data.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Layers = None,
        gradient: bool = True,
        allow_partial: bool = False,
    ) -> None:
        self.model: nn.Module = getattr(model, "_orig_mod", model)  # not torch.compile's wrapper
        self.layers = layers
        self.gradient = gradient
        self.allow_partial = allow_partial
        self._names = {
            part: name.replace("_orig_mod.", "") or type(part).__name__
            for name, part in self.model.named_modules()
        }
        self._keeps_hooks = any(map(is_compiled, model.modules()))
        attentions = [n for p, n in self._names.items() if isinstance(p, nn.MultiheadAttention)]
        if attentions and self._keeps_hooks:
            raise ValueError(
                f"{attentions[0]} is an nn.MultiheadAttention in a compiled model, which cannot be "
                "recorded; record the model before torch.compile."
            )
        self._recording = EntropyRecording()
        self._watch = Watch(self.model)
        self.listens = False
        self._forwards = self._calls = 0
        self._hooks: list[RemovableHandle] = []
        self._fast_path: bool | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copied model takes a recorder along that is not listening; entropies stay here."""
        return {**self.__dict__, "_recording": EntropyRecording(), "listens": False}

    def start(self, call: ForwardCall | None = None) -> EntropyRecording:
        """Listen; return the recording to fill.

        Args:
            call: the forward pass that is already beginning, see Recorder.
        """
        self._recording = EntropyRecording()
        self._forwards = self._calls = 0
        self.listens = True
        if not self._hooks:
            for part, name in self._names.items():
                self._hooks += self._follow(part, name)
        self._fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it calls no attention function
        interception.listen(self)
        if self._keeps_hooks or runs_compiled():
            self._watch.read(self._names, torch_is_heard=True)
        if call is not None:
            self._begin(*call)
            interception.places().append((self, self._names[self.model]))
        return self._recording

    def stop(self) -> EntropyRecording:
        """Stop listening; return the recording.

        Raises:
            ValueError: if the model ran and no attention call came, or some attention was computed
                another way.
        """
        self.abort()
        unseen = self._watch.found
        listed = "; ".join(f"{name} {how}" for name, how in sorted(unseen.items())[:8])
        if self._forwards and not self._calls:
            raise ValueError(
                f"{type(self.model).__name__} ran without calling "
                "torch.nn.functional.scaled_dot_product_attention"
                f"{f' ({listed})' if listed else ''}; call it, or attention_with_entropy, in the "
                "model's attention."
            )
        self._recording.missing = sorted(unseen)
        if unseen and not self.allow_partial:
            raise ValueError(
                f"{type(self.model).__name__} attends where it cannot be recorded: {listed}; call "
                "torch.nn.functional.scaled_dot_product_attention there, or pass "
                "allow_partial=True to leave it out."
            )
        return self._recording

    def abort(self) -> None:
        """Stop listening; everything is as it was found."""
        self.listens = False
        while self._hooks and not self._keeps_hooks:  # new ones would be compiled anew
            self._hooks.pop().remove()
        self._watch.leave()
        interception.stop_listening(self)
        if self._fast_path is not None:
            torch.backends.mha.set_fastpath_enabled(self._fast_path)
            self._fast_path = None

    def _follow(self, part: nn.Module, name: str) -> list[RemovableHandle]:
        """Hook one module: while it runs, calls of attention are its calls."""

        def enter(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.listens:
                interception.places().append((self, name))

        def leave(part: nn.Module, args: Any, output: Any) -> None:
            if self.listens:
                interception.leave_place(self, name)

        hooks = [
            part.register_forward_pre_hook(enter, with_kwargs=True),
            part.register_forward_hook(leave, always_call=True),
        ]
        if part is self.model:
            hooks.append(part.register_forward_pre_hook(self._begin, with_kwargs=True))
            hooks.append(part.register_forward_hook(self._end, always_call=True))
        return hooks

    def _begin(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward pass of the whole model begins."""
        if not self.listens:
            return
        self._forwards += 1
        if not torch.compiler.is_compiling():
            given = {**{str(number): value for number, value in enumerate(args)}, **kwargs}
            self._watch.enter(self._names, given)

    def _end(self, part: nn.Module, args: Any, output: Any) -> None:
        """The forward pass of the whole model has ended."""
        if self.listens and not torch.compiler.is_compiling():
            self._watch.leave()

    def deposit_call(self, place: str | None, found: AttentionOutput, n_keys: int) -> None:
        """Take the rows of one attention call."""
        if runs_in_backward():
            return
        index, name = self._calls, place or type(self.model).__name__
        self._calls += 1
        if not is_wanted(self.layers, index, name):
            return
        entropy = found.entropy if self.gradient else found.entropy.detach()
        rows = torch.ones(
            entropy.shape[0], entropy.shape[2], dtype=torch.bool, device=entropy.device
        )
        self._recording.layers.append(
            LayerEntropy(name, kind_of(name), entropy, found.allowed_keys, rows, n_keys)
        )
