"""Softmaxes, in whichever way they are written: by name, in the logarithm, or step by step."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from entropy_regularization.integrations.mixing import DIVISIONS, SUMS, tensors_of

SOFTMAX = {
    functional.softmax,
    torch.softmax,
    Tensor.softmax,
    torch.special.softmax,
    functional.softmin,
    functional.gumbel_softmax,
}
LOG_SOFTMAX = {functional.log_softmax, torch.log_softmax, Tensor.log_softmax}
EXPONENTIALS = {torch.exp, Tensor.exp, Tensor.exp_, torch.exp2, Tensor.exp2, Tensor.exp2_}
LOG_SUMS = {torch.logsumexp, Tensor.logsumexp, torch.special.logsumexp}
DIFFERENCES = {torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__, torch.subtract}
# Names of the functions that leave exponentials, or a sum of them, what they are.
SHAPES = "view reshape flatten unflatten transpose permute squeeze unsqueeze expand getitem get"
COPIES = "view_as expand_as contiguous clone detach to type type_as float double half bfloat16"
MASKS = "where masked_fill mul rmul imul multiply div truediv tril triu dropout"
FLOORS = "add radd iadd clamp clamp_min clip max maximum nan_to_num"
STEPS = frozenset(f"{SHAPES} {COPIES} {MASKS} {FLOORS}".split())


class Softmaxes:
    """Recognises the weights that a softmax makes among the results of functions.

    Found are a softmax by name, the exponential of a log_softmax or of scores minus their
    logsumexp, and exponentials divided by their sum, with masks and floors between. Exponentials
    times anything but a mask, such as products of queries and keys that decay, are none.
    """

    def __init__(self) -> None:
        self._logs = WeakIdKeyDictionary()  # logarithms of a softmax
        self._log_sums = WeakIdKeyDictionary()  # logsumexp -> of which tensor
        # Exponentials, and sums of them -> which exponentials they are.
        self._exponentials = WeakIdKeyDictionary()
        self._totals = WeakIdKeyDictionary()

    def made(
        self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], result: Any
    ) -> bool:
        """Tell whether a function has made the weights of a softmax; note the steps to them."""
        if func in SOFTMAX:
            return True
        given = tensors_of(args, kwargs)
        if not given or not isinstance(result, Tensor):
            return False
        if func in LOG_SOFTMAX:
            self._logs[result] = None
        elif func in LOG_SUMS:
            self._log_sums[result] = weakref.ref(given[0])
        elif func in SUMS and given[0] in self._exponentials:
            self._totals[result] = self._exponentials[given[0]]
        elif func in EXPONENTIALS:
            self._exponentials[result] = object()
            return given[0] in self._logs
        elif func in DIVISIONS and given[-1] in self._totals:
            return self._exponentials.get(given[0]) is self._totals[given[-1]]
        elif func in DIFFERENCES and given[-1] in self._log_sums:
            if self._log_sums[given[-1]]() is given[0]:
                self._logs[result] = None
        else:
            self._follow(func, given, result)
        return False

    def _follow(self, func: Callable[..., Any], given: list[Tensor], result: Tensor) -> None:
        """A mask on exponentials, or a floor under their sums, leaves them what they are."""
        is_step = getattr(func, "__name__", "").strip("_") in STEPS
        for known in (self._logs, self._log_sums, self._exponentials, self._totals):
            found = [each for each in given if each in known]
            if not found:
                continue
            # What is divided by, or subtracted, may be more than the sum: a floor, a sink.
            divides = known is self._totals or known is self._log_sums
            if is_step and (divides or _keeps(found, given, result)):
                known[result] = known[found[0]]
            else:
                known.pop(result, None)  # changed in place


def _keeps(found: list[Tensor], given: list[Tensor], result: Tensor) -> bool:
    """Tell whether a step keeps all of the one tensor that is known, but for a mask on it."""
    others = [each for each in given if each is not found[0]]
    return len(found) == 1 and found[0].numel() == result.numel() and all(map(_is_mask, others))


def _is_mask(tensor: Tensor) -> bool:
    """Tell whether a tensor is boolean, of whole numbers, or holds zeros and ones alone."""
    if not tensor.is_floating_point():
        return not tensor.is_complex()
    try:
        return bool(((tensor == 0) | (tensor == 1)).all())
    except (RuntimeError, NotImplementedError):  # has no values: on the meta device, inside vmap
        return False
