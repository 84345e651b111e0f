"""Which keys a row may see, and how many; the only place that decides.

Queries are aligned with the *last* keys: query ``i`` of ``n_queries`` sits at key position
``i + n_keys - n_queries``, so that a decoding step sees the whole cache.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

SUM_OF_BYTES = 128  # ones whose sum is a byte


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

    @property
    def holds_tensors(self) -> bool:
        """Whether more than the limits left and right decides."""
        return any(tensor is not None for tensor in self[2:])

    def of_batches(self, batches: slice) -> "Structure":
        """Cut the batch dimension, where there is one that is not broadcast."""
        cut = [
            None if tensor is None else tensor if tensor.shape[0] == 1 else tensor[batches]
            for tensor in (self.allowed, self.key_padding, self.document)
        ]
        return Structure(self.left, self.right, *cut)

    def may_leave_rows_empty(self, n_queries: int, n_keys: int) -> bool:
        """Tell whether a row without any key is possible, from shapes alone."""
        plain = self.allowed is None and self.key_padding is None
        if self.document is not None:  # holds the row's own key; the limits may not
            plain = plain and min(self.left or 0, self.right or 0) >= 0
        # The first row stands at key position n_keys - n_queries, the last one at n_keys - 1.
        before = self.right is not None and n_keys - n_queries + self.right < 0
        behind = self.left is not None and self.left + min(self.right or 0, 0) < 0
        return not plain or n_keys == 0 or before or behind


Memo = dict[Any, Any]


def once(memo: Memo | None, what: Any, compute: Callable[[], Any]) -> Any:
    """Return what was computed for an earlier layer that was given the same mask, if any was.

    Which operations run must not depend on it where they are counted or traced: in compiled code,
    and under modes such as selective checkpointing, which finds saved results by their number.

    Args:
        memo: lives as long as the mask, of which nothing may change meanwhile; None computes.
        what: names what is computed, and all that it depends on but the mask.
        compute: computes it.
    """
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    if memo is None or traced:
        return compute()
    key = (what, torch.is_inference_mode_enabled())  # whose tensors cannot serve in training
    if key not in memo:
        memo[key] = compute()
    return memo[key]


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

    An additive mask forbids with -inf or with the lowest finite number of its dtype. NaN forbids
    nothing: it stays in the bias and makes its row NaN.
    """
    if mask.dtype == torch.bool:
        return mask, None
    forbidden = mask <= torch.finfo(mask.dtype).min / 2
    return ~forbidden, mask.masked_fill(forbidden, 0.0)


def visible_blocks(
    structure: Structure, rows: int, n_queries: int, n_keys: int
) -> list[tuple[int, int]]:
    """Return, for every block of ``rows`` rows, a half-open range of keys that holds all it sees.

    ``left`` and ``right`` bound it, padding at either end, and the first and last key of the
    documents of its rows. The last two read values of tensors.
    """
    blocks = [(start, min(start + rows, n_queries)) for start in range(0, n_queries, rows)]
    masks = [mask for mask in (structure.key_padding, structure.document) if mask is not None]
    if any(mask.numel() == 0 for mask in masks):
        ranges = [(0, 0) for _ in blocks]
    elif not masks:
        ranges = [_band_of_block(structure, *block, n_keys - n_queries, n_keys) for block in blocks]
    else:
        first, stop = _row_limits(structure, n_queries, n_keys)
        blind = first >= stop
        lowest = first.masked_fill(blind, n_keys).amin(0)
        highest = stop.masked_fill(blind, 0).amax(0)
        ranges = [(int(lowest[a:b].min()), int(highest[a:b].max())) for a, b in blocks]
    return [(first, stop) if first < stop else (0, 0) for first, stop in ranges]


def limits_and_ids(
    structure: Structure, n_queries: int, n_keys: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """Say all but ``allowed`` as a range of keys in every row, and ids if ranges are not enough.

    Returns:
        The limits (first, stop), ``[batch or 1, queries]``: a row sees no key but
        ``first <= j < stop``; and None if it sees all of these, else ids ``[batch or 1, queries]``
        and ``[batch or 1, keys]``: it sees those of its own id. All int64.
    """
    first, stop = _row_limits(structure, n_queries, n_keys)
    real, document = structure.key_padding, structure.document
    if real is None and document is None:
        return (first, stop), None
    counts = _count_in_limits(structure, None, n_queries, n_keys, first.device)
    if torch.equal(counts[:, 0], (stop - first).clamp(min=0)):
        return (first, stop), None
    if document is not None:
        of_key = _by_document(document)[2]
        of_row = of_key[:, n_keys - n_queries :]
    else:
        of_key, of_row = torch.zeros_like(first[:1, :1]), torch.zeros_like(first[:1])
    if real is not None:
        of_key = torch.where(real, of_key, -1)
    return (first, stop), (of_row, of_key)


def _band_of_block(
    structure: Structure, row_start: int, row_stop: int, offset: int, n_keys: int
) -> tuple[int, int]:
    """Return the range of keys that ``left`` and ``right`` leave to a block."""
    start = 0 if structure.left is None else max(0, row_start + offset - structure.left)
    stop = n_keys if structure.right is None else min(n_keys, row_stop + offset + structure.right)
    return start, stop


def _row_limits(structure: Structure, n_queries: int, n_keys: int) -> tuple[Tensor, Tensor]:
    """Return ``[batch, queries]`` limits (first, stop) outside which a row sees nothing."""
    given = structure.key_padding if structure.document is None else structure.document
    device = torch.device("cpu") if given is None else given.device
    first, stop = (limit[None] for limit in _band(structure, n_queries, n_keys, device))
    if structure.key_padding is not None:
        place = torch.arange(n_keys, device=device)
        real = structure.key_padding
        first = first.maximum(place.masked_fill(~real, n_keys).amin(1, keepdim=True))
        stop = stop.minimum((place + 1).masked_fill(~real, 0).amax(1, keepdim=True))
    if structure.document is not None:
        order, group, of_key = _by_document(structure.document)
        of_row = of_key[:, n_keys - n_queries :]
        lowest = torch.full_like(group, n_keys).scatter_reduce_(1, group, order, "amin")
        highest = torch.zeros_like(group).scatter_reduce_(1, group, order, "amax")
        first = first.maximum(lowest.gather(1, of_row))
        stop = stop.minimum(highest.gather(1, of_row) + 1)
    return first, stop


def _band(
    structure: Structure, n_queries: int, n_keys: int, device: torch.device
) -> tuple[Int[Tensor, " queries"], Int[Tensor, " queries"]]:
    """Return the limits (first, stop) that ``left`` and ``right`` set to every row."""
    offset = n_keys - n_queries

    def limit(shift: int) -> Tensor:
        start = offset + shift
        return torch.arange(start, start + n_queries, device=device).clamp(0, n_keys)

    left, right = structure.left, structure.right
    first = (
        torch.zeros(n_queries, dtype=torch.int64, device=device) if left is None else limit(-left)
    )
    if right is None:
        return first, torch.full_like(first, n_keys)
    stop = limit(right + 1)
    return first, stop if left is None else stop.maximum(first)


def _by_document(document: Int[Tensor, "#batch keys"]) -> tuple[Tensor, Tensor, Tensor]:
    """Number the documents from 0 in the order of their ids; all ``[batch, keys]``.

    Returns:
        The key positions, document after document; the documents of these; those of the keys as
        they stand.
    """
    ids, order = document.sort(dim=1, stable=True)
    group = torch.nn.functional.pad((ids[:, 1:] != ids[:, :-1]).cumsum(1), (1, 0))
    return order, group, torch.zeros_like(group).scatter(1, order, group)


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
    structure: Structure,
    n_queries: int,
    n_keys: int,
    device: torch.device,
    block: int | None = None,
) -> Int[Tensor, "#batch #heads queries"]:
    """Count the keys of every row, ``n_i``; ``log n_i`` is the most entropy the row can have.

    By prefix sums, except for a dense ``allowed``, which is counted a block of rows at a time.
    """
    allowed = structure.allowed
    if allowed is None:
        return _count_in_limits(structure, None, n_queries, n_keys, device)
    if allowed.shape[3] == 1:
        counts = _count_in_limits(structure, None, n_queries, n_keys, device)
        return counts * allowed[..., 0]
    if allowed.shape[2] == 1:
        return _count_in_limits(structure, allowed[:, :, 0], n_queries, n_keys, device)
    if torch.compiler.is_compiling():  # at once: steps would fix the length in a graph
        whole = tile_allowed(structure, Tile(0, n_queries, 0, n_keys), n_queries, n_keys, device)
        assert whole is not None
        return whole.sum(-1)
    parts = []
    if block is None:
        block = _rows_counted_at_once(structure, allowed, n_keys, device)
    for row_start in range(0, n_queries, block):
        tile = Tile(row_start, min(row_start + block, n_queries), 0, n_keys)
        inside = tile_allowed(structure, tile, n_queries, n_keys, device)
        assert inside is not None
        parts.append(_count_true(inside))
    if not parts:
        return torch.zeros(1, 1, 0, dtype=torch.int64, device=device)
    return torch.cat(parts, dim=-1)


def _rows_counted_at_once(
    structure: Structure, allowed: Tensor, n_keys: int, device: torch.device
) -> int:
    """Return how many rows of a dense mask make a step of about a million entries."""
    masks = (structure.key_padding, structure.document)
    batch = max([allowed.shape[0], *(mask.shape[0] for mask in masks if mask is not None)])
    entries = 2**20 if device.type == "cpu" else 2**26  # elsewhere each step is a few launches
    return max(1, entries // max(1, batch * allowed.shape[1] * n_keys))


def _count_true(
    mask: Bool[Tensor, "batch heads rows keys"],
) -> Int[Tensor, "batch heads rows"]:
    """Count along the last dimension, first in bytes: a CPU makes integers of all that it sums."""
    whole = mask.shape[-1] // SUM_OF_BYTES
    cut = whole * SUM_OF_BYTES
    ones = mask.to(torch.uint8)  # a view in torch 2.11 is not mapped by vmap
    parts: Tensor = ones[..., :cut].unflatten(-1, (whole, SUM_OF_BYTES))
    sums = parts.sum(-1, dtype=torch.uint8)
    return sums.sum(-1) + ones[..., cut:].sum(-1, dtype=torch.uint8)


def _count_in_limits(
    structure: Structure,
    real: Bool[Tensor, "#batch #heads keys"] | None,
    n_queries: int,
    n_keys: int,
    device: torch.device,
) -> Int[Tensor, "#batch #heads queries"]:
    """Count ``real`` keys (all, if None) within limits, padding and documents."""
    first, stop = (limit[None] for limit in _band(structure, n_queries, n_keys, device))
    if structure.key_padding is not None:
        padding = structure.key_padding[:, None]
        real = padding if real is None else real & padding
    if structure.document is not None:
        # Keys ordered by document, then position: what a row may see are neighbours there.
        order, group, of_key = _by_document(structure.document)
        place = (group * (n_keys + 1) + order).contiguous()
        start = of_key[:, n_keys - n_queries :] * (n_keys + 1)
        first, stop = (torch.searchsorted(place, start + limit) for limit in (first, stop))
        if real is not None:
            shape = torch.broadcast_shapes(real.shape, order[:, None].shape)
            real = real.expand(shape).gather(2, order[:, None].expand(shape))
    if real is None:
        from_start = structure.left is None and structure.document is None
        return (stop if from_start else stop - first)[:, None]
    before = torch.nn.functional.pad(real.to(torch.int64), (1, 0)).cumsum(-1)
    shape = torch.broadcast_shapes((*before.shape[:2], 1), (first.shape[0], 1, n_queries))
    before = before.expand(*shape[:2], -1)
    left_out, counted = (before.gather(2, each[:, None].expand(shape)) for each in (first, stop))
    return counted - left_out
