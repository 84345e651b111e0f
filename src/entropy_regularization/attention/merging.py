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
) -> AttentionShard:
    r"""Return the attention over the union of disjoint key shards.

    With :math:`w_a = \exp(\mathrm{lse}_a - \mathrm{lse})`, the share of shard a in the row,

    .. math:: \mathrm{lse} = \log \sum_a e^{\mathrm{lse}_a}, \quad
              O = \sum_a w_a O_a, \quad H = \sum_a w_a (H_a - \log w_a)

    which is the chain rule of entropy. Exact, differentiable, and associative: merging merged
    shards gives the same. Sinks must enter at most one shard's log_normalizer; there the entropy
    is that of weights that sum to less than 1, and the rule holds only for shards without sinks.

    Args:
        shards: (output, entropy, log_normalizer) of each shard, or what attention_with_entropy
            returned; all of one shape.

    Returns:
        output in the dtype of the first shard's output, entropy and log_normalizer.

    Raises:
        TypeError: if a shard is not three tensors.
        ValueError: if there is no shard, or shapes differ.
    """
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
    return AttentionShard(output, entropy, total.masked_fill(empty, -torch.inf))


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
    return shard
