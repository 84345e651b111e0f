"""(sum, count) pairs: sums travel with their counts, and are divided once, at the end.

The only module that talks to torch.distributed.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RowSum(NamedTuple):
    """A sum over rows and how many rows entered it, both ``[...]`` of one shape."""

    total: Tensor
    count: Tensor

    @staticmethod
    def over_rows(values: Tensor, counted: Tensor) -> "RowSum":
        """Sum ``[batch, heads, queries]`` over the counted rows; return ``[heads]`` pairs."""
        total = values.masked_fill(~counted, 0.0).sum((0, 2))
        return RowSum(total, counted.sum((0, 2)))

    def __add__(self, other: object) -> "RowSum":
        """Add sums to sums and counts to counts."""
        if not isinstance(other, RowSum):
            return NotImplemented
        return RowSum(self.total + other.total, self.count + other.count)

    def mean(self) -> Tensor:
        """Divide, once; 0 where nothing was counted."""
        return self.total / self.count.clamp(min=1)

    def over_ranks(self) -> "RowSum":
        """Add up the pairs of all ranks (no gradient); the pair itself without a process group."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        total, count = self.total.detach().clone(), self.count.clone()
        torch.distributed.all_reduce(total)
        torch.distributed.all_reduce(count)
        return RowSum(total, count)
