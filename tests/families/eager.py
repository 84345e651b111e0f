"""What the model itself says: a forward pass with eager attention, its weights and its softmaxes.

The weights are seen twice. Those that the model returns in its output are one reference. The other
is kept where eager attention is called, by the family's own function, with the module that called
it; it is there when a model returns no weights, and it has a name to be compared by.
"""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import AttentionInterface

KINDS = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
_BY_NAME = {functional.softmax, torch.softmax, Tensor.softmax}
_SOFTMAX = {torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default}


@dataclass
class Softmax:
    """One softmax over at least three dimensions: who computed it, and how."""

    name: str
    module: str
    shape: tuple[int, ...]


@dataclass
class Eager:
    """One eager forward pass.

    Attributes:
        output: what the model returned.
        kept: (module name, weights) of every call of the family's eager attention function, and
            of scaled_dot_product_attention, whose weights are computed beside it.
        called: module names of the calls of the family's eager attention function alone.
        softmaxes: every softmax outside scaled_dot_product_attention.
        own: (module name, weights) of every softmax that a module calls by name.
        fused: (module name, class) of the calls of scaled_dot_product_attention.
        effective: weights that act, by the identity of those that were returned.
    """

    output: Any = None
    kept: list[tuple[str, Tensor]] = field(default_factory=list)
    called: list[str] = field(default_factory=list)
    softmaxes: list[Softmax] = field(default_factory=list)
    own: list[tuple[str, Tensor]] = field(default_factory=list)
    fused: list[tuple[str, str]] = field(default_factory=list)
    effective: dict[int, Tensor] = field(default_factory=dict)

    def made(self) -> list[tuple[str, Tensor]]:
        """Return the weights that were kept, and those that other modules made themselves."""
        kept = {name for name, _ in self.kept}
        return [*self.kept, *((name, weights) for name, weights in self.own if name not in kept)]

    def returned(self) -> list[Tensor]:
        """Return the attention weights in the output, of every part of the model."""
        return [self.effective.get(id(weights), weights) for weights in _weights_in(self.output)]


def run_eager(
    model: nn.Module, batch: dict[str, Any], *, empty: bool = False, **options: Any
) -> Eager:
    """Run a model whose attention is eager, and watch it.

    Args:
        model: the model.
        batch: its keywords.
        empty: give a row that sees no key the output 0, as scaled_dot_product_attention does; eager
            attention gives it the mean of all values.
        options: more keywords; those that the model does not take are left out.
    """
    taken = inspect.signature(model.forward).parameters
    if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values()):
        options = {name: value for name, value in options.items() if name in taken}
    found = Eager()
    names = {module: name for name, module in model.named_modules()}
    with (
        _watch(found, names) as where,
        _KeptSoftmaxes(found, names, where),
        _kept_weights(found, names, empty),
        _noted_fused(found, names, where),
        _kept_multi_head(found, names, where),
    ):
        found.output = model(**batch, **options)
    return found


def entropy_of(weights: Tensor) -> Tensor:
    """Return -sum p log p of every row, 0 log 0 being 0, with a gradient that is finite there."""
    weights = weights.double()
    positive = weights > 0
    logarithm = torch.where(positive, weights, 1.0).log()
    return -(weights * logarithm).sum(-1)


def seeing(weights: Tensor) -> Tensor:
    """Return which rows see a key, ``[batch, queries]``.

    Eager attention spreads a row without keys evenly over all of them, in all heads, which no row
    of a drawn model does.
    """
    spread = weights.detach().amax(-1) - weights.detach().amin(-1)
    return (spread > 1e-7).any(1) | (weights.shape[-1] == 1)


def tensors_in(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Walk over the floating-point tensors of an output, caches and attention weights left out."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield "", value
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            if "attentions" not in str(key):
                yield from ((f"{key}.{name}", tensor) for name, tensor in tensors_in(part))


def _weights_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, dict):
        for key, part in value.items():
            if key.endswith("attentions"):
                yield from _flat(part)
            elif isinstance(part, dict):
                yield from _weights_in(part)


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _flat(part)


def fused_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the weights that scaled_dot_product_attention, called like this, does not return."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1).nan_to_num()


@contextlib.contextmanager
def _watch(found: Eager, names: dict[nn.Module, str]) -> Iterator[list[nn.Module]]:
    """Keep the stack of running modules, and note every softmax with its place on it."""
    where: list[nn.Module] = []

    class Softmaxes(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            inside = [each for each in where if not isinstance(each, nn.Softmax)]
            if function in _SOFTMAX and args[0].dim() > 2 and inside and inside[-1] is not None:
                module = inside[-1]
                name = names.get(module, "")
                shape = tuple(args[0].shape)
                found.softmaxes.append(Softmax(name, type(module).__name__, shape))
            return function(*args, **(kwargs or {}))

    def enter(module: nn.Module, _: Any) -> None:
        where.append(module)
        if module not in names:  # made by the pass itself, as bigbird_pegasus does
            names.update({part: name for name, part in where[0].named_modules()})

    handles = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(lambda *_: where.pop() and None, always_call=True),
    ]
    try:
        with Softmaxes():
            yield where
    finally:
        for handle in handles:
            handle.remove()


class _KeptSoftmaxes(TorchFunctionMode):
    """Keeps what a softmax by name has made, which no mode below autograd could."""

    def __init__(self, found: Eager, names: dict[nn.Module, str], where: list[Any]) -> None:
        super().__init__()
        self.found, self.names, self.where = found, names, where

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        inside = [each for each in self.where if not isinstance(each, nn.Softmax)]
        if function in _BY_NAME and result.dim() > 2 and inside and inside[-1] is not None:
            self.found.own.append((self.names.get(inside[-1], ""), result))
        return result


@contextlib.contextmanager
def _kept_weights(found: Eager, names: dict[nn.Module, str], empty: bool) -> Iterator[None]:
    """Keep the weights that the family's eager attention function returns."""
    original = AttentionInterface.get_interface

    def get_interface(interface: Any, name: str, default: Any) -> Any:
        function = original(interface, name, default)

        def keeping(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            result = function(module, *args, **kwargs)
            name = names.get(module, type(module).__name__)
            found.called.append(name)
            if isinstance(result[1], Tensor):
                acting = _acting(result[0], result[1], args, kwargs)
                found.effective[id(result[1])] = acting
                found.kept.append((name, acting))
            if empty:
                blind = ~seeing(result[1])[:, :, None, None]  # [batch, queries, 1, 1]
                result = (result[0].masked_fill(blind, 0.0), *result[1:])
            return result

        return keeping

    with mock.patch.object(AttentionInterface, "get_interface", get_interface):
        yield


def _acting(output: Tensor, weights: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """Return the weights that made the output, where a sink took its share after the softmax.

    Such a family returns rows that sum to one and shrinks the output instead (granite_swa).
    """
    if kwargs.get("s_aux") is None or not torch.allclose(weights.sum(-1), weights.new_ones(())):
        return weights
    value = args[2] if len(args) > 2 else kwargs["value"]
    plain = weights @ value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1)
    share = (output.transpose(1, 2) * plain).sum(-1) / plain.square().sum(-1)
    return weights * share[..., None]


@contextlib.contextmanager
def _noted_fused(found: Eager, names: dict[nn.Module, str], where: list[Any]) -> Iterator[None]:
    """Note who calls scaled_dot_product_attention, whose own softmax is not the module's."""
    original = functional.scaled_dot_product_attention

    def noting(*args: Any, **kwargs: Any) -> Tensor:
        module = where[-1] if where else None
        if where and module is None:  # inside nn.MultiheadAttention, whose weights are kept already
            return original(*args, **kwargs)
        name = names.get(module, "")
        found.fused.append((name, type(module).__name__))
        where.append(None)
        try:
            if name not in found.called:
                found.kept.append((name, fused_weights(*args, **kwargs)))
            return original(*args, **kwargs)
        finally:
            where.pop()

    with mock.patch.object(functional, "scaled_dot_product_attention", noting):
        yield


@contextlib.contextmanager
def _kept_multi_head(found: Eager, names: dict[nn.Module, str], where: list[Any]) -> Iterator[None]:
    """Keep the weights of torch's nn.MultiheadAttention, which a family may hold (siglip)."""
    original = functional.multi_head_attention_forward

    def keeping(*args: Any, **kwargs: Any) -> Any:
        name = names.get(where[-1], "") if where else ""
        where.append(None)
        try:
            asked = {**kwargs, "need_weights": True, "average_attn_weights": False}
            found.kept.append((name, original(*args, **asked)[1]))
            return original(*args, **kwargs)
        finally:
            where.pop()

    with mock.patch.object(functional, "multi_head_attention_forward", keeping):
        yield
