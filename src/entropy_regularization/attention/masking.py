"""Which keys a row may see, and how many; the only place that decides.

Queries are aligned with the *last* keys: query ``i`` of ``n_queries`` sits at key position
``i + n_keys - n_queries``, so that a decoding step sees the whole cache.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Structure(NamedTuple):
    """Everything that decides which keys a row may see.

    Attributes:
        left: keys a row may look back from its own position; None for no limit.
        right: keys a row may look ahead from its own position; None for no limit, 0 for causal.
        allowed: True where a query may attend to a key, broadcastable to
            ``[batch, heads, queries, keys]``.
        key_padding: ``[batch, keys]``, True for a real token.
        document: ``[batch, keys]`` ids; a query sees only the keys of its own document.
    """

    left: int | None = None
    right: int | None = None
    allowed: Bool[Tensor, "#batch #heads #queries #keys"] | None = None
    key_padding: Bool[Tensor, "batch keys"] | None = None
    document: Int[Tensor, "batch keys"] | None = None


class Tile(NamedTuple):
    """A rectangle of the score matrix: rows ``[row_start, row_stop)``, likewise keys."""

    row_start: int
    row_stop: int
    key_start: int
    key_stop: int


def visible_keys(
    structure: Structure, row_start: int, row_stop: int, n_queries: int, n_keys: int
) -> tuple[int, int]:
    """Return the half-open range of keys that ``left`` and ``right`` leave to a block of rows."""
    offset = n_keys - n_queries
    start = 0 if structure.left is None else max(0, row_start + offset - structure.left)
    stop = n_keys if structure.right is None else min(n_keys, row_stop + offset + structure.right)
    return min(start, n_keys), max(stop, min(start, n_keys))


def tile_allowed(
    structure: Structure, tile: Tile, n_queries: int, n_keys: int, device: torch.device
) -> Bool[Tensor, "#batch #heads #rows #tile_keys"] | None:
    """Return which scores of a tile count, or None where all of them do."""
    row_start, row_stop, key_start, key_stop = tile
    offset = n_keys - n_queries
    parts: list[Tensor] = []
    # The last row of the tile looks back least, the first row looks ahead least.
    left_cuts = (
        structure.left is not None and row_stop - 1 + offset - structure.left > key_start
    )
    right_cuts = (
        structure.right is not None and row_start + offset + structure.right < key_stop - 1
    )
    if left_cuts or right_cuts:
        position = torch.arange(row_start, row_stop, device=device)[:, None] + offset
        key = torch.arange(key_start, key_stop, device=device)[None, :]
        if left_cuts:
            parts.append((key >= position - structure.left)[None, None])
        if right_cuts:
            parts.append((key <= position + structure.right)[None, None])
    if structure.allowed is not None:
        parts.append(_crop(structure.allowed, tile))
    if structure.key_padding is not None:
        parts.append(structure.key_padding[:, None, None, key_start:key_stop])
    if structure.document is not None:
        rows = structure.document[:, None, row_start + offset : row_stop + offset, None]
        parts.append(rows == structure.document[:, None, None, key_start:key_stop])
    if not parts:
        return None
    result = parts[0]
    for part in parts[1:]:
        result = result & part
    return result


def _crop(tensor: Tensor, tile: Tile) -> Tensor:
    """Cut a tile out of a tensor whose row or key dimension may be broadcast."""
    if tensor.shape[-2] != 1:
        tensor = tensor[..., tile.row_start : tile.row_stop, :]
    if tensor.shape[-1] != 1:
        tensor = tensor[..., tile.key_start : tile.key_stop]
    return tensor


def count_allowed_keys(
    structure: Structure, n_queries: int, n_keys: int, device: torch.device, block: int = 256
) -> Int[Tensor, "#batch #heads queries"]:
    """Count the keys of every row, ``n_i``; ``log n_i`` is the most entropy the row can have."""
    counts = []
    for row_start in range(0, n_queries, block):
        row_stop = min(row_start + block, n_queries)
        tile = Tile(row_start, row_stop, 0, n_keys)
        allowed = tile_allowed(structure, tile, n_queries, n_keys, device)
        if allowed is None:
            counts.append(torch.full((1, 1, row_stop - row_start), n_keys, device=device))
        else:
            rows = allowed.expand(*allowed.shape[:2], row_stop - row_start, n_keys)
            counts.append(rows.sum(-1))
    if not counts:
        return torch.zeros(1, 1, 0, dtype=torch.int64, device=device)
    return torch.cat(counts, dim=-1)
