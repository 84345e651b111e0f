"""What the instructions of PTX that compute numbers mean, lane by lane, as functions of numpy."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Lanes = NDArray[Any]
BITS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


class Meaning(NamedTuple):
    """A function, the types of its operands and that of its result."""

    function: Callable[..., Lanes]
    sources: list[str]
    result: str


@functools.cache
def numpy_type(name: str) -> np.dtype[Any]:
    """Return numpy's type for one of PTX; bfloat16 has none and stays bits."""
    if name in ("pred", "bf16", "bf16x2", "f16x2"):
        return np.dtype({"pred": np.bool_, "bf16": np.uint16}.get(name, np.uint32))
    kind = {"b": "u", "u": "u", "s": "i", "f": "f"}[name[0]]
    return np.dtype(f"{kind}{int(name[1:]) // 8}")


def to_bfloat16(x: Lanes) -> Lanes:
    """Round float32 to bits of bfloat16, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def from_bfloat16(bits: Lanes) -> Lanes:
    """Return bits of bfloat16 as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_float16(x: Lanes) -> Lanes:
    """Round float32 to bits of float16, ties to even."""
    return x.astype(np.float16).view(np.uint16)


_PAIRS = {"bf16x2": to_bfloat16, "f16x2": to_float16}


def _pair(first: Lanes, second: Lanes) -> Lanes:
    """Put two halves into a word, the second below."""
    return (first.astype(np.uint32) << 16) | second


def _shift_left(x: Lanes, by: Lanes) -> Lanes:
    return np.where(by < 8 * x.itemsize, x << np.minimum(by, 8 * x.itemsize - 1).astype(x.dtype), 0)


def _shift_right(x: Lanes, by: Lanes) -> Lanes:
    """Fill with the sign, or with zeros if there is none."""
    last = 8 * x.itemsize - 1
    shifted = x >> np.minimum(by, last).astype(x.dtype)
    return np.where((by > last) & (x.dtype.kind == "u"), 0, shifted)


def _extract(x: Lanes, start: Lanes, length: Lanes) -> Lanes:
    bits = 8 * x.itemsize
    above = _shift_left(x, (bits - start - length).astype(np.uint32))
    return _shift_right(above.astype(x.dtype), (bits - length).astype(np.uint32))


def _divide(a: Lanes, b: Lanes) -> Lanes:
    """Divide integers of up to 32 bits towards zero."""
    return np.trunc(a.astype(np.float64) / np.where(b == 0, 1, b))


def _remainder(a: Lanes, b: Lanes) -> Lanes:
    return np.fmod(a, np.where(b == 0, 1, b))


def _permute(low: Lanes, high: Lanes, selector: Lanes) -> Lanes:
    """Choose four of eight bytes."""
    bytes_of = (high.astype(np.uint64) << np.uint64(32)) | low
    result = np.zeros((), np.uint64)
    for place in range(4):
        chosen = (selector >> (4 * place)) & 15
        if (chosen > 7).any():
            raise NotImplementedError("prmt that spreads a sign")
        byte = (bytes_of >> (8 * chosen).astype(np.uint64)) & np.uint64(255)
        result = result | byte << np.uint64(8 * place)
    return result


def _fused(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """Multiply and add; the product of two float32 is exact in float64."""
    return a.astype(np.float64) * b + c


def _unordered(compare: Callable[..., Lanes]) -> Callable[..., Lanes]:
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


def _ordered(compare: Callable[..., Lanes]) -> Callable[..., Lanes]:
    return lambda a, b: compare(a, b) & ~np.isnan(a) & ~np.isnan(b)


_COMPARE: dict[str, Callable[..., Lanes]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_PLAIN: dict[str, Callable[..., Lanes]] = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "not": np.invert, "neg": np.negative, "abs": np.abs,
    "max": np.fmax, "min": np.fmin, "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt,
    "mul": np.multiply, "fma": _fused, "mov": np.asarray, "rem": _remainder, "prmt": _permute,
}  # fmt: skip
_WITH_NAN: dict[str, Callable[..., Lanes]] = {"max": np.maximum, "min": np.minimum}
# with operands of other types, the last ones
_OTHER: dict[str, tuple[Callable[..., Lanes], list[str]]] = {
    "shl": (_shift_left, ["u32"]), "shr": (_shift_right, ["u32"]), "bfe": (_extract, ["u32"] * 2),
    "selp": (lambda first, second, chosen: np.where(chosen, first, second), ["pred"]),
}  # fmt: skip


def meaning_of(opcode: str, operands: int) -> Meaning:
    """Return what an instruction computes from ``operands`` numbers.

    Raises:
        NotImplementedError: for an instruction that Triton has not been seen to use here.
    """
    name, *modifiers = opcode.split(".")
    kind = modifiers[-1] if modifiers else ""
    if name in ("mul", "mad") and modifiers[0] in ("lo", "hi", "wide"):
        return _product(name, modifiers[0], kind)
    if name == "cvt":
        return _conversion(*modifiers[-2:])
    if name == "setp" and len(modifiers) == 2:
        return Meaning(_comparison(modifiers[0], kind), [kind] * 2, "pred")
    if name in _OTHER:
        function, others = _OTHER[name]
        sources = [kind] * (operands - len(others)) + others
        return Meaning(function, sources, kind)
    if name == "div":
        return Meaning(np.divide if kind[0] == "f" else _divide, [kind] * 2, kind)
    plain = (_WITH_NAN if "NaN" in modifiers else _PLAIN).get(name)
    if plain is None:
        raise NotImplementedError(opcode)
    if "relu" in modifiers:
        return Meaning(lambda *values: np.maximum(plain(*values), 0), [kind] * operands, kind)
    return Meaning(plain, [kind] * operands, kind)


def _comparison(which: str, kind: str) -> Callable[..., Lanes]:
    compare = _COMPARE[which.removesuffix("u") if kind[0] == "f" else which]
    if kind[0] != "f":
        return compare
    return _unordered(compare) if which.endswith("u") else _ordered(compare)


def _product(name: str, half: str, kind: str) -> Meaning:
    bits = int(kind[1:])
    double = f"{kind[0]}{2 * bits}"

    def low(a: Lanes, b: Lanes, c: Lanes | int = 0) -> Lanes:
        return a * b + c

    def wide(a: Lanes, b: Lanes, c: Lanes | int = 0) -> Lanes:
        return a.astype(numpy_type(double)) * b.astype(numpy_type(double)) + c

    def high(a: Lanes, b: Lanes, c: Lanes | int = 0) -> Lanes:
        return (wide(a, b) >> bits).astype(a.dtype) + c

    result = double if half == "wide" else kind
    if half == "hi" and bits > 32:
        raise NotImplementedError("the upper half of a product of 64 bits")
    function = {"lo": low, "wide": wide, "hi": high}[half]
    return Meaning(function, [kind, kind, *([result] if name == "mad" else [])], result)


def _conversion(to: str, of: str) -> Meaning:
    if to in _PAIRS:
        halve = _PAIRS[to]
        return Meaning(lambda first, second: _pair(halve(first), halve(second)), [of, of], to)
    if to == "bf16":
        return Meaning(to_bfloat16, [of], to)
    if of == "bf16":
        return Meaning(from_bfloat16, [of], to)
    if numpy_type(of).kind == "f" and numpy_type(to).kind != "f":
        raise NotImplementedError(f"cvt.{to}.{of}")
    return Meaning(np.asarray, [of], to)
