"""Tile sizes by kernel, head dimension and precision."""

import functools
from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """How a kernel is cut: rows and keys of a tile, warps of a program, stages of its pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


# kernel -> head dimension up to -> tiles. Chosen for few instructions a score in inner loops that
# spill (nearly) no registers on Hopper (benchmarks/kernel_resources.py), not yet by measured time.
# A group of four warps multiplies 64 rows of a tile at once: eight warps want 128 of them, or two
# groups compute the same.
_HALF: dict[str, dict[int, Tiles]] = {
    "forward": {64: Tiles(128, 128, 8, 3), 128: Tiles(128, 128, 8, 2), 256: Tiles(128, 32, 8, 2)},
    "query_gradient": {
        64: Tiles(128, 128, 8, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(64, 32, 4, 2),
    },
    "key_gradients": {
        64: Tiles(64, 128, 8, 2), 128: Tiles(32, 128, 8, 2), 256: Tiles(32, 32, 8, 1),
    },
    "bias_gradient": {
        64: Tiles(64, 64, 4, 1), 128: Tiles(128, 64, 8, 1), 256: Tiles(32, 32, 8, 1),
    },
}  # fmt: skip
# The same for devices with about 100 KB of shared memory a program (compute capability 8.6, 8.9),
# and for problems that load a bias or a dense mask, whose tiles need room as well.
_HALF_SMALL: dict[str, dict[int, Tiles]] = {
    "forward": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 32, 4, 2), 256: Tiles(32, 32, 4, 1)},
    "query_gradient": {64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 4, 1), 256: Tiles(32, 32, 4, 1)},
    "key_gradients": {64: Tiles(32, 64, 4, 2), 128: Tiles(32, 64, 4, 1), 256: Tiles(16, 32, 4, 1)},
    "bias_gradient": {64: Tiles(64, 64, 4, 1), 128: Tiles(32, 32, 4, 1), 256: Tiles(32, 32, 4, 1)},
}
LARGE_SHARED_BYTES = 160 * 1024
# float32 is multiplied without tensor cores ("ieee"), whose operands must fit in registers.
_SINGLE: dict[str, dict[int, Tiles]] = {
    "forward": {64: Tiles(32, 32, 4, 2), 128: Tiles(32, 16, 4, 1), 256: Tiles(16, 16, 4, 1)},
    "query_gradient": {64: Tiles(32, 32, 4, 2), 128: Tiles(16, 16, 4, 1), 256: Tiles(16, 16, 4, 1)},
    "key_gradients": {64: Tiles(32, 32, 4, 2), 128: Tiles(16, 16, 4, 1), 256: Tiles(16, 16, 4, 1)},
    "bias_gradient": {64: Tiles(32, 32, 4, 1), 128: Tiles(16, 16, 4, 1), 256: Tiles(16, 16, 4, 1)},
}


@functools.cache
def shared_bytes_of(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may have on a device."""
    if device.type != "cuda":
        return LARGE_SHARED_BYTES
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


@functools.cache
def choose_tiles(
    kernel: str,
    width: int,
    dtype: torch.dtype,
    shared_bytes: int = LARGE_SHARED_BYTES,
    loaded: bool = False,
) -> Tiles:
    """Choose the tiles of a kernel.

    Args:
        kernel: "forward", "row_constants", "query_gradient", "key_gradients" or "bias_gradient".
        width: the wider of the two head dimensions, at most 256.
        dtype: that of query, key and value.
        shared_bytes: shared memory that a program may have on the device.
        loaded: a number is loaded for every score, that of a bias or a dense mask.

    Returns:
        The tiles.
    """
    if kernel == "row_constants":
        return Tiles(32 if width > 128 else 64, 0, 4, 1)
    roomy = shared_bytes >= LARGE_SHARED_BYTES and not loaded
    table = _HALF if roomy else _HALF_SMALL
    if dtype.itemsize > 2:
        table = _SINGLE
    return next(tiles for limit, tiles in table[kernel].items() if width <= limit)
