"""A penalty that means the same for every length, batch size and row."""

from jaxtyping import Float
from torch import Tensor


def calibrated_penalty(
    entropy: Float[Tensor, "batch heads queries"],
    threshold: Float[Tensor, " heads"],
    maximum: Float[Tensor, "..."],
    tolerance: float,
) -> Float[Tensor, "batch heads queries"]:
    r"""Square what exceeds the tolerance, in fractions of the maximum.

    .. math:: u = H / E_{max}, \qquad
        \mathrm{penalty} = \max(|u - \theta_h| - \tau, 0)^2

    Continuous at the margin, with slope zero there, where the published penalty jumps.

    Args:
        entropy: row entropies, nats.
        threshold: fractions of the maximum, one per head.
        maximum: nats, positive, broadcastable to entropy; ``log n_i`` for the reachable maximum.
        tolerance: :math:`\tau`, a fraction of the maximum.

    Returns:
        The penalty of every row, without unit.
    """
    deviation = entropy / maximum - threshold[:, None]
    return (deviation.abs() - tolerance).clamp(min=0.0).square()
