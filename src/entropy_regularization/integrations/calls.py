"""What both recorders share: how they start, and how they take the calls of a forward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

from entropy_regularization.attention.api import AttentionOutput
from entropy_regularization.attention.masking import Memo, Structure, once
from entropy_regularization.checks import check_flag
from entropy_regularization.integrations import interception
from entropy_regularization.integrations.checkpointing import AtNextForward, refuse_lost_gradient
from entropy_regularization.integrations.compiled import holds_compiled, unwrapped
from entropy_regularization.integrations.layers import Wanted, kind_of
from entropy_regularization.integrations.sharding import join_heads, tells_heads
from entropy_regularization.integrations.stack import (
    backward_task,
    calling_module,
    calling_place,
    in_checkpoint,
    in_function_of_module,
    refuse_vmap,
    runs_compiled,
    runs_for_compiler,
    runs_with_stranger,
    shape_given,
)
from entropy_regularization.integrations.watch import Watch
from entropy_regularization.integrations.weights import Weights, heads_folded
from entropy_regularization.recording.recorder import ForwardCall, Layers
from entropy_regularization.recording.recording import EntropyRecording, LayerEntropy


class CallRecorder:
    """Listens to one model; start and stop may be called again and again.

    Args:
        model: the model.
        layers: which layers to keep, see record_entropy.
        gradient: False detaches what is recorded.
        allow_partial: accept modules that attend unheard; they are in ``missing``.
        training_only: leave out passes without a gradient.

    Raises:
        TypeError: if a flag is not True or False.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        *,
        gradient: bool = True,
        allow_partial: bool = False,
        training_only: bool = False,
    ) -> None:
        self.model = unwrapped(model)
        self.layers = Wanted(layers)
        self.gradient = check_flag("gradient", gradient)
        self.allow_partial = check_flag("allow_partial", allow_partial)
        self._training_only = training_only
        self._know({})
        self._recording = EntropyRecording()
        self._watch = Watch(self.model)
        # No counts: compiled code would be compiled anew for each.
        self._ran = self._attended = self._ran_compiled = False
        self._index = 0  # of the next call in its pass
        self._heard: list[str] = []
        self._grad_at_entry = False
        self._hooks: list[RemovableHandle] = []
        self._memos: dict[Any, Memo] = {}  # of the limits that calls of this recording had
        self._shared: Memo = {}  # the rows that several of them have
        # New hooks at every pass would have a compiled model compiled anew at every pass.
        self.keeps_hooks = holds_compiled(model)
        self._checkpointed = False
        self._started_in = -1  # the backward pass
        self._next_forward = AtNextForward(self._stop_lingering, self._pause, self._resume)

    def __getstate__(self) -> dict[str, Any]:
        """A copied model takes a recorder along; entropies stay here."""
        return {**self.__dict__, "_recording": EntropyRecording(), "_memos": {}, "_shared": {}}

    def start(self, call: ForwardCall | None = None) -> EntropyRecording:
        """Listen; return the recording to fill.

        Args:
            call: the forward pass that is already beginning, see Recorder.

        Raises:
            RuntimeError: if another thread records the model.
            NotImplementedError: under context parallelism.
        """
        interception.listen(self)
        self._forget()
        self._ran = self._attended = self._ran_compiled = False
        self._index = 0
        self._heard = []
        self._checkpointed = False
        self._started_in = backward_task()
        self._next_forward.cancel()
        try:
            interception.refuse_context_parallel()  # here too: compiled code does not ask
            self._start(call)
        except BaseException:
            self.abort()
            raise
        return self._recording

    def _start(self, call: ForwardCall | None) -> None:
        raise NotImplementedError

    def abort(self) -> None:
        """Stop listening; everything is as it was found."""
        raise NotImplementedError

    def _forget(self) -> None:
        """Let go of the recording: a recorder that is kept must not keep the graph."""
        self._recording = EntropyRecording()
        self._memos, self._shared = {}, {}

    def _stop_lingering(self) -> None:
        """The next pass begins: nothing is computed again in backward any more."""
        interception.stop_listening(self)

    def _pause(self) -> None:
        """A pass without a gradient begins: it runs the model's own attention."""

    def _resume(self) -> None:
        """It has ended: backward of the pass before may still compute something again."""

    def is_running(self) -> bool:
        """Tell whether a module of the model is running in this thread."""
        return calling_module(self._names) is not None

    def runs_uncalled(self) -> bool:
        """Tell whether a module of the model is running in a pass of which no hook told."""
        return self.is_running()

    def memo_of(self, structure: Structure) -> Memo | None:
        """Return what the calls of this recording that see the same keys share, if limits tell."""
        if structure.holds_tensors:
            return None
        return self._memos.setdefault((structure.left, structure.right), {})

    def deposit_call(
        self,
        place: str | None,
        found: AttentionOutput,
        n_keys: int,
        key_padding: Tensor | None = None,
    ) -> None:
        """Take the rows of one call of torch's own attention function, or of one softmax.

        Args:
            place: the name of the module, None if it is to be looked for.
            found: the rows.
            n_keys: how many keys there were.
            key_padding: ``[batch, keys]``, which of them are real, if that is known.

        Raises:
            RuntimeError: if reentrant checkpointing has cut the gradient of the entropy, or a
                module that is no part of the model called.
        """
        name = place or calling_module(self._names) or type(self.model).__name__
        if self._is_own(name):
            self._take(name, self._module_of(name), found, n_keys, key_padding)

    def deposit_weights(self, place: str | None, weights: Tensor, found: Weights | None) -> None:
        """Take the rows of one softmax, if its weights attend; a watched pass will show it.

        Args:
            place: as deposit_call.
            weights: what the softmax has made.
            found: the rows; None if they cannot be told, which is refused if the weights attend.
        """
        name = place or calling_module(self._names)
        if name is None or self._is_computed_again() or runs_for_compiler():
            return
        module = self._module_of(name)
        where = (type(module), *calling_place())
        deposit = None
        if found is not None:
            known = weights.dim() == 4 and self._watch.knows_layout(where)
            heads = 1 if known else heads_folded(weights, module, shape_given())
            deposit = self._deposit_of(name, module, found, heads)
        self._watch.hear(where, name, weights, deposit)

    def _deposit_of(
        self, name: str, module: nn.Module, found: Weights, heads: int | None
    ) -> Callable[[], None] | None:
        """Return what records the rows of one softmax; None if their layout is not known."""
        if heads is None or not tells_heads(module) or in_function_of_module():
            return None
        rows, real = found.as_output(heads), found.real_keys(heads)
        n_keys = real.shape[-1]
        return lambda: self.deposit_call(name, rows, n_keys, real)

    def note_unheard(self, place: str | None, how: str) -> None:
        """Note that a module attends in a way of which nothing can be heard."""
        self._watch.found[place or type(self.model).__name__] = how

    def _end_watch(self, *, torch_is_heard: bool) -> None:
        """Nothing more runs; what compiled code ran could not be watched, and is read.

        Args:
            torch_is_heard: see Watch.read.
        """
        self._watch.leave(finished=True)
        if self._ran_compiled:
            self._watch.read(self._names, torch_is_heard=torch_is_heard)

    def _note_missing(self, recording: EntropyRecording) -> None:
        """List what was not heard; what was heard of the same modules is left out with it."""
        unheard = self._watch.found
        recording.missing = sorted(unheard)
        recording.layers = [layer for layer in recording.layers if layer.name not in unheard]
        if self._heard:
            self._attended = not unheard.keys() >= {*self._heard}

    def _know(self, names: dict[nn.Module, str]) -> None:
        """Take the modules of the model and their names."""
        self._names = names
        # The compiler cannot walk over modules, if one is the part that it compiles; of the same
        # name are that part and its wrapper, which comes first, and which it must not meet either.
        self._by_name = {name: part for part, name in names.items()}

    def _module_of(self, name: str) -> nn.Module:
        return self._by_name.get(name, self.model)

    def _is_computed_again(self) -> bool:
        """Tell whether backward computes again what is recorded already.

        Not so where a checkpoint holds a whole recording, which backward makes again.
        """
        task = backward_task()
        return task != -1 and task != self._started_in

    def _is_own(self, name: str) -> bool:
        """Tell whether a part of the model calls torch's function; a stranger's call is left out.

        A pass that an interrupt has ended, of which no hook tells, is left.

        Raises:
            RuntimeError: naming the stranger, if its call is asked for and leaving it out was not
                accepted.
        """
        if torch.compiler.is_compiling() or self._is_computed_again():
            return True
        runs, stranger = runs_with_stranger(self._names)
        if not runs and not runs_compiled():
            self._leave_interrupted()
            return False
        # Names may be older than a part; and a whole that runs around the model is none of it.
        if (
            stranger is None
            or any(part is stranger for part in self.model.modules())
            or any(part is self.model for part in stranger.modules())
        ):
            return True
        if self.layers.takes(self._index, name) and not self.allow_partial:
            raise RuntimeError(
                f"{type(stranger).__name__} attends inside the forward pass of "
                f"{type(self.model).__name__} without being a part of it; assign it to an "
                "attribute (or an nn.ModuleList) of the model, run it before or after, or pass "
                "allow_partial=True to leave it out."
            )
        return False

    def _leave_interrupted(self) -> None:
        """Forget that the model was running."""
        interception.leave_places(self)
        self._watch.leave(finished=False)

    def _refuse_nothing(self, recording: EntropyRecording) -> None:
        """Refuse a choice of layers that keeps none of what attended, or an index beyond it.

        Raises:
            ValueError: naming what attended.
        """
        left_out = self._training_only and not self._heard  # passes without a gradient alone
        if self._attended and not recording.layers and not left_out:
            self.layers.refuse_nothing(self.model, self._heard)
        if self._heard and not self.model.training:  # which may drop layers
            self.layers.refuse_beyond(self.model, self._heard)

    def _take(
        self,
        name: str,
        module: nn.Module,
        found: AttentionOutput,
        n_keys: int,
        key_padding: Tensor | None = None,
    ) -> None:
        """Append the rows of one call, if they are asked for.

        Raises:
            RuntimeError: if reentrant checkpointing has cut the gradient of the entropy.
            NotImplementedError: inside torch.vmap.
        """
        if self._is_computed_again() or runs_for_compiler():
            return
        index = self._index
        self._index += 1
        self._attended = True
        if self._training_only and not self._grad_at_entry:
            return
        if not torch.compiler.is_compiling():
            self._heard.append(name)
            if self.gradient and self._grad_at_entry:
                refuse_lost_gradient(self.model, name)
            self._checkpointed |= torch.is_grad_enabled() and in_checkpoint()
        if not self.layers.takes(index, name):
            return
        refuse_vmap(name, found.entropy)
        if not self.gradient:
            found = found._replace(entropy=found.entropy.detach())
        found = join_heads(found, module, name)
        rows = self._rows(found, n_keys, key_padding)
        self._recording.layers.append(
            LayerEntropy(
                name, kind_of(name, module), found.entropy, found.allowed_keys, rows, n_keys
            )
        )

    def _rows(self, found: AttentionOutput, n_keys: int, key_padding: Tensor | None) -> Tensor:
        """Return which rows count, ``[batch, queries]``: those of real tokens that see a key."""
        if torch.compiler.is_compiling():
            return _rows_that_count(found, self._real_rows(found.entropy, n_keys, key_padding))
        # Backward, which may compute the call again, does not ask for rows: selective
        # checkpointing, which finds saved results by their number, must not see these operations.
        with _disable_current_modes():
            real = self._real_rows(found.entropy, n_keys, key_padding)
            of_these = (id(found.allowed_keys), id(real), found.entropy.shape[0])
            kept: tuple[Any, ...] = once(
                self._shared,
                of_these,
                lambda: (found.allowed_keys, real, _rows_that_count(found, real)),
            )
        rows: Tensor = kept[-1]  # what has these ids is kept with them
        return rows

    def _real_rows(self, entropy: Tensor, n_keys: int, key_padding: Tensor | None) -> Tensor | None:
        """Return which rows are of real tokens, ``[batch, queries]``; None for all, as here."""
        return None


def _rows_that_count(found: AttentionOutput, real: Tensor | None) -> Tensor:
    counts = found.allowed_keys
    seeing = counts[:, 0] > 0 if counts.shape[1] == 1 else (counts > 0).any(1)
    return seeing.expand(found.entropy.shape[0], -1).clone() if real is None else seeing & real
