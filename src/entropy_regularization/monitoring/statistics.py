"""Statistics of heads: sums over rows on the device, divided once, read in one transfer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_regularization.penalties.validation import (
    check_context_size,
    check_not_negative,
    check_option,
)
from entropy_regularization.recording.recording import (
    EntropyRecording,
    LayerEntropy,
    check_recording,
)
from entropy_regularization.reduction import SumAndCount, gather_over_ranks, sum_rows
from entropy_regularization.regularization import EntropyRegularization
from entropy_regularization.thresholds import check_fixed, thresholds_of_layers

PerHead = list[list[float]]  # [layers][heads]; layers may differ in their number of heads

COLLAPSED_BELOW = 0.25
OVERLOADED_ABOVE = 0.75


@dataclass(frozen=True)
class Band:
    r"""The band in which row entropies are wanted: :math:`|H - \theta H_{\max}| \le \tau H_{\max}`.

    Attributes:
        thresholds: :math:`\theta`, fractions of the maximum: a number, ``[heads]``, one row per
            attention call ``[layers, heads]``, or a HeadThresholds, which is read at every use.
        tolerance: :math:`\tau`, half the width of the band, a fraction of the maximum.
        maximum: "reachable" is ``log n_i``, the logarithm of the keys that row i may see, and
            leaves out rows that see fewer than two; "context" is ``log(context_size)``.
        context_size: for maximum="context"; None takes the number of keys of the first call.
    """

    thresholds: object
    tolerance: float = 0.1
    maximum: Literal["reachable", "context"] = "reachable"
    context_size: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            TypeError: if thresholds, tolerance or context_size are no numbers.
            ValueError: if thresholds leave [0, 1], the tolerance is negative or not finite, maximum
                has another name, or context_size is below 2.
        """
        check_fixed(self.thresholds, "thresholds")
        check_not_negative("tolerance", self.tolerance)
        check_option("maximum", self.maximum, ("reachable", "context"))
        check_context_size(self.context_size)

    @classmethod
    def of(cls, regularization: EntropyRegularization, thresholds: object = None) -> "Band":
        """Return the band outside which a regularization penalises.

        Args:
            regularization: gives tolerance and maximum.
            thresholds: None takes those of the regularization, 0.5 if it has none.

        Raises:
            TypeError: if regularization is no EntropyRegularization.
        """
        if not isinstance(regularization, EntropyRegularization):
            raise TypeError(
                f"regularization is a {type(regularization).__name__}; pass an "
                "EntropyRegularization, or thresholds to Band itself."
            )
        if thresholds is None:
            thresholds = 0.5 if regularization.thresholds is None else regularization.thresholds
        return cls(
            thresholds,
            regularization.tolerance_margin_factor,
            cast(Literal["reachable", "context"], regularization.maximum),
            regularization.context_size,
        )


class HeadClasses(NamedTuple):
    """How many heads are of each class, by the utilisation of their reachable maximum.

    Source: Jha & Reagen (2025) sort heads by the quarter of the maximum in which they lie.
    """

    collapsed: int
    well_behaved: int
    overloaded: int

    def shares(self) -> tuple[float, float, float]:
        """Return the classes as fractions of all heads; NaN without a head."""
        total = sum(self) or math.nan
        return self.collapsed / total, self.well_behaved / total, self.overloaded / total


@dataclass(frozen=True)
class HeadStatistics:
    """What is known of every head, on the host: plain numbers, ``[layers][heads]``.

    A mean over no row is NaN.

    Attributes:
        layers: qualified module names.
        entropy: mean row entropy, nats.
        reachable_maximum: mean of ``log n_i``, nats, ``n_i`` the keys that row i may see.
        utilisation: mean of ``H_i / log n_i`` over rows with more than one key, in [0, 1].
        in_band: share of row entropies inside the band; None without one.
        threshold: thresholds of the band, fractions of the maximum; None without one.
    """

    layers: list[str]
    entropy: PerHead
    reachable_maximum: PerHead
    utilisation: PerHead
    in_band: PerHead | None = None
    threshold: PerHead | None = None

    def classify(
        self,
        *,
        collapsed_below: float = COLLAPSED_BELOW,
        overloaded_above: float = OVERLOADED_ABOVE,
    ) -> HeadClasses:
        """Count the heads that are collapsed, well-behaved and overloaded.

        Args:
            collapsed_below: a head is collapsed below this utilisation.
            overloaded_above: a head is overloaded above this utilisation.

        Returns:
            The counts; a head without a row that sees two keys is in no class.

        Raises:
            ValueError: if the bounds are not 0 <= collapsed_below <= overloaded_above <= 1.
        """
        if not 0 <= collapsed_below <= overloaded_above <= 1:
            raise ValueError(
                f"the bounds are {collapsed_below} and {overloaded_above}; pass "
                "0 <= collapsed_below <= overloaded_above <= 1."
            )
        known = [u for u in flatten(self.utilisation) if not math.isnan(u)]
        collapsed = sum(u < collapsed_below for u in known)
        overloaded = sum(u > overloaded_above for u in known)
        return HeadClasses(collapsed, len(known) - collapsed - overloaded, overloaded)

    def metrics(self, prefix: str = "entropy/") -> dict[str, float]:
        """Return a few numbers for a logger: means over heads, and the share of each class.

        Args:
            prefix: put before every name.

        Returns:
            ``mean`` (nats), ``utilisation``, ``collapsed``, ``well_behaved``, ``overloaded``, and
            ``in_band`` if there is a band.
        """
        shares = zip(HeadClasses._fields, self.classify().shares(), strict=True)
        numbers = {
            "mean": mean_of_heads(self.entropy),
            "utilisation": mean_of_heads(self.utilisation),
            **dict(shares),
        }
        if self.in_band is not None:
            numbers["in_band"] = mean_of_heads(self.in_band)
        return {prefix + name: number for name, number in numbers.items()}


@dataclass(frozen=True)
class HeadSums:
    """Sums over rows per head, still on the device; they add up over micro-batches and steps.

    Attributes:
        layers: name to ``[statistics, 2, heads]``: entropy, reachable maximum, utilisation and,
            with a band, its share and threshold; each as a sum and what it is a sum of.
    """

    layers: dict[str, Float[Tensor, "statistics 2 heads"]]

    def plus(self, other: "HeadSums") -> "HeadSums":
        """Join with the rows of another batch.

        Layers are matched by name; one that only some batches have (layer dropout) is kept.

        Raises:
            ValueError: if a layer changed its number of heads, or only one of both has a band.
        """
        return HeadSums(add_by_name([*self.layers.items(), *other.layers.items()]))

    def over_ranks(self) -> "HeadSums":
        """Join with the rows of all ranks of the default process group, on the host.

        Every rank must call it, with ``HeadSums({})`` if it has no rows. Ranks that share the rows
        of a batch (tensor parallelism) count them several times, which moves no mean.

        Raises:
            ValueError: as ``plus``.
        """
        parts = gather_over_ranks(self._on_host())
        return HeadSums(add_by_name([layer for part in parts for layer in part.layers.items()]))

    def statistics(self) -> HeadStatistics:
        """Divide, and bring the numbers to the host in one transfer.

        Raises:
            ValueError: if there is no layer.
        """
        if not self.layers:
            raise ValueError("there are no rows to take a mean of; add those of a recording first.")
        tables = self._on_host().layers.values()
        means = [(table[:, 0] / table[:, 1]).tolist() for table in tables]  # 0 / 0, no row, is NaN
        return HeadStatistics(list(self.layers), *map(list, zip(*means, strict=True)))

    def _on_host(self) -> "HeadSums":
        if not self.layers:
            return self
        tables = list(self.layers.values())
        every = torch.cat([table.to(tables[0].device) for table in tables], dim=-1).cpu()
        parts = every.split([table.shape[-1] for table in tables], dim=-1)
        return HeadSums({name: part.clone() for name, part in zip(self.layers, parts, strict=True)})


def head_sums(recording: EntropyRecording, band: Band | None = None) -> HeadSums:
    """Sum the statistics of every head over the rows of a recording, without its graph.

    Padding rows and rows without a key are left out; rows with one key have no utilisation.
    Calls of one layer are merged by its name. Nothing waits for the device.

    Args:
        recording: what record_entropy gave.
        band: adds ``in_band`` and ``threshold``.

    Returns:
        Sums and counts, in float64 where the device has it.

    Raises:
        TypeError: if it is no recording.
        ValueError: if the recording is empty or the thresholds do not fit its calls.
    """
    check_recording("recording", recording)
    calls = recording.layers
    if not calls:
        raise ValueError(
            "the recording holds no attention call; run the model inside record_entropy."
        )
    thresholds: Sequence[Tensor | None] = [None] * len(calls)
    with torch.no_grad():
        if band is not None:
            heads = [call.heads for call in calls]
            like = calls[0].entropy
            thresholds = thresholds_of_layers(band.thresholds, heads, name="thresholds", like=like)
        pairs = zip(calls, thresholds, strict=True)
        size = calls[0].keys if band is None or band.context_size is None else band.context_size
        tables = [(call.name, _sum_call(call, t, band, size)) for call, t in pairs]
        return HeadSums(add_by_name(tables))


def head_statistics(recording: EntropyRecording, band: Band | None = None) -> HeadStatistics:
    """Return the statistics of every head of one recording; see head_sums."""
    return head_sums(recording, band).statistics()


def mean_of_heads(numbers: PerHead) -> float:
    """Return the mean over all heads whose number is known; NaN without one."""
    known = [number for number in flatten(numbers) if not math.isnan(number)]
    return math.fsum(known) / len(known) if known else math.nan


def flatten(numbers: PerHead) -> list[float]:
    """Return the numbers of all heads of all layers in one list."""
    return [number for layer in numbers for number in layer]


def _sum_call(
    call: LayerEntropy, threshold: Tensor | None, band: Band | None, context_size: int
) -> Float[Tensor, "statistics 2 heads"]:
    entropy = call.entropy
    counted = call.counted()
    comparable = counted & (call.allowed_keys > 1)  # with one key the entropy is 0 of at most 0
    maximum = call.maximum.expand_as(entropy)
    utilisation = entropy / maximum.masked_fill(maximum == 0, 1.0)
    sums = [
        sum_rows(entropy, counted),
        sum_rows(maximum, counted),
        sum_rows(utilisation, comparable),
    ]
    if band is not None and threshold is not None:
        threshold = threshold.to(entropy)
        if band.maximum == "context":
            utilisation, comparable = entropy / math.log(max(context_size, 2)), counted
        inside = (utilisation - threshold[None, :, None]).abs() <= band.tolerance
        sums.append(sum_rows(inside.to(entropy.dtype), comparable))
        sums.append(SumAndCount(threshold, torch.ones_like(threshold)))
    table = torch.stack([torch.stack([pair.total, pair.count]) for pair in sums])
    # float32 stops counting at 2**24 rows, which a window of steps reaches
    return table if table.device.type == "mps" else table.double()


def add_by_name(parts: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Add up tables ``[..., heads]`` of one name.

    Raises:
        ValueError: if two of one name have different shapes.
    """
    merged: dict[str, Tensor] = {}
    for name, table in parts:
        if name not in merged:
            merged[name] = table
            continue
        have = merged[name]
        if have.shape[-1] != table.shape[-1]:
            raise ValueError(
                f"{name} was recorded with {have.shape[-1]} and with {table.shape[-1]} heads; "
                "watch them with two monitors."
            )
        if have.shape != table.shape:
            raise ValueError("only one of the sums has a band; give both the same band.")
        merged[name] = have + table.to(have.device)
    return merged
