"""EntropyRegularization: the published class, and the same object over a recording."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from entropy_regularization.penalties.calibrated import calibrated_penalty
from entropy_regularization.penalties.published import published_penalty
from entropy_regularization.recording.recording import EntropyRecording
from entropy_regularization.reduction import RowSum
from entropy_regularization.thresholds import HeadThresholds

Thresholds = Tensor | Sequence[float] | Sequence[Sequence[float]] | HeadThresholds | float

_PENALTIES = {"published": published_penalty, "calibrated": calibrated_penalty}


class _Rows(NamedTuple):
    """One layer, whatever it came from: entropies, keys of each row, and which rows count."""

    entropy: Tensor
    allowed_keys: Tensor
    counted: Tensor


class EntropyRegularization:
    r"""Penalise attention heads whose entropy strays from a threshold (Jha & Reagen 2025).

    .. math:: \mathcal{L} = \frac{\lambda}{L} \sum_l \frac{1}{N_h} \sum_h \sum_{b,i}
        \mathrm{penalty}(H_{l,b,h,i}, \theta_{l,h})

    The positional arguments and their defaults are those of the published module, and so is every
    number (`compute_loss` agrees with it to 1e-9 in float64). The keyword-only arguments are ways
    out of what its definition implies; :meth:`calibrated` takes all of them.

    Args:
        loss_coeff: :math:`\lambda`.
        tolerance_margin_factor: :math:`\tau`, half the width of the band around a threshold, as a
            fraction of the maximum entropy.
        context_size: the maximum entropy is its logarithm; None takes the number of keys of the
            first layer.
        penalty: "published" squares the deviation outside the band (it jumps at the margin),
            "calibrated" squares what exceeds the band, as a fraction of the maximum.
        reduction: "sum" over batch and rows, as published (the strength then follows the batch
            size and the length), or "mean" over the counted rows.
        maximum: "context" is log(context_size) for every row, as published; "reachable" is log of
            the keys each row may see, and leaves out rows that see fewer than two.
        thresholds: used when a call gives none; see compute_loss.
        count_padding: whether padding rows of a recording count; None means yes for the published
            penalty, whose matrices do not tell them apart, and no for the calibrated one.

    Raises:
        ValueError: if a number is negative or not finite, or a name is unknown.
    """

    def __init__(
        self,
        loss_coeff: float = 1e-5,
        tolerance_margin_factor: float = 0.20,
        context_size: int | None = None,
        *,
        penalty: Literal["published", "calibrated"] = "published",
        reduction: Literal["sum", "mean"] = "sum",
        maximum: Literal["context", "reachable"] = "context",
        thresholds: Thresholds | None = None,
        count_padding: bool | None = None,
    ) -> None:
        _check_number("loss_coeff", loss_coeff)
        _check_number("tolerance_margin_factor", tolerance_margin_factor)
        if context_size is not None and (not isinstance(context_size, int) or context_size < 2):
            raise ValueError(
                f"context_size is {context_size!r}; pass an integer of at least 2, or None."
            )
        _check_choice("penalty", penalty, tuple(_PENALTIES))
        _check_choice("reduction", reduction, ("sum", "mean"))
        _check_choice("maximum", maximum, ("context", "reachable"))
        self.loss_coeff = float(loss_coeff)
        self.tolerance_margin_factor = float(tolerance_margin_factor)
        self.context_size = context_size
        self.penalty = penalty
        self.reduction = reduction
        self.maximum = maximum
        self.thresholds = thresholds
        self.count_padding = penalty == "published" if count_padding is None else count_padding

    @classmethod
    def calibrated(
        cls,
        loss_coeff: float = 1.0,
        tolerance_margin_factor: float = 0.1,
        *,
        thresholds: Thresholds | None = None,
    ) -> "EntropyRegularization":
        """Return the recommended settings: its strength is the same for every length and batch.

        Args:
            loss_coeff: factor of the mean penalty, which lies in [0, 1].
            tolerance_margin_factor: half the width of the band, as a fraction of ``log n_i``.
            thresholds: used when a call gives none.

        Returns:
            A regularization with the calibrated penalty, mean reduction and reachable maximum.
        """
        return cls(
            loss_coeff,
            tolerance_margin_factor,
            penalty="calibrated",
            reduction="mean",
            maximum="reachable",
            thresholds=thresholds,
        )

    def __repr__(self) -> str:
        """Return the settings."""
        return (
            f"EntropyRegularization({self.loss_coeff}, {self.tolerance_margin_factor}, "
            f"{self.context_size}, penalty={self.penalty!r}, reduction={self.reduction!r}, "
            f"maximum={self.maximum!r})"
        )

    def compute_loss(
        self,
        attentions: Sequence[Tensor],
        reg_threshold_weights: Thresholds,
        num_heads: int,
        num_layers: int,
    ) -> Tensor:
        """Return the penalty of attention matrices, as the published module does.

        Args:
            attentions: one ``[batch, heads, queries, keys]`` per layer, rows summing to 1.
            reg_threshold_weights: fractions of the maximum entropy: one per head (a tensor or a
                list), or ``[layers, heads]``.
            num_heads: how many heads to penalise, the first ones of each layer.
            num_layers: how many layers to penalise, the first ones.

        Returns:
            A scalar, differentiable in matrices and thresholds.

        Raises:
            TypeError: if a matrix is not a floating tensor.
            ValueError: if there is no matrix, shapes do not fit together, or there are fewer
                layers, heads or thresholds than asked for.
        """
        _check_matrices(attentions, num_heads, num_layers)
        matrices = attentions[:num_layers]
        rows = []
        for matrix in matrices:
            entropy = self.compute_entropy(matrix)[:, :num_heads]
            # A matrix does not say which keys a row may see: those with any weight.
            allowed = (matrix[:, :num_heads].detach() > 0).sum(-1)
            counted = torch.ones_like(entropy, dtype=torch.bool)
            rows.append(_Rows(entropy, allowed, counted))
        thresholds = _threshold_table(reg_threshold_weights, rows)
        return self._loss(rows, thresholds, matrices[0].shape[-1])

    def __call__(
        self, recording: EntropyRecording, thresholds: Thresholds | None = None
    ) -> Tensor:
        """Return the penalty of a recording: the same number as compute_loss on its matrices.

        Args:
            recording: what record_entropy gave.
            thresholds: as in compute_loss, or a HeadThresholds, or one number for every head; None
                takes the ones given to the constructor.

        Returns:
            A scalar, differentiable in the model's parameters and the thresholds.

        Raises:
            ValueError: if the recording is empty, or no or too few thresholds are there.
        """
        if not recording.layers:
            raise ValueError(
                "the recording holds no attention layer; run the model inside record_entropy."
            )
        chosen = self.thresholds if thresholds is None else thresholds
        if chosen is None:
            raise ValueError(
                "no thresholds were given; pass thresholds= to the call or to the constructor."
            )
        rows = []
        for layer in recording.layers:
            real = torch.ones_like(layer.rows) if self.count_padding else layer.rows
            counted = real[:, None].expand_as(layer.entropy)
            rows.append(_Rows(layer.entropy, layer.allowed_keys, counted))
        return self._loss(rows, _threshold_table(chosen, rows), recording.layers[0].keys)

    def _loss(self, layers: list[_Rows], thresholds: list[Tensor], n_keys: int) -> Tensor:
        losses = []
        for rows, threshold in zip(layers, thresholds, strict=True):
            maximum, counted = self._maximum(rows, n_keys)
            penalty = _PENALTIES[self.penalty](
                rows.entropy, threshold, maximum, self.tolerance_margin_factor
            )
            pair = RowSum.over_rows(penalty, counted)
            losses.append((pair.total if self.reduction == "sum" else pair.mean()).mean())
        # Layers may lie on different devices in a model split over several.
        total = torch.stack([loss.to(losses[0].device) for loss in losses]).sum()
        return self.loss_coeff / len(losses) * total

    def _maximum(self, rows: _Rows, n_keys: int) -> tuple[Tensor, Tensor]:
        """Return the maximum entropy of each row, nats, and which rows count."""
        if self.maximum == "context":
            size = n_keys if self.context_size is None else self.context_size
            # The published module takes this logarithm in float32, whatever the matrices are.
            return torch.tensor(float(max(size, 1))).log().to(rows.entropy), rows.counted
        meaningful = rows.allowed_keys > 1
        # log 2 stands in where the row is not counted, so that nothing is divided by 0
        maximum = rows.allowed_keys.clamp(min=2).to(rows.entropy.dtype).log()
        return maximum, rows.counted & meaningful

    @staticmethod
    def compute_entropy(attention_matrix: Tensor) -> Tensor:
        """Return ``-nansum(A log(A + 1e-9))`` over the keys, as published.

        Args:
            attention_matrix: ``[..., queries, keys]``, floating.

        Returns:
            ``[..., queries]``, nats. In float16, where 1e-9 is 0, use a recording instead.

        Raises:
            TypeError: if the matrix is not a floating tensor.
        """
        _check_floating(attention_matrix, "attention_matrix")
        return -torch.nansum(attention_matrix * torch.log(attention_matrix + 1e-9), dim=-1)

    @staticmethod
    def log_entropy_metrics(
        attention_matrices: Sequence[Tensor], step: int, logger: Any = None
    ) -> dict[str, float]:
        """Return the mean entropy of every head, and hand it to a logger.

        Args:
            attention_matrices: one ``[batch, heads, queries, keys]`` per layer.
            step: the training step the numbers belong to.
            logger: anything with ``log(metrics, step=step)`` (wandb does), or None.

        Returns:
            ``attn.{layer}.head.{head}.entropy`` to mean entropy over batch and queries, nats.

        Raises:
            TypeError: if a matrix is not a floating tensor, or the logger cannot log.
        """
        if logger is not None and not callable(getattr(logger, "log", None)):
            raise TypeError(
                f"logger is a {type(logger).__name__}; pass an object with log(metrics, step=...)."
            )
        metrics = {}
        for layer, matrix in enumerate(attention_matrices):
            entropy = EntropyRegularization.compute_entropy(matrix.detach())
            means = entropy.mean(dim=(0, 2)).tolist()  # one transfer a layer, not one a head
            for head, mean in enumerate(means):
                metrics[f"attn.{layer}.head.{head}.entropy"] = mean
        if logger is not None:
            logger.log(metrics, step=step)
        return metrics


def _check_number(name: str, number: float) -> None:
    if not isinstance(number, int | float) or not 0 <= number < math.inf:
        raise ValueError(f"{name} is {number!r}; pass a finite number of at least 0.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}.")


def _check_floating(tensor: object, name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; pass a torch.Tensor.")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}; pass a floating tensor.")


def _check_matrices(attentions: Sequence[Tensor], num_heads: int, num_layers: int) -> None:
    if len(attentions) == 0:
        raise ValueError(
            "attentions is empty; call the model with output_attentions=True and "
            "attn_implementation='eager', or use record_entropy."
        )
    for layer, matrix in enumerate(attentions):
        _check_floating(matrix, f"attentions[{layer}]")
        if matrix.dim() != 4:
            raise ValueError(
                f"attentions[{layer}] has shape {tuple(matrix.shape)}; pass "
                "[batch, heads, queries, keys]."
            )
        if matrix.shape[0] != attentions[0].shape[0]:
            raise ValueError(
                f"attentions[{layer}] has batch size {matrix.shape[0]} but attentions[0] has "
                f"{attentions[0].shape[0]}; pass the matrices of one forward pass."
            )
        if not 1 <= num_heads <= matrix.shape[1]:
            raise ValueError(
                f"num_heads is {num_heads} but attentions[{layer}] has {matrix.shape[1]} heads; "
                f"pass 1 to {matrix.shape[1]}."
            )
    if not 1 <= num_layers <= len(attentions):
        raise ValueError(
            f"num_layers is {num_layers} but there are {len(attentions)} matrices; pass 1 to "
            f"{len(attentions)}."
        )


def _threshold_table(thresholds: Thresholds, layers: list[_Rows]) -> list[Tensor]:
    """Return one ``[heads]`` tensor per layer on its device, whatever form they came in."""
    if isinstance(thresholds, HeadThresholds):
        thresholds = thresholds()
    like = layers[0].entropy
    if isinstance(thresholds, Tensor):
        table = thresholds
    else:
        table = torch.as_tensor(thresholds, dtype=like.dtype, device=like.device)
    if table.dim() > 2:
        raise ValueError(
            f"thresholds have shape {tuple(table.shape)}; pass [heads] or [layers, heads]."
        )
    if table.dim() == 2 and table.shape[0] < len(layers):
        raise ValueError(
            f"thresholds have shape {tuple(table.shape)} but there are {len(layers)} attention "
            "layers; pass one row per layer."
        )
    result = []
    for layer, rows in enumerate(layers):
        heads = rows.entropy.shape[1]
        row = table[layer] if table.dim() == 2 else table
        if row.dim() == 1 and row.shape[0] < heads:
            raise ValueError(
                f"there are {row.shape[0]} thresholds but layer {layer} has {heads} heads; pass "
                "one per head."
            )
        row = row[:heads] if row.dim() else row.expand(heads)
        result.append(row.to(rows.entropy.device))
    return result
