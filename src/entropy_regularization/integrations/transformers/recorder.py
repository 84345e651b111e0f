"""TransformersRecorder: listens to the attention modules of a transformers model."""

import fnmatch
import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from entropy_regularization.attention.api import AttentionOutput
from entropy_regularization.integrations.transformers.attention import NAME, RECORDER
from entropy_regularization.recording.recorder import ForwardCall, Layers
from entropy_regularization.recording.recording import EntropyRecording, LayerEntropy

CROSS_NAMES = ("cross", "encoder_attn", "encdecattention", "encoder_attention")


def find_pretrained(model: nn.Module) -> PreTrainedModel | None:
    """Return the outermost transformers model inside any wrapper, or None."""
    return next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)


class TransformersRecorder:
    """Listens to one model; start and stop may be called again and again.

    Args:
        model: a transformers model, wrapped or not.
        layers: which layers to keep, see record_entropy.
        gradient: False detaches what is recorded.
        allow_partial: do not refuse a model of which some attention modules stay silent.

    Raises:
        ValueError: if the model does not call its attention through the attention interface.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Layers = None,
        gradient: bool = True,
        allow_partial: bool = False,
    ) -> None:
        found = find_pretrained(model)
        if found is None:
            raise ValueError(f"{type(model).__name__} holds no transformers model.")
        if not found._can_set_attn_implementation():
            raise ValueError(
                f"{type(found).__name__} does not call its attention through the attention "
                "interface of transformers, so its entropy cannot be recorded exactly; load it "
                "with attn_implementation='eager' and use compute_loss on output_attentions=True."
            )
        self.model = found
        self.layers = layers
        self.gradient = gradient
        self.allow_partial = allow_partial
        self._names: dict[int, str] = {}
        self._recording = EntropyRecording()
        self._calls = 0
        self._forwards = 0
        self._padding: list[Tensor | None] = []
        self._grad_at_entry = False
        self._saved: list[tuple[Any, str]] = []
        self._listening = False
        self._hooks: list[RemovableHandle] = []
        self._kept: list[RemovableHandle] = []
        self._pending: RemovableHandle | None = None
        self._outer: dict[int, Any] = {}

    def start(self, call: ForwardCall | None = None) -> EntropyRecording:
        """Switch the model to the entropy attention and listen; return the recording to fill.

        Args:
            call: the forward pass that is already beginning, see Recorder.
        """
        self._recording = EntropyRecording()
        self._calls = self._forwards = 0
        self._switch()
        # now, not when built: a copied or wrapped model has other modules and names
        self._names = {id(part): name for name, part in self.model.named_modules()}
        for part in self.model.modules():
            if RECORDER in part.__dict__:
                self._outer[id(part)] = part.__dict__[RECORDER]
            part.__dict__[RECORDER] = self
        self._listening = True
        if call is None:
            self._hooks = self._follow(self.model)
        elif not self._kept:
            # New hooks at every pass would have a compiled model compiled anew at every pass, and
            # those of a module whose pass has begun must not change: torch walks over them.
            self._kept = self._follow(*self.model.children())
        if call is not None and call[0] is self.model:
            self._enter(*call)
        return self._recording

    def close(self) -> None:
        """Remove the hooks that starting from forward pre-hooks has left for the next pass."""
        while self._kept:
            self._kept.pop().remove()

    def _follow(self, *modules: nn.Module) -> list[RemovableHandle]:
        """Hook every transformers model inside, to know the padding that it is given."""
        parts = (part for module in modules for part in module.modules())
        handles = []
        for part in parts:
            if isinstance(part, PreTrainedModel):
                handles += [
                    part.register_forward_pre_hook(self._enter, with_kwargs=True),
                    part.register_forward_hook(self._leave, always_call=True),
                ]
        return handles

    def stop(self) -> EntropyRecording:
        """Leave the model as it was found; return the recording.

        Raises:
            ValueError: if the model ran and no attention call came.
        """
        self.abort()
        if self._forwards and not self._calls:
            raise ValueError(
                f"{type(self.model).__name__} ran, but none of its attention modules called the "
                f"attention interface ({', '.join(self._attention_names()) or 'none found'}); load "
                "it with attn_implementation='eager' and use compute_loss instead."
            )
        return self._recording

    def abort(self) -> None:
        """Leave the model as it was found."""
        self._listening = False
        for part in self.model.modules():
            part.__dict__.pop(RECORDER, None)
            if id(part) in self._outer:
                part.__dict__[RECORDER] = self._outer.pop(id(part))
        while self._hooks:
            self._hooks.pop().remove()
        self._padding.clear()
        if self._recomputes_in_backward():
            self._restore_at_next_forward()
        else:
            self._restore()

    def deposit(self, module: nn.Module, found: AttentionOutput, n_keys: int) -> None:
        """Take the rows of one attention call.

        Raises:
            RuntimeError: if reentrant checkpointing has cut the gradient of the entropy.
        """
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return  # checkpointing computes the layer again inside backward: it is recorded already
        outer = self._outer.get(id(module))
        if outer is not None:
            outer.deposit(module, found, n_keys)
        name = self._names.get(id(module), type(module).__name__)
        self._check_gradient(module, name)
        index = self._calls
        self._calls += 1
        if not self._wanted(index, name):
            return
        entropy = found.entropy if self.gradient else found.entropy.detach()
        rows = self._rows(entropy)
        kind = _kind(module, name)
        self._recording.layers.append(
            LayerEntropy(name, kind, entropy, found.allowed_keys, rows, n_keys)
        )

    def _wanted(self, index: int, name: str) -> bool:
        if self.layers is None:
            return True
        wanted = [self.layers] if isinstance(self.layers, str) else list(self.layers)
        return any(
            fnmatch.fnmatchcase(name, want) if isinstance(want, str) else want == index
            for want in wanted
        )

    def _check_gradient(self, module: nn.Module, name: str) -> None:
        if not self.gradient or not self._grad_at_entry or torch.is_grad_enabled():
            return
        if any(parameter.requires_grad for parameter in module.parameters()):
            raise RuntimeError(
                f"{name} runs without a gradient inside a forward pass that has one, as reentrant "
                "checkpointing does, which would lose the penalty silently; use "
                "gradient_checkpointing_enable(gradient_checkpointing_kwargs="
                "{'use_reentrant': False})."
            )

    # Padding queries: the 2-D attention_mask is an argument of the model, not of its attention.

    def _enter(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._listening:
            return
        if part is self.model:
            self._forwards += 1
            self._grad_at_entry = torch.is_grad_enabled()
        names = list(inspect.signature(part.forward).parameters)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        mask = given.get("attention_mask")
        if mask is None and "attention_mask" in names and self._padding:
            mask = self._padding[-1] if given.get("attention_mask", 0) == 0 else None
        usable = isinstance(mask, Tensor) and mask.dim() == 2
        self._padding.append(mask if usable else None)

    def _leave(self, part: nn.Module, args: Any, output: Any) -> None:
        if self._listening and self._padding:
            self._padding.pop()

    def _rows(self, entropy: Tensor) -> Tensor:
        """Return which rows are real, ``[batch, queries]``."""
        batch, _, n_queries = entropy.shape
        mask = self._padding[-1] if self._padding else None
        if mask is not None and mask.shape[0] == batch and mask.shape[1] >= n_queries:
            return mask[:, mask.shape[1] - n_queries :].bool().to(entropy.device)
        return torch.ones(batch, n_queries, dtype=torch.bool, device=entropy.device)

    # Which attention the model runs is a field of its configs; it is put back exactly.

    def _switch(self) -> None:
        if self._pending is not None:
            self._pending.remove()
            self._pending = None
            return
        seen: set[int] = set()
        for part in self.model.modules():
            config = getattr(part, "config", None)
            if config is not None and hasattr(config, "_attn_implementation"):
                for each in _with_parts(config):
                    if id(each) not in seen:
                        seen.add(id(each))
                        self._saved.append((each, each._attn_implementation))
        self.model.set_attn_implementation(NAME)
        # It passes by configurations that a part holds as a copy (T5 in 5.17, clipseg, xclip).
        models = [part for part in self.model.modules() if isinstance(part, PreTrainedModel)]
        deaf = {id(part.config) for part in models if not part._can_set_attn_implementation()}
        for config, _ in self._saved:
            if id(config) not in deaf:
                config._attn_implementation_internal = NAME

    def _restore(self) -> None:
        if self._pending is not None:
            self._pending.remove()
            self._pending = None
        while self._saved:
            config, implementation = self._saved.pop()
            config._attn_implementation_internal = implementation

    def _recomputes_in_backward(self) -> bool:
        """Tell whether backward, after the context, will run the attention of this pass again."""
        return (
            self.gradient
            and self.model.training
            and self._forwards > 0
            and any(getattr(part, "gradient_checkpointing", False) for part in self.model.modules())
        )

    def _restore_at_next_forward(self) -> None:
        """Checkpointing must find in backward the attention that ran in forward."""
        self._pending = self.model.register_forward_pre_hook(self._restore_if_pending)

    def _restore_if_pending(self, *_: Any) -> None:
        if self._pending is not None:  # a hook before this one may have started the recorder again
            self._restore()

    def _attention_names(self) -> list[str]:
        named = self.model.named_modules()
        return [name for name, part in named if "attention" in type(part).__name__.lower()][:8]


def _with_parts(config: Any) -> list[Any]:
    """Return a config and, recursively, the configs of its parts."""
    result = [config]
    for key in getattr(config, "sub_configs", {}):
        part = getattr(config, key, None)
        if part is not None:
            result += _with_parts(part)
    return result


def _kind(module: nn.Module, name: str) -> Literal["self", "cross"]:
    if getattr(module, "is_cross_attention", False):
        return "cross"
    last = name.rsplit(".", 1)[-1].lower()
    return (
        "cross"
        if any(word in name.lower().split(".")[-2:] or word in last for word in CROSS_NAMES)
        else "self"
    )
