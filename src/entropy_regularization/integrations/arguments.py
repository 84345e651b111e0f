"""The arguments of scaled_dot_product_attention, in the four dimensions that attend takes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from entropy_regularization.attention.masking import Structure, split_mask
from entropy_regularization.attention.validation import check_is_tensor, check_tensors
from entropy_regularization.checks import is_number


class Arguments(NamedTuple):
    """What attend takes.

    Attributes:
        query: ``[batch, heads, queries, dim]``; key and value accordingly.
        key: as query.
        value: as query.
        structure: which keys a row may see.
        bias: added to the scores.
        shape: of the output, which has the dimensions that were given.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    structure: Structure
    bias: Tensor | None
    shape: tuple[int, ...]


def as_attend_takes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    *,
    grouped: bool,
) -> Arguments:
    """Return what scaled_dot_product_attention was given as attend takes it.

    Args:
        query: as key, value, attn_mask and is_causal an argument of torch's function.
        key: as query.
        value: as query.
        attn_mask: as query.
        is_causal: as query.
        grouped: its ``enable_gqa``.

    Raises:
        TypeError: if dtypes differ, or the mask is neither boolean nor floating.
        ValueError: if shapes or devices do not fit together, or torch would not take both
            ``is_causal`` and a causal bias.
    """
    query, key, value = _broadcast(query, key, value, grouped)
    q, k, v = (_four(tensor, grouped) for tensor in (query, key, value))
    check_tensors(q, k, v)
    shift = q.shape[2] - k.shape[2]
    structure = Structure(right=shift) if is_causal else Structure()  # aligned upper left
    bias = None
    if isinstance(attn_mask, CausalBias):  # a tensor whose numbers mean nothing
        _check_causal_bias(attn_mask, query, key, is_causal)
        upper_left = attn_mask.variant is CausalVariant.UPPER_LEFT
        structure = Structure(right=shift if upper_left else 0)
    elif attn_mask is not None:
        _check_mask(attn_mask, query)
        allowed, bias = split_mask(_mask_of_four(attn_mask, query, key, grouped))
        structure = structure._replace(allowed=allowed)
    return Arguments(q, k, v, structure, bias, (*query.shape[:-1], value.shape[-1]))


def _check_mask(mask: Tensor, query: Tensor) -> None:
    """Refuse a mask that torch would not take; its shape is another matter.

    Raises:
        TypeError: if it is no tensor, or neither boolean nor floating.
        ValueError: if it is on another device.
    """
    check_is_tensor("attn_mask", mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"attn_mask has dtype {mask.dtype}; pass a boolean mask, True where a query may attend "
            "to a key, or a floating one that is added to the scores."
        )
    if mask.device != query.device:
        raise ValueError(
            f"attn_mask is on {mask.device} and query on {query.device}; move one of them."
        )


def _check_causal_bias(bias: CausalBias, query: Tensor, key: Tensor, is_causal: bool) -> None:
    """Refuse a causal bias that torch would not take.

    Raises:
        ValueError: if ``is_causal`` was said too, or it is of other lengths.
    """
    if is_causal:
        raise ValueError("attn_mask is a causal bias and is_causal is True; pass one of the two.")
    lengths = (query.shape[-2], key.shape[-2])
    if bias.variant is CausalVariant.LOWER_RIGHT and lengths != (bias.seq_len_q, bias.seq_len_kv):
        raise ValueError(
            f"attn_mask is a causal bias of {(bias.seq_len_q, bias.seq_len_kv)} queries and keys "
            f"but there are {lengths}; make one of these lengths."
        )


def check_dropout(rate: object) -> None:
    """Refuse a rate of dropout that torch would not take.

    Raises:
        ValueError: if it is not in [0, 1].
    """
    if not (is_number(rate) and 0.0 <= rate <= 1.0):  # type: ignore[operator]
        raise ValueError(f"dropout_p is {rate!r:.40}; pass a rate in [0, 1].")


def causal_mask(bias: CausalBias, query: Tensor, key: Tensor) -> Tensor:
    """Return the boolean mask that a causal bias stands for."""
    rows, keys = query.shape[-2], key.shape[-2]
    shift = 0 if bias.variant is CausalVariant.UPPER_LEFT else keys - rows
    return torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril(shift)


def as_autocast(*tensors: Tensor | None) -> list[Any]:
    """Cast as autocast casts the arguments of scaled_dot_product_attention."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not _knows_autocast(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype, kept = torch.get_autocast_dtype(device), (None, torch.bool, torch.float64)
    return [
        tensor
        if tensor is None or tensor.dtype in kept or isinstance(tensor, CausalBias)
        else tensor.to(dtype)
        for tensor in tensors
    ]


# Torch 2.11 would break the graph at it.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _knows_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def _broadcast(query: Tensor, key: Tensor, value: Tensor, grouped: bool) -> list[Tensor]:
    """Give all the same dimensions before the last two; but grouped keys keep their heads.

    Raises:
        ValueError: if that cannot be.
    """
    given, own = (query, key, value), 3 if grouped else 2
    if query.shape[:-own] == key.shape[:-own] == value.shape[:-own]:  # nearly always
        return list(given)
    try:
        shape = torch.broadcast_shapes(*(tensor.shape[:-own] for tensor in given))
    except RuntimeError:
        listed = ", ".join(str(tuple(tensor.shape)) for tensor in given)
        raise ValueError(
            f"query, key and value have shapes {listed}, whose dimensions before the last {own} "
            "do not broadcast; give them the same."
        ) from None
    return [tensor.expand(*shape, *tensor.shape[-own:]) for tensor in given]


def _mask_of_four(mask: Tensor, query: Tensor, key: Tensor, grouped: bool) -> Tensor:
    """Bring a mask to four dimensions; where one entry serves many, it stays one.

    Raises:
        ValueError: if its shape does not fit.
    """
    given, wanted = tuple(mask.shape), (*query.shape[:-1], key.shape[-2])
    if mask.dim() < len(wanted):
        mask = mask[(None,) * (len(wanted) - mask.dim())]
    if mask.dim() != len(wanted) or not all(
        have == 1 or have == want for have, want in zip(mask.shape, wanted, strict=True)
    ):
        raise ValueError(
            f"attn_mask has shape {given} but query and key imply {wanted}; pass one "
            "that broadcasts to it."
        )
    if any(size != 1 for size in mask.shape[:-3]):
        mask = mask.expand(*query.shape[:-3], *mask.shape[-3:])
    return _four(mask, grouped)


def _four(tensor: Tensor, grouped: bool) -> Tensor:
    """Bring ``[..., heads, length, dim]``, or without heads ``[batch, length, dim]``, to four.

    Only grouped keys tell that the first of three dimensions is that of heads.
    """
    if tensor.dim() == 3:
        return tensor[None] if grouped else tensor[:, None]
    if tensor.dim() < 3:
        return tensor[None, None]
    return tensor.flatten(0, -4)
