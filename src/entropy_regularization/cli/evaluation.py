"""What text says of a model: perplexity and the statistics of its heads."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from entropy_regularization.cli.models import device_of, next_token_loss, takes
from entropy_regularization.monitoring.monitor import EntropyMonitor
from entropy_regularization.monitoring.records import Record
from entropy_regularization.monitoring.statistics import Band, HeadStatistics, mean_of_heads
from entropy_regularization.recording.recorder import record_entropy
from entropy_regularization.recording.recording import EntropyRecording


@dataclass(frozen=True)
class Evaluation:
    """An evaluation on held-out text.

    Attributes:
        loss: mean over the predicted tokens, nats.
        tokens: how many were predicted.
        statistics: of every head.
        in_starting_band: share of row entropies in the band that the run began with, which is the
            same band in runs with and without a penalty.
    """

    loss: float
    tokens: int
    statistics: HeadStatistics
    in_starting_band: float

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return perplexity_of(self.loss)


def perplexity_of(loss: float) -> float:
    """Return the exponential of a loss; of NaN it is NaN."""
    return math.inf if loss >= 700 else math.exp(loss)


def evaluate(
    model: PreTrainedModel, blocks: Tensor, *, batch_size: int, band: Band, starting_band: Band
) -> Evaluation:
    """Evaluate a model, without dropout and penalty.

    Args:
        model: any causal language model.
        blocks: held-out tokens, ``[blocks, context length]``.
        batch_size: blocks at a time.
        band: in which row entropies are wanted now.
        starting_band: in which they were wanted when the run began.

    Returns:
        Loss and statistics.
    """
    monitors = EntropyMonitor(band), EntropyMonitor(starting_band)
    total, tokens = 0.0, 0
    for ids, loss, recording in read_through(model, blocks, batch_size, predicts=True):
        predicted = ids.shape[0] * (ids.shape[1] - 1)
        total, tokens = total + loss * predicted, tokens + predicted
        for monitor in monitors:
            monitor.update(recording)
    statistics, starting = (monitor.summary() for monitor in monitors)
    assert starting.in_band is not None
    return Evaluation(total / tokens, tokens, statistics, mean_of_heads(starting.in_band))


def read_through(
    model: PreTrainedModel, blocks: Tensor, batch_size: int, *, predicts: bool
) -> Iterator[tuple[Tensor, float, EntropyRecording]]:
    """Run a model over blocks of tokens as it is used: no dropout, no gradient, no cache.

    Args:
        model: any that takes ``input_ids``.
        blocks: tokens, ``[blocks, context length]``.
        batch_size: blocks at a time.
        predicts: whether it predicts every token from those before it; else the loss is NaN, and
            only the logits that cannot be left out are computed.

    Yields:
        The tokens of a batch, the mean loss over those that are predicted, and the recording.
    """
    options: dict[str, Any] = {"use_cache": False} if takes(model, "use_cache") else {}
    if not predicts and takes(model, "logits_to_keep"):
        options["logits_to_keep"] = 1
    device = device_of(model)
    training = model.training
    model.eval()
    try:
        for batch in blocks.split(batch_size):
            ids = batch.to(device)
            options["input_ids"] = ids
            try:
                found, recording = _heard(model, options)
            except ValueError:  # a part that short texts leave out is told apart once (DeepSeek V4)
                found, recording = _heard(model, options)
            yield (
                ids,
                next_token_loss(found.logits, ids).item() if predicts else math.nan,
                recording,
            )
    finally:
        model.train(training)


def _heard(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[Any, EntropyRecording]:
    with torch.no_grad(), record_entropy(model, gradient=False) as recording:
        found = model(**inputs)
    return found, recording


def numbers_of(record: Record) -> dict[str, Any]:
    """Return what result.json holds of an evaluation."""
    statistics = record.statistics
    return {
        "loss": record["loss"],
        "perplexity": record["perplexity"],
        "mean_entropy": mean_of_heads(statistics.entropy),
        "utilisation": mean_of_heads(statistics.utilisation),
        **statistics.classify()._asdict(),
        "in_starting_band": record["in_starting_band"],
    }
