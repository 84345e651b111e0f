"""Models and attention that several ranks share."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from entropy_regularization.attention.api import AttentionOutput
from entropy_regularization.integrations.layers import heads_of
from entropy_regularization.reduction import has_ranks


class Division(NamedTuple):
    """Over which dimension of which mesh tensor parallelism divides a weight, and the weight."""

    mesh: Any
    dimension: int
    weight: Any


def join_heads(found: AttentionOutput, module: nn.Module, name: str) -> AttentionOutput:
    """Give every rank the rows of all heads, if tensor parallelism divided them.

    Every rank must call it. The loss is the same on all of them, so a rank's own heads take the
    gradient of the joined ones as it is; that of the others stays where they are.

    Args:
        found: of the heads of this rank.
        module: the one that attends; its configuration tells how many heads there are.
        name: its name.

    Returns:
        ``entropy`` and, where every head has its own, ``allowed_keys`` of all heads, in the order
        of the ranks; the rest as it came.

    Raises:
        RuntimeError: if it cannot be told how the heads are divided.
    """
    division = next(_divisions(module), None) if has_ranks() else None
    if division is None:
        return found
    heads, total = found.entropy.shape[1], heads_of(getattr(module, "config", None))
    if heads == total or (total is None and not _projects(module, found)):
        return found
    ranks = division.mesh.size(division.dimension)
    if heads * ranks != total:
        of_all = "nothing tells of how many" if total is None else f"the model has {total}"
        raise RuntimeError(
            f"{name} attends with {heads} heads on each of {ranks} ranks (tensor parallelism), and "
            f"{of_all}; record the model without tensor parallelism, or a transformers model whose "
            "heads are divided evenly."
        )
    counts = found.allowed_keys
    return found._replace(
        entropy=_join(found.entropy, division),
        allowed_keys=counts if counts.shape[1] == 1 else _join(counts, division),
    )


def tells_heads(module: nn.Module) -> bool:
    """Tell whether it is known how many heads a module has of which a rank may hold a part."""
    divided = has_ranks() and next(_divisions(module), None) is not None
    return not divided or heads_of(getattr(module, "config", None)) is not None


# torch.distributed.tensor is imported where there are ranks: not every torch has it.


def _join(rows: Tensor, division: Division) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements: list[Any] = [Replicate()] * division.mesh.ndim
    placements[division.dimension] = Shard(1)
    # Backward, which may compute the call again, joins nothing: see CallRecorder._rows.
    with nullcontext() if torch.compiler.is_compiling() else _disable_current_modes():
        joined = DTensor.from_local(rows, division.mesh, placements, run_check=False)
        result: Tensor = joined.full_tensor()
    return result


def _divisions(part: nn.Module, apart: bool = False) -> Iterator[Division]:
    """Walk over the weights, inside a module that runs, that tensor parallelism divides.

    Args:
        part: the module, or one inside it.
        apart: whether FSDP, which gathers the weights of what runs, has divided those again. It
            then comes first among the dimensions of the mesh.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    for weight in part.parameters(recurse=False):
        if isinstance(weight, DTensor):
            divided = [at for at, each in enumerate(weight.placements) if each.is_shard()]
            if len(divided) == 1 + apart:
                yield Division(weight.device_mesh, divided[-1], weight)
    for child in part.children():
        yield from _divisions(child, apart or isinstance(child, FSDPModule))


def _projects(module: nn.Module, found: AttentionOutput) -> bool:
    """Tell whether a weight, divided by its rows, makes as many heads as there are here."""
    rows = found.output.shape[1] * found.output.shape[-1]
    return any(
        each.weight.placements[each.dimension].is_shard(0)
        and each.weight.to_local().shape[0] in (rows, 3 * rows)
        for each in _divisions(module)
    )


def is_distributed(function: object) -> bool:
    """Tell whether a function is one of torch's that compute over several ranks."""
    module = getattr(function, "__module__", None) or ""
    return bool(module.startswith("torch.distributed."))


def is_data_parallel(module: nn.Module) -> bool:
    """Tell whether torch's data parallelism has wrapped a module, by name: it need not be there."""
    wrappers = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
    return any(kind.__name__ in wrappers for kind in type(module).__mro__)
