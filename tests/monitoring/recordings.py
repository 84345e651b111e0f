"""Recordings whose statistics are computed again by plain loops."""

import math
from dataclasses import dataclass

import torch

from entropy_regularization.recording.recording import EntropyRecording, LayerEntropy


def recording_of(*heads: int, batch: int = 2, queries: int = 5, seed: int = 0) -> EntropyRecording:
    """Causal layers, one with ``heads[k]`` heads each; the last two queries are padding."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for index, count in enumerate(heads):
        allowed = torch.arange(1, queries + 1).expand(1, 1, -1)
        share = torch.rand(batch, count, queries, generator=generator)
        rows = torch.ones(batch, queries, dtype=torch.bool)
        rows[1, -2:] = False
        entropy = (share * allowed.log()).requires_grad_()
        layers.append(LayerEntropy(f"layer.{index}", "self", entropy, allowed, rows, queries))
    return EntropyRecording(layers)


@dataclass
class Expected:
    """Of one head."""

    entropy: float
    maximum: float
    utilisation: float
    in_band: float


def expected_of(layer: LayerEntropy, head: int, theta: float, tolerance: float) -> Expected:
    """Read a head's statistics off its rows, one at a time."""
    entropies, maxima, shares = [], [], []
    for sample in range(layer.entropy.shape[0]):
        for query in range(layer.entropy.shape[2]):
            keys = int(layer.allowed_keys[0, 0, query])
            if not layer.rows[sample, query] or keys == 0:
                continue
            entropies.append(layer.entropy[sample, head, query].item())
            maxima.append(math.log(keys))
            if keys > 1:
                shares.append(entropies[-1] / math.log(keys))
    inside = [abs(share - theta) <= tolerance for share in shares]
    return Expected(*(sum(values) / len(values) for values in (entropies, maxima, shares, inside)))
