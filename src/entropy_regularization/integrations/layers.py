"""What a layer is called, which kind it is, and whether it was asked for."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

from torch import nn

from entropy_regularization.recording.recorder import Layers

Names = Mapping[nn.Module, str]
CROSS_NAMES = ("cross", "encoder_attn", "encdecattention", "encoder_attention", "multihead_attn")


class Wanted:
    """Which layers were asked for, see record_entropy.

    Raises:
        TypeError: if they are neither indices nor patterns.
        ValueError: if an index is negative.
    """

    def __init__(self, layers: Layers) -> None:
        self.given = layers
        self._wanted: tuple[Any, ...] | None = None
        if layers is None:
            return
        self._wanted = (layers,) if isinstance(layers, str) else _as_tuple(layers)
        if any(isinstance(want, bool) or not isinstance(want, Integral | str) for want in self):
            raise TypeError(
                f"layers is {layers!r}; pass a list of indices, or of patterns of module names."
            )
        if any(not isinstance(want, str) and want < 0 for want in self):
            raise ValueError(
                f"layers is {layers!r}, but how many calls there will be is not known before; "
                "count from the first one, 0, or pass patterns of module names."
            )

    def __iter__(self) -> Iterator[Any]:
        """Walk over the indices and patterns."""
        return iter(self._wanted or ())

    def takes(self, index: int, name: str) -> bool:
        """Tell whether a call is among them; the index is that in its forward pass."""
        if self._wanted is None:
            return True
        return any(
            fnmatch.fnmatchcase(name, want) if isinstance(want, str) else want == index
            for want in self._wanted
        )

    def check(self, model: nn.Module, names_of: Callable[[nn.Module], Names]) -> None:
        """Refuse a pattern that no module has.

        Args:
            model: the model.
            names_of: gives its modules and their names; called only if patterns were asked for.

        Raises:
            ValueError: naming the pattern.
        """
        patterns = [want for want in self if isinstance(want, str)]
        names = names_of(model).values() if patterns else ()
        for want in patterns:
            if not any(fnmatch.fnmatchcase(name, want) for name in names):
                raise ValueError(
                    f"layers pattern {want!r} matches no module of {type(model).__name__}; "
                    "named_modules() has the names."
                )

    def refuse_nothing(self, model: nn.Module, heard: Iterable[str]) -> None:
        """Refuse to return no layer of a model that attended.

        Raises:
            ValueError: naming what attended.
        """
        raise ValueError(
            f"layers={self.given!r} keeps none of the attention calls of {type(model).__name__}; "
            f"choose among those of one pass, in this order: {_listed(heard)}."
        )

    def refuse_beyond(self, model: nn.Module, heard: Sequence[str]) -> None:
        """Refuse an index that no call had.

        Raises:
            ValueError: naming the index, and what attended.
        """
        for want in self:
            if not isinstance(want, str) and want >= len(heard):
                raise ValueError(
                    f"layers={self.given!r} asks for attention call {want} of "
                    f"{type(model).__name__}, which made {len(heard)}, counted from 0; choose "
                    f"among those of one pass, in this order: {_listed(heard)}."
                )


def _listed(heard: Iterable[str]) -> str:
    names = list(dict.fromkeys(heard))
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _as_tuple(layers: Any) -> tuple[Any, ...]:
    return tuple(layers) if isinstance(layers, Iterable) else (None,)


def places_among(
    names: Iterable[str], recorded: Sequence[str], layers: int, others: Iterable[str] = ()
) -> list[int] | None:
    """Tell which layers of a model were recorded in a pass that left some out (layer dropout).

    Args:
        names: of the model's modules, in its order.
        recorded: of the layers that were recorded.
        layers: how many a whole pass records, one after the other in the order of the model.
        others: layers that another pass may record: this one may lack all that are named alike.

    Returns:
        The place of each recorded layer among all that are named like one, but for numbers; None
        if those are not as many as ``layers``, or one was recorded twice.
    """
    kinds = {_without_numbers(name) for name in (*recorded, *others)}
    alike = [name for name in names if _without_numbers(name) in kinds]
    if len(alike) != layers or len(set(recorded)) != len(recorded):
        return None
    return [alike.index(name) for name in recorded]


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def attending(names: Names) -> list[str]:
    """Return the names of modules that are attention by their classes' names, and hold no other."""
    found = [name for part, name in names.items() if "attention" in type(part).__name__.lower()]
    return [name for name in found if not any(other.startswith(f"{name}.") for other in found)]


def kind_of(name: str, module: nn.Module | None = None) -> Literal["self", "cross"]:
    """Tell self from cross attention: the module may say so, else its name does."""
    if getattr(module, "is_cross_attention", False):
        return "cross"
    last = [part for part in name.lower().split(".") if not part.isdigit()][-2:]
    return "cross" if any(word in part for word in CROSS_NAMES for part in last) else "self"


def heads_of(config: Any) -> Any:
    """Return the number of heads that a configuration tells, None if it tells none for all."""
    try:
        return getattr(config, "num_attention_heads", None)
    except RuntimeError:  # transformers' own, of a configuration whose layers differ
        return None
