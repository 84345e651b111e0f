"""What a layer is called, which kind it is, and whether it was asked for."""

import fnmatch
from typing import Literal

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
