"""Several texts in one row, which flash attention takes apart by their lengths or positions."""

from typing import Any

import torch
from torch import Tensor

from entropy_regularization.attention.masking import Memo, Structure, once

VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # all or none


def taken_apart(
    structure: Structure, memo: Memo | None, query: Tensor, key: Tensor, options: dict[str, Any]
) -> tuple[Structure, Memo | None]:
    """Let rows see their own text alone, as flash attention does without padding.

    It does so whether there is a cache or not, unlike the masks that other attentions are given.

    Args:
        structure: what the mask says.
        memo: what the layers that are given the mask share.
        query: ``[batch, heads, queries, dim]``.
        key: ``[batch, kv_heads, keys, dim]``.
        options: what the model hands to its attention function.

    Returns:
        The structure with its texts, and a memo of its own; as they came if there is one text.

    Raises:
        NotImplementedError: if lengths come for several rows or beside a longer cache.
    """
    by_lengths = all(options.get(name) is not None for name in VARLEN)
    source: Tensor | None = options.get("cu_seq_lens_q" if by_lengths else "position_ids")
    if source is None:
        return structure, memo
    shape = (query.shape[0], query.shape[2], key.shape[2])
    if by_lengths and (shape[0] > 1 or shape[1] != shape[2]):
        raise NotImplementedError(
            f"cu_seq_lens came for a query of {shape[0]} x {shape[1]} and {shape[2]} keys; pass "
            "flattened texts as one row, without a cache."
        )
    # what layers share is kept with the source, whose id it has
    kept: tuple[Any, ...] = once(
        memo,
        ("texts", id(source)),
        lambda: (source, _texts(structure, source, shape, by_lengths), {}),
    )
    texts = kept[1]
    if texts is None:
        return structure, memo
    return structure._replace(document=texts, key_padding=None), None if memo is None else kept[2]


def _texts(
    structure: Structure, source: Tensor, shape: tuple[int, int, int], by_lengths: bool
) -> Tensor | None:
    """Return which text every token is of, ``[1, keys]``; None if flash attention takes no note."""
    padding, compiling = structure.key_padding, torch.compiler.is_compiling()
    if padding is not None and (compiling or not padding.all()):
        return None
    places = torch.arange(shape[2], device=source.device)
    if by_lengths:
        return torch.searchsorted(source[1:].contiguous(), places, right=True)[None]
    if source.shape != (1, shape[1]) or shape[0] > 1 or shape[1] != shape[2]:
        return None
    first = source.min()
    if not compiling and torch.equal(source[0], places + first):
        return None
    return (source == first).cumsum(-1)
