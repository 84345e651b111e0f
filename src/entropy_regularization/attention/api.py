"""attention_with_entropy: scaled dot-product attention that also gives every row's entropy."""

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from entropy_regularization.attention.compiled import support as compiled_support
from entropy_regularization.attention.compiled.support import unbuilt_reason
from entropy_regularization.attention.masking import Memo, Structure, count_allowed_keys, once
from entropy_regularization.attention.operators import blockwise_attention
from entropy_regularization.attention.reference import reference_attention
from entropy_regularization.attention.transforms import check_transforms
from entropy_regularization.attention.triton import support as triton_support
from entropy_regularization.attention.triton import triton_attention
from entropy_regularization.attention.validation import (
    check_masks,
    check_scores,
    check_tensors,
    check_window,
)

Implementation = Literal["auto", "reference", "blockwise", "compiled", "triton"]

# Hosts that listen: each is told what a call of attention_with_entropy gives, and of how many keys.
observers: list[Callable[["AttentionOutput", int], None]] = []

logger = logging.getLogger("entropy_regularization.attention")


class AttentionOutput(NamedTuple):
    """What attention_with_entropy returns.

    Attributes:
        output: ``[batch, heads, queries, value_dim]``, in the dtype of the query.
        entropy: ``[batch, heads, queries]``, nats, of the weights before dropout; float32
            (float64 for float64 input).
        log_normalizer: ``[batch, heads, queries]``, ``log sum_j exp(s_ij)`` (with the sink, if
            any); -inf for a row that sees no key.
        max_score: ``[batch, heads, queries]``, the largest score of the row; carries no gradient.
        allowed_keys: ``[batch or 1, heads or 1, queries]`` integers, how many keys the row may
            see; the most entropy it can have is ``log(allowed_keys)``.
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
    r"""Attend, and return the entropy of every row of the attention matrix.

    With scores ``s_ij = softcap(scale q_i . k_j) + bias_ij`` over the keys a row may see,

    .. math:: p_{ij} = \exp(s_{ij} - \mathrm{lse}_i), \qquad H_i = -\sum_j p_{ij} \log p_{ij}

    Differentiable in query, key, value, bias and sinks through output, entropy and
    log_normalizer. No ``[queries, keys]`` matrix is stored, except by ``reference``.

    Args:
        query: ``[batch, heads, queries, dim]``, float16, bfloat16, float32 or float64.
        key: ``[batch, kv_heads, keys, dim]``; ``heads`` is a multiple of ``kv_heads``
            (grouped-query attention).
        value: ``[batch, kv_heads, keys, value_dim]``.
        causal: a query sees the keys up to its own position; the last query is aligned with
            the last key, so that a decoding step sees the whole cache.
        window: ``(left, right)``, FlashAttention's convention: query i, aligned as above, sees
            keys ``i - left .. i + right``; None for no limit on a side.
        allowed: boolean, True where a query may attend to a key, four dimensions, each
            broadcastable to ``[batch, heads, queries, keys]``.
        key_padding: boolean ``[batch, keys]``, True for a real token.
        document: integer ids ``[batch, keys]`` of packed sequences; a query sees only the keys of
            its own document.
        bias: added to the scores, broadcastable to ``[batch, heads, queries, keys]``; may need a
            gradient. An entry of -inf masks its key, but is not subtracted from allowed_keys.
            A row of nothing but entries below -5e21 (-4e29 in ``triton``), such as the lowest
            float32, is taken for one without keys, unless by ``reference``.
        scale: factor of ``q . k``; ``1/sqrt(dim)`` unless given.
        softcap: scores become ``softcap * tanh(score / softcap)`` before the bias (Gemma 2).
        sinks: ``[heads]`` logits that join every row's normalizer but are no key (gpt-oss). The
            entropy is ``-sum p log p`` over the real keys, whose weights then sum to less than 1.
        dropout: rate in [0, 1) applied to the weights that multiply the values. The entropy is
            that of the weights before dropout. ``torch.manual_seed`` reproduces it.
        implementation: "auto" takes "triton" on CUDA and "compiled" on a CPU where they can, else
            "blockwise". A requested one that cannot run refuses and says why.

    Returns:
        output, entropy, log_normalizer, max_score and allowed_keys. A row that may see no key has
        output 0, entropy 0, log_normalizer -inf (the sink, if any) and no gradient, but for that of
        its sink.

    Raises:
        TypeError: if a tensor has the wrong dtype.
        ValueError: if shapes, devices or numbers do not fit together, or the implementation is
            unknown or cannot run.
        NotImplementedError: inside torch.func.grad and its relatives, in forward-mode
            differentiation (torch.compile wraps it in an error of its own), by batches of gradients
            and when differentiated twice, unless by ``reference``; vmap works.

    Example:
        A row that sees n keys of equal score has entropy log n:

        >>> q = torch.zeros(1, 1, 3, 2)
        >>> attention_with_entropy(q, q, q, causal=True).entropy.exp()
        tensor([[[1., 2., 3.]]])
    """
    sizes = check_tensors(query, key, value)
    left, right = check_window(causal, window)
    check_masks(sizes, query, allowed, key_padding, document)
    check_scores(sizes, query, bias, scale, softcap, sinks, dropout)
    structure = Structure(left, right, allowed, key_padding, document)
    found = attend(
        query,
        key,
        value,
        structure,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        bias=bias,
        softcap=None if softcap is None else float(softcap),
        sinks=sinks,
        dropout=float(dropout),
        implementation=implementation,
    )
    for observe in observers:
        observe(found, sizes.keys)
    return found


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    structure: Structure,
    *,
    scale: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    implementation: str = "auto",
    memo: Memo | None = None,
) -> AttentionOutput:
    """Do what attention_with_entropy does, for inputs that are known to fit together.

    Hosts call it, whose limits ``left`` and ``right`` may be negative (a static cache is longer
    than what it holds), and whose batches may be one for all (learned queries). Layers that they
    give one mask may be given one ``memo``, empty at first, which keeps what follows from the mask.
    """
    query, key, value = _in_one_batch(query, key, value)
    options: dict[str, Any] = {"bias": bias, "softcap": softcap, "sinks": sinks, "dropout": dropout}
    name = choose_implementation(implementation, query, key, value, structure, scale, options)
    if name != "reference":
        check_transforms(query, key, value, bias, sinks)
    if name == "triton":
        options["memo"] = memo
    rows = _IMPLEMENTATIONS[name](query, key, value, structure, scale=scale, **options)
    problem = (structure, query.shape[2], key.shape[2], query.device)
    counts = once(memo, ("counts", *problem[1:]), lambda: count_allowed_keys(*problem))
    return AttentionOutput(*rows, allowed_keys=counts)


def _in_one_batch(*tensors: Tensor) -> list[Tensor]:
    """Repeat a batch of one for the batch of the others, as a product of matrices does."""
    batch = max(tensor.shape[0] for tensor in tensors)
    return [
        tensor if tensor.shape[0] == batch else tensor.expand(batch, -1, -1, -1)
        for tensor in tensors
    ]


_IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]] = {
    "reference": reference_attention,
    "blockwise": blockwise_attention,
    "compiled": functools.partial(blockwise_attention, compiled=True),
    "triton": triton_attention,
}


def choose_implementation(
    asked: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    structure: Structure,
    scale: float,
    options: dict[str, Any],
) -> str:
    """Return the name of the implementation that runs, or refuse the one asked for."""
    if asked not in get_args(Implementation):
        names = ", ".join(get_args(Implementation))
        raise ValueError(f"implementation is {asked!r}; choose one of {names}.")
    if asked in ("reference", "blockwise"):
        return asked
    on_cuda = query.device.type == "cuda"
    name = ("triton" if on_cuda else "compiled") if asked == "auto" else asked
    reason = _reason_against[name](query, key, value, structure, scale=scale, **options)
    if reason is None and asked == "compiled":
        reason = unbuilt_reason()
    if reason is None:
        return name
    if asked != "auto":
        raise ValueError(f"implementation={asked!r} cannot run: {reason}")
    if on_cuda and not torch.compiler.is_compiling():
        _say_once(f"attention on {query.device.type} runs blockwise, not triton: {reason}")
    return "blockwise"


_reason_against: dict[str, Callable[..., str | None]] = {
    "compiled": compiled_support.unsupported_reason,
    "triton": triton_support.unsupported_reason,
}


@functools.cache
def _say_once(sentence: str) -> None:
    logger.warning(sentence)
