"""A penalty whose strength does not depend on length, batch size or mask, of every row."""

import torch
from jaxtyping import Float
from torch import Tensor


def calibrated_penalty(
    entropy: Float[Tensor, "batch heads queries"],
    thresholds: Float[Tensor, " heads"],
    maximum: Float[Tensor, "..."] | float,
    *,
    tolerance: float,
) -> Float[Tensor, "batch heads queries"]:
    r"""Return the squared excess of the utilisation over the tolerance around the threshold.

    .. math:: u = H / H_{\max}, \qquad \max(|u - \theta_h| - \gamma,\; 0)^2

    Value and slope are continuous at the margin. Dimensionless, hence the same for every length.

    Source: ours; the band is that of Jha & Reagen (2025), see ``published_penalty``.

    Args:
        entropy: nats.
        thresholds: :math:`\theta_h`, fractions of the maximum.
        maximum: :math:`H_{\max}` in nats; a number, or broadcastable to ``entropy``. Rows whose
            maximum is 0 have utilisation 0; leave them out of the mean.
        tolerance: :math:`\gamma`, the half-width of the band as a fraction of the maximum.

    Returns:
        A number in [0, 1] per row, if thresholds are in [0, 1].
    """
    limit = torch.as_tensor(maximum, dtype=entropy.dtype, device=entropy.device)
    unreachable = limit <= 0
    utilisation = (entropy / limit.masked_fill(unreachable, 1.0)).masked_fill(unreachable, 0.0)
    excess = (utilisation - thresholds[None, :, None]).abs() - tolerance
    return excess.clamp(min=0.0).square()
