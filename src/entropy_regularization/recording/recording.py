"""EntropyRecording: the row entropies of every attention layer in one forward pass."""

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from entropy_regularization.checks import as_integer


@dataclass(frozen=True)
class LayerEntropy:
    """The entropies of one attention call.

    Layers that are given one mask share ``allowed_keys`` and ``rows``, which are not for writing.

    Attributes:
        name: qualified module name, for instance ``transformer.h.0.attn``.
        kind: "self" or "cross" attention.
        entropy: ``[batch, heads, queries]``, nats; carries the gradient if one was asked for.
        allowed_keys: ``[batch or 1, heads or 1, queries]`` integers; the most entropy that a row
            can have is ``log(allowed_keys)``.
        rows: ``[batch, queries]`` boolean, False for padding queries.
        keys: how many keys there were, seen or not.
    """

    name: str
    kind: Literal["self", "cross"]
    entropy: Tensor
    allowed_keys: Tensor
    rows: Tensor
    keys: int

    @property
    def heads(self) -> int:
        """The number of heads."""
        return self.entropy.shape[1]

    @property
    def maximum(self) -> Tensor:
        """The most entropy each row can have, ``log n_i``, nats, in the shape of allowed_keys."""
        return self.allowed_keys.clamp(min=1).to(self.entropy.dtype).log()

    def counted(self) -> Tensor:
        """Which rows enter means, ``[batch, heads, queries]``: no padding, at least one key."""
        return (self.rows[:, None] & (self.allowed_keys > 0)).expand_as(self.entropy)

    def mean_per_head(self) -> Tensor:
        """Mean entropy over the counted rows, ``[heads]``, nats; NaN where no row counts."""
        counted = self.counted()
        total = self.entropy.masked_fill(~counted, 0.0).sum((0, 2))
        return total / counted.sum((0, 2))

    def select_heads(self, heads: Sequence[int]) -> "LayerEntropy":
        """Keep some heads, in the order given.

        Raises:
            TypeError: if heads are no integers.
            IndexError: if a head is not there, or none is asked for.
        """
        chosen = _integers("heads", heads)
        if not chosen:
            raise IndexError("heads is empty, which keeps no head; pass places of heads.")
        for head in chosen:
            if not 0 <= head < self.heads:
                raise IndexError(f"head {head} was asked of {self.name}, which has {self.heads}.")
        allowed = self.allowed_keys
        if allowed.shape[1] != 1:
            allowed = allowed[:, chosen]
        return replace(self, entropy=self.entropy[:, chosen], allowed_keys=allowed)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "LayerEntropy":
        return replace(
            self,
            entropy=function(self.entropy),
            allowed_keys=function(self.allowed_keys),
            rows=function(self.rows),
        )


@dataclass
class EntropyRecording:
    """The entropies of the attention layers of one forward pass, in the order of the calls.

    A layer that is called several times (albert, cross-attention over several inputs) stands there
    several times under the same name.

    Attributes:
        layers: one LayerEntropy per attention call.
        missing: names of attention modules that could not be seen, if a partial recording was
            accepted.
    """

    layers: list[LayerEntropy] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of attention calls."""
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerEntropy]:
        """Walk over the attention calls."""
        return iter(self.layers)

    def __getitem__(self, index: int) -> LayerEntropy:
        """Return one attention call."""
        return self.layers[index]

    def __repr__(self) -> str:
        """Return one line per layer: name, kind, shape and mean entropy."""
        lines = [
            f"  {layer.name} ({layer.kind}) {tuple(layer.entropy.shape)}" + _mean_of(layer)
            for layer in self.layers
        ]
        return "\n".join([f"EntropyRecording of {len(self.layers)} attention calls", *lines])

    @property
    def entropies(self) -> list[Tensor]:
        """The entropies alone, one ``[batch, heads, queries]`` per layer."""
        return [layer.entropy for layer in self.layers]

    def select(
        self,
        pattern: str = "*",
        *,
        kind: Literal["self", "cross"] | None = None,
        indices: Iterable[int] | None = None,
        heads: Sequence[int] | None = None,
    ) -> "EntropyRecording":
        """Keep the layers whose name matches a shell pattern, of one kind, or at some indices.

        Args:
            pattern: of module names, for instance ``"*.layers.1?.*"``.
            kind: "self" or "cross"; None for both.
            indices: places in the order of the calls; None for all.
            heads: the heads to keep of each layer, in this order; None for all.

        Raises:
            TypeError: if the pattern is no text, or indices or heads are no integers.
            LookupError: if nothing is left, or an index or head is not there.
        """
        if not isinstance(pattern, str):
            raise TypeError(f"pattern is {pattern!r}; pass a pattern of names, or indices=[...].")
        wanted = list(range(len(self))) if indices is None else _integers("indices", indices)
        if indices is not None and not wanted:
            raise LookupError("indices is empty, which keeps no layer; pass places of calls.")
        for index in wanted:
            if not -len(self.layers) <= index < len(self.layers):
                raise LookupError(f"layer {index} was asked for; there are {len(self.layers)}.")
        kept = [
            self.layers[index]
            for index in wanted
            if fnmatch.fnmatchcase(self.layers[index].name, pattern)
            and kind in (None, self.layers[index].kind)
        ]
        if not kept:
            names = ", ".join(sorted({layer.name for layer in self.layers})) or "none"
            among = "" if indices is None else f" at indices {wanted}"
            raise LookupError(
                f"no recorded layer{among} matches pattern {pattern!r} and kind {kind!r}; "
                f"there are: {names}."
            )
        if heads is not None:
            kept = [layer.select_heads(heads) for layer in kept]
        return EntropyRecording(kept, list(self.missing))

    def detach(self) -> "EntropyRecording":
        """Return the same numbers without their graph."""
        return self._map(Tensor.detach)

    def cpu(self) -> "EntropyRecording":
        """Return the same recording on the CPU."""
        return self._map(Tensor.cpu)

    def mean_per_head(self) -> list[Tensor]:
        """Mean entropy over counted rows, one ``[heads]`` tensor per layer, nats."""
        return [layer.mean_per_head() for layer in self.layers]

    def _map(self, function: Callable[[Tensor], Tensor]) -> "EntropyRecording":
        return EntropyRecording([layer._map(function) for layer in self.layers], list(self.missing))

    @staticmethod
    def concatenate(recordings: Sequence["EntropyRecording"]) -> "EntropyRecording":
        """Join recordings of several batches of the same model along the batch dimension.

        Batches may have different lengths: shorter ones are filled with rows that do not count.

        Raises:
            TypeError: if something is no recording.
            ValueError: if there is nothing to join, or the layers differ.
        """
        one = isinstance(recordings, EntropyRecording)  # whose items are calls
        if one or not isinstance(recordings, Sequence):
            raise TypeError(f"recordings is a {type(recordings).__name__}; pass a list of them.")
        for number, each in enumerate(recordings):
            check_recording(f"recordings[{number}]", each)
        if not recordings:
            raise ValueError("no recording was given; pass at least one.")
        for other in recordings[1:]:
            calls = ([_described(call) for call in each] for each in (recordings[0], other))
            for at, (ours, theirs) in enumerate(zip_longest(*calls, fillvalue="none")):
                if ours != theirs:
                    raise ValueError(
                        f"the recordings have different layers: call {at} is {ours} in one and "
                        f"{theirs} in another; join batches of the same model."
                    )
        joined = [
            _join(calls)
            for calls in zip(*(recording.layers for recording in recordings), strict=True)
        ]
        missing = sorted({name for recording in recordings for name in recording.missing})
        return EntropyRecording(joined, missing)


def check_recording(name: str, given: object, otherwise: str = "") -> None:
    """Refuse what is no recording.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(given, EntropyRecording):
        raise TypeError(
            f"{name} is a {type(given).__name__}; pass the EntropyRecording of record_entropy"
            f"{otherwise}."
        )


def _integers(name: str, given: object) -> list[int]:
    """Return places in a list as Python's integers."""
    items = [as_integer(item) for item in given] if isinstance(given, Iterable) else [None]
    found = [item for item in items if item is not None]
    if len(found) < len(items):
        raise TypeError(f"{name} is {given!r}; pass a list of integers.")
    return found


def _described(layer: LayerEntropy) -> str:
    return f"{layer.name} ({layer.kind}, {layer.heads} heads)"


def _mean_of(layer: LayerEntropy) -> str:
    if layer.entropy.is_meta:  # no numbers
        return ""
    return f" mean {layer.mean_per_head().mean().item():.3f} nats"


def _join(calls: Sequence[LayerEntropy]) -> LayerEntropy:
    """Join the calls of one layer along the batch, all as long as the longest."""
    length = max(call.entropy.shape[-1] for call in calls)
    heads = max(call.allowed_keys.shape[1] for call in calls)

    def fill(tensor: Tensor) -> Tensor:
        return pad(tensor, (0, length - tensor.shape[-1]))

    allowed = [fill(c.allowed_keys).expand(c.entropy.shape[0], heads, -1) for c in calls]
    return replace(
        calls[0],
        entropy=torch.cat([fill(call.entropy) for call in calls]),
        allowed_keys=torch.cat(allowed),
        rows=torch.cat([fill(call.rows) for call in calls]),
        keys=max(call.keys for call in calls),
    )
