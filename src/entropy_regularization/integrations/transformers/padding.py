"""Which rows are real: the 2-D attention_mask is an argument of the model, not of its attention."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, StaticCache

from entropy_regularization.attention.masking import Memo, once
from entropy_regularization.integrations.transformers.accumulation import IGNORED

TOKENS = ("input_ids", "decoder_input_ids")  # of which a cache may hold the first ones


class _Given(NamedTuple):
    """The mask that a model was given, and the name of what it reads."""

    mask: Tensor | None
    reads: str
    memo: Memo  # the part that is its rows', by length
    filled: Tensor | int | None = None  # tokens in a static cache, whose mask may be as long as it
    made: bool = False  # the mask is of the model around, which made another of it, or of labels
    frames: Callable[[int, Tensor], Tensor] | None = None  # that a mask of samples leaves
    labels: Tensor | None = None  # of which the model makes what its decoder reads
    decoder_mask: Tensor | None = None  # for a decoder that is no model by itself
    cached: bool = False  # whether the tokens follow others that a cache holds

    def ends_with(self, n_queries: int, n_keys: int) -> bool:
        """Tell whether queries are the last tokens of the mask, which come after a cache.

        Chunks that see themselves (canine), pooled tokens (funnel) and probes are not.
        """
        if self.mask is None or self.reads not in TOKENS or self.made:
            return False
        length = self.mask.shape[1]
        return n_queries < length and (self.cached or n_keys not in (n_queries, length))


class PaddingTracker:
    """Follows the transformers models inside a model, and the mask that each is given."""

    def __init__(self) -> None:
        self._given: list[_Given] = []
        self.active = False

    def __getstate__(self) -> dict[str, Any]:
        """A copied model is not listened to."""
        return {"_given": [], "active": False}

    def follow(self, models: Iterable[nn.Module]) -> list[RemovableHandle]:
        """Hook transformers models; return the hooks."""
        parts = list(models)
        decoders = [each for model in parts for each in plain_part(model, "decoder")]
        handles = []
        for part in dict.fromkeys([*parts, *decoders]):
            handles += [
                part.register_forward_pre_hook(self.enter, with_kwargs=True),
                part.register_forward_hook(self.leave, always_call=True),
            ]
        return handles

    def enter(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the mask of a model whose forward begins.

        A part without one inherits it, unless it reads something else (an image beside the text).
        So does a part that is given what the model around made of its mask (gemma3, paligemma). A
        decoder without one, whose tokens are made of labels, takes the padding of the labels. A
        decoder that is no model by itself takes the mask that the model around has for it.
        """
        if not self.active:
            return
        given = arguments_of(part, args, kwargs)
        reads = getattr(part, "main_input_name", "input_ids")
        mask = given.get("attention_mask")
        filled = _filled(given)
        outer = self._given[-1] if self._given else None
        made = mask is not None and not _is_of_tokens(mask) and not _may_decode(part)
        inherits = "attention_mask" not in given or made
        if inherits and outer is not None and outer.reads == reads:
            mask, filled, made = outer.mask, outer.filled, made or outer.made
        labels = _labels(part, given)
        if labels is None and outer is not None:
            labels = outer.labels
        decoder_mask = given.get("decoder_attention_mask")
        if outer is not None and not isinstance(part, PreTrainedModel):
            mask, filled, made = outer.decoder_mask, None, True
        elif outer is not None and decoder_mask is None:
            decoder_mask = outer.decoder_mask
        if mask is None and labels is not None and given.get("encoder_hidden_states") is not None:
            mask, made = _are_followed(labels), True
        usable = mask if _is_of_tokens(mask) else None
        frames = _frames_of(part)
        self._given.append(
            _Given(usable, reads, {}, filled, made, frames, labels, decoder_mask, _is_cached(given))
        )

    def leave(self, part: nn.Module, args: Any, output: Any) -> None:
        """Forget the mask of a model whose forward has ended."""
        if self.active and self._given:
            self._given.pop()

    def clear(self) -> None:
        """Forget all."""
        self._given.clear()

    def rows(self, entropy: Tensor, n_keys: int, key_padding: Tensor | None) -> Tensor | None:
        """Return which rows of ``[batch, heads, queries]`` are real, ``[batch, queries]``.

        None stands for all of them.

        Args:
            entropy: of one call.
            n_keys: how many keys it had.
            key_padding: ``[batch, keys]``, which keys of the call are real, if its mask says so.
                It tells of the rows where the model's own mask is that of something longer (of
                samples of a sound, of which the rows are frames), or unknown: sentence-transformers
                calls the forward of a model, and so none of its hooks. Where it says nothing
                (compiled, or wavlm), the model tells the frames that its samples leave.
        """
        batch, _, n_queries = entropy.shape
        given = self._given[-1] if self._given else _Given(None, "", {})
        mask = given.mask
        if mask is not None and mask.shape[0] == batch:
            if mask.shape[1] == n_queries or given.ends_with(n_queries, n_keys):
                what = (n_queries, entropy.device)
                part: Tensor = once(given.memo, what, lambda: _part(given, *what))
                return part
            frames = given.frames
            if key_padding is None and frames is not None and mask.shape[1] > n_queries:
                real: Tensor = once(given.memo, n_queries, lambda: frames(n_queries, mask))
                key_padding = real.to(entropy.device)
        elif self._given:  # a model that was given none
            key_padding = None
        if key_padding is not None and key_padding.shape == (batch, n_queries):
            return key_padding
        return None


def _is_of_tokens(mask: Any) -> bool:
    """Tell a mask ``[batch, tokens]`` from one of queries and keys, or several of them."""
    return isinstance(mask, Tensor) and mask.dim() == 2


def _may_decode(part: nn.Module) -> bool:
    """Tell whether a model may be the decoder of another, whose mask is that of the encoder."""
    names = ("is_encoder_decoder", "is_decoder")
    return any(_configured(part, name) for name in names)


def plain_part(model: nn.Module, which: str) -> list[nn.Module]:
    """Return the encoder or decoder of a model where it is no model by itself (fsmt)."""
    find: Callable[[], Any] | None = getattr(model, f"get_{which}", None)
    if find is None or not _configured(model, "is_encoder_decoder"):
        return []
    part = find()
    plain = isinstance(part, nn.Module) and not isinstance(part, PreTrainedModel)
    return [part] if plain else []


def _configured(part: nn.Module, name: str) -> bool:
    return bool(getattr(getattr(part, "config", None), name, False))


def _labels(part: nn.Module, given: dict[str, Any]) -> Tensor | None:
    """Return the labels of which a model makes what its decoder reads, if no mask tells more."""
    labels = given.get("labels")
    own = ("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask")
    if not _is_of_tokens(labels) or any(given.get(name) is not None for name in own):
        return None
    return labels if _configured(part, "is_encoder_decoder") else None


def _are_followed(labels: Tensor) -> Tensor:
    """Return which labels are no padding: all up to the last that counts in the loss."""
    counts = labels != IGNORED
    return counts.flip(1).cumsum(1).flip(1) > 0


def _frames_of(part: nn.Module) -> Callable[[int, Tensor], Tensor] | None:
    """Return what a model makes of its mask of samples, ``[batch, frames]``; None if nothing."""
    name = "_get_feature_vector_attention_mask"
    found: Callable[..., Tensor] | None = getattr(part, name, None)
    if found is None or "add_adapter" not in inspect.signature(found).parameters:
        return found
    return functools.partial(found, add_adapter=False)  # which follows attention


def _filled(given: dict[str, Any]) -> Tensor | int | None:
    """Return how many tokens a static cache holds before a pass; None if there is none."""
    cache = given.get("past_key_values")
    cache = given.get("cache") if cache is None else cache  # its name from transformers 5.24 on
    cache = getattr(cache, "self_attention_cache", cache)
    if not isinstance(cache, StaticCache):
        return None
    filled: Tensor | int = cache.get_seq_length()
    return filled.clone() if isinstance(filled, Tensor) else filled


def _is_cached(given: dict[str, Any]) -> bool:
    """Tell whether a model was given what it computed of earlier tokens."""
    return any(given.get(name) is not None for name in ("past_key_values", "cache", "layer_past"))


def _part(given: _Given, n_queries: int, device: torch.device) -> Tensor:
    """Return the part of a mask that tells of the queries, ``[batch, queries]``: mostly its end."""
    assert given.mask is not None
    mask = given.mask.bool().to(device)
    last = mask.shape[1] - n_queries
    if given.filled is None or last == 0:
        return mask[:, last:]
    places = torch.arange(n_queries, device=device) + given.filled
    return mask.index_select(1, places.clamp(max=mask.shape[1] - 1))


def arguments_of(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that a forward was given, by name."""
    if not args:
        return kwargs
    names = inspect.signature(part.forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}
