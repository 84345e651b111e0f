"""Tile sizes by kernel, head dimension and precision."""

from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """How a kernel is cut: rows and keys of a tile, warps of a program, stages of its pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


# kernel -> head dimension up to -> tiles. Chosen so that nothing, or little, spills from the
# registers on Hopper (benchmarks/kernel_resources.py), not yet by measured time.
_HALF: dict[str, dict[int, Tiles]] = {
    "forward": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 2), 256: Tiles(128, 32, 8, 2)},
    "query_gradient": {
        64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 2), 256: Tiles(64, 32, 8, 2),
    },
    "key_gradients": {
        64: Tiles(32, 128, 8, 3), 128: Tiles(32, 64, 8, 2), 256: Tiles(32, 32, 8, 1),
    },
    "bias_gradient": {
        64: Tiles(64, 64, 4, 1), 128: Tiles(64, 64, 8, 1), 256: Tiles(32, 32, 8, 1),
    },
}  # fmt: skip
# float32 is multiplied without tensor cores ("ieee"), whose operands must fit in registers.
_SINGLE: dict[str, dict[int, Tiles]] = {
    "forward": {64: Tiles(32, 32, 4, 2), 128: Tiles(32, 16, 4, 1), 256: Tiles(16, 16, 4, 1)},
    "query_gradient": {64: Tiles(32, 32, 4, 2), 128: Tiles(16, 16, 4, 1), 256: Tiles(16, 16, 4, 1)},
    "key_gradients": {64: Tiles(32, 32, 4, 2), 128: Tiles(16, 16, 4, 1), 256: Tiles(16, 16, 4, 1)},
    "bias_gradient": {64: Tiles(32, 32, 4, 1), 128: Tiles(16, 16, 4, 1), 256: Tiles(16, 16, 4, 1)},
}


def choose_tiles(kernel: str, width: int, dtype: torch.dtype) -> Tiles:
    """Choose the tiles of a kernel for the wider of the two head dimensions."""
    if kernel == "row_constants":
        return Tiles(32 if width > 128 else 64, 0, 4, 1)
    table = _HALF if dtype.itemsize == 2 else _SINGLE
    return next(tiles for limit, tiles in table[kernel].items() if width <= limit)
