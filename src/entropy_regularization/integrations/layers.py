"""What a layer is called, which kind it is, and whether it was asked for."""

import fnmatch
import sys
from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from entropy_regularization.recording.recorder import Layers

CROSS_NAMES = ("cross", "encoder_attn", "encdecattention", "encoder_attention", "multihead_attn")


def is_wanted(layers: Layers, index: int, name: str) -> bool:
    """Tell whether a call is among the layers asked for, see record_entropy."""
    if layers is None:
        return True
    wanted = [layers] if isinstance(layers, str) else list(layers)
    return any(
        fnmatch.fnmatchcase(name, want) if isinstance(want, str) else want == index
        for want in wanted
    )


def kind_of(name: str, module: nn.Module | None = None) -> Literal["self", "cross"]:
    """Tell self from cross attention: the module may say so, else its name does."""
    if getattr(module, "is_cross_attention", False):
        return "cross"
    last = name.lower().split(".")[-2:]
    return "cross" if any(word in part for word in CROSS_NAMES for part in last) else "self"


def runs_in_backward() -> bool:
    """Tell whether checkpointing computes a layer again: it is recorded already."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def in_reentrant_checkpoint() -> bool:
    """Tell whether this runs inside a reentrant checkpoint, which cuts gradients of what leaves."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        code = frame.f_code
        if code.co_name == "forward" and code.co_filename.endswith("utils/checkpoint.py"):
            return True
    return False


def calling_module(names: Mapping[nn.Module, str]) -> str | None:
    """Return the name of the innermost module of a model whose method is running, None if none is.

    Reads the stack of Python frames: a model needs no hook on each of its modules for it.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        part = frame.f_locals.get("self")
        if isinstance(part, nn.Module) and not isinstance(part, nn.Softmax):
            name = names.get(part)
            if name is not None:
                return name or type(part).__name__
    return None
