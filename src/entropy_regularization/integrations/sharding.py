"""Attention that several ranks share."""

import sys
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from entropy_regularization.attention.api import AttentionOutput
from entropy_regularization.reduction import has_ranks

_DTENSOR = "torch.distributed.tensor"  # where it was never imported, nothing is sharded


def join_heads(found: AttentionOutput, module: nn.Module, name: str) -> AttentionOutput:
    """Give every rank the rows of all heads, if tensor parallelism divided them.

    Every rank must call it. The loss is the same on all of them, so a rank's own heads take the
    gradient of the joined ones as it is; that of the others stays where they are.

    Args:
        found: of the heads of this rank.
        module: the one that attends.
        name: its name.

    Returns:
        ``entropy`` and, where every head has its own, ``allowed_keys`` of all heads, in the order
        of the ranks; the rest as it came.

    Raises:
        RuntimeError: if it cannot be told how the heads are divided.
    """
    mesh = _mesh_of(module)
    heads = found.entropy.shape[1]
    total = getattr(getattr(module, "config", None), "num_attention_heads", None)
    if mesh is None or heads == total:  # the latter where they were joined before the attention
        return found
    if heads * mesh.size() != total:
        of_all = "nothing tells of how many" if total is None else f"the model has {total}"
        raise RuntimeError(
            f"{name} attends with {heads} heads on each of {mesh.size()} ranks (tensor "
            f"parallelism), and {of_all}; record the model without tensor parallelism, or a "
            "transformers model whose heads are divided evenly."
        )
    counts = found.allowed_keys
    return found._replace(
        entropy=_join(found.entropy, mesh),
        allowed_keys=counts if counts.shape[1] == 1 else _join(counts, mesh),
    )


def _join(rows: Tensor, mesh: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    # Backward, which may compute the call again, joins nothing: see CallRecorder._rows.
    with nullcontext() if torch.compiler.is_compiling() else _disable_current_modes():
        joined = DTensor.from_local(rows, mesh, [Shard(1)], run_check=False)
        result: Tensor = joined.full_tensor()
    return result


def _mesh_of(module: nn.Module) -> Any:
    """Return the mesh over which the weights of a module that runs are divided, None if none is.

    Those that FSDP divided are whole while the module runs that it was told to gather.
    """
    if not has_ranks() or _DTENSOR not in sys.modules:
        return None
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    for part in module.modules():
        if part is not module and isinstance(part, FSDPModule):
            continue
        for weight in part.parameters(recurse=False):
            if isinstance(weight, DTensor):
                mesh: Any = weight.device_mesh
                divided = [at for at, each in enumerate(weight.placements) if each.is_shard()]
                if len(divided) == 1:
                    return mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[divided[0]]]
    return None


def is_distributed(function: object) -> bool:
    """Tell whether a function is one of torch's that compute over several ranks."""
    return getattr(function, "__module__", "").startswith(_DTENSOR)
