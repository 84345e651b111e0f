"""Weights that make attention visibly uneven.

Default initialisations are so small that every row of attention is uniform, and a wrong mask or
scale hardly moves its entropy.
"""

import torch
from torch import nn

GAIN = 1.4
NOISE = 0.1


def draw(model: nn.Module, seed: int) -> None:
    """Draw every matrix from a normal distribution of large gain; shake every vector a little."""
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) not in seen and _is_drawn(parameter):
                    seen.add(id(parameter))
                    noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                    if parameter.dim() < 2:
                        parameter.add_(NOISE * noise)
                    else:
                        parameter.copy_(noise * _scale(module, parameter))


def _is_drawn(parameter: torch.Tensor) -> bool:
    return parameter.is_floating_point() and parameter.numel() > 0


def _scale(module: nn.Module, parameter: torch.Tensor) -> float:
    if isinstance(module, nn.Embedding):
        return 1.0
    convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    fan_in = parameter[0].numel() if convolution else parameter.shape[-1]
    return GAIN * max(fan_in, 1) ** -0.5
