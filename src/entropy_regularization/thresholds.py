"""Thresholds: which share of its maximum entropy each head is held at."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from entropy_regularization.checks import check_flag, check_positive_integer, is_number

logger = logging.getLogger("entropy_regularization")

Thresholds = float | Sequence[float] | Sequence[Sequence[float]] | Tensor


class HeadThresholds(nn.Module):
    r"""Learnable thresholds :math:`\theta_{l,h}`, one per layer and head.

    As in Algorithm 1 of Jha & Reagen (2025). Each is a fraction of the maximum entropy.

    The parameter is named ``fraction_bias``, ``[layers, heads]``, because optimizers that group
    parameters by name, transformers' Trainer among them, keep a bias out of weight decay; decay
    would pull every threshold towards 0, that is towards collapse. ``without_weight_decay`` makes
    parameter groups for any other training loop.

    Args:
        layers: number of attention layers, in the order in which the model calls them.
        heads: number of heads; of the widest layer if they differ (entries beyond a layer's heads
            are not used).
        initial: a number, ``[heads]`` or ``[layers, heads]``.
        learnable: False keeps the thresholds fixed, but saved with the model.

    Raises:
        TypeError: if layers or heads is not an integer, or learnable not True or False.
        ValueError: if layers or heads is not positive, or initial has another shape or leaves
            [0, 1].

    Example:
        >>> HeadThresholds(2, 3, initial=0.25)().tolist()
        [[0.25, 0.25, 0.25], [0.25, 0.25, 0.25]]
    """

    def __init__(
        self, layers: int, heads: int, initial: Thresholds = 0.5, *, learnable: bool = True
    ) -> None:
        super().__init__()
        layers = check_positive_integer("layers", layers)
        heads = check_positive_integer("heads", heads)
        check_flag("learnable", learnable)
        # torch.device("meta") may be in force, whose tensors hold no numbers
        with torch.device("cpu"):
            values = as_tensor(initial, "initial").detach()
        if values.is_meta:
            raise ValueError("initial lies on the meta device and holds no numbers; pass numbers.")
        if tuple(values.shape) not in ((), (heads,), (layers, heads)):
            raise ValueError(
                f"initial has shape {tuple(values.shape)}; pass a number, ({heads},) or "
                f"({layers}, {heads})."
            )
        _check_fractions(values, "initial")
        self._initial = values.cpu().clone()
        device = values.device if isinstance(initial, Tensor | HeadThresholds) else None
        empty = torch.empty(layers, heads, device=device)
        self.fraction_bias = nn.Parameter(empty, requires_grad=learnable)
        if not empty.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the thresholds to ``initial``, as FSDP does for a model that was made on meta.

        transformers does not: a model of its own that holds thresholds calls this where it
        initialises weights (``_init_weights``).
        """
        values = self._initial.expand(self.layers, self.heads)
        weight: Any = self.fraction_bias
        if hasattr(weight, "placements"):  # a DTensor; not every torch has these
            from torch.distributed.tensor import distribute_tensor

            values = distribute_tensor(values, weight.device_mesh, weight.placements)
        with torch.no_grad():
            weight.copy_(values)

    @property
    def layers(self) -> int:
        """The number of layers."""
        return self.fraction_bias.shape[0]

    @property
    def heads(self) -> int:
        """The number of heads of a layer."""
        return self.fraction_bias.shape[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert them, as a module does; say if they can hardly learn any more."""
        before = self.fraction_bias.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        dtype = self.fraction_bias.dtype
        coarse = torch.finfo(dtype).eps > torch.finfo(torch.float32).eps
        if self.fraction_bias.requires_grad and dtype != before and coarse:
            logger.warning(
                "the thresholds were converted to %s, where the small steps of an optimizer are "
                "lost in rounding and leave them as they are, unless it keeps copies in float32; "
                "convert the model first, and call regularize or make HeadThresholds after.",
                dtype,
            )
        return self

    def forward(self) -> Float[Tensor, "layers heads"]:
        """Return the thresholds, not the parameter: FSDP frees what that is gathered into."""
        return self.fraction_bias.clone()

    def extra_repr(self) -> str:
        """Say how many there are and whether they are learned."""
        learnable = self.fraction_bias.requires_grad
        return f"layers={self.layers}, heads={self.heads}, learnable={learnable}"


def without_weight_decay(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Return two parameter groups: the model's parameters, and its thresholds undecayed.

    For training loops of one's own: ``AdamW(without_weight_decay(model, 0.01), lr=...)``.

    Args:
        model: holds HeadThresholds somewhere among its modules.
        weight_decay: of every parameter that is no threshold.

    Returns:
        Groups as torch.optim takes them.

    Raises:
        TypeError: if the model is no module.
        ValueError: if the model holds no HeadThresholds, or the decay is no number of at least 0.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; pass a torch.nn.Module.")
    if not (is_number(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay is {weight_decay!r:.40}; pass a number, 0 or larger.")
    held = [m for m in model.modules() if isinstance(m, HeadThresholds)]
    if not held:
        raise ValueError(
            f"{type(model).__name__} holds no HeadThresholds; call regularize on it first."
        )
    thresholds = {id(p) for module in held for p in module.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {
            "params": [p for p in trained if id(p) not in thresholds],
            "weight_decay": weight_decay,
        },
        {"params": [p for p in trained if id(p) in thresholds], "weight_decay": 0.0},
    ]


def as_tensor(thresholds: object, name: str) -> Tensor:
    """Return thresholds as a floating tensor of zero, one or two dimensions, gradient kept.

    Args:
        thresholds: number, list, list of lists, array, tensor or HeadThresholds.
        name: what the argument is called where it came in.

    Raises:
        TypeError: if it is none of these, or its entries are not floating.
        ValueError: if it is ragged or has more than two dimensions, a number leaves [0, 1], or
            FSDP holds a part of the thresholds here.
            Entries of tensors are not read, which would wait for their device: they may have been
            learned.
    """
    if isinstance(thresholds, HeadThresholds):
        values: Tensor = thresholds()  # by a call, whose hooks gather what is sharded or offloaded
        if hasattr(values, "placements") or values.dim() != 2:
            raise ValueError(
                f"{name} are HeadThresholds that FSDP has sharded with the model, whose forward "
                "pass is over; call regularize(model) instead, or shard them by themselves: "
                "fully_shard(thresholds)."
            )
        return values
    expected = "pass a number, a list, or a floating tensor [heads] or [layers, heads]"
    if not isinstance(thresholds, Tensor) and hasattr(thresholds, "tolist"):  # of numpy
        thresholds = thresholds.tolist()
    if isinstance(thresholds, Tensor):
        values = thresholds
    elif isinstance(thresholds, int | float | list | tuple) and not isinstance(thresholds, bool):
        values = _from_numbers(thresholds, name, expected)
    else:
        raise TypeError(f"{name} is a {type(thresholds).__name__}; {expected}.")
    if not values.is_floating_point():
        raise TypeError(f"{name} has dtype {values.dtype}; {expected}.")
    if values.dim() > 2:
        raise ValueError(f"{name} has shape {tuple(values.shape)}; {expected}.")
    return values


def _from_numbers(numbers: object, name: str, expected: str) -> Tensor:
    if isinstance(numbers, list | tuple) and any(isinstance(entry, Tensor) for entry in numbers):
        rows = [as_tensor(entry, name) for entry in numbers]
        if len({row.shape for row in rows}) > 1:
            raise ValueError(f"{name} has rows of different lengths; {expected}.")
        return torch.stack(rows)
    try:
        # float64, so that a list loses no digits beside float64 matrices
        values = torch.tensor(numbers, dtype=torch.float64)
    except ValueError as error:
        if "too many dimensions" in str(error):  # what torch says of a list of strings
            raise TypeError(f"{name} has entries that are not numbers; {expected}.") from error
        raise ValueError(f"{name} has rows of different lengths; {expected}.") from error
    except OverflowError as error:
        raise ValueError(f"{name} has a number beyond all floats; {expected}.") from error
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{name} has entries that are not numbers; {expected}.") from error
    _check_fractions(numbers, name)
    return values


def check_fixed(thresholds: object, name: str) -> None:
    """Refuse thresholds that cannot be meant, once, where they come in; waits for their device.

    Raises:
        TypeError: if they are not numbers.
        ValueError: if a number, or an entry of a tensor without a gradient, leaves [0, 1].
    """
    values = as_tensor(thresholds, name)
    if not (isinstance(thresholds, HeadThresholds) or values.requires_grad or values.is_meta):
        _check_fractions(values, name)


def _check_fractions(numbers: Any, name: str) -> None:
    """Check numbers of Python, one by one: what a tensor holds would break a compiled graph."""
    if hasattr(numbers, "tolist"):
        numbers = numbers.tolist()
    if isinstance(numbers, list | tuple):
        for number in numbers:
            _check_fractions(number, name)
    elif not 0 <= numbers <= 1:
        raise ValueError(
            f"{name} has {numbers:g}, which is not in [0, 1]; pass fractions of the maximum such "
            "as 0.5, or the HeadThresholds that learned them."
        )


def thresholds_of_layers(
    thresholds: object, heads: Sequence[int], *, name: str, like: Tensor, or_more: bool = False
) -> list[Float[Tensor, " heads"]]:
    """Return one vector of thresholds per layer.

    Args:
        thresholds: a number; ``[heads]``, shared by all layers; or ``[layers, heads]``.
        heads: how many heads each layer uses.
        name: what the argument is called where it came in.
        like: gives dtype and device.
        or_more: take the first ones where there are more than heads.

    Returns:
        ``[heads]`` for every layer, gradient kept.

    Raises:
        TypeError: if thresholds are not numbers.
        ValueError: if there are not as many as heads of the widest layer, or not one row per layer.
    """
    values = as_tensor(thresholds, name)
    # Numbers go to a GPU without waiting for it; what comes from there is waited for.
    values = values.to(like, non_blocking=values.device.type == "cpu")
    widest = max(heads)
    if values.dim() == 0:
        values = values.expand(widest)
    count = values.shape[-1]
    if count < widest or (count > widest and not or_more):
        raise ValueError(
            f"{name} has {count} thresholds a layer but {widest} heads are asked for; pass one "
            "threshold per head."
        )
    if values.dim() == 2 and values.shape[0] != len(heads):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)} but there are {len(heads)} layers; pass "
            "[heads] for all layers, or one row per layer."
        )
    rows = values.unbind() if values.dim() == 2 else [values] * len(heads)
    return [
        row if row.shape[0] == count else row[:count]
        for row, count in zip(rows, heads, strict=True)
    ]
