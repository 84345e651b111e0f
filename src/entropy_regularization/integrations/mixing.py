"""Weights that mix the parallel streams of one token, as hyper-connections do: they do not attend.

Their scores are linear in the token, not products of queries and keys, and the matrix that a
softmax makes of them is scaled until its columns sum to one as well as its rows (Sinkhorn).
Attention that is scaled so has scores of queries and keys; linear scores without it may attend.
"""

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

DIVISIONS = {
    torch.div,
    Tensor.div,
    Tensor.div_,
    Tensor.__truediv__,
    Tensor.__itruediv__,
    torch.true_divide,
    Tensor.true_divide,
    Tensor.true_divide_,
}
SUMS = {torch.sum, Tensor.sum}
SPLITS = {torch.split, Tensor.split, torch.chunk, Tensor.chunk, torch.unbind, Tensor.unbind}
TURNS = {
    torch.transpose,
    Tensor.transpose,
    torch.permute,
    Tensor.permute,
    Tensor.mT.__get__,  # type: ignore[attr-defined]
    Tensor.T.__get__,  # type: ignore[attr-defined]
}

SCORES, WEIGHTS, SUM, MIXTURE = "scores", "weights", "sum", "mixture"


class Mixtures:
    """Knows which tensors are such mixtures.

    Args:
        products: the functions that make scores of queries and keys.
        cuts: the functions whose result is the same thing with another number of elements.
    """

    def __init__(self, products: Container[Any], cuts: Container[Any]) -> None:
        self._products, self._cuts = products, cuts
        # tensor -> what it is, and the dimension that its softmax or sum ran over
        self._found = WeakIdKeyDictionary()

    def __contains__(self, tensor: Tensor) -> bool:
        return bool(self._found.get(tensor, ("", None))[0] == MIXTURE)

    def is_without_scores(self, tensor: Tensor) -> bool:
        """Tell whether these are weights that no queries and keys had a part in."""
        return bool(self._found.get(tensor, ("", None))[0] == WEIGHTS)

    def softmax(self, args: Any, kwargs: Mapping[str, Any], result: Tensor) -> None:
        """Note the weights that a softmax made of anything but scores of queries and keys."""
        if not any(kind == SCORES for kind, _ in self._known(args, kwargs)):
            self._found[result] = (WEIGHTS, softmax_dimension(args, kwargs))

    def follow(
        self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """Note what another function made."""
        if func is functional.linear:
            return  # what a token is projected to is no score of its attention
        known = self._known(args, kwargs)
        for part in tensors_of([result], {}):
            found = self._kind_of(func, args, kwargs, part, known)
            if found is not None:
                self._found[part] = found

    def _kind_of(
        self,
        func: Callable[..., Any],
        args: Any,
        kwargs: Mapping[str, Any],
        result: Tensor,
        known: list[tuple[str, int | None]],
    ) -> tuple[str, int | None] | None:
        given = tensors_of(args, kwargs)
        if func in self._products:
            learned = any(isinstance(each, nn.Parameter) for each in given)
            return None if learned else (SCORES, None)
        if not known or (func in TURNS and known[0][0] in (WEIGHTS, SUM)):
            return None
        if func in SUMS and known[0][0] == WEIGHTS:
            return (SUM, softmax_dimension(args, kwargs))
        if func in DIVISIONS and _is_across(known):
            return (MIXTURE, None)
        same = func in self._cuts or func in SPLITS
        return known[0] if same or result.numel() in [each.numel() for each in given] else None

    def _known(self, args: Any, kwargs: Mapping[str, Any]) -> list[tuple[str, int | None]]:
        given = tensors_of(args, kwargs)
        return [self._found[each] for each in given if each in self._found]


def tensors_of(args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that a function was given, those in lists too."""
    result: list[Tensor] = []
    for each in [*args, *kwargs.values()]:
        parts = each if isinstance(each, (list, tuple)) else [each]
        result += [part for part in parts if isinstance(part, Tensor)]
    return result


def _is_across(known: list[tuple[str, int | None]]) -> bool:
    """Tell whether weights are divided by their sums over another dimension than the softmax's."""
    return [kind for kind, _ in known] == [WEIGHTS, SUM] and known[0][1] != known[1][1]


def softmax_dimension(args: Any, kwargs: Mapping[str, Any]) -> int | None:
    """Return the dimension that a softmax or a sum runs over, counted from the last."""
    given = kwargs.get("dim", args[1] if len(args) > 1 else None)
    dimension = given[0] if isinstance(given, (list, tuple)) and len(given) == 1 else given
    tensors = tensors_of(args, kwargs)
    if not isinstance(dimension, int) or not tensors:
        return None
    return dimension if dimension < 0 else dimension - tensors[0].dim()
