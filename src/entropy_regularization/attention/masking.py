"""Which keys a row may see, and how many; the only place that decides.

Queries are aligned with the *last* keys: query ``i`` of ``n_queries`` sits at key position
``i + n_keys - n_queries``, so that a decoding step sees the whole cache.
"""

from collections.abc import Iterator
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
    key_padding: Bool[Tensor, "#batch keys"] | None = None
    document: Int[Tensor, "#batch keys"] | None = None

    def of_batches(self, batches: slice) -> "Structure":
        """Cut the batch dimension, where there is one that is not broadcast."""
        cut = [
            None if tensor is None else tensor if tensor.shape[0] == 1 else tensor[batches]
            for tensor in (self.allowed, self.key_padding, self.document)
        ]
        return Structure(self.left, self.right, *cut)

    def may_leave_rows_empty(self, n_queries: int, n_keys: int) -> bool:
        """Tell whether a row without any key is possible, from shapes alone."""
        plain = self.allowed is None and self.key_padding is None and self.document is None
        # The first row stands at key position n_keys - n_queries, the last one at n_keys - 1.
        before = self.right is not None and n_keys - n_queries + self.right < 0
        behind = self.left is not None and self.left + min(self.right or 0, 0) < 0
        return not plain or n_keys == 0 or before or behind


class Tile(NamedTuple):
    """A rectangle of the score matrix: rows ``[row_start, row_stop)``, likewise keys."""

    row_start: int
    row_stop: int
    key_start: int
    key_stop: int

    def crop(self, tensor: Tensor) -> Tensor:
        """Cut the last two dimensions of a tensor; one that is broadcast stays as it is."""
        if tensor.shape[-2] != 1:
            tensor = tensor[..., self.row_start : self.row_stop, :]
        if tensor.shape[-1] != 1:
            tensor = tensor[..., self.key_start : self.key_stop]
        return tensor


def split_mask(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split a dense mask into (allowed, additive bias or None).

    An additive mask forbids with -inf or with the lowest finite number of its dtype.
    """
    if mask.dtype == torch.bool:
        return mask, None
    allowed = mask > torch.finfo(mask.dtype).min / 2
    return allowed, mask.masked_fill(~allowed, 0.0)


def visible_keys(
    structure: Structure, row_start: int, row_stop: int, n_queries: int, n_keys: int
) -> tuple[int, int]:
    """Return a half-open range of keys outside which no row of a block sees anything.

    ``left`` and ``right`` bound it, then padding at either end, then the documents of the rows.
    The last two read values of tensors.
    """
    offset = n_keys - n_queries
    start = 0 if structure.left is None else max(0, row_start + offset - structure.left)
    stop = n_keys if structure.right is None else min(n_keys, row_stop + offset + structure.right)
    if start >= stop:
        return 0, 0
    seen = None
    if structure.key_padding is not None:
        seen = structure.key_padding[:, start:stop].any(0)
    if structure.document is not None:
        rows = structure.document[:, row_start + offset : row_stop + offset]
        keys = structure.document[:, start:stop]
        lowest, highest = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        near = ((keys >= lowest) & (keys <= highest)).any(0)
        seen = near if seen is None else seen & near
    if seen is None:
        return start, stop
    places = seen.nonzero()
    if not len(places):
        return 0, 0
    return start + int(places[0]), start + int(places[-1]) + 1


def sees_all(structure: Structure, tile: Tile, n_queries: int, n_keys: int) -> bool:
    """Tell whether padding and documents leave a tile whole; reads values of tensors.

    ``left`` and ``right`` are the business of edge_masks.
    """
    if structure.allowed is not None:
        return False
    keys = slice(tile.key_start, tile.key_stop)
    if structure.key_padding is not None and not structure.key_padding[:, keys].all():
        return False
    if structure.document is None:
        return True
    offset = n_keys - n_queries
    rows = structure.document[:, tile.row_start + offset : tile.row_stop + offset]
    first = rows[:, :1]
    return bool((rows == first).all()) and bool((structure.document[:, keys] == first).all())


def edge_masks(
    structure: Structure, tile: Tile, n_queries: int, n_keys: int, device: torch.device
) -> Iterator[tuple[slice, Bool[Tensor, "rows edge"]]]:
    """Walk over the columns of a tile that ``left`` or ``right`` cuts, with True where it does.

    A causal tile is cut only near the diagonal; the rest of it needs no mask.
    """
    row_start, row_stop, key_start, key_stop = tile
    position = torch.arange(row_start, row_stop, device=device)[:, None] + n_keys - n_queries
    first, last = row_start + n_keys - n_queries, row_stop - 1 + n_keys - n_queries
    if structure.left is not None and last - structure.left > key_start:
        stop = min(last - structure.left, key_stop)
        key = torch.arange(key_start, stop, device=device)
        yield slice(0, stop - key_start), key < position - structure.left
    if structure.right is not None and first + structure.right + 1 < key_stop:
        start = max(first + structure.right + 1, key_start)
        key = torch.arange(start, key_stop, device=device)
        yield slice(start - key_start, key_stop - key_start), key > position + structure.right


def tile_allowed(
    structure: Structure, tile: Tile, n_queries: int, n_keys: int, device: torch.device
) -> Bool[Tensor, "#batch #heads #rows #tile_keys"] | None:
    """Return which scores of a tile count, or None where all of them do."""
    row_start, row_stop, key_start, key_stop = tile
    offset = n_keys - n_queries
    parts: list[Tensor] = []
    if structure.left is not None or structure.right is not None:
        inside = torch.ones(
            row_stop - row_start, key_stop - key_start, dtype=torch.bool, device=device
        )
        for columns, outside in edge_masks(structure, tile, n_queries, n_keys, device):
            inside[:, columns] &= ~outside
        parts.append(inside[None, None])
    if structure.allowed is not None:
        parts.append(tile.crop(structure.allowed))
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


def count_allowed_keys(
    structure: Structure, n_queries: int, n_keys: int, device: torch.device, block: int = 128
) -> Int[Tensor, "#batch #heads queries"]:
    """Count the keys of every row, ``n_i``; ``log n_i`` is the most entropy the row can have.

    Closed form for ``left``, ``right`` and ``key_padding`` (prefix sums); documents and a dense
    ``allowed`` are counted a block of rows at a time.
    """
    if structure.allowed is None and structure.document is None:
        return _count_in_band(structure, n_queries, n_keys, device)
    if torch.compiler.is_compiling() and structure.document is None:
        # at once: steps would fix the length in a graph, and what is dense is there already
        whole = tile_allowed(structure, Tile(0, n_queries, 0, n_keys), n_queries, n_keys, device)
        assert whole is not None
        return whole.expand(*whole.shape[:2], n_queries, n_keys).sum(-1)
    # Only the keys that a block may see; to find them reads values, which a graph cannot, and
    # which would wait for a GPU.
    cut = device.type == "cpu" and not torch.compiler.is_compiling()
    counts = []
    for row_start in range(0, n_queries, block):
        row_stop = min(row_start + block, n_queries)
        keys = (0, n_keys)
        if cut:
            keys = visible_keys(structure, row_start, row_stop, n_queries, n_keys)
        tile = Tile(row_start, row_stop, *keys)
        allowed = tile_allowed(structure, tile, n_queries, n_keys, device)
        assert allowed is not None
        shape = (*allowed.shape[:2], row_stop - row_start, keys[1] - keys[0])
        counts.append(allowed.expand(shape).sum(-1))
    if not counts:
        return torch.zeros(1, 1, 0, dtype=torch.int64, device=device)
    return torch.cat(counts, dim=-1)


def _count_in_band(
    structure: Structure, n_queries: int, n_keys: int, device: torch.device
) -> Int[Tensor, "#batch 1 queries"]:
    """Count real keys between the left and right limit of each row."""
    position = torch.arange(n_queries, device=device) + n_keys - n_queries
    start = torch.zeros_like(position)
    stop = torch.full_like(position, n_keys)
    if structure.left is not None:
        start = (position - structure.left).clamp(0, n_keys)
    if structure.right is not None:
        stop = (position + structure.right + 1).clamp(0, n_keys)
    if structure.key_padding is None:
        return (stop - start).clamp(min=0)[None, None]
    padded = torch.nn.functional.pad(structure.key_padding.to(torch.int64), (1, 0))
    before = padded.cumsum(-1)  # real keys before each position
    return (before[:, stop.clamp(min=0)] - before[:, start]).clamp(min=0)[:, None]
