"""Which tiles padding and documents leave out, and which whole: bounds by tile, on the device."""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from entropy_regularization.attention.masking import Structure
from entropy_regularization.attention.triton.tiles import Tiles


class Bounds(NamedTuple):
    """The bounds of the tiles of three kernels; None where a kernel computes them by itself."""

    forward: Tensor | None = None
    query_gradient: Tensor | None = None
    key_gradients: Tensor | None = None


def visible_keys(
    structure: Structure, batch: int, n_queries: int, n_keys: int, tiles: Tiles
) -> Int[Tensor, "batch row_tiles 4"] | None:
    """Bound the keys that each tile of rows sees, as far as padding and documents go.

    Four positions (start, whole start, whole stop, stop): nothing is seen outside ``[start,
    stop)``, and all is seen by all within ``[whole start, whole stop)``. None without padding and
    documents. Stays on the device: no value is read.
    """
    found = _tiles_seen(structure, n_queries, n_keys, tiles)
    if found is None:
        return None
    seen, whole = found
    return _bounds(seen, whole, tiles.keys).expand(batch, -1, -1).contiguous()


def visible_rows(
    structure: Structure, batch: int, n_queries: int, n_keys: int, tiles: Tiles
) -> Int[Tensor, "batch key_tiles 4"] | None:
    """Bound the rows that see each tile of keys, as visible_keys does."""
    found = _tiles_seen(structure, n_queries, n_keys, tiles)
    if found is None:
        return None
    seen, whole = found
    return _bounds(seen.mT, whole.mT, tiles.rows).expand(batch, -1, -1).contiguous()


def _tiles_seen(
    structure: Structure, n_queries: int, n_keys: int, tiles: Tiles
) -> tuple[Tensor, Tensor] | None:
    """Tell, ``[batch or 1, row tiles, key tiles]``, which tiles may be seen, and which whole."""
    padding, document = structure.key_padding, structure.document
    if padding is None and document is None:
        return None
    row_tiles, key_tiles = -(-n_queries // tiles.rows), -(-n_keys // tiles.keys)
    given = document if document is not None else padding
    assert given is not None
    seen = torch.ones(1, row_tiles, key_tiles, dtype=torch.bool, device=given.device)
    whole = seen
    if padding is not None:
        seen = seen & _tiles_of(padding, tiles.keys, False).any(-1)[:, None]
        whole = whole & _tiles_of(padding, tiles.keys, True).all(-1)[:, None]
    if document is not None:
        ids = document.to(torch.int64)
        lowest, highest = torch.iinfo(ids.dtype).min, torch.iinfo(ids.dtype).max
        rows = ids[:, n_keys - n_queries :]
        row_least = _tiles_of(rows, tiles.rows, highest).amin(-1)[:, :, None]
        row_most = _tiles_of(rows, tiles.rows, lowest).amax(-1)[:, :, None]
        key_least = _tiles_of(ids, tiles.keys, highest).amin(-1)[:, None]
        key_most = _tiles_of(ids, tiles.keys, lowest).amax(-1)[:, None]
        seen = seen & (row_least <= key_most) & (key_least <= row_most)
        one = (row_least == row_most) & (key_least == key_most)
        whole = whole & one & (row_least == key_least)
    return seen, whole


def _tiles_of(positions: Tensor, length: int, fill: int) -> Tensor:
    """Cut ``[batch, positions]`` into ``[batch, tiles, length]``."""
    batch, n = positions.shape
    tiles = -(-n // length)
    # not functional.pad, which takes the number through a double: 2^63 - 1 becomes -2^63
    rest = positions.new_full((batch, tiles * length - n), fill)
    return torch.cat((positions, rest), 1).view(batch, tiles, length)


def _bounds(seen: Tensor, whole: Tensor, length: int) -> Tensor:
    """Return (start, whole start, whole stop, stop) of the last dimension, times ``length``.

    The first and last True entry of ``seen``, and the longest run of True entries of ``whole``.
    """
    n = seen.shape[-1]
    if n == 0:
        return torch.zeros(*seen.shape[:-1], 4, dtype=torch.int32, device=seen.device)
    index = torch.arange(n, dtype=torch.int32, device=seen.device).expand(seen.shape)
    stop = torch.where(seen, index + 1, 0).amax(-1)
    start = torch.where(seen, index, n).amin(-1).minimum(stop)
    before = torch.where(whole, -1, index).cummax(-1).values  # the last entry that is not True
    longest = (index - before).max(-1)
    whole_stop = torch.where(longest.values > 0, longest.indices + 1, 0)
    bounds = (start, whole_stop - longest.values, whole_stop, stop)
    return torch.stack([bound.to(torch.int32) for bound in bounds], -1) * length
