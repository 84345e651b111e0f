"""The memories of a device, which refuse what a device would do without a word.

Global memory holds tensors far apart and fails for every address between them. Shared memory fails
where the result of a program would depend on which warp comes first.
"""

import ctypes
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Offsets = NDArray[np.int64]
Bytes = NDArray[np.uint8]
WARP = 32
SEVERAL = -2  # readers of one byte


class ProgramError(Exception):
    """A program did what no program may do."""


def view_as(memory: Bytes, size: int) -> NDArray[Any]:
    """View memory as unsigned integers of ``size`` bytes."""
    return memory[: len(memory) // size * size].view(f"u{size}")


def check_range(offsets: Offsets, size: int, end: int, what: str) -> None:
    """Refuse accesses that are not aligned or lie outside."""
    if (offsets % size).any():
        raise ProgramError(f"an access of {size} bytes to {what} memory is not aligned")
    if len(offsets) and (offsets.min() < 0 or offsets.max() + size > end):
        raise ProgramError(f"an access to {what} memory lies outside of it")


class Region(NamedTuple):
    """The place of a tensor's storage, shared with other views of it."""

    pointer: int
    start: int
    size: int


class GlobalMemory:
    """A copy of some tensors, each in a region of its own; nothing between them may be touched."""

    BASE = 0x7F00_0000_0000
    GAP = 4096

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        storages = {
            storage.data_ptr(): storage.nbytes()
            for storage in (tensor.untyped_storage() for tensor in tensors)
            if storage.nbytes()
        }
        self.regions: list[Region] = []
        end = self.GAP
        for pointer, size in storages.items():
            self.regions.append(Region(pointer, end, size))
            end += -(-size // 256) * 256 + self.GAP
        self.bytes = np.full(end, 0xFF, np.uint8)
        self.is_tensor = np.zeros(end, np.bool_)
        for region in self.regions:
            inside = slice(region.start, region.start + region.size)
            self.bytes[inside] = self._host_bytes(region)
            self.is_tensor[inside] = True

    @staticmethod
    def _host_bytes(region: Region) -> Bytes:
        return np.ctypeslib.as_array((ctypes.c_uint8 * region.size).from_address(region.pointer))

    def address_of(self, tensor: Tensor) -> int:
        """Return where a tensor's first element lies here; that of an empty one is never read."""
        storage = tensor.untyped_storage().data_ptr()
        for region in self.regions:
            if region.pointer == storage:
                return self.BASE + region.start + tensor.data_ptr() - storage
        return self.BASE

    def copy_back(self) -> None:
        """Write what the tensors became."""
        for region in self.regions:
            inside = slice(region.start, region.start + region.size)
            self._host_bytes(region)[:] = self.bytes[inside]

    def offsets(self, addresses: NDArray[Any], size: int) -> Offsets:
        """Return the places of accesses of ``size`` bytes."""
        found = addresses.astype(np.int64) - self.BASE
        check_range(found, size, len(self.bytes), "global")
        if not (self.is_tensor[found].all() and self.is_tensor[found + size - 1].all()):
            raise ProgramError("an access to global memory lies outside of every tensor")
        return found


class SharedMemory:
    """The shared memory of one program, and who read and wrote what since the last barrier.

    A byte may not be read, or written with another value, by one warp after another wrote or read
    it, without a barrier between. Asynchronous copies own what they write until they are waited
    for, and products (wgmma) what they read; products read only what was written before a fence
    (``fence.proxy.async``) and a barrier.
    """

    def __init__(self, size: int, copies_need_fences: bool = True) -> None:
        size = max(16, size)
        self.copies_need_fences = copies_need_fences
        self.bytes = np.full(size, 0x7F, np.uint8)  # anything may be there at first
        self.epoch = 1  # barriers
        self.written, self.read = np.zeros((2, size), np.int32)  # the epoch in which they were
        self.writer, self.reader = np.zeros((2, size), np.int32)
        self.arriving, self.multiplied = np.zeros((2, size), np.int32)  # by how many
        self.unfenced = np.zeros(size, np.bool_)

    def barrier(self) -> None:
        self.epoch += 1

    def fence(self) -> None:
        self.unfenced[:] = False

    def offsets(self, addresses: NDArray[Any], size: int) -> Offsets:
        """Return the places of accesses of ``size`` bytes."""
        found = addresses.astype(np.int64)
        check_range(found, size, len(self.bytes), "shared")
        return found

    def _by_another(self, epochs: Any, warps: Any, places: Offsets, warp: NDArray[Any]) -> Any:
        return (epochs[places] == self.epoch) & (warps[places] != warp)

    def note_read(self, places: Offsets, warp: NDArray[Any]) -> None:
        """Check and remember reads, ``[lanes, bytes]`` by the warp of each lane."""
        warp = warp[:, None]
        if self._by_another(self.written, self.writer, places, warp).any():
            raise ProgramError("a warp reads what another wrote, with no barrier between")
        if self.arriving[places].any():
            raise ProgramError("a warp reads what an asynchronous copy may still write")
        shared = self._by_another(self.read, self.reader, places, warp)
        self.reader[places] = np.where(shared, SEVERAL, warp)
        self.read[places] = self.epoch

    def note_write(self, places: Offsets, warp: NDArray[Any], new: NDArray[Any] | None) -> None:
        """Check and remember writes; ``new`` are their bytes, None if not yet known."""
        warp = warp[:, None]
        differs = True if new is None else self.bytes[places] != new
        if self.multiplied[places].any():
            raise ProgramError("a warp writes what a product may still read")
        if self.arriving[places].any():
            raise ProgramError("a warp writes what an asynchronous copy may still write")
        if (self._by_another(self.written, self.writer, places, warp) & differs).any():
            raise ProgramError("two warps write one place, with no barrier between")
        if (self._by_another(self.read, self.reader, places, warp) & differs).any():
            raise ProgramError("a warp writes what another may yet read, with no barrier between")
        self.mark_written(places, warp)

    def mark_written(self, places: Offsets, warp: NDArray[Any]) -> None:
        self.written[places] = self.epoch
        self.writer[places] = warp
        self.unfenced[places] = True

    def start_copy(self, places: Offsets, warp: NDArray[Any]) -> None:
        """An asynchronous copy to these places begins."""
        self.note_write(places, warp, None)
        self.arriving[places] += 1

    def end_copy(self, places: Offsets, warp: NDArray[Any]) -> None:
        """The threads that began a copy have waited for it."""
        self.arriving[places] -= 1
        self.mark_written(places, warp[:, None])
        self.unfenced[places] &= self.copies_need_fences

    def start_product(self, places: Offsets) -> None:
        """A product that reads these places begins, for four warps at once."""
        if (self.written[places] == self.epoch).any():
            raise ProgramError("a product reads what was written, with no barrier between")
        if self.arriving[places].any():
            raise ProgramError("a product reads what an asynchronous copy may still write")
        if self.unfenced[places].any():
            raise ProgramError("a product reads what was written, with no fence between")
        self.multiplied[places] += 1

    def end_product(self, places: Offsets) -> None:
        """The warps have waited for a product."""
        self.multiplied[places] -= 1
        self.read[places] = self.epoch
        self.reader[places] = SEVERAL
