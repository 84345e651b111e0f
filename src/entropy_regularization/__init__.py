"""Measure and control the entropy of every attention head of a transformer."""

from entropy_regularization.attention.api import AttentionOutput, attention_with_entropy

__version__ = "0.1.0"

__all__ = ["AttentionOutput", "attention_with_entropy"]
