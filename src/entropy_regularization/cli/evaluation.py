"""What held-out text says of a model: perplexity and the statistics of its heads."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from entropy_regularization.monitoring.monitor import EntropyMonitor
from entropy_regularization.monitoring.records import Record
from entropy_regularization.monitoring.statistics import Band, HeadStatistics, mean_of_heads
from entropy_regularization.recording.recorder import record_entropy


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
        """The exponential of the loss; of NaN it is NaN."""
        return math.inf if self.loss >= 700 else math.exp(self.loss)


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
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        with torch.no_grad():
            for batch in blocks.split(batch_size):
                ids = batch.to(model.device)
                with record_entropy(model, gradient=False) as recording:
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                predicted = ids.shape[0] * (ids.shape[1] - 1)
                total, tokens = total + loss.item() * predicted, tokens + predicted
                for monitor in monitors:
                    monitor.update(recording)
    finally:
        model.train(training)
    statistics, starting = (monitor.summary() for monitor in monitors)
    assert starting.in_band is not None
    return Evaluation(total / tokens, tokens, statistics, mean_of_heads(starting.in_band))


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
