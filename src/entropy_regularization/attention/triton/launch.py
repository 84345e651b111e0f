"""From tensors to kernel launches: arguments, tile sizes, grids."""

import contextlib
import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from entropy_regularization.attention.masking import Memo, Structure, once
from entropy_regularization.attention.triton.bias_gradient import bias_gradient_kernel
from entropy_regularization.attention.triton.forward import forward_kernel
from entropy_regularization.attention.triton.key_gradient import key_gradient_kernel
from entropy_regularization.attention.triton.query_gradient import query_gradient_kernel
from entropy_regularization.attention.triton.recomputation import row_constants_kernel
from entropy_regularization.attention.triton.skipping import Bounds, visible_keys, visible_rows
from entropy_regularization.attention.triton.tiles import Tiles, choose_tiles, shared_bytes_of
from entropy_regularization.attention.triton.views import (
    masks_of,
    pairs_view,
    rows_like,
    strides_by_8,
    view,
)

LOG2_E = 1.0 / math.log(2.0)


class Problem(NamedTuple):
    """The inputs of one attention call, validated."""

    query: Tensor
    key: Tensor
    value: Tensor
    structure: Structure
    scale: float
    bias: Tensor | None
    softcap: float | None
    sinks: Tensor | None
    dropout: float
    seed: Tensor | None
    bounds: Bounds = Bounds()

    @property
    def wide(self) -> torch.dtype:
        """The dtype of scores and sums; float64 only under the interpreter."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    @property
    def loaded(self) -> bool:
        """Whether the kernels read a number for every score."""
        return self.bias is not None or self.structure.allowed is not None


class Upstream(NamedTuple):
    """Gradients that arrive; None where nothing was differentiated."""

    output: Tensor | None
    entropy: Tensor | None
    log_normalizer: Tensor | None


def common_arguments(problem: Problem) -> dict[str, Any]:
    """Return what every kernel that computes scores takes."""
    query, key, value = problem.query, problem.key, problem.value
    batch, heads, n_queries, dim = query.shape
    n_keys, value_dim = key.shape[2], value.shape[-1]
    sizes = (batch, heads, n_queries, n_keys)
    masks = masks_of(problem.structure, sizes)
    dropout = None
    if problem.seed is not None:
        dropout = (problem.seed, problem.dropout, 1.0 / (1.0 - problem.dropout))
    cap = problem.softcap
    return {
        **masks,
        "query": view(query),
        "key": view(key),
        "value": view(value),
        "bias": None if problem.bias is None else pairs_view(problem.bias, sizes),
        "dropout": dropout,
        "factor": problem.scale * LOG2_E if cap is None else problem.scale / cap,
        "cap_log2": None if cap is None else cap * LOG2_E,
        "left": limit(problem.structure.left, n_queries + n_keys),
        "right": limit(problem.structure.right, n_queries + n_keys),
        "group": heads // max(key.shape[1], 1),
        "n_queries": n_queries,
        "n_keys": n_keys,
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "PADDED": padded(dim),
        "VALUE_PADDED": padded(value_dim),
        "WIDE": tl.float64 if problem.wide == torch.float64 else tl.float32,
    }


def limit(side: int | None, most: int) -> int | None:
    """Bound a side of a window to what has an effect, so that positions stay 32-bit numbers."""
    return None if side is None else max(-most, min(side, most))


def tiles_in(positions: int, length: int) -> int:
    """Count the tiles of a length that hold some positions (triton.cdiv takes microseconds)."""
    return -(-positions // length)


def padded(dim: int) -> int:
    """Round a head dimension up to what matrix instructions take."""
    return max(16, 1 << (dim - 1).bit_length())


def tiles_for(kernel: str, query: Tensor, value: Tensor, loaded: bool = False) -> Tiles:
    """Choose the tiles of a kernel for the head dimensions, precision and device of a problem.

    ``loaded``: a bias or a dense mask takes shared memory and registers too.
    """
    width = max(query.shape[-1], value.shape[-1])
    return choose_tiles(kernel, width, query.dtype, shared_bytes_of(query.device), loaded)


def bounds_of(kernel: str, problem: Problem, memo: Memo | None = None) -> Tensor | None:
    """Return the bounds of a kernel's tiles that padding and documents set, if there are any."""
    given: Tensor | None = getattr(problem.bounds, kernel)
    structure = problem.structure
    if given is not None or (structure.key_padding is None and structure.document is None):
        return given
    tiles = tiles_for(kernel, problem.query, problem.value, problem.loaded)
    bound = visible_rows if kernel == "key_gradients" else visible_keys
    sizes = (problem.query.shape[0], problem.query.shape[2], problem.key.shape[2])
    what = (bound.__name__, *sizes, tiles.rows, tiles.keys)
    found: Tensor | None = once(memo, what, lambda: bound(structure, *sizes, tiles))
    return found


def start_kernel(kernel: Any, programs: int, tiles: Tiles, arguments: dict[str, Any]) -> None:
    """Launch ``programs`` programs of a kernel on the device of its first tensor."""
    if programs == 0:
        return
    device = arguments["query"][0].device if "query" in arguments else arguments["output"][0].device
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        kernel[(programs,)](
            **arguments,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            enable_fp_fusion=True,
        )


def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return output, entropy, log-normalizer and largest score of every row.

    The fifth result is for backward: the log-normalizer in base 2, -inf where there is no key,
    whatever sink.
    """
    query, key, value = problem.query, problem.key, problem.value
    batch, heads, n_queries, _ = query.shape
    output = rows_like(query, value.shape[-1])
    wide = problem.wide
    entropy, log_normalizer, max_score, log2_normalizer = (
        query.new_empty(batch, heads, n_queries, dtype=wide) for _ in range(4)
    )
    tiles = tiles_for("forward", query, value, problem.loaded)
    blocks = tiles_in(n_queries, tiles.rows)
    arguments = common_arguments(problem)
    arguments |= {
        "factor": abs(arguments["factor"]),
        "NEGATIVE": arguments["factor"] < 0,
        "output": view(output),
        "p_entropy": entropy,
        "p_log_normalizer": log_normalizer,
        "p_max_score": max_score,
        "p_log2_normalizer": log2_normalizer,
        "p_sinks": None if problem.sinks is None else problem.sinks.contiguous(),
        "p_ranges": bounds_of("forward", problem),
        "heads": heads,
        "n_blocks": blocks,
        "ROWS": tiles.rows,
        "KEYS": tiles.keys,
        "STRIDES_BY_8": strides_by_8(query, key, value, output),
    }
    start_kernel(forward_kernel, blocks * batch * heads, tiles, arguments)
    return output, entropy, log_normalizer, max_score, log2_normalizer


class RowConstants(NamedTuple):
    """What dS needs of its row, each ``[batch, heads, queries]``, and the distance between heads.

    That is a multiple of 16, so that the kernels load several rows at once whatever the length.
    """

    delta: Tensor
    log2_normalizer: Tensor
    entropy_slope: Tensor | None
    stride: int


def row_constants(
    problem: Problem, saved: tuple[Tensor, Tensor, Tensor], upstream: Upstream
) -> RowConstants:
    """Collect the terms of dS that belong to a row (see recomputation.row_constants_kernel)."""
    output, entropy, saved_normalizer = saved
    tiles = tiles_for("row_constants", output, output)
    batch, heads, n_queries, value_dim = output.shape
    stride = tiles_in(n_queries, 16) * 16

    def allocate() -> Tensor:
        return entropy.new_empty(batch, heads, stride)[..., :n_queries]

    slope = None if upstream.entropy is None else allocate()
    constants = RowConstants(allocate(), allocate(), slope, stride)
    blocks = tiles_in(n_queries, tiles.rows)
    arguments = {
        "output": view(output),
        "d_output": None if upstream.output is None else view(upstream.output),
        "p_entropy": entropy,
        "p_saved_normalizer": saved_normalizer,
        "p_d_entropy": None if upstream.entropy is None else upstream.entropy.contiguous(),
        "p_d_normalizer": (
            None if upstream.log_normalizer is None else upstream.log_normalizer.contiguous()
        ),
        "p_sinks": None if problem.sinks is None else problem.sinks.contiguous(),
        "constants": tuple(constants),
        "heads": heads,
        "n_queries": n_queries,
        "n_blocks": blocks,
        "VALUE_DIM": value_dim,
        "VALUE_PADDED": padded(value_dim),
        "ROWS": tiles.rows,
        "WIDE": tl.float64 if problem.wide == torch.float64 else tl.float32,
        "STRIDES_BY_8": upstream.output is not None and strides_by_8(output, upstream.output),
    }
    start_kernel(row_constants_kernel, blocks * batch * heads, tiles, arguments)
    return constants


def backward(
    problem: Problem,
    saved: tuple[Tensor, Tensor, Tensor],
    upstream: Upstream,
    wanted: tuple[bool, bool, bool, bool, bool],
) -> list[Tensor | None]:
    """Return the gradients of query, key, value, bias and sinks, None where not wanted.

    Args:
        problem: the inputs of the forward pass.
        saved: its output, entropy, and log-normalizer in base 2 (see forward).
        upstream: the gradients of output, entropy and log-normalizer.
        wanted: which of (query, key, value, bias, sinks) need a gradient.
    """
    sizes = problem.query.shape[2], problem.key.shape[2]
    d_output = upstream.output
    if d_output is None:  # one zero, seen everywhere
        d_output = problem.query.new_zeros(1, 1, 1, 1).expand(saved[0].shape)
    elif problem.bias is not None or problem.structure.may_leave_rows_empty(*sizes):
        # 0 times what is not finite would be NaN
        d_output = d_output.masked_fill((saved[2] == -math.inf)[..., None], 0.0)
        upstream = upstream._replace(output=d_output)
    constants = row_constants(problem, saved, upstream)
    arguments = common_arguments(problem) | {
        "d_output": view(d_output),
        "constants": tuple(constants),
    }
    d_query, d_bias, d_sinks = None, None, None
    d_key, d_value = None, None
    if wanted[0]:
        d_query = query_gradient(problem, arguments)
    if wanted[1] or wanted[2]:
        d_key, d_value = key_gradients(problem, arguments)
    if wanted[3] and problem.bias is not None:
        d_bias = bias_gradient(problem, problem.bias, arguments)
    if wanted[4] and problem.sinks is not None:
        d_sinks = sinks_gradient(problem.sinks, saved[2], constants, upstream)
    return [d_query, d_key if wanted[1] else None, d_value if wanted[2] else None, d_bias, d_sinks]


def query_gradient(problem: Problem, arguments: dict[str, Any]) -> Tensor:
    """Return dQ."""
    query, key, value = problem.query, problem.key, problem.value
    batch, heads, n_queries, _ = query.shape
    d_query = torch.empty_like(query)
    tiles = tiles_for("query_gradient", query, value, problem.loaded)
    blocks = tiles_in(n_queries, tiles.rows)
    own = {
        "d_query": view(d_query),
        "p_ranges": bounds_of("query_gradient", problem),
        "scale": problem.scale,
        "heads": heads,
        "n_blocks": blocks,
        "ROWS": tiles.rows,
        "KEYS": tiles.keys,
        "STRIDES_BY_8": strides_by_8(query, key, value, arguments["d_output"][0], d_query),
    }
    start_kernel(query_gradient_kernel, blocks * batch * heads, tiles, arguments | own)
    return d_query


def key_gradients(problem: Problem, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return dK and dV."""
    query, key, value = problem.query, problem.key, problem.value
    batch, kv_heads, n_keys, _ = key.shape
    d_key, d_value = torch.empty_like(key), torch.empty_like(value)
    tiles = tiles_for("key_gradients", query, value, problem.loaded)
    blocks = tiles_in(n_keys, tiles.keys)
    own = {
        "d_key": view(d_key),
        "d_value": view(d_value),
        "p_ranges": bounds_of("key_gradients", problem),
        "scale": problem.scale,
        "kv_heads": kv_heads,
        "n_blocks": blocks,
        "ROWS": tiles.rows,
        "KEYS": tiles.keys,
        "STRIDES_BY_8": strides_by_8(query, key, value, arguments["d_output"][0], d_key, d_value),
    }
    start_kernel(key_gradient_kernel, blocks * batch * kv_heads, tiles, arguments | own)
    return d_key, d_value


def bias_gradient(problem: Problem, bias: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Return dbias, in the shape of the bias."""
    query, value = problem.query, problem.value
    batch, heads, n_queries, _ = query.shape
    n_keys = problem.key.shape[2]
    d_bias = torch.empty_like(bias)
    tiles = tiles_for("bias_gradient", query, value, problem.loaded)
    counts = (batch, heads, tiles_in(n_queries, tiles.rows), tiles_in(n_keys, tiles.keys))
    owned = [1 if size == 1 else n for size, n in zip(bias.shape, counts, strict=True)]
    visited = [n if size == 1 else 1 for size, n in zip(bias.shape, counts, strict=True)]
    own = {
        "d_bias": view(d_bias),
        "heads": heads,
        "owned": tuple(owned[1:]),
        "visited": tuple(visited),
        "ROWS": tiles.rows,
        "KEYS": tiles.keys,
        "STRIDES_BY_8": strides_by_8(query, problem.key, value, arguments["d_output"][0]),
        "SUM_ROWS": bias.shape[2] == 1,
        "SUM_KEYS": bias.shape[3] == 1,
    }
    if d_bias.numel():
        start_kernel(bias_gradient_kernel, math.prod(owned), tiles, arguments | own)
    return d_bias


def sinks_gradient(
    sinks: Tensor, log2_normalizer: Tensor, constants: RowConstants, upstream: Upstream
) -> Tensor:
    """Return dsinks: ``dlse/dsink`` is the sink's share of a row, ``dp_j/dsink`` minus that p_j."""
    empty = log2_normalizer == -math.inf
    log2_share = sinks.to(log2_normalizer.dtype)[None, :, None] * LOG2_E - log2_normalizer
    share = log2_share.exp2().masked_fill(log2_normalizer.isinf(), 1.0)
    inner = constants.delta
    if upstream.entropy is not None:
        inner = inner - upstream.entropy.masked_fill(empty, 0.0)
    gradient = share * -inner
    if upstream.log_normalizer is not None:  # that of a row without a key is its sink
        gradient = gradient + upstream.log_normalizer.masked_fill(~empty, 0.0)
    return gradient.sum((0, 2)).to(sinks.dtype)
