"""Which keys rows and blocks of them see, and how the work is cut by that."""

import functools
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from entropy_regularization.attention.masking import Structure, limits_and_ids

MULTIPLE = 16  # products are fastest at multiples of it; kernel.cpp counts on it
NARROW = 512  # rows that see more keys are wide
# Measured; docs/attention.md has what other sizes gave.
ROWS = 64  # of a block
ROWS_OF_NARROW_BAND = 32  # fewer, because a block computes all that any of its rows sees
STRIPE_OF_WIDE, STRIPE_OF_NARROW = 384, 2048


class Cut(NamedTuple):
    """The limits of rows, and sizes of blocks, stripes and tiles."""

    rows: int  # of a block, of each query head
    stripe: int  # keys that stay in the cache while the blocks pass by
    tile: int  # keys that meet a block at once
    of_rows: tuple[Int[Tensor, "#batch queries"], Int[Tensor, "#batch queries"]]
    of_blocks: tuple[Int[Tensor, "#batch blocks"], Int[Tensor, "#batch blocks"]]
    ids: tuple[Int[Tensor, "#batch queries"], Int[Tensor, "#batch keys"]] | None


def cut(structure: Structure, n_queries: int, n_keys: int, group: int) -> Cut:
    """Cut a problem whose structure has no ``allowed``; ``group`` query heads share a key head."""
    if structure.key_padding is None and structure.document is None:
        return _cut_band(structure, n_queries, n_keys, group)
    return _cut(structure, n_queries, n_keys, group)


def _cut(structure: Structure, n_queries: int, n_keys: int, group: int) -> Cut:
    (first, stop), ids = limits_and_ids(structure, n_queries, n_keys)
    most = max(1, int((stop - first).max()))
    narrow = most <= NARROW
    slanted = structure.left is not None or structure.right is not None
    near = ROWS_OF_NARROW_BAND if narrow and slanted else ROWS
    stacked = _parts(n_queries, max(1, round(n_queries / near)))  # no small rest
    rows = _parts(stacked, group)
    stripe = min(STRIPE_OF_NARROW if narrow else STRIPE_OF_WIDE, _multiple(n_keys))
    # A block's range begins and ends at multiples.
    tile = min(stripe, _multiple(most + rows + 2 * MULTIPLE)) if narrow else stripe
    return Cut(rows, stripe, tile, (first, stop), _hulls(first, stop, rows, n_keys), ids)


_cut_band = functools.lru_cache(maxsize=8)(_cut)  # no tensor there that could change


def _hulls(first: Tensor, stop: Tensor, rows: int, n_keys: int) -> tuple[Tensor, Tensor]:
    """Return limits of blocks outside which none of their rows sees a key.

    They are multiples, but not outside the limits of all rows: what is there may be anything.
    """
    blind = first >= stop
    short = -first.shape[1] % rows
    given = ((first.masked_fill(blind, n_keys), n_keys), (stop.masked_fill(blind, 0), 0))
    lows, highs = (
        torch.nn.functional.pad(limit, (0, short), value=none).unflatten(1, (-1, rows))
        for limit, none in given
    )
    lowest, highest = lows.amin(2), highs.amax(2)
    down = lowest - lowest % MULTIPLE
    up = highest + -highest % MULTIPLE
    sees = lowest < highest
    return (
        torch.where(sees, down.maximum(lowest.amin(1, keepdim=True)), lowest),
        torch.where(sees, up.minimum(highest.amax(1, keepdim=True)), highest),
    )


def _parts(whole: int, part: int) -> int:
    return -(-whole // part)


def _multiple(count: int) -> int:
    """Round up to a multiple of MULTIPLE."""
    return _parts(count, MULTIPLE) * MULTIPLE
