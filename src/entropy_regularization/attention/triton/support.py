"""What the kernels cannot do, in one sentence each."""

import importlib
import importlib.util
import re

import torch
from torch import Tensor

from entropy_regularization.attention.masking import Structure

LARGEST_DIM = 256
# The first that puts a fence between an asynchronous copy and the tensor cores that read it.
# Without, results on Blackwell differed from run to run:
# https://github.com/triton-lang/triton/pull/10537
FENCED_TRITON = (3, 7, 1)


def unsupported_reason(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    structure: Structure,
    *,
    scale: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> str | None:
    """Say why the kernels cannot run on these inputs, which are known to fit together.

    Args:
        query: ``[batch, heads, queries, dim]``.
        key: ``[batch, kv_heads, keys, dim]``.
        value: ``[batch, kv_heads, keys, value_dim]``.
        structure: which keys a row may see; every structure is supported.
        scale: every number is supported.
        bias: float64 is refused.
        softcap: every number is supported.
        sinks: float64 is refused.
        dropout: every rate is supported.

    Returns:
        One sentence, or None if they can run.
    """
    if not is_installed():
        return "the package triton is not installed; it comes with torch for CUDA."
    interpreted = is_interpreted()
    reason = None if interpreted else _unsupported_device(query.device)
    if reason is not None:
        return reason
    for name, tensor in (("query", query), ("bias", bias), ("sinks", sinks)):
        if tensor is not None and tensor.dtype == torch.float64 and not interpreted:
            return f"{name} is float64; the kernels take float16, bfloat16 and float32."
    if interpreted and query.dtype == torch.bfloat16 and not interpreter_multiplies_bfloat16():
        return (
            "query is bfloat16, whose bits Triton's interpreter multiplies as integers; pass "
            "float16 or float32 to it."
        )
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[-1] > LARGEST_DIM:
            return (
                f"{name} has head dimension {tensor.shape[-1]}; the kernels hold at most "
                f"{LARGEST_DIM}."
            )
    if value.shape[-1] == 0:
        return "value has head dimension 0; the kernels need at least 1."
    return None


def _unsupported_device(device: torch.device) -> str | None:
    if device.type != "cuda":
        return (
            f"the inputs are on {device.type}; the kernels need a CUDA device "
            "(or Triton's interpreter: set TRITON_INTERPRET=1 before starting Python)."
        )
    if torch.version.hip is not None:
        # Triton's compiler for them ends the process on some of the kernels
        return "torch is built for ROCm; the kernels are for NVIDIA devices."
    capability = compute_capability(device.index)
    if capability < (8, 0):
        version = ".".join(map(str, capability))
        return f"the device has compute capability {version}; the kernels need 8.0."
    if capability[0] in (10, 11) and triton_version() < FENCED_TRITON:
        found, needed = (".".join(map(str, each)) for each in (triton_version(), FENCED_TRITON))
        return (
            f"Triton {found} leaves out fences that tensor cores of compute capability "
            f"{capability[0]}.{capability[1]} need; install Triton {needed} or newer."
        )
    return None


# Facts of the process, which torch.compile takes as constants instead of tracing into Triton.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_installed() -> bool:
    """Tell whether Triton is there."""
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_interpreted() -> bool:
    """Tell whether Triton runs kernels by its interpreter in this process."""
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def interpreter_multiplies_bfloat16() -> bool:
    """Tell whether 1 times 1 is 1 in bfloat16, of which the interpreter stores bits as integers.

    Up to Triton 3.9 it multiplies these.
    """
    import numpy as np  # which the interpreter needs, and nothing else of ours

    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    one = interpreter.TensorHandle(np.full((1, 1), 0x3F80, np.uint16), language.bfloat16)
    nothing = interpreter.TensorHandle(np.zeros((1, 1), np.float32), language.float32)
    product = interpreter.InterpreterBuilder().create_dot(one, one, nothing, None, 0)
    return bool(product.data.item() == 1.0)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def triton_version() -> tuple[int, ...]:
    """Return the three numbers of Triton's version."""
    return tuple(map(int, re.findall(r"\d+", importlib.import_module("triton").__version__)[:3]))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def compute_capability(index: int | None) -> tuple[int, int]:
    """Return the compute capability of a CUDA device; None is the current one."""
    return torch.cuda.get_device_capability(index)
