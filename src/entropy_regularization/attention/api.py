"""attention_with_entropy: scaled dot-product attention that also gives every row's entropy."""

from typing import Literal, NamedTuple

from torch import Tensor

from entropy_regularization.attention.masking import Structure, count_allowed_keys
from entropy_regularization.attention.reference import reference_attention

Implementation = Literal["auto", "reference", "blockwise", "triton"]


class AttentionOutput(NamedTuple):
    """What attention_with_entropy returns.

    Attributes:
        output: ``[batch, heads, queries, value_dim]``.
        entropy: ``[batch, heads, queries]``, nats, before dropout.
        log_normalizer: ``[batch, heads, queries]``, ``log sum_j exp(s_ij)``.
        max_score: ``[batch, heads, queries]``, the largest score of the row; carries no gradient.
        allowed_keys: ``[batch or 1, heads or 1, queries]``, how many keys the row may see.
    """

    output: Tensor
    entropy: Tensor
    log_normalizer: Tensor
    max_score: Tensor
    allowed_keys: Tensor


def attention_with_entropy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    allowed: Tensor | None = None,
    key_padding: Tensor | None = None,
    document: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    implementation: Implementation = "auto",
) -> AttentionOutput:
    """Attend, and return the entropy of every row of the attention matrix."""
    left, right = window if window is not None else (None, None)
    if causal:
        right = 0 if right is None else min(right, 0)
    structure = Structure(left, right, allowed, key_padding, document)
    rows = reference_attention(
        query,
        key,
        value,
        structure,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        bias=bias,
        softcap=softcap,
        sinks=sinks,
        dropout=dropout,
    )
    counts = count_allowed_keys(structure, query.shape[-2], key.shape[-2], query.device)
    return AttentionOutput(*rows, allowed_keys=counts)
