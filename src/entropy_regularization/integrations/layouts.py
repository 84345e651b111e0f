"""Which dimension holds the heads, where sizes do not tell: what became of a projection does.

Heads are the last dimension of a projection, split in two, so they lie inside tokens and batch
entries. They are followed from there, through views by their strides, and through copies.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from entropy_regularization.integrations.mixing import tensors_of

SPLITTING = {"view", "reshape", "unflatten"}  # names of functions
RELAYING = {"transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "resize_", "set_"}


class Layouts:
    """Knows which dimension of a tensor holds the heads."""

    def __init__(self) -> None:
        # Tensors of heads -> their dimension; None of views of a projection that do not show it.
        self._heads = WeakIdKeyDictionary()

    def heads_of(self, tensor: Tensor) -> int | None:
        """Return the dimension that holds the heads, None if it is not known."""
        heads: int | None = self._heads.get(tensor)
        return heads

    def follow(
        self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """Note where the heads are in what a function has made."""
        given = tensors_of(args, kwargs)
        for made in given[:1] if func is Tensor.__setitem__ else tensors_of([result], {}):
            if made.dim() > 2 and _has_strides(made):
                self._note(func, args, given, made)

    def _note(self, func: Callable[..., Any], args: Any, given: list[Tensor], made: Tensor) -> None:
        name = getattr(func, "__name__", "")
        if name in RELAYING:  # in place: nothing tells how it was before
            self._heads.pop(made, None)
            return
        known = [(each, self._heads[each]) for each in given if each in self._heads]
        told = [(each, heads) for each, heads in known if heads is not None]
        if func is torch.einsum:
            moved = {_by_letters(args[0], given, each, heads) for each, heads in told}
        else:
            moved = {_after(each, heads, made) for each, heads in told}
        moved.discard(None)
        if len(moved) > 1:
            self._heads.pop(made, None)
        elif moved:
            self._heads[made] = moved.pop()
        elif name == "conv2d":
            self._heads[made] = 1  # the channels, whichever way the heads are cut out of them
        elif _splits_features(name, given, made) or any(
            heads is None and _shares_memory(each, made) for each, heads in known
        ):
            self._heads[made] = _inside_tokens(made) if made.dim() == 4 else None


def _has_strides(tensor: Tensor) -> bool:
    plain = type(tensor) is Tensor and tensor.layout is torch.strided
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def _splits_features(name: str, given: list[Tensor], made: Tensor) -> bool:
    """Tell whether the last dimension of a projection is split: that of tokens, in any order."""
    splits = name in SPLITTING and given[0].dim() in (2, 3)
    return splits and made.shape[-1] < given[0].shape[-1]


def _inside_tokens(view: Tensor) -> int:
    """Return which dimension is the innermost but for the features, as strides tell."""
    return sorted(range(view.dim()), key=lambda i: (view.stride(i), -i))[1]


def _after(source: Tensor, heads: int, made: Tensor) -> int | None:
    """Return which dimension holds the heads in what a function made of a tensor of them."""
    if source.dim() == 3 or made.dim() == 3:  # folded into the batch, in their order
        folded = [each.shape[: each.dim() - 2].numel() for each in (source, made)]
        return heads if heads < 2 and folded[0] == folded[1] else None
    if source.dim() == made.dim() and _shares_memory(source, made):
        places = list(zip(made.shape, made.stride(), strict=True))
        place = (source.shape[heads], source.stride(heads))
        if place in places:  # which a view has turned
            return places.index(place) if places.count(place) == 1 else None
    outside = slice(heads) if heads else slice(1, 2)  # of which there are as many in a copy
    return heads if made.shape[outside] == source.shape[outside] else None


def _by_letters(equation: object, given: list[Tensor], source: Tensor, heads: int) -> int | None:
    """Return which dimension of what an einsum made is that of the heads of an operand."""
    at = next(number for number, each in enumerate(given) if each is source)
    if not isinstance(equation, str) or "->" not in equation:
        return None
    inputs, _, output = equation.replace(" ", "").partition("->")
    operand = inputs.split(",")[at]
    dots = "0123456789"[: source.dim() - len(operand.replace("...", ""))]
    letter = operand.replace("...", dots)[heads]
    place = output.replace("...", dots).find(letter)
    return place if place >= 0 else None
