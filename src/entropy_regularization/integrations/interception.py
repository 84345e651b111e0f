"""torch's own attention functions, heard while they run inside a model that is listened to.

``scaled_dot_product_attention`` and ``multi_head_attention_forward`` are looked up as attributes of
``torch.nn.functional`` at every call (by user code, nn.MultiheadAttention and nn.Transformer
alike), so while a recorder listens those attributes hold wrappers, and only then. Calls from other
modules, and from other threads, go straight to the originals.
"""

import threading
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from entropy_regularization.attention.api import AttentionOutput, attend
from entropy_regularization.attention.masking import Structure, split_mask

original_attention = functional.scaled_dot_product_attention
original_multi_head = functional.multi_head_attention_forward

# Positions of arguments of multi_head_attention_forward.
DROPOUT, NEED_WEIGHTS = 10, 15


class Listener(Protocol):
    """A recorder that wants to hear torch's attention functions."""

    def deposit_call(self, place: str | None, found: AttentionOutput, n_keys: int) -> None:
        """Take the rows of one call; ``place`` is the module's name if the listener gave one."""


_listeners: list[Listener] = []
_thread = threading.local()  # places: (listener, module name or None), the innermost last


def listen(listener: Listener) -> None:
    """Put the wrappers in place for one more listener."""
    if not _listeners:
        functional.scaled_dot_product_attention = _attention
        functional.multi_head_attention_forward = _multi_head
    _listeners.append(listener)


def stop_listening(listener: Listener) -> None:
    """Take one listener away, and the wrappers with the last one."""
    if listener in _listeners:
        _listeners.remove(listener)
    if not _listeners:
        functional.scaled_dot_product_attention = original_attention
        functional.multi_head_attention_forward = original_multi_head
    places()[:] = [place for place in places() if place[0] is not listener]


def places() -> list[tuple[Listener, str | None]]:
    """Return where in which listener's model this thread is, the innermost last."""
    if not hasattr(_thread, "places"):
        _thread.places = []
    result: list[tuple[Listener, str | None]] = _thread.places
    return result


def leave_place(listener: Listener, name: str | None) -> None:
    """Drop the innermost place of that name."""
    for index in range(len(places()) - 1, -1, -1):
        if places()[index] == (listener, name):
            del places()[index]
            return


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
    if not where:
        return original_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    q, k, v = (_four(tensor) for tensor in (query, key, value))
    shift = q.shape[2] - k.shape[2]
    structure = Structure(right=shift) if is_causal else Structure()  # aligned upper left
    bias = None
    if attn_mask is not None:
        allowed, bias = split_mask(_mask_of_four(attn_mask, query, key))
        structure = structure._replace(allowed=allowed)
    found = attend(
        q,
        k,
        v,
        structure,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        bias=bias,
        dropout=dropout_p,
    )
    for listener, name in where.items():
        listener.deposit_call(name, found, k.shape[2])
    return found.output.reshape(*_rows(query, key), value.shape[-1])


def _multi_head(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Call multi_head_attention_forward; where it makes the weights itself, hear it once more.

    With need_weights=True it calls no attention function: a second call without them, whose output
    is dropped, is heard instead. Its rows are those of the first call, before dropout.
    """
    weights = args[NEED_WEIGHTS] if len(args) > NEED_WEIGHTS else kwargs.get("need_weights", True)
    # A mode that watches torch's functions calls this once more from inside the original.
    if weights and places() and not getattr(_thread, "in_multi_head", False):
        given = list(args)
        again = {**kwargs}
        for position, name, value in (
            (DROPOUT, "dropout_p", 0.0),
            (NEED_WEIGHTS, "need_weights", False),
        ):
            if len(given) > position:
                given[position] = value
            else:
                again[name] = value
        original_multi_head(*given, **again)
        _thread.in_multi_head = True
    try:
        result: tuple[Tensor, Tensor | None] = original_multi_head(*args, **kwargs)
    finally:
        _thread.in_multi_head = False
    return result


def _mask_of_four(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    if mask.dim() == 2 and query.dim() == 4:
        return mask[None, None]
    return _four(mask.expand(*_rows(query, key), key.shape[-2]))


def _rows(query: Tensor, key: Tensor) -> tuple[int, ...]:
    """Return the shape of all rows; a batch of one serves all keys."""
    end = query.dim() - (3 if query.dim() > 3 else 2)  # heads are the query's own
    batch = torch.broadcast_shapes(query.shape[:end], key.shape[:end])
    return (*batch, *query.shape[end:-1])


def _four(tensor: Tensor) -> Tensor:
    """Bring ``[..., heads, length, dim]`` or ``[batch, length, dim]`` to four dimensions."""
    if tensor.dim() == 3:
        return tensor[:, None]
    if tensor.dim() < 3:
        return tensor[None, None]
    return tensor.reshape(-1, *tensor.shape[-3:])
