"""Every check on shapes, dtypes and devices, and the sentence read when it fails.

Shapes and dtypes are always checked; values never, because reading them stops a GPU and breaks
compilation.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_regularization.checks import FLOAT32, check_flag, is_number

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

LOG2_E = math.log2(math.e)

# Keys that a side of a window counts at most: more than a tensor can have, and a number that may
# be added to positions in 64 bits.
FARTHEST = 2**48


class Sizes(NamedTuple):
    """The sizes that query, key and value agree on."""

    batch: int
    heads: int
    queries: int
    keys: int


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> Sizes:
    """Check query, key and value against each other.

    Raises:
        TypeError: if one is not a floating tensor, or their dtypes differ.
        ValueError: if their shapes or devices do not fit together.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_is_tensor(name, tensor)
        if tensor.dtype not in FLOATING:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}; pass float16, bfloat16, float32 or float64."
            )
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; pass [batch, heads, positions, dim]."
            )
        _check_place(name, tensor, query)
        if tensor.dtype != query.dtype:
            raise TypeError(
                f"{name} has dtype {tensor.dtype} and query {query.dtype}; convert one of them."
            )
    batch, heads, n_queries, dim = query.shape
    kv_heads, n_keys = key.shape[1], key.shape[2]
    if key.shape[0] != batch or key.shape[3] != dim:
        raise ValueError(
            f"key has shape {tuple(key.shape)} but query {tuple(query.shape)} implies "
            f"({batch}, heads, keys, {dim}); batch and dim must be the same."
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value has shape {tuple(value.shape)} but key {tuple(key.shape)} implies "
            f"({batch}, {kv_heads}, {n_keys}, any dim); pass one value per key."
        )
    if dim == 0:
        raise ValueError("query and key have head dimension 0; pass at least 1.")
    if (kv_heads == 0 and heads != 0) or (kv_heads and heads % kv_heads):
        raise ValueError(
            f"query has {heads} heads and key {kv_heads}; the number of query heads must be a "
            "multiple of the number of key heads."
        )
    return Sizes(batch, heads, n_queries, n_keys)


def check_is_tensor(name: str, given: object) -> None:
    """Refuse what is no tensor.

    Raises:
        TypeError: if it is not one, or a sparse or nested one.
    """
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} is a {type(given).__name__}; pass a torch.Tensor.")
    if given.is_nested or given.layout != torch.strided:
        kind = "nested" if given.is_nested else str(given.layout)
        raise TypeError(
            f"{name} is a {kind} tensor; pass a dense one (to_dense, to_padded_tensor)."
        )


def _check_place(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(
            f"{name} is on {tensor.device} and query on {query.device}; move one of them."
        )


def check_window(causal: bool, window: object) -> tuple[int | None, int | None]:
    """Check ``window`` and fold ``causal`` into it; return the limits (left, right).

    Raises:
        TypeError: if ``window`` is not a pair of integers or None.
        ValueError: if a side is negative.
    """
    check_flag("causal", causal)
    if window is None:
        return None, 0 if causal else None
    sides = tuple(window) if isinstance(window, tuple | list) else ()
    if len(sides) != 2 or not all(s is None or type(s) is int for s in sides):
        raise TypeError(
            f"window is {window!r}; pass (left, right) as integers, None for no limit on a side."
        )
    left, right = sides
    for side in (left, right):
        if side is not None and side < 0:
            raise ValueError(
                f"window is {window!r}; sides count keys and cannot be negative, use None for "
                "no limit."
            )
    left, right = (None if side is None else min(side, FARTHEST) for side in (left, right))
    if causal:
        right = 0 if right is None else min(right, 0)
    return left, right


def check_masks(
    sizes: Sizes,
    query: Tensor,
    allowed: Tensor | None,
    key_padding: Tensor | None,
    document: Tensor | None,
) -> None:
    """Check the tensors that say which keys a row may see.

    Raises:
        TypeError: if one is not a tensor, a mask is not boolean or document not integer.
        ValueError: if a shape or device does not fit.
    """
    if allowed is not None:
        _check_boolean("allowed", allowed)
        _check_broadcast("allowed", allowed, sizes, query)
    if key_padding is not None:
        _check_boolean("key_padding", key_padding)
        _check_positions("key_padding", key_padding, sizes, query)
    if document is not None:
        check_is_tensor("document", document)
        if document.dtype not in INTEGERS:
            raise TypeError(f"document has dtype {document.dtype}; pass integer ids of documents.")
        _check_positions("document", document, sizes, query)
        if sizes.queries > sizes.keys:
            raise ValueError(
                f"document needs a key position for every query, but there are {sizes.queries} "
                f"queries and {sizes.keys} keys; use allowed for cross-attention."
            )


def _check_boolean(name: str, tensor: Tensor) -> None:
    check_is_tensor(name, tensor)
    if tensor.dtype != torch.bool:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}; pass a boolean tensor, True where attention is "
            "allowed (use bias for additive masks)."
        )


def _check_positions(name: str, tensor: Tensor, sizes: Sizes, query: Tensor) -> None:
    _check_place(name, tensor, query)
    fits = tensor.dim() == 2 and (tensor.shape[0] == 1 or tensor.shape[0] == sizes.batch)
    if not fits or tensor.shape[1] != sizes.keys:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} but query and key imply "
            f"({sizes.batch}, {sizes.keys}); pass one entry per key."
        )


def _check_broadcast(name: str, tensor: Tensor, sizes: Sizes, query: Tensor) -> None:
    _check_place(name, tensor, query)
    fits = tensor.dim() == 4 and all(
        have == 1 or have == want  # "in (1, want)" goes wrong on compile's symbolic sizes
        for have, want in zip(tensor.shape, sizes, strict=True)
    )
    if not fits:
        wanted = ", ".join(f"{n}" if n == 1 else f"{n} or 1" for n in sizes)
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} but query and key imply ({wanted}); pass "
            "four dimensions [batch, heads, queries, keys]."
        )


def check_scores(
    sizes: Sizes,
    query: Tensor,
    bias: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> None:
    """Check what acts on the scores.

    Raises:
        TypeError: if bias or sinks is not a floating tensor.
        ValueError: if a shape or number does not fit.
    """
    for name, tensor in (("bias", bias), ("sinks", sinks)):
        if tensor is None:
            continue
        check_is_tensor(name, tensor)
        if tensor.dtype not in FLOATING:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}; pass a floating tensor (use allowed for "
                "boolean masks)."
            )
    if bias is not None:
        _check_broadcast("bias", bias, sizes, query)
    if sinks is not None:
        _check_place("sinks", sinks, query)
        if tuple(sinks.shape) != (sizes.heads,):
            raise ValueError(
                f"sinks has shape {tuple(sinks.shape)} but query implies ({sizes.heads},); pass "
                "one logit per query head."
            )
    _check_numbers(scale, softcap, dropout)
    if query.dtype != torch.float64:
        _check_products(query.shape[-1], scale, softcap)


def _check_numbers(scale: float | None, softcap: float | None, dropout: float) -> None:
    if scale is not None and not is_number(scale):
        raise ValueError(
            f"scale is {scale!r:.40}; pass a finite number of float32, or None for 1/sqrt(dim)."
        )
    if softcap is not None and not (is_number(softcap) and softcap >= FLOAT32.tiny):
        raise ValueError(
            f"softcap is {softcap!r:.40}; pass a positive number of float32, or None for no cap."
        )
    if not (is_number(dropout) and 0.0 <= dropout < 1.0):
        raise ValueError(f"dropout is {dropout!r:.40}; pass a rate in [0, 1).")


def _check_products(dim: int, scale: float | None, softcap: float | None) -> None:
    """Refuse a scale and a softcap whose products leave float32, in which scores are computed.

    Scores are in base 2, and scale / softcap is one factor.
    """
    name, bounded = ("scale", scale) if softcap is None else ("softcap", softcap)
    if bounded is not None and abs(float(bounded)) * LOG2_E > FLOAT32.max:
        raise ValueError(
            f"{name} is {bounded!r}, and times log2(e) more than float32 holds; pass at most "
            "2.3e38 in size."
        )
    if softcap is None:
        return
    factor = dim**-0.5 if scale is None else abs(float(scale))
    if factor / float(softcap) > FLOAT32.max:
        raise ValueError(
            f"scale is {scale!r} and softcap {softcap!r}, and their quotient more than float32 "
            "holds; pass a smaller scale or a larger softcap."
        )
