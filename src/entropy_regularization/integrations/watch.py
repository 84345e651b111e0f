"""The watch over a forward pass: which passes need one, and what it has found.

A recording that silently misses layers is a wrong answer. So the first forward pass of each kind is
watched (``unseen``); later ones of a kind in which everything was heard are not.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from entropy_regularization.integrations.source import (
    IF_COMPILED,
    MATRIX_PRODUCTS,
    attends_by_source,
    other_name_in,
)
from entropy_regularization.integrations.stack import calling_module
from entropy_regularization.integrations.unseen import Heard, Judged, UnseenAttention

SWITCHES = (bool, str)  # types of attributes that may choose the code that runs
# Those of attributes that every module has, or that change from pass to pass.
NUMBERS_AND_STATE = frozenset((int, float, type(None), dict, OrderedDict, list, tuple, set, Tensor))
UNKNOWN_SOFTMAX = "takes a softmax that earlier passes did not (run the pass again)"
IN_A_THREAD = "takes a softmax in a thread of its own, where nothing tells whether it attends"
OTHER_LAYOUT = "lays its weights out otherwise than in earlier passes"

# Kinds of passes that were watched and in which everything was heard; what was judged in each.
_sound: "weakref.WeakKeyDictionary[nn.Module, dict[object, dict[tuple[Any, ...], Judged]]]"
_sound = weakref.WeakKeyDictionary()


_watching: list[Any] = []  # the stance of the compiler, once for every watch that runs
_lock = threading.Lock()


@contextmanager
def _as_written() -> Iterator[None]:
    """Run compiled functions as they were written, until the last watch ends, in any order."""
    with _lock:
        stance = _watching[0] if _watching else torch.compiler.set_stance("force_eager")
        _watching.append(stance)
    try:
        yield
    finally:
        with _lock:
            _watching.pop()
            if not _watching:
                stance.__exit__(None, None, None)


class Watch:
    """Watches the first forward pass of each kind that a model makes, see _kind_of.

    In that pass compiled parts run as they were written. A model that is compiled as a whole is not
    watched, because a compiler that meets a watch compiles everything anew; its source is read.

    Attributes:
        found: the modules that attend unheard, each with how.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._mode: UnseenAttention | None = None
        self._until_end = ExitStack()
        self._thread = 0
        self._kind: object = None
        self._judged: dict[tuple[Any, ...], Judged] = {}
        self.found: dict[str, str] = {}

    def is_interrupted(self) -> bool:
        """Tell whether the pass that is watched is no longer running: KeyboardInterrupt ended it.

        No hook is called then.
        """
        assert self._mode is not None
        return self._thread == threading.get_ident() and calling_module(self._mode.names) is None

    def __getstate__(self) -> dict[str, Any]:
        """A copied model is not being watched."""
        return {**self.__dict__, "_mode": None, "_until_end": ExitStack(), "_judged": {}}

    def begin(self) -> None:
        """A recording begins; what an earlier one found is not its own."""
        self.found = {}

    def enter(
        self, names: Mapping[nn.Module, str], part: nn.Module, given: Mapping[str, Any]
    ) -> None:
        """Begin to watch, unless a pass of this kind was found sound before.

        Args:
            names: the modules of the model and their names.
            part: the module whose pass begins, the model itself or a part that is called alone.
            given: its arguments, by name.
        """
        if self._mode is not None:
            return
        self._kind = _kind_of(names, part, given)
        known = _sound.get(self._model, {}).get(self._kind)
        if known is not None:
            self._judged = known
            return
        _leave_interrupted()
        mode = UnseenAttention(names)
        mode.found.update(_scripted(names))
        # Nothing could be seen of compiled functions and parts, which would be compiled anew.
        self._thread = threading.get_ident()  # modes are of a thread
        self._until_end.enter_context(_as_written())
        self._until_end.enter_context(mode)
        self._mode = mode
        _running.append(self)

    def knows_layout(self, place: tuple[Any, ...]) -> bool:
        """Tell whether an earlier pass has told which of four dimensions holds the heads."""
        judged = None if self._mode is not None else self._judged.get(place)
        return judged is not None and judged.attends and judged.layout_is_told

    def hear(
        self,
        place: tuple[Any, ...],
        name: str,
        weights: Tensor,
        deposit: Callable[[], None] | None,
    ) -> None:
        """Take the weights of a softmax: record their rows if they attend.

        Args:
            place: where in the code of which class they were made.
            name: of the module that made them.
            weights: what the softmax has made.
            deposit: records the rows; None if they are not known.
        """
        mode = self._mode
        if mode is not None and threading.get_ident() == self._thread:
            mode.hear(weights, Heard(place, name, deposit, weights.shape))
        elif mode is not None:
            if weights.dim() > 2:
                mode.found[name] = IN_A_THREAD
        elif place not in self._judged:
            _sound.get(self._model, {}).pop(self._kind, None)
            self.found[name] = UNKNOWN_SOFTMAX
        elif self._judged[place].attends:
            if deposit is None:
                self.found[name] = OTHER_LAYOUT
            else:
                deposit()

    def read(self, names: Mapping[nn.Module, str], *, torch_is_heard: bool) -> None:
        """Read the source of a compiled model's modules, since its pass cannot be watched.

        Args:
            names: the modules and their names.
            torch_is_heard: whether calls of torch's own function, and of the library's, are
                recorded nevertheless.
        """
        for part, name in names.items():
            how = other_name_in(part.__dict__.values()) or attends_by_source(type(part))  # type: ignore[arg-type]
            if how is not None and not (torch_is_heard and how in IF_COMPILED):
                self.found[name] = how

    def leave(self, *, finished: bool) -> None:
        """End the watch of this pass.

        Args:
            finished: whether it came to its end; otherwise nothing is known about its rest.
        """
        if self._mode is None or threading.get_ident() != self._thread:  # a part in a thread
            return
        mode, self._mode = self._mode, None
        _running.remove(self)
        self._until_end.close()
        judged = mode.judged()
        self.found.update(mode.found)
        if finished and not mode.found:
            _sound.setdefault(self._model, {})[self._kind] = judged


_running: list[Watch] = []


def _leave_interrupted() -> None:
    for watch in list(_running):
        if watch.is_interrupted():
            watch.leave(finished=False)


def _kind_of(names: Mapping[nn.Module, str], part: nn.Module, given: Mapping[str, Any]) -> object:
    """Return what tells passes apart that may run different code.

    Which arguments are given (an image beside the text), and the switches: those among the
    arguments, those of every module (``training``, a flag for a fused function) and of the objects
    that it holds, and the code of functions that were put in the place of others, and of hooks.
    """
    switches: list[Any] = []
    helpers: dict[int, Any] = {}
    for each in names:  # at every pass: cheap
        switches.append(type(each))
        for hook in (*each._forward_pre_hooks.values(), *each._forward_hooks.values()):
            switches.append(getattr(hook, "__code__", type(hook)))
        for value in each.__dict__.values():
            if type(value) in NUMBERS_AND_STATE:  # nearly all
                continue
            if type(value) in SWITCHES:
                switches.append(value)
            else:
                helpers[id(value)] = value
                switches.append(getattr(value, "__code__", type(value)))
    switches += [getattr(kind, "forward", None) for kind in dict.fromkeys(map(type, names))]
    for helper in helpers.values():  # configs, and processors that hold a module's code
        values = getattr(helper, "__dict__", {}).values()
        switches += [value for value in values if isinstance(value, SWITCHES)]
    arguments = frozenset(
        (name, value if isinstance(value, SWITCHES) and len(str(value)) < 32 else None)
        for name, value in given.items()
        if value is not None
    )
    return hash((names.get(part), arguments, torch.is_grad_enabled(), *switches))


def _scripted(names: Mapping[nn.Module, str]) -> dict[str, str]:
    """Return the modules that attend inside torch.jit, where nothing is heard."""
    found = {}
    for part, name in names.items():
        if isinstance(part, torch.jit.ScriptModule) and hasattr(part, "inlined_graph"):
            graph = str(part.inlined_graph)
            weighs = "softmax" in graph and any(word in graph for word in MATRIX_PRODUCTS)
            if weighs or "scaled_dot_product_attention" in graph:
                found[name] = "attends inside torch.jit"
    return found
