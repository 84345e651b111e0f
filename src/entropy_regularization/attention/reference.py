"""The executable specification: the full matrix, plain autograd, any floating dtype.

Every other implementation exists because a test says that it equals this one.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from entropy_regularization.attention.masking import Structure, Tile, tile_allowed


def reference_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    structure: Structure,
    *,
    scale: float,
    bias: Float[Tensor, "..."] | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    dropout: float = 0.0,
) -> tuple[
    Float[Tensor, "batch heads queries value_dim"],
    Float[Tensor, "batch heads queries"],
    Float[Tensor, "batch heads queries"],
    Float[Tensor, "batch heads queries"],
]:
    """Return output, entropy, log-normalizer and largest score of every row.

    Scores are computed in float32 (float64 for float64 input), whatever the inputs' precision,
    under autocast too.
    """
    # a meta tensor knows no autocast
    device = "cpu" if query.device.type == "meta" else query.device.type
    with torch.autocast(device, enabled=False):
        return _attend(
            query, key, value, structure,
            scale=scale, bias=bias, softcap=softcap, sinks=sinks, dropout=dropout,
        )  # fmt: skip


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    structure: Structure,
    *,
    scale: float,
    bias: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_queries, n_keys = query.shape[-2], key.shape[-2]
    wide = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // max(key.shape[1], 1)
    keys = key.to(wide).repeat_interleave(group, dim=1)
    values = value.to(wide).repeat_interleave(group, dim=1)

    # s_ij = softcap(scale q_i . k_j) + bias_ij, -inf where the key is not allowed
    score = scale * query.to(wide) @ keys.transpose(-1, -2)
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    if bias is not None:
        score = score + bias.to(wide)
    everything = Tile(0, n_queries, 0, n_keys)
    allowed = tile_allowed(structure, everything, n_queries, n_keys, query.device)
    if allowed is None:
        allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=query.device)
    # -inf in a bias masks its key; NaN does not, so that its row is NaN
    allowed = allowed.expand(score.shape) & (score != -torch.inf)
    empty = ~allowed.any(-1)  # rows with no key: output, entropy and every gradient are 0

    # lse_i = log(sum_j exp(s_ij) [+ exp(sink)])
    # An empty row is given finite scores, because the gradient of logsumexp of -inf alone is NaN.
    masked = score.masked_fill(~allowed, -torch.inf).masked_fill(empty[..., None], 0.0)
    if n_keys == 0:
        masked = torch.zeros(*score.shape[:-1], 1, dtype=wide, device=score.device)
    log_normalizer = torch.logsumexp(masked, dim=-1)
    if sinks is not None:
        sink = sinks.to(wide)[None, :, None].expand_as(log_normalizer)
        log_normalizer = torch.where(empty, sink, torch.logaddexp(log_normalizer, sink))

    # log p_ij is kept finite where p_ij = 0: 0 * -inf is NaN, forward and backward
    finite = score.masked_fill(~allowed, 0.0)
    log_probability = finite - log_normalizer[..., None]
    zero = ~allowed | (log_probability == -torch.inf)  # so are all beside a sink of infinity
    log_probability = log_probability.masked_fill(zero, 0.0)
    probability = log_probability.exp() * ~zero
    entropy = -(probability * log_probability).sum(-1)

    # dropout changes the output only
    weights = torch.dropout(probability, dropout, train=True) if dropout > 0.0 else probability
    output = (weights @ values).masked_fill(empty[..., None], 0.0).to(query.dtype)

    nothing = score.new_full((), -torch.inf)
    max_score = score.detach().masked_fill(~allowed, -torch.inf)
    max_score = max_score.amax(-1) if n_keys else nothing.expand(score.shape[:-1]).clone()
    if sinks is None:
        log_normalizer = log_normalizer.masked_fill(empty, -torch.inf)
    return output, entropy, log_normalizer, max_score
