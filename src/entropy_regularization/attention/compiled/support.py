"""What the compiled kernel computes, and in words what it does not."""

from typing import Any

import torch
from torch import Tensor

from entropy_regularization.attention.blockwise import Problem
from entropy_regularization.attention.compiled.build import unavailable_reason
from entropy_regularization.attention.compiled.passes import PRECISIONS
from entropy_regularization.attention.masking import Structure


def unsupported_reason(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    structure: Structure,
    *,
    bias: Tensor | None,
    softcap: float | None,
    dropout: float,
    **_: Any,
) -> str | None:
    """Return why a call cannot run compiled, or None if it can where there is a kernel."""
    if query.device.type != "cpu":
        return f"the tensors are on {query.device}; it runs on a CPU."
    if query.dtype not in PRECISIONS:
        return f"the inputs are {query.dtype}; it computes float32, bfloat16 and float16."
    if (
        not query.dtype == key.dtype == value.dtype
        or not key.device == value.device == query.device
    ):
        return "query, key and value are not of one dtype on one device."
    given = {"allowed": structure.allowed, "bias": bias, "softcap": softcap}
    for name, option in given.items():
        if option is not None:
            return f"{name} is given, which it does not have."
    if dropout > 0.0:
        return f"dropout is {dropout}, which it does not have."
    return None


def runs(problem: Problem) -> bool:
    """Tell whether a problem runs compiled, when it comes to that; the first call may build."""
    if 0 in (problem.query.numel(), problem.key.numel(), problem.value.numel()):
        return False
    reason = unsupported_reason(**problem._asdict())
    return reason is None and unavailable_reason() is None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # torch has no types for it
def unbuilt_reason() -> str | None:
    """Return why no kernel can be built here, or None; asked when a graph is traced, too."""
    reason = unavailable_reason()
    return None if reason is None else f"{reason}."
