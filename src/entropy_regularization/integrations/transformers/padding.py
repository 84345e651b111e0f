"""Which rows are real: the 2-D attention_mask is an argument of the model, not of its attention."""

import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from entropy_regularization.attention.masking import Memo, once

TOKENS = ("input_ids", "decoder_input_ids")  # of which a cache may hold the first ones


class _Given(NamedTuple):
    """The mask that a model was given, and the name of what it reads."""

    mask: Tensor | None
    reads: str
    memo: Memo  # its end, by length


class PaddingTracker:
    """Follows the transformers models inside a model, and the mask that each is given."""

    def __init__(self) -> None:
        self._given: list[_Given] = []
        self.active = False

    def __getstate__(self) -> dict[str, Any]:
        """A copied model is not listened to."""
        return {"_given": [], "active": False}

    def follow(self, models: Iterable[nn.Module]) -> list[RemovableHandle]:
        """Hook transformers models; return the hooks."""
        handles = []
        for model in models:
            handles += [
                model.register_forward_pre_hook(self.enter, with_kwargs=True),
                model.register_forward_hook(self.leave, always_call=True),
            ]
        return handles

    def enter(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the mask of a model whose forward begins.

        A part without one inherits it, unless it reads something else (an image beside the text).
        """
        if not self.active:
            return
        given = arguments_of(part, args, kwargs)
        reads = getattr(part, "main_input_name", "input_ids")
        mask = given.get("attention_mask")
        outer = self._given[-1] if self._given else None
        if "attention_mask" not in given and outer is not None and outer.reads == reads:
            mask = outer.mask
        usable = isinstance(mask, Tensor) and mask.dim() == 2
        self._given.append(_Given(mask if usable else None, reads, {}))

    def leave(self, part: nn.Module, args: Any, output: Any) -> None:
        """Forget the mask of a model whose forward has ended."""
        if self.active and self._given:
            self._given.pop()

    def clear(self) -> None:
        """Forget all."""
        self._given.clear()

    def rows(self, entropy: Tensor, key_padding: Tensor | None) -> Tensor | None:
        """Return which rows of ``[batch, heads, queries]`` are real, ``[batch, queries]``.

        None stands for all of them.

        Args:
            entropy: of one call.
            key_padding: ``[batch, keys]``, which keys of the call are real, if its mask says so.
                It tells of the rows where the model's own mask is that of something longer (of
                samples of a sound, of which the rows are frames), or unknown: sentence-transformers
                calls the forward of a model, and so none of its hooks.
        """
        batch, _, n_queries = entropy.shape
        mask, reads, memo = self._given[-1] if self._given else _Given(None, "", {})
        if mask is not None and mask.shape[0] == batch:
            if mask.shape[1] == n_queries or (reads in TOKENS and mask.shape[1] > n_queries):
                what, first = (n_queries, entropy.device), mask.shape[1] - n_queries
                end: Tensor = once(memo, what, lambda: mask[:, first:].bool().to(entropy.device))
                return end
        elif self._given:  # a model that was given none
            key_padding = None
        if key_padding is not None and key_padding.shape == (batch, n_queries):
            return key_padding
        return None


def arguments_of(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that a forward was given, by name."""
    if not args:
        return kwargs
    names = inspect.signature(part.forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}
