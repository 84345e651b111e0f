"""How the work is cut: chunks of heads, blocks of rows."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from entropy_regularization.attention.blockwise.problem import Problem
from entropy_regularization.attention.masking import visible_blocks

# Elements of one score buffer: two of them should stay near the second-level cache.
SCRATCH_ELEMENTS = 800_000
ROWS, MOST_ROWS = ((512, 64), (1024, 96), (2048, 192)), 256  # (keys, rows of a block)
UNCUT, PIECE = 1024, 512  # more keys are cut in pieces
PIECE_SCORES = 4 * 256 * 512  # in a buffer, if keys are cut
ALL_AT_ONCE = 200_000  # scores of all heads: so few are one chunk, uncut
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
    batch, kv_heads, all_keys, dim = problem.key.shape
    rows, n_keys = _rows_and_keys(problem)
    if batch * kv_heads * problem.group * problem.query.shape[2] * all_keys <= ALL_AT_ONCE:
        # Low precision is widened a piece at a time.
        keys = n_keys if problem.query.dtype == problem.wide else min(n_keys, UNCUT)
        return Blocks(max(problem.query.shape[2], 1), max(batch, 1), max(kv_heads, 1), keys)
    stacked, keys = problem.group * rows, n_keys
    room = SCRATCH_ELEMENTS // max(stacked * keys, 1)
    if n_keys > UNCUT:
        keys = PIECE if 2 * stacked > MOST_ROWS else UNCUT
        room = min(PIECE_SCORES // stacked, SCRATCH_ELEMENTS // max(dim, 1)) // keys
    room = max(2, room)
    if room >= kv_heads:
        return Blocks(rows, min(max(room // kv_heads, 1), batch), kv_heads, keys)
    # An even share for every core, and no smaller chunk at the end.
    shares = [units for units in range(2, room + 1, 2) if kv_heads % units == 0]
    return Blocks(rows, 1, max(shares, default=room), keys)


def _rows_and_keys(problem: Problem) -> tuple[int, int]:
    """Return the rows of a block, and the most keys that they may see."""
    structure, group = problem.structure, problem.group
    n_queries, n_keys = problem.query.shape[2], problem.key.shape[2]
    window = n_keys
    if structure.left is not None and structure.right is not None:
        window = min(n_keys, max(structure.left + structure.right + 1, 0))
    # Keys are packed anew for every product: the more of them, the more rows must share that.
    rows = _rows_for(window)
    most = min(n_keys, window + rows)
    if structure.document is not None or structure.key_padding is not None:
        most = min(most, _widest(problem, rows))
        rows = min(rows, _rows_for(most))
    rows = max(MULTIPLE, rows // max(group, 1))
    if structure.right is None and group * n_queries * n_keys <= WHOLE_SCORES:
        rows = n_queries
    return even(n_queries, rows), most


def _rows_for(keys: int) -> int:
    return next((rows for most, rows in ROWS if keys <= most), MOST_ROWS)


def even(whole: int, part: int) -> int:
    """Return a number near ``part`` that cuts the whole without a small rest.

    A multiple of MULTIPLE, unless it is small, nothing is cut, or the rest would be small.
    """
    parts = max(1, round(whole / max(part, 1)))
    length = max(1, -(-whole // parts))
    rounded = -(-length // MULTIPLE) * MULTIPLE
    rest = whole % rounded
    if parts == 1 or length < 2 * MULTIPLE or 0 < rest < rounded // 4:
        return length
    return rounded


def _widest(problem: Problem, rows: int) -> int:
    """Return the most keys that a block of rows may see, by the values of the structure."""
    sizes = problem.query.shape[2], problem.key.shape[2]
    blocks = visible_blocks(problem.structure, rows, *sizes)
    return max([1, *(stop - start for start, stop in blocks)])


def chunks_of(problem: Problem, blocks: Blocks) -> Iterator[Chunk]:
    """Walk over (batch, key head) pairs, a chunk at a time."""
    batch, kv_heads = problem.key.shape[:2]
    for b in range(0, batch, blocks.batches):
        for h in range(0, kv_heads, blocks.heads):
            yield Chunk(
                slice(b, min(b + blocks.batches, batch)), slice(h, min(h + blocks.heads, kv_heads))
            )
