"""Softmaxes, in whichever way they are written: by name, in the logarithm, or step by step."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from entropy_regularization.integrations.mixing import DIVISIONS, SUMS, tensors_of

SOFTMAX = {functional.softmax, torch.softmax, Tensor.softmax, torch.special.softmax}
LOG_SOFTMAX = {functional.log_softmax, torch.log_softmax, Tensor.log_softmax}
EXPONENTIALS = {torch.exp, Tensor.exp, Tensor.exp_}


class Softmaxes:
    """Recognises the weights that a softmax makes among the results of functions."""

    def __init__(self) -> None:
        self._logs = WeakIdKeyDictionary()  # logarithms of a softmax
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
        elif func in EXPONENTIALS:
            if given[0] in self._logs:
                return True
            self._exponentials[result] = object()
        elif func in DIVISIONS and given[0] in self._exponentials and given[-1] in self._totals:
            return bool(self._exponentials[given[0]] is self._totals[given[-1]])
        elif func in SUMS and given[0] in self._exponentials:
            self._totals[result] = self._exponentials[given[0]]
        else:
            self._follow(given, result)
        return False

    def _follow(self, given: list[Tensor], result: Tensor) -> None:
        """A mask on exponentials, or a floor under their sums, leaves them what they are."""
        for known in (self._exponentials, self._totals):
            for tensor in given:
                if tensor in known and tensor.numel() == result.numel():
                    known[result] = known[tensor]
