"""Which attention a model runs is a field of its configs; it is set, and put back exactly."""

import functools
import threading
import weakref
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from entropy_regularization.integrations.modules import having
from entropy_regularization.integrations.transformers.attention import FLATTENED, NAME

IMPLEMENTATION = "_attn_implementation"  # attribute of a config: the attention that its model runs

_lock = threading.RLock()  # models of several threads may have been built from one config


class AttentionSwitch:
    """What one config said before it was switched, and who needs it switched.

    Several recorders may need it at once, of one model, of a part of it, or of another model with
    the same config; the last that leaves puts it back, in whatever order they leave. A copy of a
    recorder takes along copies of its switches, for the copied config.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._implementation: str | None = config._attn_implementation
        self._switched_to = self._implementation
        self._holders: list[object] = []
        _switches[id(config)] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied config is switched already when a recorder next asks for it."""
        self.__dict__.update(state)
        with _lock:
            _switches[id(self._config)] = self

    @classmethod
    def of(cls, config: Any, holder: object) -> "AttentionSwitch":
        """Return the switch of a config, which the holder now holds until ``off(holder)``."""
        switch = _switches.get(id(config)) or cls(config)
        if not any(each is holder for each in switch._holders):
            switch._holders.append(holder)
        return switch

    def replaces(self, implementation: str, config: Any) -> bool:
        """Tell whether a config ran an attention before it was switched."""
        return self._config is config and self._implementation == implementation

    def follow_flash_attention(self) -> None:
        """Let a config that ran flash attention take several texts in one row apart, as it does."""
        switched = self._config._attn_implementation == NAME
        if switched and _function_of(self._implementation) is flash_attention_forward:
            self._config._attn_implementation_internal = FLATTENED

    def off(self, holder: object) -> None:
        """Put the config back as it was, if nobody else needs the entropy attention."""
        with _lock:
            remaining = [each for each in self._holders if each is not holder]
            was_last = bool(self._holders) and not remaining
            self._holders = remaining
            if was_last:
                if self._config._attn_implementation in (NAME, FLATTENED):  # nobody set it since
                    self._config._attn_implementation_internal = self._implementation
                _switches.pop(id(self._config), None)

    def pause(self, holder: object) -> None:
        """Let go of the config for a while."""
        with _lock:
            self._switched_to = self._config._attn_implementation
            self.off(holder)

    def resumed(self, holder: object) -> "AttentionSwitch":
        """Return the switch of the config, which is again as it was before the pause."""
        with _lock:
            switch = AttentionSwitch.of(self._config, holder)
            self._config._attn_implementation_internal = self._switched_to
        return switch


# By the id of the config, which the switch keeps alive; whoever holds a switch keeps that.
_switches: "weakref.WeakValueDictionary[int, AttentionSwitch]" = weakref.WeakValueDictionary()


def switch_on(
    model: PreTrainedModel, modules: Collection[nn.Module], holder: object
) -> list[AttentionSwitch]:
    """Let every part of a model that can run the entropy attention; return what to switch off.

    Args:
        model: the model.
        modules: those of the model, itself among them.
        holder: who needs it, until ``off(holder)`` of every switch.

    Raises:
        ValueError: if the model runs an attention function that transformers did not bring.
    """
    with _lock:
        parts = having(modules, "config")  # every PreTrainedModel has one
        holding = [part for part in parts if hasattr(part.config, IMPLEMENTATION)]
        for part in holding:
            _refuse_registered(getattr(part.config, IMPLEMENTATION))
        switches = [AttentionSwitch.of(config, holder) for config in _configs_of(holding)]
        try:
            models = [part for part in parts if isinstance(part, PreTrainedModel)]
            can_set = [each._can_set_attn_implementation() for each in models]
            if any(can_set):
                model.set_attn_implementation(NAME)
                _set_copies(holding if all(can_set) else _in_settable(model, set(holding)))
            for switch in switches:
                switch.follow_flash_attention()
        except BaseException:
            for switch in switches:
                switch.off(holder)
            raise
    return switches


def _function_of(name: str | None) -> Any:
    """Return the function that is registered for an attention, None for the models' own."""
    if name is None or name not in ALL_ATTENTION_FUNCTIONS:
        return None
    function: Any = ALL_ATTENTION_FUNCTIONS[name]
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _refuse_registered(name: str | None) -> None:
    """Refuse an attention function that somebody registered, which may attend differently.

    One that divides the sequence over ranks, for instance, gets a part of the keys. Kernels of the
    hub, which have a slash in their names, are other ways to the same numbers.
    """
    function = _function_of(name)
    if function is None or "/" in str(name):
        return
    # what functools.wraps leaves as it is
    module = getattr(function, "__globals__", {}).get("__name__") or type(function).__module__
    if module.partition(".")[0] not in ("transformers", "entropy_regularization"):
        raise ValueError(
            f"the model attends by {name!r}, a function of {module} that a recording would replace "
            "by softmax attention; if that computes the same, call "
            f"model.set_attn_implementation({'eager' if name == 'sdpa' else 'sdpa'!r}) first."
        )


def _configs_of(holding: Iterable[nn.Module]) -> list[Any]:
    """Return every config that modules hold, and those of its parts, once."""
    held = {id(part.config): part.config for part in holding}
    found = {id(each): each for config in held.values() for each in _with_parts(config)}
    return list(found.values())


def _set_copies(holding: Iterable[nn.Module]) -> None:
    """Reach the configs that a part holds as a copy (xclip; T5 in 5.17)."""
    for config in {id(part.config): part.config for part in holding}.values():
        config._attn_implementation_internal = NAME  # type: ignore[union-attr]


def _in_settable(
    module: nn.Module, holding: Collection[nn.Module], can_set: bool = False
) -> list[nn.Module]:
    """Return which modules are in a part that can be set, and in none inside it that cannot."""
    if isinstance(module, PreTrainedModel):
        can_set = module._can_set_attn_implementation()
    found = [module] if can_set and module in holding else []
    for child in module.children():
        found += _in_settable(child, holding, can_set)
    return found


def _with_parts(config: Any) -> list[Any]:
    """Return a config and, recursively, the configs of its parts."""
    result = [config]
    for key in getattr(config, "sub_configs", {}):
        part = getattr(config, key, None)
        if part is not None:
            result += _with_parts(part)
    return result
