"""EntropyRegularizedTrainer: transformers' Trainer with the penalty in the loss and in the logs."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from entropy_regularization.integrations.transformers.regularize import handle_of, regularize
from entropy_regularization.monitoring.monitor import EntropyMonitor
from entropy_regularization.regularization import EntropyRegularization


class EntropyRegularizedTrainer(Trainer):
    """Trainer that adds the entropy penalty to the training loss and logs both.

    Everything else is Trainer's: accumulation, mixed precision, checkpointing, distributed
    training, resuming. The evaluation loss is the model's own. Logs gain

    - ``penalty``: the part of ``loss`` that is the penalty;
    - ``model_loss``: ``loss`` without it;
    - ``entropy/mean`` (nats), ``entropy/utilisation`` and the shares of heads of each class, over
      this rank's rows since the last log.

    Args:
        *args: as Trainer.
        loss_coeff: as EntropyRegularization; not together with ``regularization``.
        tolerance_margin_factor: as EntropyRegularization; not together with ``regularization``.
        context_size: as EntropyRegularization; not together with ``regularization``.
        regularization: all settings in one object, for instance
            ``EntropyRegularization.calibrated()``.
        thresholds: as ``regularize``; learnable ones that start at 0.5 unless given.
        **kwargs: as Trainer.

    Raises:
        TypeError: if no transformers model is given, or settings are something else.
        ValueError: if settings are given twice, or the model cannot be regularized (see
            ``regularize``).

    Example:
        >>> trainer = EntropyRegularizedTrainer(  # doctest: +SKIP
        ...     model=model, args=args, train_dataset=data,
        ...     loss_coeff=1e-5, tolerance_margin_factor=0.2, context_size=128,
        ... )
    """

    def __init__(
        self,
        *args: Any,
        loss_coeff: float | None = None,
        tolerance_margin_factor: float | None = None,
        context_size: int | None = None,
        regularization: EntropyRegularization | None = None,
        thresholds: object = None,
        **kwargs: Any,
    ) -> None:
        settings = {
            "loss_coeff": loss_coeff,
            "tolerance_margin_factor": tolerance_margin_factor,
            "context_size": context_size,
        }
        given = {name: value for name, value in settings.items() if value is not None}
        if regularization is not None and given:
            raise ValueError(
                f"{', '.join(given)} and regularization were given; set "
                f"{', '.join(given)} in regularization."
            )
        super().__init__(*args, **kwargs)
        inner = cast(nn.Module, self.model)  # Trainer itself refuses to have none
        found = handle_of(inner)
        if found is not None and (regularization is not None or given or thresholds is not None):
            raise ValueError(
                "the model is regularized already; leave the settings to that, or call remove() on "
                "what regularize returned."
            )
        self.regularized = found or regularize(
            inner,
            regularization or EntropyRegularization(**given),  # type: ignore[arg-type]
            thresholds=thresholds,
        )
        self._monitor = EntropyMonitor()
        self._penalty_share: Tensor | None = None  # of the loss of this micro-batch
        self._penalty_sum: Tensor | None = None  # since the last log
        self._first_step = 0  # optimizer steps done when penalty_sum began

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return Trainer's loss; in training it includes the penalty.

        The model adds the penalty to the loss that it returns. If the loss is made outside it
        (label smoothing, compute_loss_func), the penalty is added here, divided by the number of
        accumulated micro-batches where Trainer does not divide any more.

        Args:
            model: the model, wrapped.
            inputs: keywords of the model.
            return_outputs: whether to return the outputs too.
            num_items_in_batch: labels in all micro-batches of the step.

        Returns:
            The loss, or the loss and the outputs.
        """
        self.regularized.unadded = None
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if model.training:
            loss = self._account(loss, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _account(self, loss: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Add the penalty if the model could not, and remember which share of the loss it is."""
        seen = self.regularized
        if seen.unadded is not None:
            steps = self.current_gradient_accumulation_steps
            added = seen.unadded / (steps if self._is_scaled(num_items_in_batch) else 1)
            loss = loss + added.to(loss)
            seen.unadded, whole, part = None, loss.detach(), added.detach()
        elif seen.loss is not None and seen.added is not None:
            whole, part = seen.loss + seen.added, seen.added
        else:
            return loss
        # A share survives whatever factors Trainer puts on the loss afterwards.
        self._penalty_share = torch.where(whole != 0, part / whole, torch.zeros_like(whole))
        if seen.recording is not None:
            self._monitor.update(seen.recording)
            seen.recording = None
        return loss

    def _is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Tell whether Trainer takes the loss as normalised over the accumulated batch."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is not None:
            return bool(scaled)
        accepts = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(accepts or self.compute_loss_func is not None)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run one micro-batch and add up the penalty's part of its loss."""
        self._penalty_share = None
        loss: Tensor = super().training_step(*args, **kwargs)
        if self._penalty_share is not None:
            part = loss.detach() * self._penalty_share.to(loss.device)
            if self._penalty_sum is None:
                self._first_step = self.state.global_step  # after a resume, not 0
                self._penalty_sum = part
            else:
                self._penalty_sum = self._penalty_sum + part
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the penalty and the entropies beside the training loss."""
        if "loss" in logs and self._penalty_sum is not None:
            steps = max(self.state.global_step - self._first_step, 1)
            total = self.accelerator.reduce(self._penalty_sum, reduction="mean")
            logs["penalty"] = (total / steps).item()
            logs["model_loss"] = logs["loss"] - logs["penalty"]
            logs.update(self._monitor.summary().metrics())
            self._monitor.reset()
            self._penalty_sum = None
        super().log(logs, *args, **kwargs)
