"""Room 3: entropies to one differentiable number per row; pure functions, one file per penalty."""

from entropy_regularization.penalties.calibrated import calibrated_penalty
from entropy_regularization.penalties.published import published_penalty

__all__ = ["calibrated_penalty", "published_penalty"]
