"""Which rows are real: the 2-D attention_mask is an argument of the model, not of its attention."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


class PaddingTracker:
    """Follows the transformers models inside a model, and the mask that each is given."""

    def __init__(self) -> None:
        self._masks: list[Tensor | None] = []
        self.active = False

    def __getstate__(self) -> dict[str, Any]:
        """A copied model is not listened to."""
        return {"_masks": [], "active": False}

    def follow(self, *modules: nn.Module) -> list[RemovableHandle]:
        """Hook every transformers model in the modules; return the hooks."""
        handles = []
        for part in (part for module in modules for part in module.modules()):
            if isinstance(part, PreTrainedModel):
                handles += [
                    part.register_forward_pre_hook(self.enter, with_kwargs=True),
                    part.register_forward_hook(self.leave, always_call=True),
                ]
        return handles

    def enter(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the mask of a model whose forward begins; a part without one inherits it."""
        if not self.active:
            return
        given = arguments_of(part, args, kwargs)
        mask = given.get("attention_mask")
        if "attention_mask" not in given and self._masks:
            mask = self._masks[-1]
        usable = isinstance(mask, Tensor) and mask.dim() == 2
        self._masks.append(mask if usable else None)

    def leave(self, part: nn.Module, args: Any, output: Any) -> None:
        """Forget the mask of a model whose forward has ended."""
        if self.active and self._masks:
            self._masks.pop()

    def clear(self) -> None:
        """Forget all."""
        self._masks.clear()

    def rows(self, entropy: Tensor) -> Tensor:
        """Return which rows of ``[batch, heads, queries]`` are real, ``[batch, queries]``."""
        batch, _, n_queries = entropy.shape
        mask = self._masks[-1] if self._masks else None
        if mask is not None and mask.shape[0] == batch and mask.shape[1] >= n_queries:
            return mask[:, mask.shape[1] - n_queries :].bool().to(entropy.device)
        return torch.ones(batch, n_queries, dtype=torch.bool, device=entropy.device)


def arguments_of(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that a forward was given, by name."""
    names = inspect.signature(part.forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}
