"""Sums that travel with their counts, over rows and ranks, and are divided once, at the end.

The only module that talks to torch.distributed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed

Reduction = Literal["sum", "mean"]
Part = TypeVar("Part")


@dataclass(frozen=True)
class SumAndCount:
    """A sum over rows and how many rows it is of.

    Attributes:
        total: ``[..., heads]``, carries the gradient.
        count: ``[..., heads]``, same dtype as total, none.
    """

    total: Tensor
    count: Tensor

    def plus(self, other: "SumAndCount") -> "SumAndCount":
        """Join with the rows of another batch."""
        return SumAndCount(self.total + other.total, self.count + other.count)

    @staticmethod
    def cat(parts: "Sequence[SumAndCount]") -> "SumAndCount":
        """Join sums of different heads."""
        totals, counts = [part.total for part in parts], [part.count for part in parts]
        return SumAndCount(torch.cat(totals), torch.cat(counts))

    def split(self, parts: int) -> "list[SumAndCount]":
        """Take heads apart again, the same number into every part."""
        pairs = zip(self.total.chunk(parts), self.count.chunk(parts), strict=True)
        return [SumAndCount(total, count) for total, count in pairs]

    def mean(self) -> Tensor:
        """Divide; 0 where no row counts, with gradient 0."""
        return self.total / self.count.masked_fill(self.count == 0, 1.0)


def sum_rows(
    values: Float[Tensor, "batch heads queries"], counted: Bool[Tensor, "..."] | None = None
) -> SumAndCount:
    """Sum over batch and queries the rows that count, and count them.

    Args:
        values: one number per row.
        counted: True for rows that count, broadcastable to ``values``; None counts all.

    Returns:
        total and count, each ``[heads]``.
    """
    if counted is None:
        counted = torch.ones((), dtype=torch.bool, device=values.device)
    counted = counted.expand_as(values)
    total = values.masked_fill(~counted, 0.0).sum((0, 2))
    return SumAndCount(total, counted.sum((0, 2)).to(total.dtype))


def has_ranks() -> bool:
    """Tell whether there is a process group."""
    return bool(distributed.is_available() and distributed.is_initialized())


def mean_over_ranks(value: Tensor) -> Tensor:
    """Return the mean of a tensor over the ranks of the default process group, without a gradient.

    Without a process group it is returned as it is. Every rank must call it.
    """
    if not has_ranks():
        return value
    total = value.detach().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def gather_over_ranks(part: Part) -> list[Part]:
    """Return what every rank of the default process group has, in the order of the ranks.

    Without a process group that is this part alone. Every rank must call it.

    Args:
        part: anything that can be pickled; tensors on the host.
    """
    if not has_ranks():
        return [part]
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, part)
    return parts


def mean_count_over_ranks(pairs: Sequence[SumAndCount]) -> list[SumAndCount]:
    """Replace every count by its mean over the ranks of the default process group.

    Data-parallel training averages gradients over ranks, so a total divided by the mean count gives
    the gradient of (sum over all ranks) / (count over all ranks), whatever each rank's share is.
    Without a process group the pairs are returned as they are. Every rank must call it.
    """
    if not pairs or not has_ranks():
        return list(pairs)
    # one message for all layers
    counts = mean_over_ranks(torch.cat([pair.count.flatten() for pair in pairs]))
    parts = torch.split(counts, [pair.count.numel() for pair in pairs])
    return [
        SumAndCount(pair.total, part.view_as(pair.count))
        for pair, part in zip(pairs, parts, strict=True)
    ]
