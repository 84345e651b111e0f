"""Where the kernels run: on the GPU if there is one, else by Triton's interpreter on the CPU."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from entropy_regularization.attention.triton import launch
from entropy_regularization.attention.triton.support import is_interpreted
from entropy_regularization.attention.triton.tiles import Tiles

if is_interpreted():
    _create_dot = interpreter.InterpreterBuilder.create_dot
    _patch_tensor = interpreter._patch_lang_tensor

    @functools.wraps(_create_dot)
    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        """Multiply bfloat16, which the interpreter stores as bit patterns and multiplies as such.

        Remove when Triton's own create_dot converts bfloat16 (it does not up to 3.9).
        """
        if a.dtype == tl.bfloat16:
            a, b = (
                interpreter.TensorHandle(
                    (x.data.astype(np.uint32) << 16).view(np.float32), tl.float32
                )
                for x in (a, b)
            )
        return _create_dot(self, a, b, *rest)

    def patch_tensor(tensor: Any, *rest: Any) -> Any:
        """Let loop bounds be one-element arrays, which numpy 2.4 no longer converts to integers.

        Remove when the oldest supported Triton is 3.7.
        """
        patched = _patch_tensor(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())
        return patched

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._patch_lang_tensor = patch_tensor


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def set_tiles(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes every kernel use the given rows and keys of a tile."""

    def choose(rows: int, keys: int, warps: int = 4, stages: int = 1) -> None:
        tiles = Tiles(rows, keys, warps, stages)
        monkeypatch.setattr(launch, "tiles_for", lambda *arguments: tiles)

    return choose
