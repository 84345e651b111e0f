"""Fused attention with entropy for GPUs, written in Triton, which is imported at the first use."""

from typing import Any

from torch import Tensor


def triton_attention(*tensors: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return output, entropy, log-normalizer and largest score (operators.triton_attention)."""
    from entropy_regularization.attention.triton import operators

    return operators.triton_attention(*tensors, **options)
