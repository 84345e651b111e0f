"""The penalty of the published module (Jha & Reagen 2025), number for number."""

import torch
from jaxtyping import Float
from torch import Tensor


def published_penalty(
    entropy: Float[Tensor, "batch heads queries"],
    threshold: Float[Tensor, " heads"],
    maximum: Float[Tensor, "..."],
    tolerance: float,
) -> Float[Tensor, "batch heads queries"]:
    r"""Square the deviation from the threshold where it exceeds the tolerance.

    .. math:: \delta = H - \theta_h E_{max}, \qquad
        \mathrm{penalty} = \delta^2 \; [\, |\delta| > \tau E_{max} \,]

    It jumps at the margin from 0 to ``(tolerance * maximum)^2``; see calibrated_penalty.

    Args:
        entropy: row entropies, nats.
        threshold: fractions of the maximum, one per head.
        maximum: :math:`E_{max}`, nats, broadcastable to entropy.
        tolerance: :math:`\tau`, a fraction of the maximum.

    Returns:
        The penalty of every row, squared nats.
    """
    deviation = entropy - threshold[:, None] * maximum
    outside = deviation.abs() > tolerance * maximum
    return torch.where(outside, deviation.square(), torch.zeros_like(deviation))
