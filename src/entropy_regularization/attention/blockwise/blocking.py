"""How the work is cut: chunks of heads, blocks of rows."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from entropy_regularization.attention.blockwise.problem import Problem
from entropy_regularization.attention.masking import visible_keys

# Elements of one score buffer: two of them should stay near the second-level cache.
SCRATCH_ELEMENTS = 800_000
ROWS, MOST_ROWS = ((512, 64), (1024, 96), (2048, 192)), 256  # (keys, rows of a block)
UNCUT, PIECE, UNITS = 1024, 512, 4  # more keys are cut in pieces, of so many units at once
MULTIPLE = 16  # products are fastest at multiples of it
WHOLE_SCORES = 40_000  # of one head: a matrix so small is not cut, unless half of it is masked


class Chunk(NamedTuple):
    """Some key heads of some batch entries; they are multiplied in one batched product."""

    batches: slice
    heads: slice  # of keys; the query heads are group times as many

    def of(self, tensor: Tensor, group: int) -> Tensor:
        """Cut a ``[#batch, #query heads, ...]`` tensor to ``[#b, #h, group or 1, ...]``."""
        if tensor.shape[0] != 1:
            tensor = tensor[self.batches]
        if tensor.shape[1] == 1:
            return tensor[:, :, None]
        shape = (tensor.shape[0], tensor.shape[1] // group, group, *tensor.shape[2:])
        grouped = tensor.view(shape)
        return grouped[:, self.heads]

    def units(self, tensor: Tensor, group: int) -> Tensor:
        """Cut ``[batch, query heads, queries, dim]`` to ``[units, group, queries, dim]``."""
        return self.of(tensor, group).flatten(0, 1)


class Blocks(NamedTuple):
    """How the work is cut: rows in a block, (batch, key head) pairs in a chunk, keys in a piece."""

    rows: int
    batches: int
    heads: int
    keys: int


def choose_blocks(problem: Problem) -> Blocks:
    """Choose blocks that keep the score buffers near the cache and all cores busy (measured)."""
    batch, kv_heads, n_keys, _ = problem.key.shape
    n_queries, group = problem.query.shape[2], problem.group
    left, right = problem.structure.left, problem.structure.right
    window = n_keys if left is None or right is None else min(n_keys, max(left + right + 1, 0))
    # Keys are packed anew for every product: the more of them, the more rows must share that.
    rows = _rows_for(window)
    n_keys = min(n_keys, window + rows)
    if problem.structure.document is not None or problem.structure.key_padding is not None:
        n_keys = min(n_keys, _widest(problem, rows))
        rows = min(rows, _rows_for(n_keys))
    rows = max(16, rows // group)
    whole = group * n_queries * problem.key.shape[2]
    if right is None and whole <= WHOLE_SCORES:
        rows = n_queries
    rows = even(n_queries, rows)
    if batch * kv_heads * whole <= SCRATCH_ELEMENTS // 4:
        return Blocks(max(n_queries, 1), max(batch, 1), max(kv_heads, 1), n_keys)
    keys = n_keys if n_keys <= UNCUT else PIECE
    room = max(2, SCRATCH_ELEMENTS // max(group * rows * keys, 1))
    if keys < n_keys:
        room = min(room, UNITS)
    if room >= kv_heads:
        return Blocks(rows, min(max(room // kv_heads, 1), batch), kv_heads, keys)
    # An even share for every core, and no smaller chunk at the end.
    shares = [units for units in range(2, room + 1, 2) if kv_heads % units == 0]
    return Blocks(rows, 1, max(shares, default=room), keys)


def _rows_for(keys: int) -> int:
    return next((rows for most, rows in ROWS if keys <= most), MOST_ROWS)


def even(whole: int, part: int) -> int:
    """Return a number near ``part`` that cuts the whole without a small rest.

    A multiple of MULTIPLE, unless it is small or nothing is cut.
    """
    parts = max(1, round(whole / max(part, 1)))
    length = max(1, -(-whole // parts))
    return length if parts == 1 or length < 2 * MULTIPLE else -(-length // MULTIPLE) * MULTIPLE


def _widest(problem: Problem, rows: int) -> int:
    """Return the most keys that a block of rows may see, by the values of the structure."""
    n_queries, n_keys = problem.query.shape[2], problem.key.shape[2]
    widest = 1
    for row_start in range(0, n_queries, rows):
        row_stop = min(row_start + rows, n_queries)
        start, stop = visible_keys(problem.structure, row_start, row_stop, n_queries, n_keys)
        widest = max(widest, stop - start)
    return widest


def chunks_of(problem: Problem, blocks: Blocks) -> Iterator[Chunk]:
    """Walk over (batch, key head) pairs, a chunk at a time."""
    batch, kv_heads = problem.key.shape[:2]
    for b in range(0, batch, blocks.batches):
        for h in range(0, kv_heads, blocks.heads):
            yield Chunk(
                slice(b, min(b + blocks.batches, batch)), slice(h, min(h + blocks.heads, kv_heads))
            )
