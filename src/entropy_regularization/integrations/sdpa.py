"""SdpaRecorder: listens to any PyTorch model that calls scaled_dot_product_attention.

The function is looked up as ``torch.nn.functional.scaled_dot_product_attention`` at every call (by
user code, nn.MultiheadAttention and nn.Transformer layers alike), so while a recorder listens that
attribute holds a wrapper, and only then. Calls from other modules, and from other threads, go
straight to the original.
"""

import fnmatch
import threading
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from entropy_regularization.attention.api import AttentionOutput, attend
from entropy_regularization.attention.masking import Structure
from entropy_regularization.recording.recorder import ForwardCall, Layers
from entropy_regularization.recording.recording import EntropyRecording, LayerEntropy

CROSS_NAMES = ("cross", "multihead_attn", "encoder_attn")

_original = functional.scaled_dot_product_attention
_original_softmax = functional.softmax
_listeners: list["SdpaRecorder"] = []
_place = threading.local()  # where in which model this thread is: (recorder, module name) pairs


class SdpaRecorder:
    """Listens to one model; start and stop may be called again and again.

    Args:
        model: any module.
        layers: which layers to keep, see record_entropy.
        gradient: False detaches what is recorded. Otherwise call backward inside the context if the
            model uses checkpointing.
        allow_partial: accept modules that compute a softmax of their own; they are in ``missing``.

    Raises:
        ValueError: if the model is compiled and holds nn.MultiheadAttention, which then records
            tensors without data.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Layers = None,
        gradient: bool = True,
        allow_partial: bool = False,
    ) -> None:
        self.model = model
        self.layers = layers
        self.gradient = gradient
        self.allow_partial = allow_partial
        self._names = {part: name or type(part).__name__ for name, part in model.named_modules()}
        attentions = [n for p, n in self._names.items() if isinstance(p, nn.MultiheadAttention)]
        if attentions and any(hasattr(part, "_orig_mod") for part in self._names):
            raise ValueError(
                f"{attentions[0]} is an nn.MultiheadAttention in a compiled model, which cannot be "
                "recorded; record the model before torch.compile."
            )
        self._recording = EntropyRecording()
        self._silent: list[str] = []
        self._forwards = self._calls = 0
        self._hooks: list[RemovableHandle] = []
        self._fast_path = True

    def start(self, call: ForwardCall | None = None) -> EntropyRecording:
        """Listen; return the recording to fill.

        Args:
            call: the forward pass that is already beginning, see Recorder.
        """
        self._recording = EntropyRecording()
        self._silent = []
        self._forwards = self._calls = 0
        for part in self._names:
            self._hooks += [
                part.register_forward_pre_hook(self._enter, with_kwargs=True),
                part.register_forward_hook(self._leave, always_call=True),
            ]
        self._fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it calls no attention function
        if not _listeners:
            functional.scaled_dot_product_attention = _attention
            functional.softmax = _softmax
        _listeners.append(self)
        if call is not None:
            self._enter(*call)
        return self._recording

    def stop(self) -> EntropyRecording:
        """Stop listening; return the recording.

        Raises:
            ValueError: if the model ran and no attention call came, or some attention was computed
                another way.
        """
        self.abort()
        if self._forwards and not self._calls:
            found = ", ".join(self._silent[:8]) or "none computed a softmax either"
            raise ValueError(
                f"{type(self.model).__name__} ran without calling "
                "torch.nn.functional.scaled_dot_product_attention (own softmax: "
                f"{found}); call it, or attention_with_entropy, in the model's attention."
            )
        self._recording.missing = sorted(set(self._silent))
        if self._recording.missing and not self.allow_partial:
            raise ValueError(
                f"{', '.join(self._recording.missing[:8])} computes a softmax of its own beside "
                "the attention that was recorded; pass allow_partial=True to leave it out."
            )
        return self._recording

    def abort(self) -> None:
        """Stop listening; everything is as it was found."""
        while self._hooks:
            self._hooks.pop().remove()
        if self in _listeners:
            _listeners.remove(self)
            torch.backends.mha.set_fastpath_enabled(self._fast_path)
        if not _listeners:
            functional.scaled_dot_product_attention = _original
            functional.softmax = _original_softmax
        _stack()[:] = [place for place in _stack() if place[0] is not self]

    def _enter(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if part is self.model:
            self._forwards += 1
        if isinstance(part, nn.MultiheadAttention):
            weights = args[4] if len(args) > 4 else kwargs.get("need_weights", True)
            if weights:
                raise ValueError(
                    f"{self._names[part]} is called with need_weights=True, which makes the "
                    "attention matrix by another road; pass need_weights=False."
                )
        _stack().append((self, self._names[part]))

    def _leave(self, part: nn.Module, args: Any, output: Any) -> None:
        for index in range(len(_stack()) - 1, -1, -1):
            if _stack()[index] == (self, self._names[part]):
                del _stack()[index]
                return

    def deposit(self, name: str, found: AttentionOutput, n_keys: int) -> None:
        """Take the rows of one attention call."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return  # checkpointing computes the layer again inside backward
        index = self._calls
        self._calls += 1
        if self.layers is not None:
            wanted = [self.layers] if isinstance(self.layers, str) else list(self.layers)
            if not any(
                fnmatch.fnmatchcase(name, want) if isinstance(want, str) else want == index
                for want in wanted
            ):
                return
        entropy = found.entropy if self.gradient else found.entropy.detach()
        rows = torch.ones(
            entropy.shape[0], entropy.shape[2], dtype=torch.bool, device=entropy.device
        )
        kind: Literal["self", "cross"] = "self"
        if any(word in name.lower() for word in CROSS_NAMES):
            kind = "cross"
        self._recording.layers.append(
            LayerEntropy(name, kind, entropy, found.allowed_keys, rows, n_keys)
        )

    def heard_softmax(self, name: str) -> None:
        """Note a softmax inside a module that is called attention."""
        self._silent.append(name)


def _stack() -> list[tuple[SdpaRecorder, str]]:
    if not hasattr(_place, "stack"):
        _place.stack = []
    stack: list[tuple[SdpaRecorder, str]] = _place.stack
    return stack


def _where() -> dict[SdpaRecorder, str]:
    """Return the recorders whose model is running in this thread, with the innermost module."""
    return dict(_stack())


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend as scaled_dot_product_attention does, and deposit the entropies."""
    where = _where()
    if not where:
        return _original(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    batch = query.shape[:-3] if query.dim() > 3 else query.shape[:-2]
    q, k, v = (_four(tensor) for tensor in (query, key, value))
    shift = q.shape[2] - k.shape[2]
    structure = Structure(right=shift) if is_causal else Structure()  # aligned upper left
    bias = None
    if attn_mask is not None:
        scores = (*query.shape[:-1], key.shape[-2])
        mask = attn_mask
        flat = mask.dim() == 2 and query.dim() == 4
        mask = mask[None, None] if flat else _four(mask.expand(scores))
        if mask.dtype == torch.bool:
            structure = structure._replace(allowed=mask)
        else:
            bias = mask
    found = attend(
        q,
        k,
        v,
        structure,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        bias=bias,
        dropout=dropout_p,
    )
    for recorder, name in where.items():
        recorder.deposit(name, found, k.shape[2])
    return found.output.reshape(*batch, *found.output.shape[1 if query.dim() > 3 else 2 :])


def _four(tensor: Tensor) -> Tensor:
    """Bring ``[..., heads, length, dim]`` or ``[batch, length, dim]`` to four dimensions."""
    if tensor.dim() == 3:
        return tensor[:, None]
    if tensor.dim() < 3:
        return tensor[None, None]
    return tensor.reshape(-1, *tensor.shape[-3:])


def _softmax(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute a softmax, and note one that looks like attention of its own."""
    for recorder, name in _where().items():
        if input.dim() >= 3 and "att" in name.lower():
            recorder.heard_softmax(name)
    return _original_softmax(input, *args, **kwargs)
