"""torch.compile: who is compiled, and recorders that are not compiled anew at every recording."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from entropy_regularization.integrations.modules import qualified_names

# Where torch.compile, its checkpoint wrapper and FSDP keep the module that they wrap.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
KEPT = "_entropy_recorders"  # attribute of a compiled model that holds its recorders


class Keepable(Protocol):
    """A recorder that says whether it is to be kept, and in use."""

    @property
    def keeps_hooks(self) -> bool:
        """Whether its model is compiled."""

    @property
    def listens(self) -> bool:
        """Whether it was started and not yet stopped."""


R = TypeVar("R", bound=Keepable)


def kept_or_new(make: Callable[..., R], model: nn.Module, **options: Any) -> R:
    """Return a recorder of a model; a compiled model keeps it for the next recording.

    Args:
        make: the recorder's class.
        model: the model, or what torch.compile returned for it.
        options: arguments of the recorder.
    """
    recorder = make(model, **options)
    if not recorder.keeps_hooks:
        return recorder
    kept: dict[str, R] = model.__dict__.setdefault(KEPT, {})
    wanted = repr(sorted(options.items()))
    if wanted not in kept or kept[wanted].listens:  # one recording inside another needs two
        kept[wanted] = recorder
    return kept[wanted]


def refuse_export(model: nn.Module) -> None:
    """Refuse to record a model that torch.export traces, with tensors that hold no data.

    Raises:
        NotImplementedError: if it does.
    """
    # Dynamo of torch 2.11 takes is_exporting() to be true whatever it compiles for.
    if torch.compiler._is_exporting_flag:
        raise NotImplementedError(
            f"{type(model).__name__} was exported while its entropies are recorded, of which an "
            "exported program keeps none; leave record_entropy first, and if the model is "
            "regularized, call model.eval()."
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of torch.compile and of torch's data parallelism."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def name_of(qualified: str) -> str:
    """Return a module's name without what torch's wrappers put into it."""
    return ".".join(part for part in qualified.split(".") if part not in WRAPPED)


def holds_compiled(model: nn.Module) -> bool:
    """Tell whether torch.compile was applied to a module of a model, or to its forward."""
    forwards: dict[int, Any] = {}  # most modules share that of their class
    for part in qualified_names(model):
        if "_orig_mod" in part._modules or part._compiled_call_impl is not None:
            return True
        forward = part.__dict__.get("forward", getattr(type(part), "forward", None))
        forwards[id(forward)] = forward
    return any(hasattr(each, "_torchdynamo_orig_callable") for each in forwards.values())
