"""How the entropy of every head grows with the number of keys that a row sees.

Under a causal mask one forward pass holds rows of every length, so that one long context tells
whether a head attends to a fixed number of keys, or spreads over all that it is given.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_regularization.monitoring.statistics import PerHead, add_by_name
from entropy_regularization.recording.recording import (
    EntropyRecording,
    LayerEntropy,
    check_recording,
)

OCTAVES = 32  # the last one begins at 2**31 keys
LEAST_SPREAD = 1e-9  # of log n, nats squared: below it all rows see the same number of keys


@dataclass(frozen=True)
class LengthProfile:
    """What is known of every head by how many keys its rows see, on the host: plain numbers.

    An octave holds the rows that see from ``keys[k]`` to ``2 * keys[k] - 1`` keys. What no row
    tells is NaN.

    Attributes:
        layers: qualified module names.
        keys: where every octave begins, 1, 2, 4, ...; up to the last that has a row.
        typical_keys: of the rows of an octave, the geometric mean of their numbers of keys, over
            the heads of a layer, ``[layers][octaves]``; layers with a window have others.
        entropy: mean row entropy, nats, ``[layers][heads][octaves]``.
        growth: slope of the least-squares line through ``H_i`` against ``log n_i``,
            ``[layers][heads]``, over rows that see two keys or more: 0 of a head that attends to
            as many keys of a long context as of a short one, 1 of a head that attends to all
            alike.
        deviation: standard deviation of row entropies, nats, ``[layers][heads]``.
    """

    layers: list[str]
    keys: list[int]
    typical_keys: list[list[float]]
    entropy: list[PerHead]
    growth: PerHead
    deviation: PerHead


@dataclass(frozen=True)
class LengthSums:
    """Sums over rows by octave of the keys that they see; they add up over batches.

    Attributes:
        layers: name to ``[6, octaves, heads]``: over the rows of an octave, with ``x = log n_i``
            and ``h = H_i``, the sums of 1, x, h, x x, x h and h h.
    """

    layers: dict[str, Float[Tensor, "6 octaves heads"]]

    def plus(self, other: "LengthSums") -> "LengthSums":
        """Join with the rows of another batch; layers are matched by name.

        Raises:
            ValueError: if a layer changed its number of heads.
        """
        return LengthSums(add_by_name([*self.layers.items(), *other.layers.items()]))

    def profile(self) -> LengthProfile:
        """Divide, on the host.

        Raises:
            ValueError: if there is no row.
        """
        tables = [table.cpu() for table in self.layers.values()]
        count = sum((table[0].sum(-1) for table in tables), torch.zeros(OCTAVES))
        if not count.any():
            raise ValueError("there are no rows to take a mean of; add those of a recording first.")
        octaves = int(count.nonzero().max()) + 1
        return LengthProfile(
            layers=list(self.layers),
            keys=[2**octave for octave in range(octaves)],
            typical_keys=[_typical_keys(table)[:octaves].tolist() for table in tables],
            entropy=[(table[2] / table[0])[:octaves].T.tolist() for table in tables],
            growth=[_growth(table).tolist() for table in tables],
            deviation=[_deviation(table).tolist() for table in tables],
        )


def octave_name(octave: int) -> str:
    """Write how many keys the rows of an octave see: "1", "2 to 3", "4 to 7"."""
    return f"{2**octave:,} to {2 ** (octave + 1) - 1:,}" if octave else "1"


def length_sums(recording: EntropyRecording) -> LengthSums:
    """Sum over the rows of a recording by how many keys they see, without its graph.

    Padding rows and rows without a key are left out. Calls of one layer are merged by its name.
    Nothing waits for the device, but where it has no float64 (mps).

    Args:
        recording: what record_entropy gave.

    Raises:
        TypeError: if it is no recording.
    """
    check_recording("recording", recording)
    return LengthSums(add_by_name([(call.name, _sum_call(call)) for call in recording]))


def _sum_call(call: LayerEntropy) -> Float[Tensor, "6 octaves heads"]:
    entropy = call.entropy.detach()
    if entropy.device.type == "mps":
        return _sum_call(call._map(Tensor.cpu))
    starts = 2 ** torch.arange(OCTAVES, device=entropy.device)
    octave = torch.bucketize(call.allowed_keys, starts, right=True) - 1
    counted = call.counted()
    h = entropy.double().masked_fill(~counted, 0.0)
    x = call.allowed_keys.clamp(min=1).double().log().expand_as(h).masked_fill(~counted, 0.0)
    values = torch.stack([counted.double(), x, h, x * x, x * h, h * h])  # [6, batch, heads, rows]
    places = octave.clamp(min=0).expand_as(values)
    by_head = [each.transpose(1, 2).flatten(2) for each in (places, values)]
    table = values.new_zeros(len(values), call.heads, OCTAVES)
    return table.scatter_add_(2, *by_head).transpose(1, 2)


def _typical_keys(table: Float[Tensor, "6 octaves heads"]) -> Float[Tensor, " octaves"]:
    count, x = table[:2].sum(-1)
    return torch.exp(x / count)


def _growth(table: Float[Tensor, "6 octaves heads"]) -> Float[Tensor, " heads"]:
    """Return the slope of h against x; rows with one key, whose entropy is 0, are left out."""
    count, x, h, xx, xh, _ = table[:, 1:].sum(1)
    spread = xx / count - (x / count) ** 2
    slope = (xh / count - x / count * h / count) / spread
    return torch.where(spread > LEAST_SPREAD, slope, math.nan)


def _deviation(table: Float[Tensor, "6 octaves heads"]) -> Float[Tensor, " heads"]:
    count, _, h, _, _, hh = table.sum(1)
    return torch.sqrt((hh / count - (h / count) ** 2).clamp(min=0))
