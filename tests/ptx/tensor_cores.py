"""Matrices that warps hold together, and their products.

Fragments (PTX ISA, "Matrix Fragments for mma.m16n8k16"): lane ``4 g + t`` of a warp holds of a
16 x 16 operand the pairs at rows ``g`` and ``g + 8``, columns ``2 t`` and ``2 t + 8``; of a
16 x 8 result the pairs at rows ``g`` and ``g + 8``, columns ``2 t``. Sums are float32.
"""

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
from memory import WARP, Offsets, ProgramError, view_as
from numpy.typing import NDArray
from operations import from_bfloat16

if TYPE_CHECKING:
    from machine import Machine

G, T = np.divmod(np.arange(WARP), 4)
WORD = np.dtype(np.uint32)
GROUP = 4 * WARP  # threads that multiply together
SWIZZLED_BYTES = {1: 128, 2: 64, 3: 32}


def halves_of(machine: "Machine", register: str) -> NDArray[np.uint16]:
    """Return a register's two halves, ``[warps, lanes, 2]``."""
    return machine.get(register, WORD).view(np.uint16).reshape(-1, WARP, 2)


def to_float(bits: NDArray[np.uint16], kind: str) -> NDArray[np.float32]:
    if kind == "bf16":
        return from_bfloat16(bits)
    assert kind == "f16", kind
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)


def load_matrices(machine: "Machine", registers: list[str], where: Any, transposed: bool) -> None:
    """``ldmatrix``: 8 x 8 matrices whose rows' addresses the lanes give, eight by eight."""
    count = len(registers)
    rows, warp = _rows(machine, where, count)
    machine.shared.note_read(rows.reshape(-1, 1) + np.arange(16), warp)
    halves = view_as(machine.shared.bytes, 2)[rows[..., None] // 2 + np.arange(8)]
    found = np.ascontiguousarray(halves.swapaxes(-1, -2) if transposed else halves).view(np.uint32)
    for place, register in enumerate(registers):
        machine.put(register, found[:, place].reshape(-1), "b32")


def store_matrices(machine: "Machine", registers: list[str], where: Any, transposed: bool) -> None:
    """``stmatrix``: the reverse."""
    count = len(registers)
    rows, warp = _rows(machine, where, count)
    halves = np.stack([halves_of(machine, name).reshape(-1, 8, 8) for name in registers], 1)
    halves = np.ascontiguousarray(halves.swapaxes(-1, -2) if transposed else halves)
    places = rows.reshape(-1, 1) + np.arange(16)
    machine.shared.note_write(places, warp, halves.view(np.uint8).reshape(places.shape))
    view_as(machine.shared.bytes, 2)[rows[..., None] // 2 + np.arange(8)] = halves


def _rows(machine: "Machine", where: Any, count: int) -> tuple[Offsets, NDArray[np.int32]]:
    """Return the places of rows ``[warps, matrices, 8]`` and the warp of each."""
    given = machine.shared.offsets(where, 16).reshape(-1, WARP)[:, : 8 * count]
    return given.reshape(-1, count, 8), np.repeat(np.arange(len(given), dtype=np.int32), 8 * count)


def first_operand(machine: "Machine", registers: list[str], kind: str) -> NDArray[np.float32]:
    """Return the 16 x 16 matrix that every warp holds in four registers."""
    found = np.empty((machine.threads // WARP, 16, 16), np.uint16)
    for place, register in enumerate(registers):
        pair = halves_of(machine, register)
        row, column = G + 8 * (place % 2), 2 * T + 8 * (place // 2)
        found[:, row, column], found[:, row, column + 1] = pair[..., 0], pair[..., 1]
    return to_float(found, kind)


def multiply_in_warps(machine: "Machine", operands: list[list[str]], kind: str) -> None:
    """``mma.sync.m16n8k16``: result, two factors, what is added."""
    results, first, second, added = operands
    factor = np.empty((machine.threads // WARP, 16, 8), np.uint16)
    for place, register in enumerate(second):
        pair = halves_of(machine, register)
        factor[:, 2 * T + 8 * place, G] = pair[..., 0]
        factor[:, 2 * T + 8 * place + 1, G] = pair[..., 1]
    product = first_operand(machine, first, kind) @ to_float(factor, kind)
    sums = [machine.get(name, np.dtype(np.float32)) for name in added]
    for place, (register, old) in enumerate(zip(results, sums, strict=True)):
        part = product[:, G + 8 * (place // 2), 2 * T + place % 2]
        machine.put(register, old + part.reshape(-1), "f32")


def start_product(
    machine: "Machine",
    results: list[str],
    in_registers: list[str] | None,
    descriptors: list[NDArray[np.uint64]],
    transposed: list[bool],
    adds: bool,
    kind: str,
) -> None:
    """``wgmma``: every four warps multiply 64 x 16 by 16 x N, at least one of them in memory."""
    columns = 2 * len(results)
    heights = [columns] if in_registers is not None else [64, columns]
    # [groups][operands], places of 16-bit numbers
    places = [
        [
            operand_places(shared_by_all(given[group : group + GROUP]), height, by_column)
            for given, height, by_column in zip(descriptors, heights, transposed, strict=True)
        ]
        for group in range(0, machine.threads, GROUP)
    ]
    touched = [np.stack((each, each + 1)) for group in places for each in group]
    for each in touched:
        machine.shared.start_product(machine.shared.offsets(each, 1))

    def multiply() -> None:
        memory = view_as(machine.shared.bytes, 2)
        factors = [[to_float(memory[each // 2], kind) for each in group] for group in places]
        if in_registers is None:
            products = [first @ second.T for first, second in factors]
        else:
            rows = first_operand(machine, in_registers, kind).reshape(-1, 64, 16)
            products = [first @ second.T for first, (second,) in zip(rows, factors, strict=True)]
        product = np.stack(products).reshape(-1, 16, columns)  # by warp
        for place, register in enumerate(results):
            block, part = divmod(place, 4)
            value = product[:, G + 8 * (part // 2), 8 * block + 2 * T + part % 2].reshape(-1)
            old = machine.get(register, np.dtype(np.float32)) if adds else np.float32(0)
            machine.put(register, old + value, "f32")

    def end() -> None:
        if not machine.eager:
            multiply()
        for each in touched:
            machine.shared.end_product(each)

    if machine.eager:
        multiply()
    machine.products.open.append(end)


def shared_by_all(descriptors: NDArray[np.uint64]) -> int:
    if (descriptors != descriptors[0]).any():
        raise ProgramError("warps that multiply together have different operands")
    return int(descriptors[0])


@functools.cache
def operand_places(descriptor: int, height: int, by_column: bool) -> Offsets:
    """Return where an operand ``[height, 16]`` lies (PTX ISA, "Matrix Descriptor").

    Rows, or columns if ``by_column``, are pieces of 128, 64 or 32 bytes in blocks of eight, whose
    chunks of 16 bytes are permuted by the number of the piece.
    """
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    width = SWIZZLED_BYTES.get(descriptor >> 62, 0)
    if descriptor >> 49 & 7 or not width:
        raise NotImplementedError("an operand that is not swizzled or has an offset of its base")
    row, column = np.arange(height)[:, None], np.arange(16)[None]
    if by_column:
        within = leading * (row // (width // 2)) + 2 * (row % (width // 2))
        place = start + within + stride * (column // 8) + width * (column % 8)
    else:
        place = start + stride * (row // 8) + width * (row % 8) + 2 * column
    return place ^ ((place >> 7 & (width // 16 - 1)) << 4)
