"""Masks as structure: what a transformers model makes as an [N, N] mask, recognised when made.

transformers composes mask functions (causal, sliding window, padding, packed) and asks the mask
interface for a mask. Plain compositions are kept as a Structure inside a tensor that has a shape
but no storage; a model that only hands it on never pays for it, and one that computes with it gets
the dense mask at that moment. A composition that is not recognised becomes the dense mask at once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import masking_utils

from entropy_regularization.attention.masking import Memo, Structure, split_mask


class StructuredMask(Tensor):
    """An additive ``[batch, 1, queries, keys]`` mask that is made only if someone computes with it.

    Attributes:
        structure: what the mask says, aligned as attention_with_entropy aligns; None if only the
            mask itself can say it.
        memo: what the layers that are given the mask share, see attend.
    """

    structure: Structure | None
    memo: Memo
    _make: Callable[[], Tensor]
    _dense: Tensor | None

    @staticmethod
    def __new__(
        cls,
        structure: Structure | None,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        make_dense: Callable[[], Tensor],
    ) -> "StructuredMask":
        """Make a tensor with a shape and no storage."""
        mask: StructuredMask = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        mask.structure, mask.memo = structure, {}
        mask._make, mask._dense = make_dense, None
        return mask

    def make_dense(self) -> Tensor:
        """Return the mask itself, made when first asked for."""
        if self._dense is None:
            self._dense = self._make()
        return self._dense

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Make the dense mask and compute with that.

        Only a boolean mask is ever negated: parakeet and nemotron_asr_streaming, whose own masks
        are those of sdpa, do so. An additive one, 0 where a key may be seen, would be turned round.
        """
        if func is torch.ops.aten.logical_not.default:
            return ~split_mask(args[0].make_dense())[0]

        # A view may be written to later, as the mask itself is by an operation in place.
        shared = func._schema.is_mutable or any(r.alias_info for r in func._schema.returns)

        def dense(value: Any) -> Any:
            if not isinstance(value, cls):
                return value
            value.structure = None if shared else value.structure
            return value.make_dense()

        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Describe the mask without making it."""
        return f"StructuredMask({self.structure}, shape={tuple(self.shape)})"


def _code_of(function: Callable[..., Any]) -> Any:
    return getattr(function, "__code__", None)


def _probe(name: str, *arguments: Any) -> Any:
    """Return the code object of what a factory in masking_utils returns, None if it is gone."""
    factory = getattr(masking_utils, name, None)
    return None if factory is None else _code_of(factory(*arguments))


# Functions made by one factory share one code object: comparing it is exact, no guess by name.
_CAUSAL = _code_of(masking_utils.causal_mask_function)
_BIDIRECTIONAL = _code_of(masking_utils.bidirectional_mask_function)
_AND = _code_of(masking_utils.and_masks())
_WINDOW = _probe("sliding_window_overlay", 1)
_TWO_SIDED_WINDOW = _probe("sliding_window_bidirectional_overlay", 1)
_PACKED = _probe("packed_sequence_mask_function", torch.zeros(1, 1, dtype=torch.int64))
_REMAPPED = _probe(
    "remap_positions_for_packed_sequence",
    masking_utils.causal_mask_function,
    torch.zeros(1, 1, dtype=torch.int64),
)


# Families whose code takes a mask to be boolean, as that of sdpa is, in more ways than negation;
# their own eager attention gives NaN.
BOOLEAN = {"nemotron_asr_streaming_encoder"}


def recognise(function: Callable[..., Any]) -> Structure | None:
    """Return what a mask function says in terms of (left, right, document); None if unknown.

    Positions are those of the mask function: key ``<=`` query for causal.
    """
    code = _code_of(function)
    if code is None:
        return None
    if code is _CAUSAL:
        return Structure(right=0)
    if code is _BIDIRECTIONAL:
        return Structure()
    closed = dict(
        zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()))  # noqa: B905  # type: ignore[attr-defined]
    )
    if code is _WINDOW and type(closed["sliding_window"]) is int:
        return Structure(left=closed["sliding_window"] - 1)
    if code is _TWO_SIDED_WINDOW and type(closed["sliding_window"]) is int:
        return Structure(left=closed["sliding_window"], right=closed["sliding_window"])
    if code is _PACKED:
        return Structure(document=closed["packed_sequence_mask"])
    if code is _REMAPPED:
        # Inside a document positions are consecutive, so that differences are what they were.
        return recognise(closed["mask_function"])
    if code is _AND:
        return _intersection([recognise(part) for part in closed["mask_functions"]])
    return None


def _intersection(parts: list[Structure | None]) -> Structure | None:
    left: int | None = None
    right: int | None = None
    document: Tensor | None = None
    for part in parts:
        if part is None or (part.document is not None and document is not None):
            return None
        left = part.left if left is None else left if part.left is None else min(left, part.left)
        right = (
            part.right if right is None else right if part.right is None else min(right, part.right)
        )
        document = part.document if document is None else document
    return Structure(left, right, document=document)


def entropy_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Tensor | None:
    """Make the mask of one kind of layer (registered in AttentionMaskInterface).

    Its arguments are those of ``masking_utils.eager_mask``, which is also what it falls back to.
    """
    given: dict[str, Any] = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "dtype": dtype,
    }

    def make_dense() -> Tensor:
        dense: Tensor = masking_utils.eager_mask(**given, **_never_skipped(options))
        return dense

    if getattr(options.get("config"), "model_type", None) in BOOLEAN:
        boolean: Tensor | None = masking_utils.sdpa_mask(**given, **_never_skipped(options))
        return boolean
    said = None if torch.compiler.is_compiling() else recognise(mask_function)
    packed_with_cache = said is not None and said.document is not None and q_length != kv_length
    device = torch.device(options.get("device", "cpu"))
    if said is None or packed_with_cache or isinstance(q_offset, Tensor):
        dense: Tensor | None = masking_utils.eager_mask(**given, **options)
        if dense is None or torch.compiler.is_compiling():
            return dense
        return StructuredMask(None, tuple(dense.shape), dtype, dense.device, lambda: dense)
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length].bool()
    # transformers counts positions from the start, attention_with_entropy aligns the last ones.
    shift = (q_offset - kv_offset) - (kv_length - q_length)
    structure = Structure(
        left=None if said.left is None else said.left - shift,
        right=None if said.right is None else said.right + shift,
        key_padding=padding,
        document=said.document,
    )
    if structure == Structure() and options.get("allow_is_bidirectional_skip", False):
        return None
    shape = (batch_size, 1, q_length, kv_length)
    return StructuredMask(structure, shape, dtype, device, make_dense)


def _never_skipped(options: dict[str, Any]) -> dict[str, Any]:
    """Ask for the mask itself, also where a fused attention would do without it."""
    return {**options, "allow_is_bidirectional_skip": False, "allow_is_causal_skip": False}
