"""EntropyRegularization: the published class, and the same object over a recording."""

import functools
import logging
import math
import struct
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from entropy_regularization.attention.validation import check_is_tensor
from entropy_regularization.checks import check_flag
from entropy_regularization.penalties import calibrated_penalty, published_penalty
from entropy_regularization.penalties.layers import LayerRows, sum_layers
from entropy_regularization.penalties.validation import (
    check_context_size,
    check_matrices,
    check_matrix,
    check_not_negative,
    check_option,
)
from entropy_regularization.recording.recording import EntropyRecording, check_recording
from entropy_regularization.reduction import (
    Reduction,
    SumAndCount,
    mean_count_over_ranks,
    sum_rows,
)
from entropy_regularization.thresholds import check_fixed, thresholds_of_layers

Penalty = Literal["published", "calibrated"]
Maximum = Literal["context", "reachable"]

_PENALTIES = {"published": published_penalty, "calibrated": calibrated_penalty}
logger = logging.getLogger("entropy_regularization")

EPSILON = 1e-9  # the published module adds it inside the logarithm of a stored matrix


class EntropyRegularization:
    r"""Hold every head's attention entropy near a share of its maximum.

    .. math:: \text{loss} = \frac{\text{loss\_coeff}}{L} \sum_l \frac{1}{H} \sum_h
              \operatorname{reduce}_{b,i}\; \text{penalty}(H_{lhbi}, \theta_{lh}, H_{\max})

    Two settings. The default is the module that Jha & Reagen (2025) published, digit for digit.
    ``penalty="calibrated"`` is the recommended one: its strength does not depend on batch size,
    length or mask, and it has no jump at the margin.

    ==================  =====================  ==========================================
    option              published              calibrated
    ==================  =====================  ==========================================
    reduction           "sum" over rows        "mean" over the rows that count
    maximum             "context": log N       "reachable": log of the keys a row may see
    count_padding       True                   False
    ==================  =====================  ==========================================

    Under a causal mask log N cannot be reached: a mean over rows ends at 0.80 of it at 128 tokens.
    A sum makes the strength follow batch size and length: 1e-5 at 128 x 128 rows is 0.16 on the
    mean row.

    Args:
        loss_coeff: factor of the whole penalty.
        tolerance_margin_factor: half-width of the unpenalised band, a fraction of the maximum.
        context_size: number of keys whose logarithm is the "context" maximum; the number of keys
            of the first layer unless given.
        penalty: "published" or "calibrated", see ``entropy_regularization.penalties``.
        reduction: "sum" or "mean" over batch and queries; None takes the penalty's own.
        maximum: "context" or "reachable"; None takes the penalty's own. With "reachable", rows
            that see fewer than two keys are left out, because their entropy can only be 0.
        thresholds: used when a call gives none: a number, ``[heads]``, ``[layers, heads]`` or
            HeadThresholds; fractions of the maximum. None means 0.5.
        count_padding: whether padding queries, and rows that see no key, enter sum and mean. True
            gives the number that the published module gives on the matrices of the same pass,
            except that a model's eager attention gives rows that see no key (left padding) a
            meaningless uniform distribution, where a recording has entropy 0. None takes the
            penalty's own.
        across_ranks: with "mean", divide by the count over all data-parallel ranks rather than
            each rank's own. One small all-reduce a call, which every rank must then make.

    Raises:
        TypeError: if a number is not a number, or a flag not True or False.
        ValueError: if a number is out of range or an option unknown.

    Example:
        >>> regularization = EntropyRegularization(loss_coeff=1.0, tolerance_margin_factor=0.0)
        >>> uniform = torch.full((1, 1, 1, 2), 0.5)  # entropy log 2; threshold 0.5 log 2
        >>> loss = regularization.compute_loss([uniform], [0.5], num_heads=1, num_layers=1)
        >>> round(loss.item(), 4), round((0.5 * math.log(2)) ** 2, 4)
        (0.1201, 0.1201)
    """

    def __init__(
        self,
        loss_coeff: float = 1e-5,
        tolerance_margin_factor: float = 0.20,
        context_size: int | None = None,
        *,
        penalty: Penalty = "published",
        reduction: Reduction | None = None,
        maximum: Maximum | None = None,
        thresholds: object = None,
        count_padding: bool | None = None,
        across_ranks: bool = False,
    ) -> None:
        published = penalty == "published"
        self.loss_coeff = check_not_negative("loss_coeff", loss_coeff)
        self.tolerance_margin_factor = check_not_negative(
            "tolerance_margin_factor", tolerance_margin_factor
        )
        self.context_size = check_context_size(context_size)
        self.penalty = check_option("penalty", penalty, get_args(Penalty))
        self.reduction = check_option(
            "reduction",
            ("sum" if published else "mean") if reduction is None else reduction,
            get_args(Reduction),
        )
        self.maximum = check_option(
            "maximum",
            ("context" if published else "reachable") if maximum is None else maximum,
            get_args(Maximum),
        )
        if thresholds is not None:
            check_fixed(thresholds, "thresholds")
        self.thresholds = thresholds
        self.count_padding = (
            published if count_padding is None else check_flag("count_padding", count_padding)
        )
        self.across_ranks = check_flag("across_ranks", across_ranks)

    @classmethod
    def calibrated(
        cls, loss_coeff: float = 1.0, tolerance_margin_factor: float = 0.1, **options: Any
    ) -> "EntropyRegularization":
        """Return the recommended settings, ``penalty="calibrated"``.

        Args:
            loss_coeff: factor of the mean penalty, which lies in [0, 1].
            tolerance_margin_factor: half-width of the band, a fraction of ``log n_i``.
            **options: further keywords of the constructor.

        Raises:
            TypeError: if a number is not a number, or a keyword unknown.
            ValueError: if a number is out of range or an option unknown.
        """
        return cls(loss_coeff, tolerance_margin_factor, penalty="calibrated", **options)

    def __repr__(self) -> str:
        """Return the settings."""
        return (
            f"EntropyRegularization(loss_coeff={self.loss_coeff}, "
            f"tolerance_margin_factor={self.tolerance_margin_factor}, "
            f"context_size={self.context_size}, penalty={self.penalty!r}, "
            f"reduction={self.reduction!r}, maximum={self.maximum!r})"
        )

    def __call__(self, recording: EntropyRecording, thresholds: object = None) -> Tensor:
        """Return the penalty of a recorded forward pass; add it to the loss.

        Args:
            recording: what ``record_entropy`` gave.
            thresholds: as in the constructor, for this call only.

        Returns:
            A scalar, differentiable in the model's parameters and the thresholds. A recording
            without a gradient cannot train the model, which the log says once, unless gradients
            are off here too.

        Raises:
            TypeError: if recording is no EntropyRecording or thresholds are not numbers.
            ValueError: if nothing was recorded, or thresholds do not fit the layers and heads.
        """
        check_recording("recording", recording, ", or matrices to compute_loss")
        if not recording.layers:
            raise ValueError(
                "the recording is empty; run a forward pass inside record_entropy(model) first."
            )
        layers = [LayerRows(layer.entropy, layer.allowed_keys, layer.rows) for layer in recording]
        wanted = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if wanted and not any(layer.entropy.requires_grad for layer in layers):
            _warn_of_no_gradient()
        context_size = self.context_size or recording.layers[0].keys
        heads = [layer.entropy.shape[1] for layer in layers]
        given = self._thresholds(thresholds)
        vectors = thresholds_of_layers(given, heads, name="thresholds", like=layers[0].entropy)
        return self._reduce(layers, vectors, context_size)

    def compute_loss(
        self,
        attentions: Sequence[Float[Tensor, "batch heads queries keys"]],
        reg_threshold_weights: object,
        num_heads: int,
        num_layers: int,
        *,
        allowed: Bool[Tensor, "..."] | None = None,
    ) -> Tensor:
        """Return the penalty of stored attention matrices, as published.

        Args:
            attentions: one ``[batch, heads, queries, keys]`` matrix per layer, as a model with
                eager attention returns them for ``output_attentions=True``. In training mode these
                are the weights after dropout, whose entropy is another.
            reg_threshold_weights: fractions of the maximum; ``[heads]`` (or more), shared by the
                layers, ``[layers, heads]``, or one number; tensor, list or HeadThresholds.
            num_heads: the first num_heads heads are penalised.
            num_layers: number of matrices.
            allowed: boolean, broadcastable to the matrices, True where a query may attend. Needed
                for ``maximum="reachable"``, because a weight of 0 does not tell.

        Returns:
            A scalar, differentiable in matrices and thresholds.

        Raises:
            TypeError: if matrices are not floating tensors, or thresholds not numbers.
            ValueError: if there are no matrices, their shapes or number do not fit, or more heads
                are asked for than there are matrices or thresholds.
        """
        check_matrices("attentions", attentions, num_heads, num_layers)
        layers = [
            LayerRows(
                self.compute_entropy(matrix)[:, :num_heads],
                self._count_allowed(allowed, matrix, num_heads),
                None,
            )
            for matrix in attentions
        ]
        context_size = self.context_size or attentions[0].shape[-1]
        vectors = thresholds_of_layers(
            reg_threshold_weights,
            [num_heads] * len(layers),
            name="reg_threshold_weights",
            like=layers[0].entropy,
            or_more=True,
        )
        return self._reduce(layers, vectors, context_size)

    @staticmethod
    def compute_entropy(
        attention_matrix: Float[Tensor, "*batch queries keys"],
    ) -> Float[Tensor, "*batch queries"]:
        """Return the entropy of every row of a stored matrix, ``-nansum(A log(A + 1e-9))``, nats.

        float16 and bfloat16 are computed in float32, where 1e-9 does not vanish. As published, an
        entry that is NaN counts as 0, so a matrix of NaN has entropy 0; a recording, whose entropy
        is computed otherwise, keeps NaN.

        Args:
            attention_matrix: rows are probabilities over the last dimension.

        Raises:
            TypeError: if it is not a floating tensor.
            ValueError: if it has fewer than two dimensions.
        """
        check_matrix("attention_matrix", attention_matrix)
        if attention_matrix.dim() < 2:
            raise ValueError(
                f"attention_matrix has shape {tuple(attention_matrix.shape)}; pass "
                "[..., queries, keys]."
            )
        weights = attention_matrix.to(torch.promote_types(attention_matrix.dtype, torch.float32))
        return -torch.nansum(weights * torch.log(weights + EPSILON), dim=-1)

    @staticmethod
    def log_entropy_metrics(
        attention_matrices: Sequence[Float[Tensor, "batch heads queries keys"]],
        step: int,
        logger: Any = None,
    ) -> dict[str, float]:
        """Return the mean entropy of every head, and hand it to a logger.

        Args:
            attention_matrices: one ``[batch, heads, queries, keys]`` per layer.
            step: passed to the logger.
            logger: has ``log(metrics, step=step)`` as a wandb run has, or is called so, or is a
                logging.Logger, which gets one line; None for none.

        Returns:
            ``attn.{layer}.head.{head}.entropy`` to nats, over batch and queries.

        Raises:
            TypeError: if matrices are not floating tensors, or the logger is none of these.
            ValueError: if there are no matrices, or their shapes do not fit.
        """
        check_matrices("attention_matrices", attention_matrices)
        metrics: dict[str, float] = {}
        with torch.no_grad():
            for layer, matrix in enumerate(attention_matrices):
                means = EntropyRegularization.compute_entropy(matrix).mean((0, 2)).tolist()
                for head, mean in enumerate(means):
                    metrics[f"attn.{layer}.head.{head}.entropy"] = mean
        if logger is not None:
            _hand_to(logger, metrics, step)
        return metrics

    def _thresholds(self, given: object) -> object:
        if given is not None:
            return given
        return 0.5 if self.thresholds is None else self.thresholds

    def _reduce(
        self, layers: list[LayerRows], thresholds: list[Tensor], context_size: int
    ) -> Tensor:
        penalise = functools.partial(self._penalise, context_size=context_size)
        sums = sum_layers(layers, thresholds, penalise)
        if self.reduction == "mean" and self.across_ranks:
            (sums,) = mean_count_over_ranks([sums])
        per_head = sums.mean() if self.reduction == "mean" else sums.total
        heads = [layer.entropy.shape[1] for layer in layers]
        if len(set(heads)) > 1:
            per_head = torch.stack([values.mean() for values in per_head.split(heads)])
        return self.loss_coeff * per_head.mean()

    def _penalise(self, layer: LayerRows, thresholds: Tensor, *, context_size: int) -> SumAndCount:
        entropy = layer.entropy
        counted = self._counted(layer)
        if counted is not None:  # what does not count, be it NaN, reaches neither sum nor gradient
            entropy = entropy.masked_fill(~counted, 0.0)
        maximum: Tensor | float = _published_log(context_size)
        if self.maximum == "reachable":
            assert layer.allowed_keys is not None
            maximum = layer.allowed_keys.clamp(min=1).to(entropy.dtype).log()
        penalty = _PENALTIES[self.penalty](
            entropy,
            thresholds.to(entropy.device),
            maximum,
            tolerance=self.tolerance_margin_factor,
        )
        return sum_rows(penalty, counted)

    def _counted(self, layer: LayerRows) -> Tensor | None:
        """Return which rows enter, broadcastable to [batch, heads, queries]; None for all."""
        fewest = 2 if self.maximum == "reachable" else 1
        conditions = []
        if layer.allowed_keys is not None and (fewest == 2 or not self.count_padding):
            conditions.append(layer.allowed_keys >= fewest)
        if layer.rows is not None and not self.count_padding:
            conditions.append(layer.rows[:, None])
        if not conditions:
            return None
        return conditions[0] if len(conditions) == 1 else conditions[0] & conditions[1]

    def _count_allowed(
        self, allowed: Tensor | None, matrix: Tensor, num_heads: int
    ) -> Tensor | None:
        if allowed is None:
            if self.maximum == "reachable":
                raise ValueError(
                    "maximum='reachable' needs to know which keys a row may see and matrices do "
                    "not tell; pass allowed=, call the object on a recording, or use "
                    "maximum='context'."
                )
            return None
        check_is_tensor("allowed", allowed)
        if allowed.dtype != torch.bool:
            raise TypeError(f"allowed has dtype {allowed.dtype}; pass booleans, True to attend.")
        try:
            return allowed.expand(matrix.shape).sum(-1)[:, :num_heads]
        except RuntimeError as error:
            raise ValueError(
                f"allowed has shape {tuple(allowed.shape)}, which does not broadcast to the "
                f"matrices' {tuple(matrix.shape)}; pass [batch or 1, 1, queries, keys]."
            ) from error


@functools.cache
def _warn_of_no_gradient() -> None:
    logger.warning(
        "the recording carries no gradient, so its penalty cannot train the model; record with "
        "gradient=True and outside torch.no_grad(), or compute the penalty inside it."
    )


def _published_log(context_size: int) -> float:
    """Return log N rounded to float32, as the published module has it in any precision."""
    (rounded,) = struct.unpack("f", struct.pack("f", math.log(context_size)))
    return float(rounded)


def _hand_to(logger: Any, metrics: dict[str, float], step: int) -> None:
    if isinstance(logger, logging.Logger):
        logger.info("step %d: %s", step, metrics)
    elif callable(getattr(logger, "log", None)):
        logger.log(metrics, step=step)
    elif callable(logger):
        logger(metrics, step=step)
    else:
        raise TypeError(
            f"logger is a {type(logger).__name__}; pass an object with log(metrics, step=...), a "
            "function, or a logging.Logger."
        )
