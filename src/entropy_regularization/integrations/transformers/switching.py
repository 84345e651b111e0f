"""Which attention a model runs is a field of its configs; it is set, and put back exactly."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from entropy_regularization.integrations.transformers.attention import NAME

SWITCH = "_entropy_switch"  # attribute of a model while its attention is switched


class AttentionSwitch:
    """Switches one model, and the parts of it that use the attention interface, and back.

    Several recorders may need it at once, in any order; the last that leaves puts all back.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._saved: list[tuple[Any, str]] = []
        self._holders: list[object] = []

    @classmethod
    def on(cls, model: PreTrainedModel, holder: object) -> "AttentionSwitch":
        """Let every part of a model that can run the entropy attention; return the model's switch.

        Args:
            model: the model.
            holder: who needs it, until ``off(holder)``.
        """
        switch: AttentionSwitch | None = model.__dict__.get(SWITCH)
        if switch is None:
            switch = cls(model)
            model.__dict__[SWITCH] = switch
            switch._set()
        if not any(each is holder for each in switch._holders):
            switch._holders.append(holder)
        return switch

    def off(self, holder: object) -> None:
        """Put every config back as it was, if nobody else needs the entropy attention."""
        self._holders = [each for each in self._holders if each is not holder]
        if not self._holders:
            while self._saved:
                config, implementation = self._saved.pop()
                config._attn_implementation_internal = implementation
            self._model.__dict__.pop(SWITCH, None)

    def _set(self) -> None:
        self._save()
        parts = (part for part in self._model.modules() if isinstance(part, PreTrainedModel))
        if any(part._can_set_attn_implementation() for part in parts):
            self._model.set_attn_implementation(NAME)
            self._set_copies(self._model, can_set=False)

    def _save(self) -> None:
        seen: set[int] = set()
        for part in self._model.modules():
            config = getattr(part, "config", None)
            if config is not None and hasattr(config, "_attn_implementation"):
                for each in _with_parts(config):
                    if id(each) not in seen:
                        seen.add(id(each))
                        self._saved.append((each, each._attn_implementation))

    def _set_copies(self, module: nn.Module, can_set: bool) -> None:
        """Reach the configs that a part holds as a copy (xclip; T5 in 5.17)."""
        if isinstance(module, PreTrainedModel):
            can_set = module._can_set_attn_implementation()
        if can_set and hasattr(getattr(module, "config", None), "_attn_implementation"):
            module.config._attn_implementation_internal = NAME  # type: ignore[union-attr]
        for child in module.children():
            self._set_copies(child, can_set)


def _with_parts(config: Any) -> list[Any]:
    """Return a config and, recursively, the configs of its parts."""
    result = [config]
    for key in getattr(config, "sub_configs", {}):
        part = getattr(config, key, None)
        if part is not None:
            result += _with_parts(part)
    return result
