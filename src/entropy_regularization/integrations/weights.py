"""The entropy of weights that a model makes itself, by a softmax over its scores.

The matrix is there already: its entropy costs a pass over it, and its gradient no memory, because
backward of the softmax keeps the weights anyway.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from entropy_regularization.attention.api import AttentionOutput
from entropy_regularization.reduction import has_ranks

# A score so far below the largest of its row is masked. Models mask by adding -10000 and less;
# scores of queries and keys lie that far apart in no model whose loss is finite.
MASKED_BELOW = 5000.0
# What modules call their number of heads.
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "attention_heads")


class Weights(NamedTuple):
    """What a softmax has made, and of what.

    Attributes:
        entropy: of every row, ``[batch, heads, queries]`` or ``[batch * heads, queries]``, nats,
            float32 (float64 of float64 weights).
        allowed_keys: of every row, how many scores are not masked.
        seen: of every key, whether a row sees it, ``[..., keys]``.
    """

    entropy: Tensor
    allowed_keys: Tensor
    seen: Tensor

    def real_keys(self, heads: int) -> Tensor:
        """Return which keys some row of some head sees, ``[batch, keys]``: the others are padding.

        Args:
            heads: how many are folded into the batch.
        """
        seen = self.seen.unflatten(0, (-1, heads)) if self.seen.dim() == 2 else self.seen
        return seen.any(1)

    def as_output(self, heads: int) -> AttentionOutput:
        """Return the rows as those of a call of attention, of which nothing else is known.

        Args:
            heads: how many are folded into the batch.
        """
        entropy, allowed = self.entropy, self.allowed_keys
        if entropy.dim() == 2:
            entropy, allowed = (each.unflatten(0, (-1, heads)) for each in (entropy, allowed))
        nothing = entropy.detach()
        return AttentionOutput(nothing[..., None][..., :0], entropy, nothing, nothing, allowed)


def heads_folded(weights: Tensor, module: nn.Module, given: Sequence[int] | None) -> int | None:
    """Return how many heads are folded into the batch of ``[batch * heads, queries, keys]``.

    Heads that a module folds may come before the batch or after it. It is known of the modules of
    transformers alone, where they come after, and which tell how many they are.

    Args:
        weights: that a module has made.
        module: it.
        given: the shape of what it was given, ``[batch, length, ...]`` or, if the length is that
            of the queries, ``[length, batch, ...]``.

    Returns:
        1 of ``[batch, heads, queries, keys]``; None if the dimensions are not known to be these.
    """
    batch, *places = given or (None,)
    if places and batch == weights.shape[-2] and weights.shape[0] % max(places[0], 1) == 0:
        batch, places[0] = places[0], batch
    told = _told_heads(module)
    if weights.dim() == 4 and weights.shape[1] == told:
        return 1
    if batch is None:
        return None
    if weights.dim() == 4:
        unlike = told is not None and not has_ranks()  # a rank may hold a part of the heads
        return 1 if not unlike and _has_heads_second(weights, batch, places) else None
    if weights.shape[0] == batch:
        return 1 if _has_queries_alone(weights.shape[1], places[0]) else None
    if told is None or not type(module).__module__.startswith("transformers."):
        return None
    return told if weights.shape[0] == batch * told else None


def _told_heads(module: nn.Module) -> int | None:
    told = (getattr(module, name, None) for name in HEADS)
    return next((each for each in told if isinstance(each, int)), None)


def _has_heads_second(weights: Tensor, batch: int, places: Sequence[int]) -> bool:
    """Tell whether the second dimension of four may be heads: not the batch, nor places."""
    second, n_queries = weights.shape[1:3]
    if second == batch != weights.shape[0]:
        return False
    if len(places) > 2:  # rows and columns, of which one attends along the other, or all along all
        along = weights.shape[0] == batch and n_queries != math.prod(places[1:])
        return not (along and {second, n_queries} <= {*places})
    if second == places[0] != n_queries:
        return False
    return _has_queries_alone(n_queries, places[0])


def tells_layout(shape: Sequence[int]) -> bool:
    """Tell whether sizes tell heads, the second dimension of four, from batch and queries."""
    return len(shape) == 4 and shape[0] != shape[1] != shape[2]


def has_as_many(shape: Sequence[int]) -> bool:
    """Tell whether there are as many heads as batch entries, of which either may come first."""
    return len(shape) == 4 and shape[0] == shape[1] > 1


def _has_queries_alone(n_queries: int, length: int) -> bool:
    """Tell whether so many queries may be those of one head, not of several for every place."""
    return n_queries == length or n_queries % max(length, 1) != 0


def may_attend(scores: object, dim: object) -> bool:
    """Tell whether the softmax of scores may make weights of attention, by their shape."""
    return (
        type(scores) in (Tensor, nn.Parameter)
        and scores.dim() in (3, 4)  # type: ignore[attr-defined]
        and dim in (-1, scores.dim() - 1)  # type: ignore[attr-defined]
        and scores.is_floating_point()  # type: ignore[attr-defined]
        and scores.shape[-1] > 0  # type: ignore[attr-defined]
        and not torch._C._functorch.is_functorch_wrapped_tensor(scores)  # type: ignore[arg-type]
    )


def weigh(scores: Tensor, weights: Tensor) -> Weights:
    """Return the entropy of every row of weights, and of how many keys it is.

    A row that sees no key has entropy 0 and no gradient, whatever weights the softmax gives it.

    Args:
        scores: ``[..., queries, keys]``, masked by -inf or by large negative numbers.
        weights: their softmax, in any floating dtype.
    """
    scores = scores.detach()
    largest = scores.amax(-1, keepdim=True)
    sees = (largest > torch.finfo(scores.dtype).min / 2) | largest.isnan()
    masked = (largest - MASKED_BELOW).masked_fill(~sees, torch.inf).nan_to_num_(nan=-torch.inf)
    allowed = scores > masked
    entropy = _Entropy.apply(weights, sees[..., 0])  # type: ignore[no-untyped-call]
    counts = allowed.sum(-1, dtype=torch.int32).long()  # twice as fast as int64 all the way
    return Weights(entropy, counts, allowed.any(-2))


class _Entropy(torch.autograd.Function):
    """The entropy of rows of weights ``w``, of the distribution ``p = w / sum(w)`` in each.

    ``H = log sum(w) - sum(w log w) / sum(w)`` and ``dH/dw = -(log p + H) / sum(w)``, which is 0 in
    the mean over ``p``: so what weights rounded to half precision lack of 1 moves neither. Where a
    weight is 0 the gradient need only be finite: backward of the softmax multiplies it by 0.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, sees: Tensor) -> Tensor:
        wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
        total = wide.sum(-1)
        entropy: Tensor = total.log() + torch.special.entr(wide).sum(-1) / total
        entropy.masked_fill_(~sees, 0.0)
        ctx.save_for_backward(weights, sees, total, entropy)
        return entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weights, sees, total, entropy = ctx.saved_tensors
        given, wide = torch.finfo(weights.dtype), torch.finfo(entropy.dtype)
        least = max(given.tiny * given.eps, wide.tiny)  # that is not 0, of float16 too
        log_w = weights.to(entropy.dtype).clamp_min(least).log()
        factor = (-gradient / total).masked_fill(~sees, 0.0)
        slope = (log_w + (entropy - total.log())[..., None]) * factor[..., None]
        return slope.to(weights.dtype), None
