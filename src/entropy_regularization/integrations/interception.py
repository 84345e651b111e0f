"""torch's own attention functions, heard while they run inside a model that is listened to.

``scaled_dot_product_attention`` and ``multi_head_attention_forward`` are looked up as attributes of
``torch.nn.functional`` at every call (by user code, nn.MultiheadAttention and nn.Transformer
alike), so while a recorder listens those attributes hold wrappers, and only then. So do
``torch.softmax`` and ``Tensor.softmax``, which every softmax of torch by name calls. Calls from
other modules, and from other threads, go straight to what the attributes held before. A model that
was checkpointed and is dropped leaves the wrappers to the next call, which takes them away.
attention_with_entropy of this library tells by itself what it found.
"""

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.bias import CausalBias

from entropy_regularization.attention.api import AttentionOutput, attend, observers
from entropy_regularization.attention.masking import Memo, Structure
from entropy_regularization.integrations.arguments import (
    as_attend_takes,
    as_autocast,
    causal_mask,
    check_dropout,
)
from entropy_regularization.integrations.sharding import is_distributed
from entropy_regularization.integrations.stack import runs_compiled, runs_in_backward
from entropy_regularization.integrations.weights import Weights, may_attend, weigh

original_attention = functional.scaled_dot_product_attention
original_multi_head = functional.multi_head_attention_forward
ATTENTION, MULTI_HEAD = "scaled_dot_product_attention", "multi_head_attention_forward"
# What the attributes held when somebody began to listen: torch's own, or what a user put there.
_found: dict[str, Callable[..., Any]] = {}

UNCALLED = "takes a softmax where no model was called"
COMPILED_MULTI_HEAD = "is torch's multi-head attention in compiled code, where it is not heard"
# Positions of arguments of multi_head_attention_forward.
DROPOUT, NEED_WEIGHTS, IS_CAUSAL = 10, 15, 24


class Listener(Protocol):
    """A recorder that wants to hear torch's attention functions."""

    model: nn.Module

    def is_running(self) -> bool:
        """Tell whether a module of the model is running in this thread."""

    def runs_uncalled(self) -> bool:
        """Tell whether a module of the model is running in a pass of which no hook told."""

    def memo_of(self, structure: Structure) -> Memo | None:
        """Return what its calls that see the same keys share, if limits tell which those are."""

    def deposit_call(self, place: str | None, found: AttentionOutput, n_keys: int) -> None:
        """Take the rows of one call; ``place`` is the module's name if the listener gave one."""

    def deposit_weights(self, place: str | None, weights: Tensor, found: Weights | None) -> None:
        """Take the rows of one softmax, if its weights attend; None if no rows can be told."""

    def note_unheard(self, place: str | None, how: str) -> None:
        """Note that a module attends in a way of which nothing can be heard."""


_listeners: list[tuple[Listener, int]] = []  # each with the thread that it was started in
# Stopped; backward, after the context, computes their checkpointed calls again.
_lingering: "weakref.WeakSet[Listener]" = weakref.WeakSet()
_lock = threading.RLock()  # the functions and the fast path are those of all threads
_fast_path: list[bool] = []  # as it was found, while anyone listens
_thread = threading.local()  # places: (listener, module name or None), the innermost last


def listen(listener: Listener) -> None:
    """Put the wrappers in place for one more listener.

    Raises:
        RuntimeError: if another thread listens to the same model, whose calls would mix.
    """
    thread = threading.get_ident()
    with _lock:
        if any(each.model is listener.model and at != thread for each, at in _listeners):
            raise RuntimeError(
                f"another thread records the same {type(listener.model).__name__}; let one thread "
                "record it at a time, or give each thread a copy of the model."
            )
        if not _listeners:
            _fast_path.append(torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)  # it calls no attention function
            for key, (owner, name, wrapper) in _WRAPPERS.items():
                if getattr(owner, name) is not wrapper:
                    _found[key] = getattr(owner, name)
                    setattr(owner, name, wrapper)
            if _hear not in observers:
                observers.append(_hear)
        _listeners.append((listener, thread))
        _lingering.discard(listener)


def stop_listening(listener: Listener, *, lingers: bool = False) -> None:
    """Take one listener away, and the wrappers with the last one.

    Args:
        listener: who stops.
        lingers: keep the wrappers for what backward computes again; a later call ends that.
    """
    with _lock:
        remaining = [each for each in _listeners if each[0] is not listener]
        if _listeners and not remaining:
            torch.backends.mha.set_fastpath_enabled(_fast_path.pop())
        _listeners[:] = remaining
        _lingering.discard(listener)
        if lingers:
            _lingering.add(listener)
        _restore()
    leave_places(listener)


def _restore() -> None:
    """Take the wrappers away, if nobody needs them.

    They call it themselves, for a lingering listener may be dropped. Its finalizer must not: it
    could run while Dynamo compiles another model, which guards on the function that it found.
    """
    if torch.compiler.is_compiling():
        return
    with _lock:
        if not _listeners and not list(_lingering):
            for key, (owner, name, wrapper) in _WRAPPERS.items():
                if getattr(owner, name) is wrapper:
                    delattr(owner, name)
                    if getattr(owner, name, None) is not _found[key]:  # not inherited
                        setattr(owner, name, _found[key])
            if _hear in observers:
                observers.remove(_hear)


def _is_computed_again() -> bool:
    """Tell whether backward computes a checkpointed call of a listener once more.

    The listener may have stopped, and on a GPU backward runs in a thread of its own.
    """
    if torch.compiler.is_compiling() or not runs_in_backward():
        return False
    heard = [*_lingering, *(listener for listener, _ in list(_listeners))]
    return any(listener.is_running() for listener in heard)


def places() -> list[tuple[Listener, str | None]]:
    """Return where in which listener's model this thread is, the innermost last."""
    if not hasattr(_thread, "places"):
        _thread.places = []
    result: list[tuple[Listener, str | None]] = _thread.places
    return result


def leave_places(listener: Listener) -> None:
    """Drop all places of a listener in this thread."""
    places()[:] = [place for place in places() if place[0] is not listener]


def leave_place(listener: Listener, name: str | None) -> None:
    """Drop the innermost place of that name."""
    for index in range(len(places()) - 1, -1, -1):
        if places()[index] == (listener, name):
            del places()[index]
            return


def _hear(found: AttentionOutput, n_keys: int) -> None:
    """Deposit what attention_with_entropy has found."""
    for listener, name in dict(places()).items():
        listener.deposit_call(name, found, n_keys)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend as scaled_dot_product_attention does, and deposit the entropies."""
    where = dict(places())
    if not where and not _is_computed_again():
        _restore()
        if isinstance(attn_mask, CausalBias):  # it knows torch's function by its name alone
            attn_mask = causal_mask(attn_mask, query, key)
        return _pass_on(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    refuse_nested("query, key or value", query, key, value)
    refuse_context_parallel()
    query, key, value, attn_mask = as_autocast(query, key, value, attn_mask)
    given = as_attend_takes(query, key, value, attn_mask, is_causal, grouped=enable_gqa)
    check_dropout(dropout_p)
    found = attend(
        given.query,
        given.key,
        given.value,
        given.structure,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        bias=given.bias,
        dropout=dropout_p if dropout_p < 1 else 0.0,
        memo=next(iter(where)).memo_of(given.structure) if where else None,
    )
    _hear(found, given.key.shape[2])
    output = found.output if dropout_p < 1 else functional.dropout(found.output, 1.0)
    return output.reshape(given.shape)


def _pass_on(*args: Any, **options: Any) -> Tensor:
    """Call what the attribute held before; if that calls the wrapper, torch's own."""
    found = _found[ATTENTION]
    if found is original_attention or getattr(_thread, "passes_on", False):
        return original_attention(*args, **options)
    _thread.passes_on = True
    try:
        output: Tensor = found(*args, **options)
    finally:
        _thread.passes_on = False
    return output


def _multi_head(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Call multi_head_attention_forward; where it makes the weights itself, hear it once more.

    With need_weights=True it calls no attention function: a second call without them, whose output
    is dropped, is heard instead. Its rows are those of the first call, before dropout.
    """
    if torch.compiler.is_dynamo_compiling():
        for listener, name in dict(places()).items():
            listener.note_unheard(name, COMPILED_MULTI_HEAD)
    # A mode that watches torch's functions calls this once more from inside the original.
    inside = in_multi_head()
    if not places() and not _is_computed_again():
        _restore()
    elif _makes_weights(args, kwargs) and not inside:
        given = list(args)
        again = {**kwargs}
        for position, name, value in (
            (DROPOUT, "dropout_p", 0.0),
            (NEED_WEIGHTS, "need_weights", False),
            # With weights the mask decides; without them this would replace it, unlike with a bias.
            (IS_CAUSAL, "is_causal", False),
        ):
            if len(given) > position:
                given[position] = value
            else:
                again[name] = value
        _found[MULTI_HEAD](*given, **again)
        _thread.in_multi_head = True
    try:
        result: tuple[Tensor, Tensor | None] = _found[MULTI_HEAD](*args, **kwargs)
    finally:
        _thread.in_multi_head = False
    return result


def in_multi_head() -> bool:
    """Tell whether this runs inside multi_head_attention_forward, which was heard already."""
    return getattr(_thread, "in_multi_head", False)


def _makes_weights(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    given = args[NEED_WEIGHTS] if len(args) > NEED_WEIGHTS else kwargs.get("need_weights", True)
    return bool(given)


def _softmax_of(key: str) -> Callable[..., Any]:
    """Return the wrapper of one of torch's softmaxes."""

    def softmax(*args: Any, **kwargs: Any) -> Any:
        """Take a softmax, and tell whoever listens what rows it has made."""
        if torch.compiler.is_compiling():
            return _found[key](*args, **kwargs)
        # A mode that watches torch's functions calls this once more from inside the original.
        inside = in_softmax()
        _thread.in_softmax = True
        try:
            weights = _found[key](*args, **kwargs)
        finally:
            _thread.in_softmax = inside
        if not (inside or in_multi_head()):
            _weigh(weights, *args, **kwargs)
        return weights

    return softmax


def in_softmax() -> bool:
    """Tell whether this runs inside a wrapper of a softmax."""
    return getattr(_thread, "in_softmax", False)


def _weigh(
    weights: Tensor, scores: Any = None, dim: Any = None, dtype: Any = None, **kwargs: Any
) -> None:
    """Tell whoever listens what rows a softmax has made, if it may attend."""
    where = dict(places())
    scores = kwargs.get("input", scores)
    if not where and not _is_computed_again():
        _restore()
        if may_attend(scores, dim):
            _note_uncalled()
        return
    if runs_compiled():
        return  # where no watch was
    found = weigh(scores, weights) if may_attend(scores, dim) and "out" not in kwargs else None
    for listener, name in where.items():
        listener.deposit_weights(name, weights, found)


def _note_uncalled() -> None:
    """A softmax runs: tell the listeners whose model runs without a hook that told of it."""
    for listener, thread in list(_listeners):
        if thread == threading.get_ident() and listener.runs_uncalled() and not runs_compiled():
            listener.note_unheard(None, UNCALLED)


def goes_around_wrapper(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Tell whether what a mode sees of torch is attention that was not called by the wrappers.

    multi_head_attention_forward shows a mode its wrapper, in whose place it was called; but for
    weights it calls no attention function that is heard where no mode is.
    """
    around = func is _multi_head and not in_multi_head() and _makes_weights(args, kwargs)
    return around or func is original_attention or (func in SOFTMAX_WRAPPERS and not in_softmax())


# Where they are attributes of what: keys are strings, which Dynamo can look up.
_WRAPPERS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    ATTENTION: (functional, ATTENTION, _attention),
    MULTI_HEAD: (functional, MULTI_HEAD, _multi_head),
    "torch.softmax": (torch, "softmax", _softmax_of("torch.softmax")),
    "Tensor.softmax": (Tensor, "softmax", _softmax_of("Tensor.softmax")),
}
SOFTMAX_WRAPPERS = {_WRAPPERS[key][-1] for key in ("torch.softmax", "Tensor.softmax")}
for _, _name, _wrapper in _WRAPPERS.values():
    _wrapper.__name__ = _name  # others that wrap them go by it, as context_parallel does


def refuse_nested(what: str, *tensors: object) -> None:
    """Refuse tensors of different lengths, which are not computed here.

    Raises:
        ValueError: if one is nested.
    """
    if any(isinstance(tensor, Tensor) and tensor.is_nested for tensor in tensors):
        raise ValueError(
            f"{what} came as a nested tensor, whose entropies cannot be recorded; pad it "
            "(torch.nested.to_padded_tensor) and pass a mask."
        )


def refuse_context_parallel() -> None:
    """Refuse attention inside ``torch.distributed.tensor.experimental.context_parallel``.

    Raises:
        NotImplementedError: if it is asked for, by the function in the place of torch's.
    """
    if torch.compiler.is_compiling():
        return
    found = (functional.scaled_dot_product_attention, _found.get(ATTENTION))
    if any(is_distributed(each) for each in found):
        raise NotImplementedError(
            "attention runs under context parallelism, where a rank sees a part of the sequence "
            "and its entropies cannot be recorded; record the model without it (data, fully "
            "sharded and tensor parallelism are fine)."
        )
