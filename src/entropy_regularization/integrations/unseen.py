"""Attention that no recorder hears: a softmax of one's own, or a function under another name.

A recording that silently misses layers is a wrong answer. So the first forward pass of its kind is
watched: every softmax is followed to where its result multiplies other activations, which is what
makes it attention; a router's softmax, which is sorted and scattered, is not, nor is one that mixes
streams (``mixing``).
"""

import ast
import functools
import inspect
import sys
import textwrap
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from entropy_regularization.integrations.interception import (
    goes_around_wrapper,
    original_attention,
    original_multi_head,
)
from entropy_regularization.integrations.mixing import SPLITS, Mixtures, tensors_of
from entropy_regularization.integrations.softmaxes import Softmaxes
from entropy_regularization.integrations.stack import calling_module

PRODUCTS = {
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.mm,
    Tensor.mm,
    torch.bmm,
    Tensor.bmm,
    torch.baddbmm,
    Tensor.baddbmm,
    torch.einsum,
    torch.linalg.matmul,
    torch.linalg.multi_dot,
    torch.tensordot,
    torch.inner,
    torch.addmm,
    Tensor.addmm,
    torch.addbmm,
    Tensor.addbmm,
    torch.sparse.mm,
    functional.linear,
}
MATRIX_PRODUCTS = ("matmul", "bmm", "einsum")  # as source and graphs of torch.jit name them
FLEX = flex_attention.flex_attention.__code__  # computes everything where no watch sees it
SWITCHES = (bool, str)  # types of attributes that may choose the code that runs
# Those of attributes that every module has, or that change from pass to pass.
NUMBERS_AND_STATE = frozenset((int, float, type(None), dict, OrderedDict, list, tuple, set, Tensor))
OWN_SOFTMAX = "computes a softmax of its own"
OTHER_NAMES = {
    original: f"calls {original.__name__} by another name"
    for original in (original_attention, original_multi_head)
}
CALLS_TORCH = "calls torch's own attention, which cannot be heard in a compiled model"
CALLS_OURS = "calls attention_with_entropy, which cannot be heard in a compiled model"
IF_COMPILED = {CALLS_TORCH, CALLS_OURS}  # what can be heard where nothing is compiled

SCALINGS = {torch.mul, Tensor.mul, Tensor.__mul__}
# What may lie between the softmax and the product, where the number of elements may change.
CUTS = {
    Tensor.__getitem__,
    Tensor.expand,
    Tensor.repeat,
    torch.cat,
    torch.concat,
    torch.concatenate,
    torch.stack,
    torch.narrow,
    Tensor.narrow,
    torch.select,
    Tensor.select,
    torch.index_select,
    Tensor.index_select,
    torch.repeat_interleave,
    Tensor.repeat_interleave,
    torch.tile,
    Tensor.tile,
    functional.pad,
}


class UnseenAttention(TorchFunctionMode):
    """Watches what runs inside; changes nothing.

    Args:
        names: the modules of the model and their names.

    Attributes:
        found: the modules that attend unheard, each with how.
    """

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.names = names
        self._kinds = {name: type(part).__name__.lower() for part, name in names.items()}
        self._linears = {name for part, name in names.items() if isinstance(part, nn.Linear)}
        self._softmaxes = Softmaxes()
        self._weights = WeakIdKeyDictionary()  # tensors that came from a softmax -> the module
        self._mixtures = Mixtures(PRODUCTS, CUTS)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run a function of torch; note where softmaxes come from and go to."""
        kwargs = kwargs or {}
        around = goes_around_wrapper(func, args, kwargs)
        result = func(*args, **kwargs)
        if sys._getframe(1).f_code is FLEX:
            self._note(calling_module(self.names), "calls flex_attention")
        if self._softmaxes.made(func, args, kwargs, result):
            name = calling_module(self.names)
            if name is not None:
                self._weights[result] = name
                self._mixtures.softmax(args, kwargs, result)
        elif around:
            self._note(calling_module(self.names), f"calls {func.__name__} by another name")
        else:
            self._mixtures.follow(func, args, kwargs, result)
            if self._weights:
                self._follow(func, tensors_of(args, kwargs), result)
        return result

    def _follow(self, func: Callable[..., Any], tensors: list[Tensor], result: Any) -> None:
        source = next((each for each in tensors if each in self._weights), None)
        if source is None:
            return
        if func is Tensor.__setitem__ and tensors[0].dim() == 4:  # block by block
            self._weights[tensors[0]] = self._weights[source]
        if func in SPLITS:
            for part in tensors_of([result], {}):
                self._weights[part] = self._weights[source]
        if not isinstance(result, Tensor):
            return
        if func in PRODUCTS:
            self._multiply(func, tensors, source, result)
        elif func in SCALINGS and result.numel() > source.numel():
            # Deformable attention weighs the values that it samples; so does a mixture of experts.
            name = self._weights[source]
            if any(word in self._kinds.get(name, "") for word in ("attention", "attn")):
                self._note(name, "weighs sampled values by a softmax of its own")
        elif (
            func in CUTS
            or result.numel() == source.numel()
            # heads that a convolution mixes into more or fewer
            or (source.dim() == result.dim() == 4 and source.shape[2:] == result.shape[2:])
        ):
            self._weights[result] = self._weights[source]

    def _multiply(
        self, func: Callable[..., Any], tensors: list[Tensor], source: Tensor, result: Tensor
    ) -> None:
        """Weights meet another matrix: activations, unless it is one of these."""
        if all(
            each in self._weights and self._mixtures.is_without_scores(each) for each in tensors
        ):
            self._weights[result] = self._weights[source]  # a kernel made of two
        elif source in self._mixtures:
            return
        elif not (
            any(isinstance(each, nn.Parameter) for each in tensors)
            # The weight of a layer that is sharded, cast, or stood in for is no parameter.
            or (func is functional.linear and calling_module(self.names) in self._linears)
        ):
            self._note(self._weights[source], OWN_SOFTMAX)
        elif source.dim() == 4 and result.shape == source.shape:
            self._weights[result] = self._weights[source]  # heads that talk to each other

    def _note(self, name: str | None, how: str) -> None:
        if name is not None:
            self.found[name] = how


# Kinds of passes that were watched and in which everything was heard.
_sound: "weakref.WeakKeyDictionary[nn.Module, set[object]]" = weakref.WeakKeyDictionary()


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
        self.found: dict[str, str] = {}

    def is_interrupted(self) -> bool:
        """Tell whether the pass that is watched is no longer running: KeyboardInterrupt ended it.

        No hook is called then.
        """
        assert self._mode is not None
        return self._thread == threading.get_ident() and calling_module(self._mode.names) is None

    def __getstate__(self) -> dict[str, Any]:
        """A copied model is not being watched."""
        return {**self.__dict__, "_mode": None, "_until_end": ExitStack()}

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
        if self._kind in _sound.get(self._model, ()):
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

    def read(self, names: Mapping[nn.Module, str], *, torch_is_heard: bool) -> None:
        """Read the source of a compiled model's modules, since its pass cannot be watched.

        Args:
            names: the modules and their names.
            torch_is_heard: whether calls of torch's own function, and of the library's, are
                recorded nevertheless.
        """
        for part, name in names.items():
            how = _other_name_in(part.__dict__.values()) or attends_by_source(type(part))  # type: ignore[arg-type]
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
        self.found.update(mode.found)
        if finished and not mode.found:
            _sound.setdefault(self._model, set()).add(self._kind)


_running: list[Watch] = []


def _leave_interrupted() -> None:
    for watch in list(_running):
        if watch.is_interrupted():
            watch.leave(finished=False)


def _kind_of(names: Mapping[nn.Module, str], part: nn.Module, given: Mapping[str, Any]) -> object:
    """Return what tells passes apart that may run different code.

    Which arguments are given (an image beside the text), and the switches: those among the
    arguments, those of every module (``training``, a flag for a fused function) and of the objects
    that it holds, and the code of functions that were put in the place of others.
    """
    switches: list[Any] = []
    helpers: dict[int, Any] = {}
    for each in names:  # at every pass: cheap
        switches.append(type(each))
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


@functools.cache
def attends_by_source(kind: type[nn.Module]) -> str | None:
    """Tell how a module's class attends in its own code, outside the attention interface.

    A class without a forward attends as the one does whose forward it inherits.
    """
    if issubclass(kind, nn.MultiheadAttention):
        return CALLS_TORCH
    owner = next(base for base in kind.__mro__ if "forward" in vars(base))
    how = _attends_in_code(kind)
    return how if how is not None or owner in (kind, nn.Module) else attends_by_source(owner)


def _attends_in_code(kind: type[nn.Module]) -> str | None:
    try:
        tree = _code_of(kind)
    except (OSError, TypeError, SyntaxError):  # made at run time, or written in C
        return None
    source = ast.unparse(tree)
    if "ALL_ATTENTION_FUNCTIONS" in source:
        return None
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    known = getattr(sys.modules.get(kind.__module__), "__dict__", {})
    other = _other_name_in(known.get(name) for name in names)
    if other is not None:
        return other
    if "scaled_dot_product_attention(" in source or "multi_head_attention_forward(" in source:
        return CALLS_TORCH
    if "attention_with_entropy(" in source:
        return CALLS_OURS
    product = any(word in source for word in (*MATRIX_PRODUCTS, " @ "))
    return OWN_SOFTMAX if product and "softmax(" in source else None


def _other_name_in(values: Iterable[object]) -> str | None:
    """Tell how values attend that are torch's own functions, in whose place no wrapper will be."""
    held = [how for value in values for each, how in OTHER_NAMES.items() if value is each]
    return held[0] if held else None


def _code_of(kind: type[nn.Module]) -> ast.AST:
    """Return the code of a class without what it says in docstrings."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(value=None)
    return tree
