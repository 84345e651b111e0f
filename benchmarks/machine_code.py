"""NVIDIA's machine code as its cuobjdump prints it: loops, and registers that come to harm."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton.backends.nvidia

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
Code = list[tuple[int, str]]  # address, instruction


def dump(machine_code: bytes, what: str) -> str:
    """Let cuobjdump print something about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        command = [str(CUOBJDUMP), what, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def instructions(assembly: str) -> Code:
    """Return what ``-sass`` prints, without encodings."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", assembly)
    return [(int(address, 16), instruction.strip()) for address, instruction in found]


def branch_target(instruction: str) -> int | None:
    found = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)
    return int(found[1], 16) if found else None


def inner_loops(code: Code) -> list[list[str]]:
    """Return the instructions of every innermost loop, between its head and its branch back."""
    loops = []
    for address, instruction in code:
        target = branch_target(instruction)
        if target is not None and target < address:
            loops.append((target, address))
    inner = [
        loop
        for loop in loops
        if not any(loop[0] <= o[0] and o[1] <= loop[1] for o in loops if o != loop)
    ]
    return [[text for address, text in code if head <= address <= tail] for head, tail in inner]


def registers_written(instruction: str) -> set[int]:
    """Return the registers that an instruction other than a product writes."""
    found = re.match(r"(?:@!?U?P\w+\s+)?([\w.]+)\s+R(\d+)\b", instruction)
    if found is None:
        return set()
    opcode, first = found[1], int(found[2])
    matrices = re.search(r"^LDSM.*\.(\d)$", opcode)
    count = int(matrices[1]) if matrices else 4 if ".128" in opcode else 1
    if ".64" in opcode or "WIDE" in opcode:
        count = 2
    return set(range(first, first + count))


def product_inputs(instruction: str) -> set[int]:
    """Return the registers that an asynchronous product reads as its first factor."""
    found = re.search(r"\bHGMMA\S*\s+R\d+,\s*R(\d+),", instruction)
    return set(range(int(found[1]), int(found[1]) + 4)) if found else set()


def successors(code: Code) -> list[list[int]]:
    """Return, for every instruction, the places of those that may follow it."""
    places = {address: place for place, (address, _) in enumerate(code)}
    found = []
    for place, (_, instruction) in enumerate(code):
        target = branch_target(instruction)
        follow = [] if target is None else [places[target]]
        ends = re.fullmatch(r"EXIT|RET.*|BRA\s+0x[0-9a-f]+", instruction)
        if ends is None and place + 1 < len(code):
            follow.append(place + 1)
        found.append(follow)
    return found


def overwritten_inputs(code: Code) -> list[str]:
    """Return instructions that write a register which a product in flight may still read.

    NVIDIA's assembler can do so on Hopper before CUDA 13.3
    (https://github.com/triton-lang/triton/pull/11781); results are then wrong now and then.
    """
    follow = successors(code)
    in_flight: list[set[int] | None] = [None] * len(code)
    in_flight[0] = set()
    waiting = [0]
    while waiting:
        place = waiting.pop()
        instruction = code[place][1]
        before = in_flight[place] or set()
        after = before | product_inputs(instruction)
        if re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0\b", instruction):
            after = set()
        for following in follow[place]:
            known = in_flight[following]
            if known is None or not after <= known:
                in_flight[following] = after | (known or set())
                waiting.append(following)
    return [
        instruction
        for (_, instruction), registers in zip(code, in_flight, strict=True)
        if registers and "HGMMA" not in instruction and registers & registers_written(instruction)
    ]
