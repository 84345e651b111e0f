"""The penalty as Jha & Reagen (2025) published it, of every row of attention."""

from jaxtyping import Float
from torch import Tensor


def published_penalty(
    entropy: Float[Tensor, "batch heads queries"],
    thresholds: Float[Tensor, " heads"],
    maximum: Float[Tensor, "..."] | float,
    *,
    tolerance: float,
) -> Float[Tensor, "batch heads queries"]:
    r"""Return the squared distance from the threshold where it exceeds the margin.

    .. math:: \delta = H - \theta_h H_{\max}, \qquad
              \delta^2 \;[\, |\delta| > \gamma H_{\max} \,]

    It jumps from 0 to :math:`(\gamma H_{\max})^2` at the margin; ``calibrated_penalty`` does not.

    Source: Jha & Reagen, "Entropy-Guided Attention for Private LLMs" (2025), Algorithm 1, as their
    module computes it: on every row, where the paper averages over the queries first.

    Args:
        entropy: nats.
        thresholds: :math:`\theta_h`, fractions of the maximum.
        maximum: :math:`H_{\max}` in nats; a number, or broadcastable to ``entropy``.
        tolerance: :math:`\gamma`, the half-width of the margin as a fraction of the maximum.

    Returns:
        Square nats.
    """
    deviation = entropy - thresholds[None, :, None] * maximum
    inside = deviation.abs() <= tolerance * maximum  # NaN is not: it comes through
    return deviation.masked_fill(inside, 0.0).square()
