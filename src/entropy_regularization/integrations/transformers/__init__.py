"""Recording and penalties on Hugging Face transformers models."""

import importlib
from typing import TYPE_CHECKING, Any

from entropy_regularization.integrations.transformers.support import unsupported_reason

if reason := unsupported_reason():
    raise ImportError(reason, name="transformers")

from entropy_regularization.integrations.transformers.loading import load_thresholds
from entropy_regularization.integrations.transformers.regularize import regularize
from entropy_regularization.integrations.transformers.regularized import Regularized

if TYPE_CHECKING:
    from entropy_regularization.integrations.transformers.callback import EntropyCallback
    from entropy_regularization.integrations.transformers.trainer import EntropyRegularizedTrainer

__all__ = [
    "EntropyCallback",
    "EntropyRegularizedTrainer",
    "Regularized",
    "load_thresholds",
    "regularize",
]

_HOMES = {"EntropyCallback": "callback", "EntropyRegularizedTrainer": "trainer"}


def __getattr__(name: str) -> Any:
    """Import what needs Trainer when it is asked for: a recording does not need it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
