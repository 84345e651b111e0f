"""The attention function that transformers models call, registered in its attention interface."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from entropy_regularization.attention.api import AttentionOutput, attend
from entropy_regularization.attention.masking import Memo, Structure, split_mask
from entropy_regularization.integrations.interception import places, refuse_context_parallel
from entropy_regularization.integrations.transformers.flattened import taken_apart
from entropy_regularization.integrations.transformers.masks import (
    StructuredMask,
    entropy_mask,
)

NAME = "entropy_regularization"
FLATTENED = "entropy_regularization_flattened"  # in the place of flash attention
# Attribute of a module: the recorders that listen to it, each with the name it has for the module.
RECORDERS = "_entropy_listeners"


def entropy_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    flattened: bool = False,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as eager attention does, and hand the entropy of every row to the recorders, if any.

    ``attention_mask`` None means that nothing is masked, whatever ``is_causal`` says: the mask
    function of this interface never leaves a mask out.

    Args:
        module: the attention module.
        query: ``[batch, heads, queries, dim]``.
        key: ``[batch, kv_heads, keys, dim]``.
        value: ``[batch, kv_heads, keys, value_dim]``.
        attention_mask: a StructuredMask, a dense mask (boolean or additive), or None.
        dropout: rate; acts on the output, not on the entropy.
        scaling: factor of the scores; 1/sqrt(dim) unless given.
        is_causal: ignored, see above.
        flattened: take several texts in one row apart where flash attention does, by
            ``cu_seq_lens_q`` and its like or by ``position_ids`` that start again.
        options: ``softcap``, ``s_aux`` (sinks), ``sinks`` (one of every row), ``position_bias`` and
            ``indices`` (of the keys chosen for each query) act; the others are hints.

    Returns:
        The output ``[batch, queries, heads, value_dim]``, and None in place of the weights.

    Raises:
        ValueError: if weights are asked for, which are never made.
        NotImplementedError: under context parallelism, or for lengths of flattened texts in several
            rows or beside a cache.
    """
    if options.get("output_attentions"):
        refuse_matrices()
    refuse_context_parallel()
    structure, bias, memo = _mask_of(attention_mask, query, key)
    if flattened:
        structure, memo = taken_apart(structure, memo, query, key, options)
    key_padding = _real_keys(structure, query)
    if options.get("indices") is not None:
        structure = structure._replace(allowed=_chosen(options["indices"], structure, key))
        memo = None
    position_bias = options.get("position_bias")
    if position_bias is not None:
        position_bias = position_bias[..., : key.shape[2]]
        bias = position_bias if bias is None else bias + position_bias
    sinks = options.get("s_aux")
    # Under autocast the query and key may be wider than the value (rotary embeddings in float32).
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    found = attend(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        structure,
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        bias=bias,
        softcap=options.get("softcap"),
        sinks=None if sinks is None else sinks.reshape(-1),
        dropout=dropout,
        memo=memo,
    )
    if options.get("sinks") is not None:
        found = _with_row_sinks(found, options["sinks"])
    recorders = getattr(module, RECORDERS, ())
    for recorder, name in recorders:
        recorder.deposit(module, name, found, key.shape[2], key_padding)
    if not torch.compiler.is_compiling():
        # a part of the model that is recorded by itself, as any module is
        for listener, place in dict(places()).items():
            if place is not None:
                listener.deposit_call(place, found, key.shape[2])
    return found.output.to(value.dtype).transpose(1, 2).contiguous(), None


def refuse_matrices() -> None:
    """Raise the ValueError about matrices that were asked for."""
    raise ValueError(
        "output_attentions=True was asked for while entropies are recorded, but no attention "
        "matrix is ever made; leave it out, the recording holds the entropies."
    )


def _with_row_sinks(found: AttentionOutput, sinks: Tensor) -> AttentionOutput:
    """Give a sink of its own to every row, ``[batch, heads, queries, 1]`` (inkling2).

    The keys keep the share ``r = Z / (Z + exp(sink))`` of a row's mass ``Z``. Their weights become
    ``r p``, so that the entropy ``H`` becomes ``r H - r log r``.
    """
    sinks = sinks[..., 0].to(found.log_normalizer.dtype)
    seen = found.log_normalizer.isfinite()
    above = (found.log_normalizer - sinks).masked_fill(~seen, 0.0)
    log_share = torch.nn.functional.logsigmoid(above)
    share = log_share.exp()
    entropy = (share * (found.entropy - log_share)).masked_fill(~seen, 0.0)
    output = (found.output * share[..., None]).to(found.output.dtype)
    log_normalizer = torch.logaddexp(found.log_normalizer, sinks)
    return found._replace(output=output, entropy=entropy, log_normalizer=log_normalizer)


def _real_keys(structure: Structure, query: Tensor) -> Tensor | None:
    """Return which keys are no padding, ``[batch, keys]``; None if the mask does not say it.

    In a graph masks are dense, and a key that no row sees is padding; where nobody asks for it, the
    compiler leaves it out.
    """
    allowed = structure.allowed
    if structure.key_padding is not None or allowed is None or not torch.compiler.is_compiling():
        return structure.key_padding
    return allowed.any(-2).any(1).expand(query.shape[0], -1)


def _chosen(indices: Tensor, structure: Structure, key: Tensor) -> Tensor:
    """Return what is allowed of the keys that ``[batch, queries, chosen]`` indices choose.

    Families with an indexer (deepseek_v32) hand the keys over by index, a negative one being none.
    """
    chosen = indices.new_zeros(*indices.shape[:2], key.shape[2] + 1, dtype=torch.bool)
    chosen.scatter_(-1, indices.long().masked_fill(indices < 0, key.shape[2]), True)
    allowed = chosen[:, None, :, : key.shape[2]]
    return allowed if structure.allowed is None else allowed & structure.allowed


def _mask_of(
    mask: Tensor | None, query: Tensor, key: Tensor
) -> tuple[Structure, Tensor | None, Memo | None]:
    """Return the structure and the additive bias that a mask stands for, and a structure's memo."""
    if mask is None:
        return Structure(), None, None
    if isinstance(mask, StructuredMask):
        if mask.structure is not None and mask.shape[-2:] == (query.shape[2], key.shape[2]):
            return mask.structure, None, mask.memo
        mask = mask.make_dense()
    mask = mask[..., : key.shape[2]]  # a mask may be longer than the keys
    while mask.dim() < 4:
        mask = mask[None]
    allowed, bias = split_mask(mask)
    if allowed.shape[-2] not in (1, query.shape[2]):
        allowed = allowed[..., -query.shape[2] :, :]
        bias = None if bias is None else bias[..., -query.shape[2] :, :]
    return Structure(allowed=allowed), bias, None


def register() -> None:
    """Make the attention and its masks known to transformers."""
    AttentionInterface.register(NAME, entropy_attention)
    AttentionInterface.register(FLATTENED, functools.partial(entropy_attention, flattened=True))
    for name in (NAME, FLATTENED):
        AttentionMaskInterface.register(name, entropy_mask)


register()
