"""Measure and control the entropy of every attention head of a transformer."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from entropy_regularization.attention.api import AttentionOutput, attention_with_entropy
    from entropy_regularization.attention.merging import AttentionShard, merge_attention
    from entropy_regularization.monitoring.monitor import EntropyMonitor
    from entropy_regularization.recording.recorder import record_entropy
    from entropy_regularization.recording.recording import EntropyRecording, LayerEntropy
    from entropy_regularization.regularization import EntropyRegularization
    from entropy_regularization.thresholds import HeadThresholds

__version__ = "0.1.0"

__all__ = [
    "AttentionOutput",
    "AttentionShard",
    "EntropyMonitor",
    "EntropyRecording",
    "EntropyRegularization",
    "HeadThresholds",
    "LayerEntropy",
    "attention_with_entropy",
    "merge_attention",
    "record_entropy",
]

_ROOMS = {
    "AttentionOutput": "attention.api",
    "AttentionShard": "attention.merging",
    "EntropyMonitor": "monitoring.monitor",
    "EntropyRecording": "recording.recording",
    "EntropyRegularization": "regularization",
    "HeadThresholds": "thresholds",
    "LayerEntropy": "recording.recording",
    "attention_with_entropy": "attention.api",
    "merge_attention": "attention.merging",
    "record_entropy": "recording.recorder",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: entropy-reg --help need not wait for torch."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
