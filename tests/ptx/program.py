"""PTX as Triton prints it, read into blocks of instructions between labels and branches.

The language: NVIDIA, *PTX ISA*. Triton writes a statement or several to a line and nothing of a
statement to the next.
"""

import re
from typing import NamedTuple

_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


class Guard(NamedTuple):
    """The predicate before an instruction: ``@%p1`` or ``@!%p1``."""

    register: str
    negated: bool


class Instruction(NamedTuple):
    """One statement; an operand is a register, a number, ``{a, b}`` or ``[address + offset]``."""

    opcode: str
    operands: tuple[str, ...]
    guard: Guard | None

    @property
    def parts(self) -> list[str]:
        """The words of the opcode; there are no clusters, so shared memory is the program's."""
        return self.opcode.replace("shared::cta", "shared").split(".")


class Parameter(NamedTuple):
    name: str
    type: str


class Block(NamedTuple):
    """Instructions that run one after the other, and the branch or return after them, if any."""

    instructions: list[Instruction]
    end: Instruction | None


class Program(NamedTuple):
    """One kernel."""

    name: str
    parameters: list[Parameter]
    threads: int
    blocks: list[Block]
    labels: dict[str, int]  # to places in blocks


def read_statement(text: str) -> Instruction:
    """Read one instruction."""
    found = re.fullmatch(r"(?:@(!?)%(\w+)\s+)?([\w.:]+)\s*(.*)", text)
    if found is None:
        raise NotImplementedError(f"no statement of PTX as Triton prints it: {text}")
    negated, register, opcode, rest = found.groups()
    guard = None if register is None else Guard(register, negated == "!")
    return Instruction(opcode, tuple(_OPERAND.findall(rest)), guard)


def read_program(ptx: str) -> Program:
    """Read the one kernel of a text."""
    head, _, body = ptx.partition(".reqntid")
    entry = re.search(r"\.entry (\w+)\(", head)
    threads, _, body = body.partition("{")
    assert entry is not None
    parameters = [
        Parameter(name, kind)
        for kind, name in re.findall(r"\.param \.(\w+)\s[^,)]*?(\w+_param_\d+)", head)
    ]
    blocks: list[Block] = []
    labels: dict[str, int] = {}
    current: list[Instruction] = []
    for line in body.splitlines():
        code = line.partition("//")[0].strip()
        if label := re.fullmatch(r"(\$\w+):", code):
            blocks.append(Block(current, None))
            current = []
            labels[label[1]] = len(blocks)
            continue
        if code.startswith(".section"):  # what debuggers read
            break
        for text in code.split(";"):
            if text.strip(" \t{}") == "" or text.strip().startswith("."):
                continue
            instruction = read_statement(text.strip())
            if instruction.parts[0] in ("bra", "ret"):
                blocks.append(Block(current, instruction))
                current = []
            else:
                current.append(instruction)
    return Program(entry[1], parameters, int(threads), blocks, labels)
