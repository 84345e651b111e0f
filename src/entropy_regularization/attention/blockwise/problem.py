"""What is computed: the inputs of one attention call, and its gradients."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_regularization.attention.masking import Structure

LOG2_E = 1.0 / math.log(2.0)
LN_2 = math.log(2.0)

# A masked score stays finite, because 0 * -inf is NaN: in the sum of p (s - m), and in the product
# of p with the gradient of s, where a gradient of the entropy up to 1e16 may multiply it. At an
# edge it bounds scores from above, so one of -inf, or NaN, would stay.
MASKED_SCORE = -1e22
EMPTY_ROW = -5e21  # a row whose largest score lies below this sees no key


class Problem(NamedTuple):
    """The inputs of one attention call, validated."""

    query: Tensor
    key: Tensor
    value: Tensor
    structure: Structure
    scale: float
    bias: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0
    seed: Tensor | None = None

    @property
    def wide(self) -> torch.dtype:
        """The dtype of scores and sums: at least float32."""
        return torch.promote_types(self.query.dtype, torch.float32)

    @property
    def group(self) -> int:
        """How many query heads share a key head."""
        return self.query.shape[1] // max(self.key.shape[1], 1)


class Gradients(NamedTuple):
    """Gradients of the inputs; None where none is wanted."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
