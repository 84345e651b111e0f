"""record_entropy: a context in which attention calls deposit the entropy of their rows."""

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn

from entropy_regularization.recording.recording import EntropyRecording

ForwardCall = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Layers = Sequence[int] | Sequence[str] | str | None


class Recorder(Protocol):
    """What a host offers: something that can listen to a model again and again.

    ``start`` switches listening on, ``stop`` switches it off and gives what was heard, ``abort``
    switches it off after an error. Between a stop and the next start the model is as it was found.
    """

    def start(self, call: ForwardCall | None = None) -> EntropyRecording:
        """Begin to listen; return the recording that will fill. If it raises, nothing listens.

        Args:
            call: (module, args, kwargs) of the forward pass that is already beginning, when start
                is called from a forward pre-hook: hooks added then miss that pass.
        """

    def stop(self) -> EntropyRecording:
        """Stop listening; return the recording, or raise if some layer could not be heard."""

    def abort(self) -> None:
        """Stop listening, whatever was heard."""

    def backward_is_over(self) -> None:
        """Let go of what backward may compute again, which else the next forward pass does."""


def make_recorder(
    model: nn.Module,
    *,
    layers: Layers = None,
    gradient: bool = True,
    allow_partial: bool = False,
    training_only: bool = False,
) -> Recorder:
    """Return a recorder for a model; see record_entropy for the arguments.

    With ``training_only`` it leaves out passes without a gradient, such as generated text.

    Raises:
        TypeError: if the model is not a torch module, or a flag not True or False.
        ValueError: if no host can see this model's attention; the sentence names what was found.
        ImportError: if it is a model of an older transformers than is supported.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; pass a torch.nn.Module.")
    keeping = importlib.import_module("entropy_regularization.integrations.compiled")
    host = importlib.import_module("entropy_regularization.integrations.sdpa").SdpaRecorder
    # A model of a host that was never imported cannot exist, so nothing is imported in vain.
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling and any(isinstance(part, modeling.PreTrainedModel) for part in model.modules()):
        name = "entropy_regularization.integrations.transformers.recorder"
        host = importlib.import_module(name).TransformersRecorder
    recorder: Recorder = keeping.kept_or_new(
        host,
        model,
        layers=layers,
        gradient=gradient,
        allow_partial=allow_partial,
        training_only=training_only,
    )
    return recorder


@contextmanager
def record_entropy(
    model: nn.Module, *, layers: Layers = None, gradient: bool = True, allow_partial: bool = False
) -> Iterator[EntropyRecording]:
    """Record the entropy of every attention row in the forward passes inside the context.

    A transformers model is seen through its attention interface, any other model through
    ``torch.nn.functional.scaled_dot_product_attention``; both compute the same output as before, in
    linear memory. Attention that a model writes out itself, ``softmax(scores) @ values``, runs as
    it is, and its weights are read. Outside the context the model is as it was.

    Args:
        model: the model, wrapped or not (DistributedDataParallel, PEFT, torch.compile).
        layers: which layers to keep: indices in the order of the calls of each forward pass, shell
            patterns of module names, or one pattern; None for all.
        gradient: False detaches what is recorded, for monitoring.
        allow_partial: accept that some attention modules cannot be seen; their names are then in
            ``recording.missing``. Otherwise they raise.

    Yields:
        The recording, which fills as the model runs.

    Raises:
        TypeError: if the model is not a torch module, or a flag not True or False.
        ValueError: if the model, or a part of it, cannot be seen; the sentence names the modules.
        ImportError: if it is a model of an older transformers than is supported.

    Example:
        >>> with record_entropy(model) as recording:  # doctest: +SKIP
        ...     output = model(**batch)
        >>> loss = output.loss + regularization(recording)  # doctest: +SKIP
    """
    recorder = make_recorder(model, layers=layers, gradient=gradient, allow_partial=allow_partial)
    recording = recorder.start()
    try:
        yield recording
    except BaseException:
        recorder.abort()
        raise
    recorder.stop()
