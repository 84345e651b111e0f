"""Attention with entropy in linear memory: pure PyTorch, any device, own backward.

A block of rows meets the keys it may see, in pieces that stay in the cache if there are many; what
the structure excludes (the future, the keys outside a window, padding at either end, other
documents) is not computed, up to a few keys that even out a block. Scores live in scratch buffers
that every block reuses. See docs/attention.md for what was tried and what each choice gave.

Inside this room scores and log-probabilities are in base 2 (names end in ``_log2``): exp of a
number that underflows costs ten times as much as any other on a CPU, exp2 costs always the same.
"""

from entropy_regularization.attention.blockwise.backward import backward
from entropy_regularization.attention.blockwise.forward import forward
from entropy_regularization.attention.blockwise.problem import Gradients, Problem

__all__ = ["Gradients", "Problem", "backward", "forward"]
