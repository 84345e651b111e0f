"""Operators of torch.library, and their gradients.

``torch.library.custom_op`` does it too, but reads the operator's schema anew at every call that
needs a gradient: a quarter of what a call took the host (docs/kernel.md).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # the compiler has nothing to trace in an operator

from entropy_regularization.attention.transforms import one_by_one

NAMESPACE = "entropy_regularization"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")

Results = tuple[Tensor, ...] | list[Tensor]


def as_operator(fake: Callable[..., Results]) -> Callable[[Callable[..., Results]], Any]:
    """Make an operator of a function that changes none of its arguments.

    The function's annotations are the operator's schema. Under vmap the operator is called once for
    every entry of what is mapped.

    Args:
        fake: allocates the results, for torch.compile.
    """

    def define(function: Callable[..., Results]) -> Any:
        name = function.__name__
        schema = torch.library.infer_schema(function, mutates_args=())
        _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, _disable_dynamo(function), "CompositeExplicitAutograd")
        operator = getattr(getattr(torch.ops, NAMESPACE), name).default
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        torch.library.register_vmap(f"{NAMESPACE}::{name}", one_by_one(operator), lib=_library)
        return operator

    return define


def define_gradient(
    operator: Any, backward: Callable[..., Any], save: Callable[..., None] | None = None
) -> None:
    """Let autograd differentiate an operator.

    Args:
        operator: of as_operator.
        backward: from the context and the gradients of the results to those of all arguments.
        save: of the context, the arguments and the results, what backward will need.
    """
    name = operator._schema.name.partition("::")[2]
    returns_list = len(operator._schema.returns) == 1

    def compute(*arguments: Any) -> Results:
        with torch._C._AutoDispatchBelowAutograd():
            results: Results = operator(*arguments)
        return results

    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        results = compute(*arguments)
        ctx.set_materialize_grads(False)
        if save is not None:
            save(ctx, arguments, results)
        return tuple(results)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    differentiable: Any = type(name, (torch.autograd.Function,), methods)

    def compute_and_follow(*arguments: Any) -> Results:
        if not torch.is_grad_enabled() or not torch._C._any_requires_grad(*arguments):
            return compute(*arguments)
        results: tuple[Tensor, ...] = differentiable.apply(*arguments)
        return list(results) if returns_list else results

    _library.impl(name, _disable_dynamo(compute_and_follow), "Autograd")
