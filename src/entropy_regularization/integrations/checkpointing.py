"""Checkpointing: backward computes a layer again, often after the context of its recording."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from entropy_regularization.integrations.stack import in_reentrant_checkpoint, runs_in_backward


class AtNextForward:
    """Calls a function when one of some modules begins its next forward pass, once.

    A pass that backward computes again is no next one. Neither is one without a gradient (text that
    is generated, a reference model): backward of the pass before it may still come.

    Args:
        function: to call.
        pause: called as a pass without a gradient begins.
        resume: called as it ends.
    """

    def __init__(
        self, function: Callable[[], None], pause: Callable[[], None], resume: Callable[[], None]
    ) -> None:
        self._function, self._pause, self._resume = function, pause, resume
        self._hooks: list[RemovableHandle] = []
        self._paused_in: nn.Module | None = None

    def wait(self, modules: Iterable[nn.Module]) -> None:
        """Wait for one of the modules, and no longer for those before."""
        self.cancel()
        for part in modules:
            self._hooks += [
                part.register_forward_pre_hook(self._begin),
                part.register_forward_hook(self._end, always_call=True),
            ]

    def cancel(self) -> None:
        """Wait no longer."""
        self._paused_in = None
        while self._hooks:
            self._hooks.pop().remove()

    def _begin(self, part: nn.Module, *_: Any) -> None:
        # a hook before this one may have cancelled it
        if not self._hooks or runs_in_backward():
            return
        if torch.is_grad_enabled():
            self.cancel()
            self._function()
        elif self._paused_in is None:
            self._paused_in = part
            self._pause()

    def _end(self, part: nn.Module, *_: Any) -> None:
        if part is self._paused_in:
            self._paused_in = None
            self._resume()


def refuse_lost_gradient(model: nn.Module, name: str) -> None:
    """Refuse a call that a reentrant checkpoint runs without a gradient, in a pass that has one.

    Raises:
        RuntimeError: if the gradient of its entropy would be lost.
    """
    if torch.is_grad_enabled() or not in_reentrant_checkpoint():
        return
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise RuntimeError(
            f"{name} runs without a gradient inside a forward pass that has one, as reentrant "
            "checkpointing does (in any library), which would lose the penalty silently; use "
            "checkpoint(..., use_reentrant=False), or of transformers "
            "activation_checkpointing_kwargs={'use_reentrant': False} (in older versions "
            "gradient_checkpointing_kwargs)."
        )
