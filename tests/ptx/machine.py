"""All threads of one program, in step: registers, branches, memory, warps."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from memory import WARP, GlobalMemory, Offsets, SharedMemory, view_as
from numpy.typing import NDArray
from operations import BITS, Lanes, meaning_of, numpy_type
from program import Guard, Instruction, Program
from tensor_cores import load_matrices, multiply_in_warps, start_product, store_matrices

Step = Callable[["Machine"], None]
Reader = Callable[["Machine"], Lanes]
# what a register holds that nobody wrote
NOISE = {"p": True, "rs": 0x7FD7, "r": 0x7FD7_7FD7, "rd": 0x7FD7_7FD7_7FD7_7FD7}
REGISTER = {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "rd": np.uint64}
SPECIAL = {"%tid.x": "thread", "%ctaid.x": "program_id"}


class Machine:
    """A kernel that is being run.

    Args:
        kernel: what :func:`prepare` made of the program.
        memory: where its tensors lie.
        arguments: one number for every parameter.
        eager: asynchronous copies and products are done as they begin; if not, when they are waited
            for. A right program cannot tell.
        copies_need_fences: products may read what was copied only after a fence.
    """

    def __init__(
        self,
        kernel: "Kernel",
        memory: GlobalMemory,
        arguments: Sequence[float],
        eager: bool,
        copies_need_fences: bool,
    ) -> None:
        self.kernel, self.memory, self.eager = kernel, memory, eager
        self.copies_need_fences = copies_need_fences
        self.threads = kernel.program.threads
        self.thread = np.arange(self.threads, dtype=np.uint32)
        self.warp = (self.thread // WARP).astype(np.int32)
        self.arguments = {
            parameter.name: np.full(self.threads, value).astype(numpy_type(parameter.type))
            for parameter, value in zip(kernel.program.parameters, arguments, strict=True)
        }

    def run(self, program_id: int, shared_bytes: int) -> None:
        """Run one program to its end."""
        self.program_id = np.full(self.threads, program_id, np.uint32)
        self.registers: dict[str, Lanes] = {}
        self.shared = SharedMemory(shared_bytes, self.copies_need_fences)
        self.copies, self.products = Queue(), Queue()
        labels, place = self.kernel.program.labels, 0
        while True:
            for step in self.kernel.steps[place]:
                step(self)
            end = self.kernel.program.blocks[place].end
            place += 1
            if end is None or not self.all_or_none(end.guard):
                continue
            if end.parts[0] == "ret":
                return
            place = labels[end.operands[0]]

    def all_or_none(self, guard: Guard | None) -> bool:
        """Return what all threads agree on."""
        mask = self.mask(guard)
        if mask.any() != mask.all():
            raise NotImplementedError("threads of a program that branch apart")
        return bool(mask.all())

    def mask(self, guard: Guard | None) -> NDArray[np.bool_]:
        """Return which threads take part in an instruction."""
        if guard is None:
            return np.ones(self.threads, np.bool_)
        return self.get(guard.register, np.dtype(np.bool_)) ^ guard.negated

    def get(self, register: str, dtype: np.dtype[Any]) -> Lanes:
        """Return a register as numbers of a type, the lower part of it if that is smaller."""
        raw = self.registers.get(register)
        if raw is None:
            kind = register.rstrip("0123456789")
            raw = np.full(self.threads, NOISE[kind], REGISTER[kind])
        if raw.itemsize != dtype.itemsize:
            raw = raw.astype(f"u{dtype.itemsize}")
        return raw.view(dtype)

    def put(self, register: str, value: Any, kind: str, guard: Guard | None = None) -> None:
        """Write numbers of a type to a register, in the threads of the guard."""
        dtype = REGISTER[register.rstrip("0123456789")]
        typed = np.asarray(value).astype(numpy_type(kind))
        raw = typed if dtype == np.bool_ else typed.view(f"u{typed.itemsize}").astype(dtype)
        if guard is not None:
            raw = np.where(self.mask(guard), raw, self.get(register, np.dtype(dtype)))
        if raw.shape != (self.threads,):  # one number for all
            raw = np.full(self.threads, raw)
        self.registers[register] = raw


class Queue:
    """Asynchronous work in groups, which end in the order in which they began."""

    def __init__(self) -> None:
        self.open: list[Callable[[], None]] = []
        self.groups: list[list[Callable[[], None]]] = []

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, left: int) -> None:
        """End all groups but the last ``left``."""
        while len(self.groups) > left:
            for end in self.groups.pop(0):
                end()


class Kernel:
    """A program whose instructions are functions of a machine."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.steps = [[prepare(one) for one in block.instructions] for block in program.blocks]


def reader(operand: str, kind: str) -> Reader:
    """Return a function that reads an operand as numbers of a type."""
    dtype = numpy_type(kind)
    if operand in SPECIAL:
        name = SPECIAL[operand]
        return lambda machine: getattr(machine, name)
    if operand.startswith("%"):
        register = operand[1:]
        return lambda machine: machine.get(register, dtype)
    if operand == "global_smem":  # where shared memory begins
        operand = "0"
    if operand.startswith("0f"):  # bits of a float32
        operand = f"0x{operand[2:]}"
    value = int(operand.rstrip("U"), 0)
    if kind == "pred":
        value = value != 0
    size = dtype.itemsize
    constant = np.full(1, value & (1 << 8 * size) - 1, f"u{size}").view(dtype)
    return lambda machine: constant


def names(operand: str) -> list[str]:
    """List the registers of ``{%a, %b}`` or ``%a``."""
    return [name.lstrip("%") for name in re.findall(r"[%\w]+", operand)]


def prepare(instruction: Instruction) -> Step:
    """Return the function that an instruction is."""
    parts, operands, guard = instruction.parts, instruction.operands, instruction.guard
    special = {
        "ld": load, "st": store, "cp": copy_asynchronously, "bar": synchronize, "fence": fence,
        "shfl": shuffle, "ldmatrix": matrices, "stmatrix": matrices, "mma": warp_product,
        "wgmma": warp_group_product,
    }  # fmt: skip
    if parts[0] in special:
        return special[parts[0]](instruction)
    if parts[0] == "mov" and "{" in "".join(operands):
        return pack(instruction)
    target, *sources = operands
    meaning = meaning_of(instruction.opcode, len(sources))
    readers = [reader(*each) for each in zip(sources, meaning.sources, strict=True)]
    register = target[1:]

    def step(machine: Machine) -> None:
        values = [read(machine) for read in readers]
        machine.put(register, meaning.function(*values), meaning.result, guard)

    return step


def pack(instruction: Instruction) -> Step:
    """``mov`` between a register and a vector of smaller ones, the lowest first."""
    (target, source), bits = instruction.operands, int(instruction.parts[-1][1:])
    assert instruction.guard is None
    many = names(source if source.startswith("{") else target)
    part = bits // len(many)

    def join(machine: Machine) -> None:
        halves = [machine.get(name, np.dtype(BITS[part])).astype(BITS[bits]) for name in many]
        shifted = [half << BITS[bits](part * place) for place, half in enumerate(halves)]
        machine.put(target[1:], np.bitwise_or.reduce(shifted), f"u{bits}")

    def split(machine: Machine) -> None:
        word = machine.get(source[1:], np.dtype(BITS[bits]))
        for place, name in enumerate(many):
            if name != "_":
                machine.put(name, word >> BITS[bits](part * place), f"u{part}")

    return join if source.startswith("{") else split


def address(operand: str, space: str) -> Reader:
    """Return a function that computes ``[register + offset]``."""
    found = re.fullmatch(r"\[\s*(%?\w+)\s*(?:\+\s*(-?\d+)\s*)?\]", operand)
    assert found is not None, operand
    base, offset = reader(found[1], "u64" if space == "global" else "u32"), int(found[2] or 0)
    return lambda machine: np.broadcast_to(base(machine).astype(np.int64) + offset, machine.threads)


def span(places: Offsets, size: int) -> Offsets:
    """Return the bytes of accesses, ``[lanes, size]``."""
    return places[:, None] + np.arange(size)


def load(instruction: Instruction) -> Step:
    """``ld.param``, ``ld.global``, ``ld.shared``."""
    (target, source), parts, guard = instruction.operands, instruction.parts, instruction.guard
    space, kind = parts[1], parts[-1]
    if space == "param":
        name = source.strip("[]")
        return lambda machine: machine.put(
            target[1:], machine.arguments[name].view(f"u{machine.arguments[name].itemsize}"),
            f"u{machine.arguments[name].itemsize * 8}", guard,
        )  # fmt: skip
    assert space in ("global", "shared"), instruction
    registers, size = names(target), int(kind[1:]) // 8
    where = address(source, space)

    def step(machine: Machine) -> None:
        memory = machine.memory if space == "global" else machine.shared
        active = machine.mask(guard)
        places = memory.offsets(where(machine)[active], size * len(registers))
        if isinstance(memory, SharedMemory):
            memory.note_read(span(places, size * len(registers)), machine.warp[active])
        words = view_as(memory.bytes, size)
        for index, register in enumerate(registers):
            value = np.zeros(machine.threads, f"u{size}")
            value[active] = words[places // size + index]
            machine.put(register, value, f"u{8 * size}", guard)

    return step


def store(instruction: Instruction) -> Step:
    """``st.global``, ``st.shared``."""
    (target, source), parts, guard = instruction.operands, instruction.parts, instruction.guard
    space, size = parts[1], int(parts[-1][1:]) // 8
    assert space in ("global", "shared"), instruction
    sources = source.strip("{} ").replace(",", " ").split()
    readers, where = [reader(name, f"u{8 * size}") for name in sources], address(target, space)

    def step(machine: Machine) -> None:
        memory = machine.memory if space == "global" else machine.shared
        active = machine.mask(guard)
        values = [np.broadcast_to(read(machine), machine.threads)[active] for read in readers]
        places = memory.offsets(where(machine)[active], size * len(values))
        if isinstance(memory, SharedMemory):
            new = np.stack(values, 1).view(np.uint8)
            memory.note_write(span(places, size * len(values)), machine.warp[active], new)
        words = view_as(memory.bytes, size)
        for index, value in enumerate(values):
            words[places // size + index] = value

    return step


def copy_asynchronously(instruction: Instruction) -> Step:
    """``cp.async``: from global to shared memory, or zeros if the given size is 0."""
    parts, operands, guard = instruction.parts, instruction.operands, instruction.guard
    if parts[2] == "commit_group":
        return lambda machine: machine.copies.commit()
    if parts[2] == "wait_group":
        left = int(operands[0])
        return lambda machine: machine.copies.wait(left)
    assert parts[2:] in (["ca", "shared", "global"], ["cg", "shared", "global"]), instruction
    to, of = address(operands[0], "shared"), address(operands[1], "global")
    size = int(operands[2], 0)
    given = reader(operands[3] if len(operands) > 3 else str(size), "u32")

    def step(machine: Machine) -> None:
        active, shared, memory = machine.mask(guard), machine.shared, machine.memory
        sizes = np.broadcast_to(given(machine), machine.threads)[active]
        present = sizes == size
        assert (present | (sizes == 0)).all(), instruction
        targets = span(shared.offsets(to(machine)[active], size), size)
        sources = span(memory.offsets(of(machine)[active][present], size), size)
        warp = machine.warp[active]
        shared.start_copy(targets, warp)

        def copy() -> None:
            shared.bytes[targets[present]] = memory.bytes[sources]
            shared.bytes[targets[~present]] = 0

        def end() -> None:
            if not machine.eager:
                copy()
            shared.end_copy(targets, warp)

        if machine.eager:
            copy()
        machine.copies.open.append(end)

    return step


def synchronize(instruction: Instruction) -> Step:
    """``bar.sync``; warps are in step with themselves, so that ``bar.warp.sync`` does nothing."""
    if instruction.parts[1] == "warp":
        return lambda machine: None
    assert instruction.operands == ("0",), instruction
    return lambda machine: machine.shared.barrier()


def fence(instruction: Instruction) -> Step:
    """``fence.proxy.async``: products may read what was written before."""
    assert instruction.parts[1:3] == ["proxy", "async"], instruction
    return lambda machine: machine.shared.fence()


def shuffle(instruction: Instruction) -> Step:
    """``shfl.sync``: a register of another lane of the warp."""
    target, source, by, bound, _ = instruction.operands
    mode = instruction.parts[2]
    assert mode in ("bfly", "idx"), instruction
    assert bound == "31", instruction
    read, distance = reader(source, "b32"), reader(by, "u32")

    def step(machine: Machine) -> None:
        lane, number = machine.thread % WARP, distance(machine)
        other = lane ^ number if mode == "bfly" else np.broadcast_to(number % WARP, machine.threads)
        value = np.broadcast_to(read(machine), machine.threads)
        machine.put(target[1:], value[machine.thread - lane + other], "b32", instruction.guard)

    return step


def matrices(instruction: Instruction) -> Step:
    """``ldmatrix`` and ``stmatrix``."""
    stores = instruction.parts[0] == "stmatrix"
    where, registers = instruction.operands if stores else instruction.operands[::-1]
    names_of, places = names(registers), address(where, "shared")
    transposed, function = "trans" in instruction.parts, store_matrices if stores else load_matrices
    return lambda machine: function(machine, names_of, places(machine), transposed)


def warp_product(instruction: Instruction) -> Step:
    """``mma.sync``."""
    assert "m16n8k16" in instruction.parts, instruction
    operands, kind = [names(operand) for operand in instruction.operands], instruction.parts[-2]
    return lambda machine: multiply_in_warps(machine, operands, kind)


def warp_group_product(instruction: Instruction) -> Step:
    """``wgmma``."""
    parts, operands = instruction.parts, instruction.operands
    if parts[1] == "fence":
        return lambda machine: None
    if parts[1] == "commit_group":
        return lambda machine: machine.products.commit()
    if parts[1] == "wait_group":
        left = int(operands[0])
        return lambda machine: machine.products.wait(left)
    result, first, second, accumulates, *signs_and_layouts = operands
    assert signs_and_layouts[:2] == ["1", "1"], instruction
    transposed = [flag == "1" for flag in signs_and_layouts[2:]]
    in_registers = names(first) if first.startswith("{") else None
    if in_registers is not None:
        transposed = [False, *transposed]
    descriptors = [reader(each, "u64") for each in (first, second) if not each.startswith("{")]
    adds, kind = reader(accumulates, "pred"), parts[-2]

    def step(machine: Machine) -> None:
        start_product(
            machine, names(result), in_registers,
            [np.broadcast_to(read(machine), machine.threads) for read in descriptors],
            transposed[-len(descriptors):], bool(adds(machine).all()), kind,
        )  # fmt: skip

    return step
