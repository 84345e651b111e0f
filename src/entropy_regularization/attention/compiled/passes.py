"""Hand a problem to the compiled kernel: pointers, scratch, and sums in float32."""

import ctypes
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from entropy_regularization.attention.blockwise import Gradients, Problem
from entropy_regularization.attention.blockwise.backward import RowConstants
from entropy_regularization.attention.blockwise.problem import LOG2_E
from entropy_regularization.attention.compiled.build import functions_of_torch, kernel
from entropy_regularization.attention.compiled.cutting import cut

DEPTH = 4  # blocks of rows that pass over the keys together, forward
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)  # their places are the kernel's codes


def _all(kind: type, *names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names]


class View(ctypes.Structure):
    """View of kernel.cpp."""

    _fields_ = [*_all(c_void_p, "data"), *_all(c_int64, "batch", "head", "position")]


class Call(ctypes.Structure):
    """Call of kernel.cpp: the same fields in the same order."""

    _fields_ = [
        *_all(c_void_p, "product", "parallel", "thread_number", "scratch"),
        *_all(c_int64, "threads", "batch", "heads", "key_heads", "queries", "keys"),
        *_all(c_int64, "dim", "value_dim", "rows", "depth", "stripe", "tile", "segments"),
        *_all(c_int64, "precision"),
        *_all(c_float, "scale", "log2_scale"),
        *_all(c_void_p, "first", "stop", "lowest", "highest"),
        *_all(c_int64, "limits_stride", "blocks_stride"),
        *_all(c_void_p, "row_id", "key_id"),
        *_all(c_int64, "row_id_stride", "key_id_stride"),
        *_all(View, "query", "key", "value", "output"),
        *_all(c_void_p, "largest", "total", "weighted"),
        *_all(View, "d_output", "d_key", "d_value"),
        *_all(c_void_p, "d_query", "d_queries"),
        *_all(c_void_p, "log2_normalizer", "log2_slope", "delta"),
    ]


def _check_shapes(problem: Problem) -> None:
    """Refuse shapes that do not fit together: C reads what it is told to."""
    query, key, value = (tuple(tensor.shape) for tensor in problem[:3])
    fits = key[0] == query[0] and key[3] == query[3] and value[:3] == key[:3]
    if not fits or query[1] != problem.group * key[1]:
        raise ValueError(
            f"query, key and value have shapes {query}, {key} and {value}; the compiled kernel "
            "takes [batch, heads, positions, dim] that attention_with_entropy has checked."
        )


class Pass:
    """One call of the kernel, and the tensors that it points into: they live as long as it does."""

    def __init__(self, problem: Problem) -> None:
        _check_shapes(problem)
        self.call, self._kept = Call(depth=DEPTH, segments=1), list[Tensor]()
        call, group = self.call, problem.group
        call.batch, call.heads, call.queries, call.dim = problem.query.shape
        call.key_heads, call.keys, call.value_dim = problem.value.shape[1:]
        call.product, call.parallel, call.thread_number = functions_of_torch()
        call.precision = PRECISIONS.index(problem.query.dtype)
        call.scale, call.log2_scale = problem.scale, problem.scale * LOG2_E
        for name in ("query", "key", "value"):
            self.view(name, getattr(problem, name))
        plan = cut(problem.structure, call.queries, call.keys, group)
        call.rows, call.stripe, call.tile = plan.rows, plan.stripe, plan.tile
        self.table(*plan.of_rows, names=("first", "stop"), stride="limits_stride")
        self.table(*plan.of_blocks, names=("lowest", "highest"), stride="blocks_stride")
        if plan.ids is not None:
            self.table(plan.ids[0], names=("row_id",), stride="row_id_stride")
            self.table(plan.ids[1], names=("key_id",), stride="key_id_stride")

    def view(self, name: str, tensor: Tensor | None) -> None:
        """Point at ``[batch, heads, positions, dim]``, a copy if BLAS cannot read it in place."""
        if tensor is None:
            return
        dim = tensor.shape[3]
        if not (tensor.stride(3) == 1 and dim <= tensor.stride(2) < 2**31):
            tensor = tensor.contiguous()
        position = tensor.stride(2) if tensor.shape[2] > 1 else dim  # one may have any stride
        view = View(self._address(tensor), *tensor.stride()[:2], position)
        setattr(self.call, name, view)

    def target(self, name: str, tensor: Tensor | None) -> None:
        """Point at a view to be written, which must not be a copy."""
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; the "
                "compiled kernel writes into contiguous tensors."
            )
        self.view(name, tensor)

    def rows(self, **named: Tensor) -> None:
        """Point at contiguous tensors, most of them ``[batch, heads, queries]``."""
        for name, tensor in named.items():
            setattr(self.call, name, self._address(tensor))

    def table(self, *tensors: Tensor, names: tuple[str, ...], stride: str) -> None:
        """Point at ``[batch or 1, any]`` tables of one shape."""
        for name, tensor in zip(names, tensors, strict=True):
            setattr(self.call, name, self._address(tensor.contiguous()))
        batch, length = tensors[0].shape
        if batch not in (1, self.call.batch):
            raise ValueError(
                f"{' and '.join(names)} have shape {tuple(tensors[0].shape)} and the query a batch "
                f"of {self.call.batch}; give padding and documents that batch, or one for all."
            )
        setattr(self.call, stride, 0 if batch == 1 else length)

    def _address(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    def run(self, name: str, items: int) -> None:
        """Call a function of the kernel, with scratch for as many threads as have work."""
        self.call.threads = max(1, min(torch.get_num_threads(), items))
        functions, by_reference = kernel(), ctypes.byref(self.call)
        floats = self.call.threads * functions.scratch_floats(by_reference)
        self.rows(scratch=torch.empty(floats, dtype=torch.float32, device="cpu"))
        getattr(functions, name)(by_reference)


def fill_at_once(problem: Problem, output: Tensor, statistics: tuple[Tensor, ...]) -> None:
    """Do what blockwise.forward.fill_in_chunks does, but leave a row without keys undefined.

    blockwise.forward sets it by the largest score.
    """
    this = Pass(problem)
    this.target("output", output)
    largest, total, weighted = statistics
    this.rows(largest=largest, total=total, weighted=weighted)
    blocks = -(-this.call.queries // this.call.rows)
    this.run("attention_forward", this.call.batch * this.call.key_heads * -(-blocks // DEPTH))


def add_at_once(
    problem: Problem,
    constants: RowConstants,
    outputs: tuple[Tensor, Tensor],
    gradients: Gradients,
) -> None:
    """Do what blockwise.backward.add_in_chunks does, but for a bias."""
    this = Pass(problem)
    call = this.call
    for name, tensor in zip(("output", "d_output"), outputs, strict=True):
        this.view(name, tensor)
    this.target("d_key", gradients.key)
    this.target("d_value", gradients.value)
    this.rows(
        log2_normalizer=constants.log2_normalizer.contiguous(),
        log2_slope=constants.log2_slope.contiguous(),
        delta=constants.delta,
    )
    units = call.batch * call.key_heads
    call.segments = _segments(units, -(-call.keys // call.stripe))
    parts = None
    if gradients.query is not None:
        this.rows(d_query=gradients.query)
        if call.segments > 1:
            shape = (call.segments, *gradients.query.shape)
            parts = gradients.query.new_empty(shape, dtype=torch.float32)
            this.rows(d_queries=parts)
    this.run("attention_backward", units * call.segments)
    if parts is not None and gradients.query is not None:
        for part in parts[1:]:
            parts[0].add_(part)
        gradients.query.copy_(parts[0])


def _segments(units: int, stripes: int) -> int:
    """Return into how many parts the stripes of a head are dealt, so that every core has work.

    As few as keep the cores busy for nine tenths of the time, because each has sums of its own.
    """
    cores = torch.get_num_threads()
    for segments in range(1, stripes):
        rounds = -(-units * segments // cores)
        if units * segments >= 0.9 * rounds * cores:
            return segments
    return max(1, stripes)
