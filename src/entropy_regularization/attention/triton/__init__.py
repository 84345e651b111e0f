"""Fused attention with entropy for GPUs, written in Triton."""

from entropy_regularization.attention.triton.operators import triton_attention

__all__ = ["triton_attention"]
