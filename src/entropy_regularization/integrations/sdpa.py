"""SdpaRecorder: listens to any PyTorch model that calls scaled_dot_product_attention."""

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from entropy_regularization.integrations import interception
from entropy_regularization.integrations.calls import CallRecorder
from entropy_regularization.integrations.compiled import name_of, refuse_export
from entropy_regularization.integrations.modules import qualified_names
from entropy_regularization.integrations.stack import runs_compiled
from entropy_regularization.recording.recorder import ForwardCall, Layers
from entropy_regularization.recording.recording import EntropyRecording


class SdpaRecorder(CallRecorder):
    """Listens to one model; start and stop may be called again and again.

    Args:
        model: any module.
        layers: which layers to keep, see record_entropy.
        **options: as CallRecorder.

    Raises:
        ValueError: if the model is compiled and holds nn.MultiheadAttention, which then records
            tensors without data.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Layers = None,
        **options: bool,
    ) -> None:
        super().__init__(model, layers, **options)
        names = qualified_names(self.model)
        self._know({part: name_of(name) or type(part).__name__ for part, name in names.items()})
        self.layers.check(self.model, lambda _: self._names)
        attentions = [n for p, n in self._names.items() if isinstance(p, nn.MultiheadAttention)]
        if attentions and self.keeps_hooks:
            raise ValueError(
                f"{attentions[0]} is an nn.MultiheadAttention in a compiled model, which cannot be "
                "recorded; record the model before torch.compile."
            )
        self.listens = False

    def __getstate__(self) -> dict[str, Any]:
        """A copied model takes a recorder along that is not listening."""
        return {**super().__getstate__(), "listens": False}

    def _start(self, call: ForwardCall | None) -> None:
        self.listens = True
        if not self._hooks:
            for part, name in self._names.items():
                self._hooks += self._follow(part, name)
        self._watch.begin()
        if self.keeps_hooks or runs_compiled():
            self._watch.read(self._names, torch_is_heard=True)
        if call is not None:
            self._enter(self._names[self.model], *call)

    def stop(self) -> EntropyRecording:
        """Stop listening; return the recording.

        Raises:
            ValueError: if the model ran and no attention call came, or some attention was computed
                another way, or none of the calls was asked for.
        """
        self._end_watch(torch_is_heard=True)
        recording = self._recording
        self.abort()
        self._note_missing(recording)
        unseen = self._watch.found
        listed = "; ".join(f"{name} {how}" for name, how in sorted(unseen.items())[:8])
        if self._ran and not self._attended:
            raise ValueError(
                f"{type(self.model).__name__} ran without calling "
                "torch.nn.functional.scaled_dot_product_attention or attending by a softmax that "
                f"can be heard{f' ({listed})' if listed else ''}; call that function, or "
                "attention_with_entropy, in the model's attention."
            )
        if unseen and not self.allow_partial:
            raise ValueError(
                f"{type(self.model).__name__} attends where it cannot be recorded: {listed}; call "
                "torch.nn.functional.scaled_dot_product_attention there, or pass "
                "allow_partial=True to leave it out."
            )
        self._refuse_nothing(recording)
        return recording

    def abort(self) -> None:
        """Stop listening; everything is as it was found.

        If backward computes a part of the pass again, the wrappers stay until the next pass.
        """
        self.listens = False
        self._forget()
        while self._hooks and not self.keeps_hooks:  # new ones would be compiled anew
            self._hooks.pop().remove()
        self._watch.leave(finished=False)
        interception.stop_listening(self, lingers=self._checkpointed)
        if self._checkpointed:
            self._next_forward.wait([self.model])

    def backward_is_over(self) -> None:
        """Compute nothing again in backward any more."""
        if not self.listens:
            self._next_forward.cancel()
            self._stop_lingering()

    def _follow(self, part: nn.Module, name: str) -> list[RemovableHandle]:
        """Hook one module: while it runs, calls of attention are its calls."""
        if isinstance(part, torch.jit.ScriptModule | nn.Softmax):
            return []  # one takes no hooks, and the watch reads it; the other is no place
        enter, leave = functools.partial(self._enter, name), functools.partial(self._leave, name)
        return [
            part.register_forward_pre_hook(enter, with_kwargs=True),
            part.register_forward_hook(leave, always_call=True),
        ]

    def _enter(
        self, name: str, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A module begins to run."""
        if not self.listens:
            return
        if isinstance(part, nn.MultiheadAttention):
            interception.refuse_nested(f"the input of {name}", *args, *kwargs.values())
        if not self._is_inside():
            self._begin(part, args, kwargs)
        interception.places().append((self, name))

    def _leave(self, name: str, part: nn.Module, args: Any, output: Any) -> None:
        """A module has run, or raised: its output is None then."""
        if not self.listens:
            # a copy that was made while its original listened
            if part is self.model and not self.keeps_hooks:
                self.abort()
            return
        interception.leave_place(self, name)
        if not torch.compiler.is_compiling() and not self._is_inside():
            self._watch.leave(finished=output is not None)

    def _is_inside(self) -> bool:
        return any(listener is self for listener, _ in interception.places())

    def _begin(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward pass of the model, or of a part that is called alone, begins."""
        if self._is_computed_again():
            return
        refuse_export(self.model)
        self._ran = True
        self._index = 0
        self._grad_at_entry = torch.is_grad_enabled()
        if runs_compiled():
            self._ran_compiled = True
        else:
            given = {**{str(number): value for number, value in enumerate(args)}, **kwargs}
            self._watch.enter(self._names, part, given)
