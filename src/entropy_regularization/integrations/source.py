"""How a module attends, as its source tells: for a compiled model, which no watch can follow."""

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Iterable

from torch import nn

from entropy_regularization.integrations.interception import original_attention, original_multi_head

MATRIX_PRODUCTS = ("matmul", "bmm", "einsum")  # as source and graphs of torch.jit name them
OWN_SOFTMAX = "computes a softmax of its own"
OTHER_NAMES = {
    original: f"calls {original.__name__} by another name"
    for original in (original_attention, original_multi_head)
}
CALLS_TORCH = "calls torch's own attention, which cannot be heard in a compiled model"
CALLS_OURS = "calls attention_with_entropy, which cannot be heard in a compiled model"
IF_COMPILED = {CALLS_TORCH, CALLS_OURS}  # what can be heard where nothing is compiled


@functools.cache
def attends_by_source(kind: type[nn.Module]) -> str | None:
    """Tell how a module's class attends in its own code, outside the attention interface.

    A class without a forward attends as the one does whose forward it inherits.
    """
    if issubclass(kind, nn.MultiheadAttention):
        return CALLS_TORCH
    owner = next(base for base in kind.__mro__ if "forward" in vars(base))
    how = _attends_in_code(kind)
    return how if how is not None or owner in (kind, nn.Module) else attends_by_source(owner)


def _attends_in_code(kind: type[nn.Module]) -> str | None:
    try:
        tree = _code_of(kind)
    except (OSError, TypeError, SyntaxError):  # made at run time, or written in C
        return None
    source = ast.unparse(tree)
    if "ALL_ATTENTION_FUNCTIONS" in source:
        return None
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    known = getattr(sys.modules.get(kind.__module__), "__dict__", {})
    other = other_name_in(known.get(name) for name in names)
    if other is not None:
        return other
    if "scaled_dot_product_attention(" in source or "multi_head_attention_forward(" in source:
        return CALLS_TORCH
    if "attention_with_entropy(" in source:
        return CALLS_OURS
    product = any(word in source for word in (*MATRIX_PRODUCTS, " @ "))
    return OWN_SOFTMAX if product and "softmax(" in source else None


def other_name_in(values: Iterable[object]) -> str | None:
    """Tell how values attend that are torch's own functions, in whose place no wrapper will be."""
    held = [how for value in values for each, how in OTHER_NAMES.items() if value is each]
    return held[0] if held else None


def _code_of(kind: type[nn.Module]) -> ast.AST:
    """Return the code of a class without what it says in docstrings."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(value=None)
    return tree
