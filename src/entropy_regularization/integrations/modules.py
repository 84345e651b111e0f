"""The modules of a model, which may be thousands: a recorder looks at all of them in every pass."""

from collections.abc import Iterable

from torch import nn


def qualified_names(model: nn.Module) -> dict[nn.Module, str]:
    """Return every module of a model with its name, in the order of ``named_modules()``.

    That makes a generator for each level that a module is deep.
    """
    names: dict[nn.Module, str] = {}
    _add_names(model, "", names)
    return names


def _add_names(module: nn.Module, name: str, names: dict[nn.Module, str]) -> None:
    names[module] = name
    before = f"{name}." if name else ""
    for key, child in module._modules.items():
        if child is not None and child not in names:
            _add_names(child, before + key, names)


def having(modules: Iterable[nn.Module], attribute: str) -> list[nn.Module]:
    """Return the modules for which ``hasattr`` is true.

    Which it is slow to deny, since torch's ``__getattr__`` raises an error. So a module is asked
    only if its class has the attribute or answers for what is not there; what is registered
    (parameters, buffers, modules) is not looked for.
    """
    modules = list(modules)
    kinds = {
        kind
        for kind in set(map(type, modules))
        if hasattr(kind, attribute) or kind.__getattr__ is not nn.Module.__getattr__  # type: ignore[attr-defined]
    }
    return [
        part
        for part in modules
        if attribute in part.__dict__ or (type(part) in kinds and hasattr(part, attribute))
    ]
