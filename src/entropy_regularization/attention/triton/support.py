"""What the kernels cannot do, in one sentence each."""

import importlib

import torch
from torch import Tensor

from entropy_regularization.attention.masking import Structure

LARGEST_DIM = 256


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
    interpreted = is_interpreted()
    if query.device.type != "cuda" and not interpreted:
        return (
            f"the inputs are on {query.device.type}; the kernels need a CUDA device "
            "(or Triton's interpreter: set TRITON_INTERPRET=1 before starting Python)."
        )
    if query.device.type == "cuda" and not interpreted and not torch.version.hip:
        major, minor = torch.cuda.get_device_capability(query.device)
        if major < 8:
            return f"the device has compute capability {major}.{minor}; the kernels need 8.0."
    for name, tensor in (("query", query), ("bias", bias), ("sinks", sinks)):
        if tensor is not None and tensor.dtype == torch.float64 and not interpreted:
            return f"{name} is float64; the kernels take float16, bfloat16 and float32."
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[-1] > LARGEST_DIM:
            return (
                f"{name} has head dimension {tensor.shape[-1]}; the kernels hold at most "
                f"{LARGEST_DIM}."
            )
    if value.shape[-1] == 0:
        return "value has head dimension 0; the kernels need at least 1."
    return None


def is_interpreted() -> bool:
    """Tell whether Triton runs kernels by its interpreter in this process."""
    runtime = importlib.import_module("triton").knobs.runtime
    return bool(runtime.interpret)
