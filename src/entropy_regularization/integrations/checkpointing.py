"""Checkpointing: backward computes a layer again, often after the context of its recording."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from entropy_regularization.integrations.stack import in_reentrant_checkpoint, runs_in_backward


class AtNextForward:
    """Calls a function when one of some modules begins its next forward pass, once.

    A pass that backward computes again is no next one.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._hooks: list[RemovableHandle] = []

    def wait(self, modules: Iterable[nn.Module]) -> None:
        """Wait for one of the modules, and no longer for those before."""
        self.cancel()
        self._hooks = [part.register_forward_pre_hook(self._call) for part in modules]

    def cancel(self) -> None:
        """Wait no longer."""
        while self._hooks:
            self._hooks.pop().remove()

    def _call(self, *_: Any) -> None:
        # a hook before this one may have cancelled it
        if self._hooks and not runs_in_backward():
            self.cancel()
            self._function()


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
            "checkpointing does, which would lose the penalty silently; use "
            "checkpoint(..., use_reentrant=False), or of transformers "
            "gradient_checkpointing_enable(gradient_checkpointing_kwargs="
            "{'use_reentrant': False})."
        )
