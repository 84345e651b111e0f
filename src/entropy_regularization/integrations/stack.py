"""What is running around a call, read from the stack of Python frames."""

import inspect
import sys
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType

import torch
from torch import Tensor, nn
from torch._guards import TracingContext
from torch.autograd.function import Function, FunctionCtx
from torch.utils._pytree import tree_leaves

CALL = nn.Module._wrapped_call_impl.__code__  # whose arguments are those of the call


def _frames(thread: int | None = None) -> Iterator[FrameType]:
    """Walk over the frames above, or over those of another thread, the innermost first."""
    frame = sys._getframe(1) if thread is None else sys._current_frames().get(thread)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _running_modules() -> Iterator[nn.Module]:
    """Walk over the modules whose methods are running, the innermost first."""
    for frame in _frames():
        code = frame.f_code
        if "self" in code.co_varnames or "self" in code.co_freevars or "self" in code.co_cellvars:
            part = frame.f_locals.get("self")
            if isinstance(part, nn.Module) and not isinstance(part, nn.Softmax):
                yield part


def _runs(function: str, file: str) -> bool:
    for frame in _frames():
        if frame.f_code.co_name == function and frame.f_code.co_filename.endswith(file):
            return True
    return False


def runs_forward(module: nn.Module, thread: int | None = None) -> bool:
    """Tell whether the forward of a module is running, in this thread unless another is given."""
    return any(
        frame.f_code.co_name == "forward" and frame.f_locals.get("self") is module
        for frame in _frames(thread)
    )


def runs_compiled() -> bool:
    """Tell whether this runs inside a compiled function, perhaps at a break of its graph."""
    return torch.compiler.is_compiling() or _runs("compile_wrapper", "eval_frame.py")


def runs_for_compiler() -> bool:
    """Tell whether the compiler runs this to learn what a function makes: of tensors without data.

    Not so where it reads the code of this, as it reads that of most Python functions.
    """
    return not torch.compiler.is_dynamo_compiling() and TracingContext.try_get() is not None


def _forwards_of(function: type[Function]) -> Iterator[CodeType | None]:
    """Yield the code of what the subclasses of an autograd.Function compute, without decorators."""
    for subclass in function.__subclasses__():
        yield getattr(inspect.unwrap(subclass.forward), "__code__", None)
        yield from _forwards_of(subclass)


def in_reentrant_checkpoint() -> bool:
    """Tell whether this runs inside a reentrant checkpoint, which cuts gradients of what leaves.

    Of torch or another library (fairscale, DeepSpeed, Megatron, reversible layers): a module that
    runs inside the forward of an autograd.Function is computed again in its backward.
    """
    forwards = set(_forwards_of(Function))
    return any(frame.f_code in forwards for frame in _frames())


def backward_enters_checkpoint() -> bool:
    """Tell whether backward will compute a reentrant checkpoint around this again.

    Not so under an outer ``no_grad``, or where no input of the checkpoint has a gradient. One whose
    forward is not given its node first cannot be asked and is taken for none.
    """
    for frame in _frames():
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount > 0:
            node = frame.f_locals.get(code.co_varnames[0])
            if isinstance(node, FunctionCtx) and node.next_functions:  # type: ignore[attr-defined]
                return True
    return False


def in_checkpoint() -> bool:
    """Tell whether this runs inside a checkpoint that backward will compute again."""
    return _runs("checkpoint", "utils/checkpoint.py")


def backward_task() -> int:
    """Return the number of the backward pass that this runs in, -1 outside of one."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def runs_in_backward() -> bool:
    """Tell whether backward runs: checkpointing computes something again."""
    return backward_task() != -1


def refuse_vmap(name: str, entropy: Tensor) -> None:
    """Refuse to take what is gone when torch.vmap ends.

    Raises:
        NotImplementedError: if an entropy is that of one entry of what is mapped.
    """
    if not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(entropy):
        raise NotImplementedError(
            f"{name} attends inside torch.vmap, and its entropies would be gone when that ends; "
            "give the model a batch, or call it in a loop."
        )


def calling_module(names: Mapping[nn.Module, str]) -> str | None:
    """Return the name of the innermost module of a model whose method is running, None if none is.

    A model needs no hook on each of its modules for it.
    """
    for part in _running_modules():
        if part in names:
            return names[part] or type(part).__name__
    return None


def shape_given() -> torch.Size | None:
    """Return the shape of the first tensor of activations that the running module was given.

    As it was called: its code may give the names of its arguments to other tensors. A module
    without parameters is a function of the one around it, which makes its queries and keys; if no
    module has parameters, it is the outermost. Ids of tokens are taken for activations.

    Returns:
        ``[batch, length, ...]`` in most modules; None if none of them was given such a tensor.
    """
    outermost = None
    for frame in _frames():
        if frame.f_code is CALL:
            given = frame.f_locals
            leaves = tree_leaves([given["args"], given["kwargs"]])
            tensors = [each for each in leaves if isinstance(each, Tensor)]
            shape = next((each.shape for each in tensors if _has_batch_and_length(each)), None)
            outermost = shape or outermost
            if shape and next(given["self"].parameters(), None) is not None:
                return shape
    return outermost


def _has_batch_and_length(tensor: Tensor) -> bool:
    if tensor.is_floating_point():
        return tensor.dim() > 2
    return tensor.dim() == 2 and tensor.dtype != torch.bool


def in_function_of_module() -> bool:
    """Tell whether the running module computes this inside an autograd.Function of its own.

    Nothing that is made there has a gradient.
    """
    forwards = set(_forwards_of(Function))
    for frame in _frames():
        if frame.f_code in forwards:
            return True
        if isinstance(frame.f_locals.get("self"), nn.Module):
            return False
    return False


def calling_place() -> tuple[CodeType, int]:
    """Return the code that called torch, and where in it; not that of torch or of this library."""
    for frame in _frames():
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("torch", __name__.partition(".")[0]):
            break
    return frame.f_code, frame.f_lasti


def runs_with_stranger(names: Mapping[nn.Module, str]) -> tuple[bool, nn.Module | None]:
    """Tell whether a model is running, and which module runs inside it without being a part of it.

    One without parameters is no model of its own: a function that happens to be a module.
    """
    stranger = None
    for part in _running_modules():
        if part in names or getattr(part, "_is_replica", False):  # of nn.DataParallel
            return True, stranger
        if next(part.parameters(), None) is not None:
            stranger = part
    return False, None
