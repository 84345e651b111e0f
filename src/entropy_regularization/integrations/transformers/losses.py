"""The loss in a model's output, and whether it, which holds the penalty, is what is trained."""

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

from entropy_regularization.recording.recording import EntropyRecording


class TrainingPass(NamedTuple):
    """One training pass of a regularized model.

    Attributes:
        penalty: with its gradient, before any weight.
        recording: the entropies, detached.
        node: of autograd, that of the loss with the penalty; None if the model returned no loss or
            nothing has a gradient.
        loss: the model's own, detached; None if it returned none.
        added: what was added to it, detached.
    """

    penalty: Tensor
    recording: EntropyRecording
    node: Node | None = None
    loss: Tensor | None = None
    added: Tensor | None = None

    def enters(self, loss: Tensor) -> bool:
        """Tell whether the loss with the penalty is a part of a loss."""
        if self.loss is None:
            return False
        return self.node is None or depends_on(loss, self.node)


def depends_on(tensor: Tensor, node: Node) -> bool:
    """Tell whether a tensor was computed from what a node of autograd returned."""
    waiting = deque([tensor.grad_fn])
    seen = set()
    while waiting:  # the nearest first: a loss is a few operations from what it is made of
        each = waiting.popleft()
        if each is node:
            return True
        if each is not None and each not in seen:
            seen.add(each)
            waiting.extend(before for before, _ in each.next_functions)
    return False


class LossUse:
    """Finds out in backward whether losses were used, or only what else the model returned.

    Several passes may come before one backward; more than MOST are forgotten.
    """

    MOST = 64

    def __init__(self) -> None:
        self._reached: deque[set[str]] = deque(maxlen=self.MOST)  # one of each pass

    def watch(self, loss: Tensor, output: Any) -> None:
        """Note where gradients come: to the loss, or to the other outputs.

        Args:
            loss: with the penalty.
            output: what the model returns, the loss without the penalty among it.
        """
        reached: set[str] = set()
        self._reached.append(reached)
        if loss.requires_grad:
            loss.register_hook(lambda _: reached.add("loss"))
        for tensor in tree_leaves(output if isinstance(output, tuple) else dict(output)):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None and tensor.dim() > 0:
                tensor.register_hook(lambda _: reached.add("outputs"))

    def check(self, name: str) -> None:
        """Look at the backward passes since the last look, as the model with this name runs again.

        Raises:
            ValueError: if they came through outputs alone.
        """
        reached = set().union(*self._reached)
        waiting = [each for each in self._reached if not each]
        self._reached = deque(waiting, maxlen=self.MOST)
        if reached == {"outputs"}:
            raise ValueError(
                f"{name} was trained through its outputs, not through the loss that it returned, "
                "to which the entropy penalty was added; leave out the labels and add the handle's "
                "`unadded` to your loss, or mix the trainer: class MyTrainer("
                "EntropyRegularizedTrainer, SFTTrainer)."
            )


def loss_of(output: Any, given: dict[str, Any]) -> Tensor | None:
    """Return the loss in a model's output, if it is there."""
    if isinstance(output, dict):
        loss = output.get("loss")
    elif isinstance(output, tuple) and output and given.get("labels") is not None:
        loss = output[0]
    else:
        return None
    usable = isinstance(loss, Tensor) and loss.numel() == 1
    return loss if usable else None


def with_loss(output: Any, loss: Tensor) -> Any:
    """Return the output with a loss in the place of its own."""
    if isinstance(output, dict):
        output["loss"] = loss
        return output
    return (loss, *output[1:])


class _Reaching(torch.autograd.Function):
    """Returns a tensor from which a walk over the graph reaches a penalty too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, penalty: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def reaching(output: Any, penalty: Tensor) -> Any:
    """Return the output with a graph that reaches a penalty, which the caller will add to a loss.

    DistributedDataParallel walks from the output to the parameters that a pass has used
    (``find_unused_parameters``, which Trainer sets), and is led astray by gradients of others.
    """
    items = output.items() if isinstance(output, dict) else enumerate(output)
    for key, value in items:
        if isinstance(value, Tensor) and value.requires_grad:
            found = _Reaching.apply(value, penalty)  # type: ignore[no-untyped-call]
            if isinstance(output, tuple):
                return (*output[:key], found, *output[key + 1 :])
            output[key] = found
            break
    return output
