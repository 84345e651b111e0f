"""HeadThresholds: a learnable entropy threshold for every head of every layer."""

import torch
from torch import Tensor, nn


class HeadThresholds(nn.Module):
    r"""Thresholds :math:`\theta_{l,h}` as fractions of the maximum entropy (Algorithm 1 of the paper).

    The parameter is called ``fraction_bias``: every trainer that exempts biases from weight decay
    by their name (transformers.Trainer does) then exempts thresholds too, which must not be pulled
    towards 0.

    Args:
        layers: number of attention layers.
        heads: number of heads in each layer.
        initial: where the thresholds start, in [0, 1]; one number, or ``[layers, heads]`` values.
        learnable: False keeps them where they start.

    Raises:
        ValueError: if a size is not positive, or ``initial`` has another shape or leaves [0, 1].

    Example:
        >>> HeadThresholds(2, 3, initial=0.5)().shape
        torch.Size([2, 3])
    """

    fraction_bias: nn.Parameter

    def __init__(
        self, layers: int, heads: int, initial: float | Tensor = 0.5, *, learnable: bool = True
    ) -> None:
        super().__init__()
        if layers < 1 or heads < 1:
            raise ValueError(f"thresholds for {layers} layers and {heads} heads; pass at least 1.")
        start = torch.as_tensor(initial, dtype=torch.float32)
        if start.dim() and tuple(start.shape) != (layers, heads):
            raise ValueError(
                f"initial has shape {tuple(start.shape)}; pass one number or ({layers}, {heads})."
            )
        if not bool(((start >= 0) & (start <= 1)).all()):
            raise ValueError(
                "initial thresholds are fractions of the maximum entropy; pass values in [0, 1]."
            )
        values = start.expand(layers, heads).clone()
        self.fraction_bias = nn.Parameter(values, requires_grad=learnable)

    @property
    def layers(self) -> int:
        """The number of layers."""
        return self.fraction_bias.shape[0]

    @property
    def heads(self) -> int:
        """The number of heads per layer."""
        return self.fraction_bias.shape[1]

    def forward(self) -> Tensor:
        """Return the thresholds, ``[layers, heads]``."""
        return self.fraction_bias

    def extra_repr(self) -> str:
        """Describe the module in one line."""
        return f"layers={self.layers}, heads={self.heads}"
