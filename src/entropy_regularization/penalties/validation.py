"""Every check on settings and stored matrices, and the sentence read when it fails."""

from collections.abc import Sequence
from numbers import Real

from torch import Tensor

from entropy_regularization.checks import as_integer, check_positive_integer, is_number

UNSEEN = (
    "load the model with attn_implementation='eager' and pass output_attentions=True, or use "
    "record_entropy"
)


def check_not_negative(name: str, number: object) -> float:
    """Return the number, if it is finite and not negative.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is negative or not finite.
    """
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{name} is {number!r:.40}; pass a number, 0 or larger.")
    if not is_number(number) or number < 0:
        raise ValueError(f"{name} is {number!r:.40}; pass a finite number, 0 or larger.")
    return float(number)


def check_context_size(context_size: object) -> int | None:
    """Return the context size, if it is None or an integer of at least 2.

    Raises:
        TypeError: if it is neither.
        ValueError: if it is below 2: log 1 = 0 would be everyone's maximum.
    """
    if context_size is None:
        return None
    size = as_integer(context_size)
    if size is None:
        raise TypeError(f"context_size is {context_size!r}; pass an integer, or None.")
    if size < 2 or not is_number(size):
        raise ValueError(f"context_size is {size!r:.40}; pass at least 2, or None.")
    return size


def check_option(name: str, option: object, options: Sequence[str]) -> str:
    """Return the option, if it is one of the options.

    Raises:
        ValueError: if it is not.
    """
    for known in options:
        if isinstance(option, str) and option == known:
            return known
    raise ValueError(f"{name} is {option!r}; choose one of {', '.join(options)}.")


def check_matrix(name: str, matrix: object) -> None:
    """Check that something is a floating tensor.

    Raises:
        TypeError: if it is not.
    """
    if not isinstance(matrix, Tensor):
        raise TypeError(
            f"{name} is a {type(matrix).__name__}; pass a tensor (for a model, {UNSEEN})."
        )
    if not matrix.is_floating_point():
        raise TypeError(f"{name} has dtype {matrix.dtype}; pass a floating tensor.")


def check_matrices(
    name: str, matrices: Sequence[Tensor], num_heads: int = 1, num_layers: int | None = None
) -> None:
    """Check stored attention matrices against each other and against what is asked of them.

    Raises:
        TypeError: if one is not a floating tensor, or a number is not an integer.
        ValueError: if there are none, a shape does not fit, or more heads or another number of
            layers is asked for.
    """
    if matrices is None:  # what a model gives that has none to give
        raise TypeError(f"{name} is None; {UNSEEN}.")
    if not isinstance(matrices, Sequence | Tensor):
        raise TypeError(f"{name} is a {type(matrices).__name__}; pass one matrix per layer.")
    if len(matrices) == 0:
        raise ValueError(f"{name} is empty; {UNSEEN}.")
    check_positive_integer("num_heads", num_heads)
    if num_layers is not None and check_positive_integer("num_layers", num_layers) != len(matrices):
        raise ValueError(
            f"num_layers is {num_layers} but {name} has {len(matrices)} matrices; pass as many "
            "matrices as layers."
        )
    for layer, matrix in enumerate(matrices):
        _check_layer(f"{name}[{layer}]", matrix, matrices[0], num_heads)


def _check_layer(name: str, matrix: Tensor, first: Tensor, num_heads: int) -> None:
    check_matrix(name, matrix)
    if matrix.dim() != 4:
        raise ValueError(
            f"{name} has shape {tuple(matrix.shape)}; pass [batch, heads, queries, keys]."
        )
    if matrix.shape[0] != first.shape[0]:
        raise ValueError(
            f"{name} has batch {matrix.shape[0]} but the first matrix has {first.shape[0]}; pass "
            "the matrices of one forward pass."
        )
    if matrix.shape[1] < num_heads:
        raise ValueError(
            f"num_heads is {num_heads} but {name} has {matrix.shape[1]} heads; ask for at most as "
            "many."
        )
    if matrix.shape[3] == 0:
        raise ValueError(f"{name} has no keys; pass [batch, heads, queries, keys].")
