"""Layers as penalties see them, and which of them are penalised together."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from entropy_regularization.reduction import SumAndCount

MOST_ROWS = 2**22  # of layers penalised together: above, temporary memory would cost more than time


class LayerRows(NamedTuple):
    """The rows of one layer, and what broadcasts to them."""

    entropy: Float[Tensor, "batch heads queries"]
    allowed_keys: Int[Tensor, "#batch #heads queries"] | None
    rows: Bool[Tensor, "batch queries"] | None


def sum_layers(
    layers: list[LayerRows],
    thresholds: list[Float[Tensor, "heads"]],
    penalise: Callable[[LayerRows, Tensor], SumAndCount],
) -> SumAndCount:
    """Sum the penalty over rows: of every head of the first layer, of the second, and so on.

    Ranks, which may group the layers differently, add up numbers in this order.

    Args:
        layers: of one pass; they may lie on several devices.
        thresholds: of the heads of each.
        penalise: gives the sums of the heads of one layer, given its rows and thresholds.

    Returns:
        total and count, each ``[all heads]``, on the device of the first layer.
    """
    device = layers[0].entropy.device
    of_layer: dict[int, SumAndCount] = {}
    for places in _alike(layers):
        joined, vector = layers[places[0]], thresholds[places[0]]
        if len(places) > 1:
            entropies = [layers[place].entropy for place in places]
            joined = joined._replace(entropy=torch.cat(entropies, 1))
            vector = torch.cat([thresholds[place] for place in places])
        sums = penalise(joined, vector)
        sums = SumAndCount(sums.total.to(device), sums.count.to(device))
        of_layer |= zip(places, sums.split(len(places)), strict=True)
    return SumAndCount.cat([of_layer[place] for place in range(len(layers))])


def _alike(layers: list[LayerRows]) -> list[list[int]]:
    """Return the places of layers that can be penalised together, as heads of one.

    A GPU waits for the host to go through a short pass layer by layer; compiled code does not.
    """
    if torch.compiler.is_compiling():
        return [[place] for place in range(len(layers))]
    found: dict[Any, list[list[int]]] = {}
    for place, (entropy, allowed, rows) in enumerate(layers):
        of_all_heads = allowed is None or allowed.shape[1] == 1
        shared = (id(allowed), id(rows)) if of_all_heads else place
        groups = found.setdefault((entropy.shape, entropy.dtype, entropy.device, shared), [[]])
        if groups[-1] and (len(groups[-1]) + 1) * entropy.numel() > MOST_ROWS:
            groups.append([])
        groups[-1].append(place)
    return [group for groups in found.values() for group in groups]
