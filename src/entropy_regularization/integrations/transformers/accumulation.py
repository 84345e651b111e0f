"""Which part of an optimizer step a micro-batch is, as transformers' Trainer weighs losses."""

from typing import Any

from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

IGNORED = -100  # the label that transformers' losses leave out


def share_of_step(model: nn.Module, inputs: dict[str, Any]) -> Tensor | float:
    """Return the weight of a micro-batch's penalty, so that the weights of a step add up to 1.

    Trainer gives models that accept it ``num_items_in_batch``, the number of labels in all
    micro-batches and ranks of a step. The model divides its summed loss by it, and nobody divides
    by the number of micro-batches any more. The share of the labels is the weight that does the
    same for a mean. Without ``num_items_in_batch`` the weight is 1 and Trainer divides.

    Args:
        model: the model.
        inputs: the keywords it is called with.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: if ``num_items_in_batch`` is there but no labels are.
    """
    items = inputs.get("num_items_in_batch")
    if items is None:
        return 1.0
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = inputs.get("labels")
        if isinstance(labels, Tensor) and _loss_shifts_labels(model):
            labels = labels[..., 1:]  # Trainer counts what the loss predicts
    if not isinstance(labels, Tensor):
        raise ValueError(
            "num_items_in_batch was given but neither labels nor shift_labels, so the share of "
            "this micro-batch in the step is unknown; pass labels, or leave num_items_in_batch out."
        )
    count = labels.ne(IGNORED).sum()
    if isinstance(items, Tensor):
        items = items.to(count.device)
    return count / items


def _loss_shifts_labels(model: nn.Module) -> bool:
    """Tell whether position 0 of the labels is no target: decoder-only language models."""
    loss = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "")
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return loss is ForCausalLMLoss and not encoder_decoder
