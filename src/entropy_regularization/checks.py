"""Checks on plain numbers and flags, which every room uses."""

import operator
from numbers import Real

import torch

FLOAT32 = torch.finfo(torch.float32)


def is_number(given: object) -> bool:
    """Tell a number, of numpy or not, that float32 can hold; a bool is none."""
    if isinstance(given, bool) or not isinstance(given, int | float | Real):
        return False
    return bool(-FLOAT32.max <= given <= FLOAT32.max)  # type: ignore[operator]


def as_integer(given: object) -> int | None:
    """Return an integer, of numpy or torch or not, as Python's; None for what is none.

    An entry of a mask is none: masks would be taken for places 0 and 1.
    """
    if isinstance(given, bool) or getattr(given, "dtype", None) is torch.bool:
        return None
    try:
        return operator.index(given)  # type: ignore[arg-type]
    except TypeError:
        return None


def check_positive_integer(name: str, given: object) -> int:
    """Return an integer of at least 1.

    Raises:
        TypeError: if it is no integer.
        ValueError: if it is below 1.
    """
    number = as_integer(given)
    if number is None:
        raise TypeError(f"{name} is {given!r}; pass a positive integer.")
    if number < 1:
        raise ValueError(f"{name} is {number}; pass a positive integer.")
    return number


def check_flag(name: str, given: object) -> bool:
    """Return True or False.

    Raises:
        TypeError: if it is neither.
    """
    if not isinstance(given, bool):
        raise TypeError(f"{name} is {given!r}; pass True or False.")
    return given
