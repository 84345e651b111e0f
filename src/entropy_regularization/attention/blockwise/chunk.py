"""One chunk of a problem: its scores, its masks and the scratch buffers that it lives in."""

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from entropy_regularization.attention.blockwise.blocking import (
    MULTIPLE,
    Blocks,
    Chunk,
    even,
)
from entropy_regularization.attention.blockwise.problem import LOG2_E, MASKED_SCORE, Problem
from entropy_regularization.attention.masking import (
    Structure,
    Tile,
    edge_masks,
    sees_all,
    tile_allowed,
    visible_blocks,
)

# Scratch buffers up to this size stay for the next call.
KEPT_BYTES = 32 * 2**20
# Keys and values of a chunk in low precision: more of them are widened a piece at a time, because
# the buffers would not stay.
WIDENED_AT_ONCE = 2**22

Fences = list[tuple[int, Tensor]]  # first column in a tile, and what bounds scores from there on


class Scratch:
    """Buffers that every block of rows reuses, and on a CPU every call.

    A buffer is made once for the largest block. Fresh memory is dear: its page faults took 6 of the
    42 ms of a forward and backward over [1, 12, 1024, 64].
    """

    _spare: ClassVar[list[dict[str, Tensor]]] = []  # what the last call on a CPU has left

    def __init__(self, problem: Problem, blocks: Blocks) -> None:
        self._like, self.dtype = problem.query, problem.wide
        units = min(blocks.batches * blocks.heads, problem.key.shape[0] * problem.key.shape[1])
        widest = max(problem.key.shape[-1], problem.value.shape[-1])
        scores = units * problem.group * blocks.rows * blocks.keys
        product = units * max(blocks.keys, problem.group * blocks.rows) * widest
        names = ("score", "probability", "capped", "keep", "d_weights")
        self._rooms = {"product": product, **dict.fromkeys(names, scores)}
        self._rooms |= dict.fromkeys(("key", "value"), units * blocks.keys * widest)
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._fences: dict[tuple[int, ...], Fences] = {}

    def __enter__(self) -> "Scratch":
        """Take over the buffers of an earlier call."""
        if self._like.device.type == "cpu" and self._spare:
            self._buffers = self._spare.pop()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the buffers to the next call, the smaller ones if all are too large."""
        if self._like.device.type != "cpu" or self._spare:
            return
        kept, size = {}, 0
        for name, buffer in sorted(self._buffers.items(), key=lambda item: item[1].nbytes):
            size += buffer.nbytes
            if size > KEPT_BYTES:
                break
            kept[name] = buffer
        if kept:
            self._spare.append(kept)

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a contiguous, uninitialised tensor that lives until the name is taken again."""
        view = self._views.get((name, shape))
        if view is not None:
            return view
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != self.dtype:
            room = max(size, self._rooms.get(name, 0))
            with torch.inference_mode(False):  # the next call may need a gradient
                buffer = torch.empty(room, dtype=self.dtype, device=self._like.device)
            self._buffers[name] = buffer
            self._views = {place: view for place, view in self._views.items() if place[0] != name}
        view = self._views[name, shape] = buffer[:size].view(shape)
        return view

    def fences(self, structure: Structure, tile: Tile, n_queries: int, n_keys: int) -> Fences:
        """Return edge_masks as upper bounds; tiles that lie alike on the diagonal share them."""
        if structure.left is None and structure.right is None:
            return []
        rows, keys = tile.row_stop - tile.row_start, tile.key_stop - tile.key_start
        first = 0
        if structure.left is None and structure.right is not None:
            # Causal: only the columns near the diagonal are cut, wherever the block begins.
            inside = tile.row_start + n_keys - n_queries + structure.right + 1 - tile.key_start
            first = min(max(inside, 0), keys)
        if first == keys:
            return []
        place = (rows, keys - first, tile.row_start - tile.key_start - first)
        if place not in self._fences:
            masks = edge_masks(structure, tile, n_queries, n_keys, self._like.device)
            self._fences[place] = [
                (columns.start - first, self._bounds(outside)) for columns, outside in masks
            ]
        return [(first + column, fence) for column, fence in self._fences[place]]

    def _bounds(self, outside: Tensor) -> Tensor:
        """Return MASKED_SCORE outside, no bound elsewhere."""
        free = torch.full(outside.shape, torch.inf, dtype=self.dtype, device=outside.device)
        return free.masked_fill_(outside, MASKED_SCORE)


class ChunkView:
    """One chunk of a problem, ready to multiply, with its blocks of rows."""

    def __init__(self, problem: Problem, chunk: Chunk, blocks: Blocks, scratch: Scratch) -> None:
        self.problem, self.chunk, self.scratch = problem, chunk, scratch
        self.structure = problem.structure.of_batches(chunk.batches)
        inner = self.structure._replace(left=None, right=None)
        self.inner = None if inner == Structure() else inner  # what no edge of a tile says
        self.rows_in_block, self.keys_in_piece = blocks.rows, blocks.keys
        key, value = (each[chunk.batches, chunk.heads] for each in (problem.key, problem.value))
        self.shape = (*key.shape[:2], problem.group)
        self.alone = blocks.rows >= problem.query.shape[2]  # one block holds all rows
        if not self.alone and key.numel() + value.numel() <= WIDENED_AT_ONCE:
            key, value = self.widen("key", key), self.widen("value", value)
        self.key, self.value = key.flatten(0, 1), value.flatten(0, 1)  # [units, keys, dim]
        self.bias = None if problem.bias is None else chunk.of(problem.bias, problem.group)

    def widen(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor in the dtype of scores, in a scratch buffer if it is not yet."""
        if tensor.dtype == self.scratch.dtype:
            return tensor
        return self.scratch.take(name, *tensor.shape).copy_(tensor)

    def by_unit(self, tensor: Tensor) -> Tensor:
        """Cut ``[batch, query heads, queries, dim]`` to ``[units, group, queries, dim]``."""
        return self.chunk.units(tensor, self.problem.group)

    def by_key(self, tensor: Tensor | None) -> Tensor | None:
        """Cut ``[batch, key heads, keys, dim]`` to ``[units, keys, dim]``; a view.

        A chunk is either whole batch entries or some heads of one.
        """
        if tensor is None:
            return None
        return tensor[self.chunk.batches, self.chunk.heads].flatten(0, 1)

    def zeros_for(self, name: str, cut: Tensor | None) -> Tensor | None:
        """Return zeros to sum a result in, wide scratch if it is in low precision.

        One block that is alone sums nothing: it writes, into the result itself.
        """
        if cut is None:
            return None
        itself = self.alone or cut.dtype == self.problem.wide
        return (cut if itself else self.scratch.take(name, *cut.shape)).zero_()

    def tiles(self) -> Iterator[Tile]:
        """Walk over the blocks of rows, each with the keys that any of its rows may see."""
        n_queries, n_keys = self.problem.query.shape[2], self.problem.key.shape[2]
        blocks = visible_blocks(self.structure, self.rows_in_block, n_queries, n_keys)
        lowest = blocks[0][0] if blocks else 0
        for place, (first, last) in enumerate(blocks):
            start = place * self.rows_in_block
            if self.inner is None and first < last:
                # The edge of the window masks what this adds: keys that rows before have seen.
                first = max(first - first % MULTIPLE, lowest)
            yield Tile(start, min(start + self.rows_in_block, n_queries), first, last)

    def pieces(self, tile: Tile) -> Iterator[Tile]:
        """Cut the keys of a tile into pieces whose scores stay in the cache."""
        keys = tile.key_stop - tile.key_start
        if keys <= self.keys_in_piece:
            yield tile
            return
        width = even(keys, self.keys_in_piece)
        for start in range(tile.key_start, tile.key_stop, width):
            yield tile._replace(key_start=start, key_stop=min(start + width, tile.key_stop))

    def targets(self, cut: Tensor) -> tuple[Tensor, ...]:
        """Split ``[units, group, queries, dim]`` into ``[units, group, rows, dim]`` blocks."""
        blocks: tuple[Tensor, ...] = cut.split(self.rows_in_block, dim=2)
        return blocks

    def sources(self, name: str, cut: Tensor) -> Iterator[Tensor]:
        """Walk over ``[units, group rows, dim]`` blocks of ``[units, group, queries, dim]``."""
        for block in cut.split(self.rows_in_block, dim=2):
            yield self.widen(name, block).flatten(1, 2)

    def keys_and_values(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Return a tile's ``[units, keys, dim]`` in the dtype of scores."""
        keys = tile.key_start, tile.key_stop - tile.key_start
        key, value = self.key.narrow(1, *keys), self.value.narrow(1, *keys)
        return self.widen("key", key), self.widen("value", value)

    def scores(self, tile: Tile, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return scores in base 2, not masked, and their tanh if capped: ``[units, rows, keys]``.

        Args:
            tile: the block of rows and its keys.
            query: ``[units, group rows, dim]``.
            key: ``[units, keys, dim]``.
        """
        problem = self.problem
        score = self.scratch.take("score", *query.shape[:2], key.shape[1])
        factor = problem.scale * (LOG2_E if problem.softcap is None else 1.0 / problem.softcap)
        score.baddbmm_(query, key.transpose(1, 2), beta=0, alpha=factor)
        capped = None
        if problem.softcap is not None:
            capped = self.scratch.take("capped", *score.shape)
            torch.tanh(score, out=capped)
            torch.mul(capped, problem.softcap * LOG2_E, out=score)
        if self.bias is not None:
            self.per_head(score, tile).add_(tile.crop(self.bias), alpha=LOG2_E)
            score.clamp_(min=MASKED_SCORE)  # -inf in a bias masks its key
        return score, capped

    def per_head(self, score: Tensor, tile: Tile) -> Tensor:
        """View ``[units, group rows, keys]`` as ``[b, h, group, rows, keys]``."""
        return score.view(*self.shape, tile.row_stop - tile.row_start, score.shape[-1])

    def mask(self, score: Tensor, tile: Tile) -> None:
        """Bring the scores of keys that are not allowed to MASKED_SCORE, below all others."""
        problem = self.problem
        sizes = problem.query.shape[2], problem.key.shape[2]
        heads = score.view(-1, tile.row_stop - tile.row_start, score.shape[-1])
        for column, fence in self.scratch.fences(self.structure, tile, *sizes):
            # It takes a fifth of the time of masked_fill_, as an addition does, which would leave
            # a key at 1e22 above the others.
            heads.narrow(2, column, fence.shape[-1]).clamp_(max=fence)
        if self.inner is None or sees_all(self.inner, tile, *sizes):
            return
        allowed = tile_allowed(self.inner, tile, *sizes, score.device)
        if allowed is not None:
            everyone = self.chunk._replace(batches=slice(None))
            masked = ~everyone.of(allowed, problem.group)
            self.per_head(score, tile).masked_fill_(masked, MASKED_SCORE)

    def keep(self, tile: Tile, like: Tensor) -> Tensor | None:
        """Draw the dropout factors of a tile: 0 or 1/(1-rate), the same in forward and backward."""
        problem = self.problem
        if problem.seed is None:
            return None
        where = (self.chunk.batches.start, self.chunk.heads.start, tile.row_start, tile.key_start)
        seed = hash((int(problem.seed.item()), *where)) & 0x7FFF_FFFF_FFFF_FFFF
        generator = torch.Generator(like.device).manual_seed(seed)
        keep = self.scratch.take("keep", *like.shape)
        keep.bernoulli_(1.0 - problem.dropout, generator=generator)
        return keep.div_(1.0 - problem.dropout)
