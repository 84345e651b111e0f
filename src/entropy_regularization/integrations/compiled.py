"""torch.compile: who is compiled, and recorders that are not compiled anew at every recording."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import nn

# Where torch.compile, its checkpoint wrapper and FSDP keep the module that they wrap.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
KEPT = "_entropy_recorders"  # attribute of a compiled model that holds its recorders


class Keepable(Protocol):
    """A recorder that says whether it is in use."""

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
    if not any(map(is_compiled, model.modules())):
        return make(model, **options)
    kept: dict[str, R] = model.__dict__.setdefault(KEPT, {})
    wanted = repr(sorted(options.items()))
    if wanted not in kept or kept[wanted].listens:  # one recording inside another needs two
        kept[wanted] = make(model, **options)
    return kept[wanted]


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


def is_compiled(module: nn.Module) -> bool:
    """Tell whether torch.compile was applied to a module, or to its forward."""
    return (
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
    )
