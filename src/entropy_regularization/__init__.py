"""Measure and control the entropy of every attention head of a transformer."""

from entropy_regularization.attention.api import AttentionOutput, attention_with_entropy
from entropy_regularization.monitoring.monitor import EntropyMonitor
from entropy_regularization.recording.recorder import record_entropy
from entropy_regularization.recording.recording import EntropyRecording, LayerEntropy
from entropy_regularization.regularization import EntropyRegularization
from entropy_regularization.thresholds import HeadThresholds

__version__ = "0.1.0"

__all__ = [
    "AttentionOutput",
    "EntropyMonitor",
    "EntropyRecording",
    "EntropyRegularization",
    "HeadThresholds",
    "LayerEntropy",
    "attention_with_entropy",
    "record_entropy",
]
