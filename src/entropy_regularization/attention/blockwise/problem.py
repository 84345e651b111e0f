"""What is computed: the inputs of one attention call, and its gradients."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_regularization.attention.masking import Structure

LOG2_E = 1.0 / math.log(2.0)
LN_2 = math.log(2.0)

# A masked score stays finite, because 0 * -inf in the sum of p (s - m) is NaN.
MASKED_SCORE = -1e30
EMPTY_ROW = -5e29  # a row whose largest score lies below this sees no key
# 2^-2000 is 0 in float32 and float64; kept small so that its product with any gradient is finite.
MASKED_LOG_PROBABILITY = -2000.0


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
