"""Merge attention over disjoint shards of the keys: context parallelism and split decoding."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_regularization.attention.api import AttentionOutput
from entropy_regularization.attention.validation import check_is_tensor


class AttentionShard(NamedTuple):
    """Attention over some of the keys: what a shard needs to tell.

    Attributes:
        output: ``[..., queries, value_dim]``, normalised within the shard.
        entropy: ``[..., queries]``, nats, of the weights within the shard.
        log_normalizer: ``[..., queries]``; -inf for a row that sees no key of the shard.
    """

    output: Tensor
    entropy: Tensor
    log_normalizer: Tensor


def merge_attention(
    shards: Sequence[AttentionOutput | tuple[Tensor, Tensor, Tensor]],
    *,
    sinks: Tensor | None = None,
) -> AttentionShard:
    r"""Return the attention over the union of disjoint key shards.

    With :math:`w_a = \exp(\mathrm{lse}_a - \mathrm{lse})`, the share of shard a in the row,

    .. math:: \mathrm{lse} = \log \sum_a e^{\mathrm{lse}_a}, \quad
              O = \sum_a w_a O_a, \quad H = \sum_a w_a (H_a - \log w_a)

    which is the chain rule of entropy (Shannon 1948, section 6, property 3). Exact and
    differentiable; without sinks associative as well: merging merged shards gives the same.

    Args:
        shards: (output, entropy, log_normalizer) of each shard, or what attention_with_entropy
            returned; all of one shape, computed *without* sinks, whose entropies the rule cannot
            merge.
        sinks: ``[heads]`` logits that join the normalizer of the whole, as in
            attention_with_entropy; shards are then ``[batch, heads, queries, ...]``. Give them
            once, in the last merge.

    Returns:
        output in the dtype of the first shard's output, entropy and log_normalizer.

    Raises:
        TypeError: if a shard is not three floating-point tensors, or sinks are no such tensor.
        ValueError: if there is no shard, or shapes or devices differ.
    """
    parts = _checked(shards)
    first = parts[0]
    normalizers = torch.stack([part.log_normalizer for part in parts])
    # A row that no shard sees: its shares are 0, not exp(-inf + inf).
    empty = (normalizers == -torch.inf).all(0)
    total = torch.logsumexp(normalizers.masked_fill(empty, 0.0), 0)
    log_share = normalizers - total
    absent = normalizers == -torch.inf
    share = log_share.masked_fill(absent, 0.0).exp().masked_fill(absent, 0.0)
    surprise = log_share.masked_fill(absent, 0.0)
    entropy = (share * (torch.stack([part.entropy for part in parts]) - surprise)).sum(0)
    outputs = torch.stack([part.output for part in parts]).to(share.dtype)
    output = (share[..., None] * outputs).sum(0).to(first.output.dtype)
    merged = AttentionShard(output, entropy, total.masked_fill(empty, -torch.inf))
    return merged if sinks is None else _with_sinks(merged, sinks)


def _with_sinks(merged: AttentionShard, sinks: Tensor) -> AttentionShard:
    """Let sinks take their share of every row, the same as attention_with_entropy does."""
    check_is_tensor("sinks", sinks)
    if merged.entropy.ndim != 3 or tuple(sinks.shape) != (merged.entropy.shape[1],):
        raise ValueError(
            f"sinks have shape {tuple(sinks.shape)} and the shards' entropies "
            f"{tuple(merged.entropy.shape)}; pass sinks [heads] and entropies [batch, heads, "
            "queries]."
        )
    _check_floating("sinks", sinks)
    if sinks.device != merged.entropy.device:
        raise ValueError(
            f"sinks are on {sinks.device} and the shards on {merged.entropy.device}; bring them to "
            "one device."
        )
    empty = merged.log_normalizer == -torch.inf
    real = merged.log_normalizer.masked_fill(empty, 0.0)
    sink = sinks.to(real.dtype)[None, :, None].expand_as(real)
    # With share w of the real keys: H = -sum w p log(w p) = w (H_real - log w)
    log_share = torch.nn.functional.logsigmoid(real - sink)
    normalizer = torch.where(empty, sink, real - log_share)
    # A sink of infinity leaves nothing: 0 * -inf is NaN, forward and backward.
    nothing = log_share == -torch.inf
    log_share = log_share.masked_fill(nothing, 0.0)
    share = log_share.exp().masked_fill(empty | nothing, 0.0)
    output = (share[..., None] * merged.output.to(share.dtype)).to(merged.output.dtype)
    return AttentionShard(output, share * (merged.entropy - log_share), normalizer)


def _checked(shards: object) -> list[AttentionShard]:
    """Return the shards, known to fit together."""
    if not isinstance(shards, Sequence):
        raise TypeError(f"shards are a {type(shards).__name__}; pass a list of them.")
    parts = [_shard(number, given) for number, given in enumerate(shards)]
    if not parts:
        raise ValueError("no shard was given; pass at least one (output, entropy, log_normalizer).")
    first = parts[0]
    for number, part in enumerate(parts):
        shapes = [tuple(tensor.shape) for tensor in part]
        if shapes != [tuple(tensor.shape) for tensor in first] or shapes[1] != shapes[0][:-1]:
            raise ValueError(
                f"shard {number} has shapes {shapes}; pass output [..., queries, dim], entropy and "
                "log_normalizer [..., queries], the same for every shard."
            )
        for name, tensor in part._asdict().items():
            if tensor.device != first.output.device:
                raise ValueError(
                    f"{name} of shard {number} is on {tensor.device} and output of shard 0 on "
                    f"{first.output.device}; bring all shards to one device."
                )
    return parts


def _check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}; pass floating-point numbers.")


def _shard(number: int, given: object) -> AttentionShard:
    """Take the three tensors of one shard, or refuse what it is."""
    if isinstance(given, AttentionOutput):
        return AttentionShard(given.output, given.entropy, given.log_normalizer)
    if not isinstance(given, tuple | list) or len(given) != 3:
        what = f" of {len(given)}" if isinstance(given, tuple | list) else ""
        raise TypeError(
            f"shard {number} is a {type(given).__name__}{what}; pass (output, entropy, "
            "log_normalizer), or what attention_with_entropy returned."
        )
    shard = AttentionShard(*given)
    for name, tensor in shard._asdict().items():
        check_is_tensor(f"{name} of shard {number}", tensor)
        _check_floating(f"{name} of shard {number}", tensor)
    return shard
