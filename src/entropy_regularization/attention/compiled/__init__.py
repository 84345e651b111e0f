"""Attention with entropy on a CPU in one compiled function: an option beside ``blockwise``.

It works on tiles as blockwise does, of sizes of its own (cutting.py), but a thread has blocks of
rows or stripes of keys to itself, and passes once over each tile. It computes what is a range of
keys in every row, or of keys with the row's own id: causal, windows, padding, documents. The rest,
and machines without a compiler, are left to blockwise.
"""

from entropy_regularization.attention.compiled.passes import add_at_once, fill_at_once
from entropy_regularization.attention.compiled.support import runs

__all__ = ["add_at_once", "fill_at_once", "runs"]
