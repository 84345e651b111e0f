"""Numbers of an eager pass and of a recorded pass, side by side."""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from eager import entropy_of, seeing, tensors_in
from torch import Tensor, nn

from entropy_regularization.recording.recording import EntropyRecording, LayerEntropy


class Rows:
    """Which rows to compare: no padding, and no row that sees no key.

    Both are known from the batch and from eager attention, not from the recording.
    """

    def __init__(self, batch: dict[str, Any], eager_weights: list[Tensor]) -> None:
        masks = (batch.get("attention_mask"), batch.get("decoder_attention_mask"))
        self._masks = {tuple(mask.shape): mask.bool() for mask in masks if mask is not None}
        for weights in eager_weights:
            if weights.dim() == 4:
                seen = seeing(weights)
                if not seen.any():
                    continue  # all keys are the same, not all masked
                self._masks[tuple(seen.shape)] = self.real(*seen.shape) & seen

    def real(self, batch: int, length: int) -> Tensor:
        """Return ``[batch, length]``; all rows if nothing is known of this shape."""
        mask = self._masks.get((batch, length))
        return torch.ones(batch, length, dtype=torch.bool) if mask is None else mask


def padding_counted(recording: EntropyRecording, batch: dict[str, Any]) -> int:
    """Return how many layers count rows that are padding by every mask of their length."""
    masks = [mask for name, mask in batch.items() if "attention_mask" in name and mask.dim() == 2]
    found = 0
    for layer in recording:
        of_rows = [mask.bool() for mask in masks if mask.shape == layer.rows.shape]
        found += bool(of_rows) and all(bool((layer.rows & ~mask).any()) for mask in of_rows)
    return found


@dataclass
class Pairs:
    """Recorded layers with the eager entropies of the same calls, and what found no partner."""

    layers: list[LayerEntropy] = field(default_factory=list)
    eager: list[Tensor] = field(default_factory=list)
    unmatched: int = 0

    def add(self, layer: LayerEntropy, entropy: Tensor) -> None:
        self.layers.append(layer)
        self.eager.append(entropy)

    def ours(self) -> list[Tensor]:
        return [layer.entropy.double() for layer in self.layers]

    def theirs(self) -> list[Tensor]:
        return self.eager

    def error(self, rows: Rows) -> float:
        """Return the worst difference of an entropy, in nats, over the rows that count."""
        found = [
            _worst(layer, entropy, rows)
            for layer, entropy in zip(self.layers, self.eager, strict=True)
        ]
        return max(found, default=0.0)


def counted(layer: LayerEntropy, rows: Rows) -> Tensor:
    """Return the rows to compare, in the shape of the entropies."""
    batch, _, length = layer.entropy.shape
    return rows.real(batch, length)[:, None].expand_as(layer.entropy)


def _worst(layer: LayerEntropy, entropy: Tensor, rows: Rows) -> float:
    where = counted(layer, rows)
    if not where.any():
        return torch.inf  # nothing compared is nothing shown
    difference = (layer.entropy.double() - entropy).abs()[where]
    return float(difference.detach().nan_to_num(torch.inf).max())


def pair_by_name(recording: EntropyRecording, kept: list[tuple[str, Tensor]]) -> Pairs:
    """Pair calls by the name of the module, the first with the first where it is called often."""
    waiting: dict[str, list[Tensor]] = defaultdict(list)
    for name, weights in kept:
        waiting[name].append(weights)
    pairs = Pairs()
    for layer in recording:
        candidates = waiting[layer.name]
        if candidates and _fits(candidates[0], layer):
            pairs.add(layer, entropy_of(candidates.pop(0)).reshape(layer.entropy.shape))
    pairs.unmatched = sum(map(len, waiting.values()))
    return pairs


def _fits(weights: Tensor, layer: LayerEntropy) -> bool:
    """Tell whether weights have the rows of a layer, perhaps with heads folded into the batch."""
    shape = layer.entropy.shape
    return weights.shape[:-1] in (shape, (shape[0] * shape[1], shape[2]))


def pair_returned(recording: EntropyRecording, returned: list[Tensor], rows: Rows) -> Pairs:
    """Pair the matrices that the model returned with the recorded call that is nearest."""
    pairs = Pairs()
    free = list(recording)
    for weights in returned:
        entropy = entropy_of(weights)
        fitting = [layer for layer in free if layer.entropy.shape == entropy.shape]
        if not fitting:
            pairs.unmatched += 1
            continue
        nearest = min(fitting, key=lambda layer: _worst(layer, entropy, rows))
        free = [layer for layer in free if layer is not nearest]
        pairs.add(nearest, entropy)
    return pairs


def output_error(eager: Any, recorded: Any, rows: Rows) -> float:
    """Return the worst difference of the outputs, relative to the size of each tensor.

    Padding rows are left out: eager attention gives a row without keys the mean of all values.
    """
    theirs, ours = dict(tensors_in(eager)), dict(tensors_in(recorded))
    errors = [0.0]
    for name, expected in theirs.items():
        if name not in ours or ours[name].shape != expected.shape:
            return torch.inf
        errors.append(_relative(_on_rows(ours[name], rows), _on_rows(expected, rows)))
    return max(errors)


def _relative(found: Tensor, expected: Tensor) -> float:
    """Return the worst difference over the largest value; infinite values must be the same."""
    same = found.detach() == expected.detach()
    difference = (found - expected).detach().abs().masked_fill(same, 0.0).nan_to_num(torch.inf)
    finite = expected.detach().abs()[expected.isfinite()]
    if not finite.numel():
        return 0.0 if bool(same.all()) else torch.inf
    return float(difference.max()) / max(float(finite.max()), 1e-6)


def _on_rows(value: Tensor, rows: Rows) -> Tensor:
    """Zero the padding rows of ``[batch, length, ...]``."""
    if value.dim() < 3:
        return value
    keep = rows.real(value.shape[0], value.shape[1])
    return value.masked_fill(~keep.reshape(*keep.shape, *[1] * (value.dim() - 2)), 0.0)


def random_loss(
    output: Any, entropies: list[Tensor], rows: Rows, layers: list[LayerEntropy]
) -> Tensor:
    """Return a random projection of the outputs plus a random sum of the entropies."""
    generator = torch.Generator().manual_seed(3)
    loss = torch.zeros((), dtype=torch.float64)
    for _, value in tensors_in(output):
        if value.requires_grad:
            direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            loss = loss + (_on_rows(value, rows).double() * direction).mean()
    for entropy, layer in zip(entropies, layers, strict=True):
        direction = torch.randn(entropy.shape, generator=generator, dtype=torch.float64)
        where = counted(layer, rows)
        loss = loss + (entropy * direction).masked_fill(~where, 0.0).mean()
    return loss


def gradient_error(
    model: nn.Module, recorded_model: nn.Module, eager: Tensor, recorded: Tensor
) -> float:
    """Return the worst relative difference of the gradient of any parameter.

    A parameter whose gradient is a thousandth of the largest is measured against that thousandth.
    """
    parameters = [each for each in model.parameters() if each.requires_grad]
    same = [each for each in recorded_model.parameters() if each.requires_grad]
    if not (eager.requires_grad and recorded.requires_grad):
        return 0.0 if eager.requires_grad == recorded.requires_grad else torch.inf
    # A graph that a model keeps (levit) is part of both.
    theirs = torch.autograd.grad(eager, parameters, allow_unused=True, retain_graph=True)
    ours = torch.autograd.grad(recorded, same, allow_unused=True, retain_graph=True)
    norms = [0.0 if gradient is None else float(gradient.norm()) for gradient in theirs]
    if not all(math.isfinite(norm) for norm in norms):
        return torch.inf
    floor = max(1e-3 * max(norms), 1e-12)
    worst = 0.0
    for expected, found, norm in zip(theirs, ours, norms, strict=True):
        zero = torch.zeros(())
        difference = (zero if found is None else found) - (zero if expected is None else expected)
        worst = max(worst, float(difference.norm().nan_to_num(torch.inf)) / (norm + floor))
    return worst
