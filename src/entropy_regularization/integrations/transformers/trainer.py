"""EntropyRegularizedTrainer: transformers' Trainer with the penalty in the loss and in the logs."""

import copy
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from entropy_regularization.integrations.transformers.loading import (
    BESIDE,
    THRESHOLDS,
    load_renamed_weights,
    read_beside,
    save_beside,
)
from entropy_regularization.integrations.transformers.losses import TrainingPass
from entropy_regularization.integrations.transformers.regularize import regularize
from entropy_regularization.integrations.transformers.regularized import Regularized, handle_of
from entropy_regularization.monitoring.monitor import EntropyMonitor
from entropy_regularization.regularization import EntropyRegularization
from entropy_regularization.thresholds import HeadThresholds

FRACTION_BIAS = f"{THRESHOLDS}.fraction_bias"

logger = logging.getLogger("entropy_regularization.integrations.transformers")


class EntropyRegularizedTrainer(Trainer):
    """Trainer that adds the entropy penalty to the training loss and logs both.

    Everything else is Trainer's: accumulation, mixed precision, checkpointing, distributed
    training, resuming. The evaluation loss is the model's own.
    With PEFT, which saves its adapters alone, the thresholds are saved beside them and resumed. A
    trainer that makes its loss in its own way, as those of TRL do, is mixed:
    ``class MyTrainer(EntropyRegularizedTrainer, SFTTrainer): pass``; or derive from this one and
    write a ``compute_loss``, to whose loss the penalty is added. What copies the parameters into a
    second model, as ``sync_ref_model`` and ``BEMACallback`` of TRL do, needs fixed thresholds,
    since the second model has none. Logs gain

    - ``penalty``: the part of ``loss`` that is the penalty (as the model added it, if a trainer of
      one's own then weighs the model's loss);
    - ``model_loss``: ``loss`` without it;
    - ``entropy/mean`` (nats), ``entropy/utilisation`` and the shares of heads of each class, over
      the rows of all ranks since the last log.

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
        ValueError: if settings are given twice, the model cannot be regularized (see
            ``regularize``), an optimizer is given that does not train its thresholds, or
            ``sync_ref_model`` asks for learned ones in a reference model.

    Example:
        >>> trainer = EntropyRegularizedTrainer(  # doctest: +SKIP
        ...     model=model, args=args, train_dataset=data,
        ...     loss_coeff=1e-5, tolerance_margin_factor=0.2, context_size=128,
        ... )
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Add the penalty to what a ``compute_loss`` of a subclass returns, if it is not there."""
        super().__init_subclass__(**options)
        own = cls.__dict__.get("compute_loss")
        if own is not None:
            cls.compute_loss = _with_penalty(own)  # type: ignore[method-assign]

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
        self._regularization = regularization
        self._settings = given
        self._thresholds = thresholds
        self.regularized: Regularized | None = None
        super().__init__(*args, **kwargs)
        self.regularized = self._regularize(cast(nn.Module, self.model))  # Trainer refuses none
        _check_trained(self.regularized.thresholds, self.optimizer)
        _check_copied(self.regularized.thresholds, self.args)
        self._begin_window()

    def _begin_window(self) -> None:
        """Forget what was logged, and what a training that was cut short did not log."""
        self._monitor = EntropyMonitor()
        self._penalty_sum: Tensor | None = None  # since the last log
        self._first_step = 0  # optimizer steps done when penalty_sum began

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._begin_window()  # here, since auto_find_batch_size calls this again and again
        return super()._inner_training_loop(*args, **kwargs)

    def _regularize(self, model: nn.Module) -> Regularized:
        found = handle_of(model)
        if found is None:
            settings = self._regularization or EntropyRegularization(**self._settings)  # type: ignore[arg-type]
            again = self.model_init is not None
            thresholds = copy.deepcopy(self._thresholds) if again else self._thresholds
            return regularize(model, settings, thresholds=thresholds)
        if self._regularization is not None or self._settings or self._thresholds is not None:
            raise ValueError(
                "the model is regularized already; leave the settings to that, or call remove() on "
                "what regularize returned."
            )
        return found

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return a fresh model of ``model_init``, regularized, with thresholds of its own.

        Args:
            trial: of a hyperparameter search.
        """
        model = super().call_model_init(trial)
        if self.regularized is not None:  # train() makes a new one, and so does every trial
            self.regularized = self._regularize(model)
        return model

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on one micro-batch; the model runs its own attention afterwards."""
        loss: Tensor = super().training_step(*args, **kwargs)
        cast(Regularized, self.regularized).backward_is_over()
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return Trainer's loss; in training it includes the penalty.

        The model adds the penalty to the loss that it returns. If the loss is made of something
        else (label smoothing, compute_loss_func, the trainers of TRL), the penalty is added here,
        divided by the number of accumulated micro-batches where Trainer does not divide any more.

        Args:
            model: the model, wrapped.
            inputs: keywords of the model.
            return_outputs: whether to return the outputs too.
            num_items_in_batch: labels in all micro-batches of the step.

        Returns:
            The loss, or the loss and the outputs.
        """
        compute = super().compute_loss
        return self._penalized(
            lambda: compute(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch),
            return_outputs,
            num_items_in_batch,
            of_model=getattr(compute, "__func__", None) is Trainer.compute_loss,
        )

    def _penalized(
        self,
        compute: Callable[[], Any],
        return_outputs: bool,
        num_items_in_batch: Tensor | int | None,
        of_model: bool = False,
    ) -> Any:
        """Return what a computation of the loss returns, with the penalty of its training passes.

        ``of_model``: its loss is the model's own, perhaps times a number.
        """
        with cast(Regularized, self.regularized).collecting() as passes:
            found = compute()
        if not passes:
            return found
        loss, *outputs = found if return_outputs else (found,)
        loss = self._account(loss, passes, num_items_in_batch, of_model)
        return (loss, *outputs) if return_outputs else loss

    def _account(
        self,
        loss: Tensor,
        passes: list[TrainingPass],
        num_items_in_batch: Tensor | int | None,
        of_model: bool,
    ) -> Tensor:
        """Add the penalties that the loss does not hold; note how much of it they are."""
        is_scaled = self._is_scaled(num_items_in_batch)
        steps = getattr(self, "current_gradient_accumulation_steps", 1)  # set by train()
        held = [each for each in passes if each.enters(loss)]
        part = _part_of(loss, held, of_model)
        for each in passes:
            if not any(each is other for other in held):
                added = each.penalty.to(loss) / (steps if is_scaled else 1)
                loss, part = loss + added, part + added.detach()
            self._monitor.update(each.recording)
        self._count(part if is_scaled else part / steps, loss)  # as Trainer will divide the loss
        return loss

    def _count(self, part: Tensor, loss: Tensor) -> None:
        """Add the part of a loss that is the penalty to what is logged, as Trainer adds a loss."""
        if self._penalty_sum is None:
            self._first_step = self.state.global_step  # after a resume, not 0
            self._penalty_sum = torch.zeros_like(part)
        if self.args.logging_nan_inf_filter:  # Trainer takes a mean for a loss that is not finite
            steps = 1 + self.state.global_step - self._first_step
            part = torch.where(loss.detach().isfinite(), part, self._penalty_sum / steps)
        self._penalty_sum = self._penalty_sum + part

    def _is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Tell whether Trainer takes the loss as normalised over the accumulated batch."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is not None:
            return bool(scaled)
        accepts = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(accepts or self.compute_loss_func is not None)

    # PEFT saves its adapters alone, and so thresholds get a file of their own beside them.

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        thresholds = self._thresholds_beside_adapters()
        if thresholds is not None and self.args.should_save:
            saved = [state_dict[key] for key in state_dict or () if key.endswith(FRACTION_BIAS)]
            folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
            save_beside(folder, saved[0] if saved else thresholds.fraction_bias)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_missed(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_missed(Path(str(self.state.best_model_checkpoint)))

    def _load_missed(self, folder: Path) -> None:
        """Load what Trainer does not find in a checkpoint."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # they have files of their own
            load_renamed_weights(cast(nn.Module, self.model), folder)
        self._load_beside(folder)

    def _load_beside(self, folder: Path) -> None:
        thresholds, path = self._thresholds_beside_adapters(), folder / BESIDE
        if thresholds is None:
            return
        if not path.is_file():
            logger.warning("%s has no %s; the thresholds stay as they are.", folder, BESIDE)
            return
        with torch.no_grad():
            thresholds.fraction_bias.copy_(read_beside(path).fraction_bias)

    def _thresholds_beside_adapters(self) -> HeadThresholds | None:
        held = cast(Regularized, self.regularized).thresholds
        adapted = hasattr(self.accelerator.unwrap_model(self.model), "peft_config")
        return held if adapted and isinstance(held, HeadThresholds) else None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the penalty and the entropies beside the training loss."""
        if "loss" in logs and self._penalty_sum is not None:
            steps = max(self.state.global_step - self._first_step, 1)
            total = self.accelerator.reduce(self._penalty_sum, reduction="mean")
            logs["penalty"] = (total / steps).item()
            logs["model_loss"] = logs["loss"] - logs["penalty"]
            logs.update(self._monitor.summary(over_ranks=True).metrics())
            self._begin_window()
        super().log(logs, *args, **kwargs)


def _check_trained(thresholds: object, optimizer: Any) -> None:
    """Refuse an optimizer that was made before the thresholds, which it would never train."""
    if not isinstance(thresholds, HeadThresholds) or not hasattr(optimizer, "param_groups"):
        return
    learned = thresholds.fraction_bias
    trained = any(learned is each for group in optimizer.param_groups for each in group["params"])
    if learned.requires_grad and not trained:
        raise ValueError(
            "the optimizer that was given does not train the thresholds of the heads; call "
            "regularize(model, ...) before it is made, or pass fixed thresholds."
        )


def _check_copied(thresholds: object, args: Any) -> None:
    """Refuse to copy the parameters into a reference model, which has no thresholds (TRL)."""
    if isinstance(thresholds, HeadThresholds) and getattr(args, "sync_ref_model", False):
        raise ValueError(
            "sync_ref_model=True copies all parameters of the model into a reference model, which "
            "has no thresholds to take; pass fixed thresholds, for instance thresholds=0.5."
        )


def _with_penalty(compute_loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return a ``compute_loss`` whose loss has the penalty, if the one given has not added it."""

    @functools.wraps(compute_loss)
    def penalized(
        self: EntropyRegularizedTrainer, model: Any, inputs: Any, *args: Any, **options: Any
    ) -> Any:
        given = dict(zip(("return_outputs", "num_items_in_batch"), args, strict=False)) | options
        return self._penalized(
            lambda: compute_loss(self, model, inputs, *args, **options),
            given.get("return_outputs", False),
            given.get("num_items_in_batch"),
        )

    return penalized


def _part_of(loss: Tensor, held: list[TrainingPass], of_model: bool) -> Tensor:
    """Return how much of a loss are the penalties that the model added to its own."""
    nothing = loss.detach() * 0
    added = sum((each.added.to(loss) for each in held if each.added is not None), nothing)
    if not of_model:
        return added
    whole = added + sum((each.loss.to(loss) for each in held if each.loss is not None), nothing)
    # Trainer's loss is the model's, perhaps times the number of ranks
    return torch.where(whole != 0, loss.detach() * added / whole, nothing)
