"""The training behind entropy-reg train: Trainer, records, checkpoints, result."""

import gc
import math
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console
from safetensors import SafetensorError
from transformers import (
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils import logging as transformers_logging

from entropy_regularization.cli.console import PlainConsole
from entropy_regularization.cli.errors import RunProblem, Stopped, UsageProblem
from entropy_regularization.cli.evaluation import evaluate, numbers_of
from entropy_regularization.cli.files import write_json
from entropy_regularization.cli.options import SIZES, TrainOptions
from entropy_regularization.cli.preparation import Materials, check_precision, prepare
from entropy_regularization.cli.runs import RunFolder
from entropy_regularization.cli.signals import EXIT_CODES
from entropy_regularization.cli.watch import NothingLeft, Watch
from entropy_regularization.integrations.transformers.loading import (
    load_renamed_weights,
    load_thresholds,
)
from entropy_regularization.integrations.transformers.trainer import EntropyRegularizedTrainer
from entropy_regularization.monitoring.plots import save_heatmaps
from entropy_regularization.monitoring.records import RecordError, RecordWriter, read_records
from entropy_regularization.monitoring.statistics import Band
from entropy_regularization.regularization import EntropyRegularization
from entropy_regularization.thresholds import HeadThresholds

# What the messages of torch's and safetensors' writers hold when a file could not be written.
WRITING_FAILED = ("inline_container", "PytorchStreamWriter", "Error while serializing")

# What torch says of a checkpoint of another model, or of one that learned other parameters.
OTHER_MODEL = ("Error(s) in loading state_dict", "doesn't match the size of optimizer's group")


def run_training(options: TrainOptions, folder: RunFolder, *, resume: bool = False) -> None:
    """Train as the options say, and leave everything in the folder.

    Under torchrun or accelerate launch every rank calls it; the first one writes.

    Args:
        options: what was asked for.
        folder: of the run; begun or reopened.
        resume: go on from the last whole checkpoint.

    Raises:
        UsageProblem: if the options do not fit together, the model or the data.
        RunProblem: if the training fails; the last good checkpoint stays.
        Stopped: after Ctrl-C or SIGTERM, with a checkpoint written.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    check_precision(options)
    with _failures_in_words(folder), _ranks_part_in_order():
        arguments = training_arguments(options, folder)
        main_process = arguments.process_index == 0
        console = PlainConsole(quiet=not main_process)
        materials = prepare(options, folder, arguments, console)
        Run(options, folder, materials, arguments, console).run(resume=resume)


@contextmanager
def _ranks_part_in_order() -> Iterator[None]:
    """Take the ranks apart before the interpreter ends, which aborts on their running threads."""
    try:
        yield
    finally:
        if dist.is_initialized():
            gc.collect()  # a wrapped model in a cycle would keep the group, and so its threads
            dist.destroy_process_group()


@contextmanager
def _failures_in_words(folder: RunFolder) -> Iterator[None]:
    """Turn what a machine can run out of into a sentence."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunProblem(
            "the GPU ran out of memory; lower --batch-size (and raise --accumulation), or add "
            "--gradient-checkpointing."
        ) from error
    except RecordError as error:
        raise RunProblem(str(error)) from error
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RunProblem(
            f"{error.strerror or error} ({error.filename or folder.path}); make room or access, "
            f"then {folder.how_to_go_on()}"
        ) from error
    except (RuntimeError, SafetensorError) as error:  # how torch and safetensors name a full disk
        if not any(words in str(error) for words in WRITING_FAILED):
            raise
        raise RunProblem(
            f"{folder.path} could not be written, its disk is probably full; make room, then "
            f"{folder.how_to_go_on()}"
        ) from error


def training_arguments(options: TrainOptions, folder: RunFolder) -> TrainingArguments:
    """Return the options in Trainer's words."""
    return TrainingArguments(
        output_dir=str(folder.checkpoints.path),
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        max_steps=options.total_steps,
        num_train_epochs=options.epochs or 1.0,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        bf16=options.precision == "bfloat16",
        fp16=options.precision == "float16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=options.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=options.checkpoint_steps,
        seed=options.seed,
        data_seed=options.seed,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )


class Run:
    """One training: the model, the Trainer, and what is written while it runs."""

    def __init__(
        self,
        options: TrainOptions,
        folder: RunFolder,
        materials: Materials,
        arguments: TrainingArguments,
        console: Console,
    ) -> None:
        self.options, self.folder, self.console = options, folder, console
        self.model, self.tokenizer, self.blocks, self.held_out, self.shapes = materials
        settings = self._regularization()
        self.starting_band = self.band = Band.of(settings, options.threshold)
        common: dict[str, Any] = {
            "model": self.model,
            "args": arguments,
            "train_dataset": self.blocks,
            "processing_class": self.tokenizer,
            # All blocks have one length; Trainer's own choice needs a tokenizer that can pad.
            "data_collator": default_data_collator,
        }
        self.trainer: Trainer
        if options.penalty == "none":
            self.trainer = Trainer(**common)
        else:
            learned = not options.fixed_thresholds
            thresholds = HeadThresholds(*self.shapes, options.threshold, learnable=learned)
            self.band = Band.of(settings, thresholds)
            self.trainer = EntropyRegularizedTrainer(
                **common, regularization=settings, thresholds=thresholds
            )
        self.trainer.remove_callback(PrinterCallback)

    def _regularization(self) -> EntropyRegularization:
        options = self.options
        if options.penalty == "published":
            return EntropyRegularization(options.strength, options.band, options.context_length)
        return EntropyRegularization.calibrated(options.strength, options.band)

    def run(self, *, resume: bool) -> None:
        """Evaluate, train, evaluate, write."""
        checkpoint = self.folder.checkpoints.to_resume(self.console.print) if resume else None
        with self._records(None if checkpoint is None else checkpoint[0]) as writer:
            if checkpoint is None:
                self._tell_of_thresholds()
                self._evaluate(writer, 0, "before")
            else:
                self.console.print(f"going on from step {checkpoint[0]}")
                if self.options.penalty == "none":  # EntropyRegularizedTrainer does so itself
                    load_renamed_weights(self.model, checkpoint[1])
            step = 0 if checkpoint is None else checkpoint[0]
            watch = self._watch(writer)
            self.trainer.add_callback(watch)
            try:
                with watch.signals, suppress(NothingLeft), self._other_model_in_words(step):
                    self.trainer.train(
                        resume_from_checkpoint=None if checkpoint is None else str(checkpoint[1])
                    )
            finally:
                watch.close()
            if watch.signals.number is not None:
                raise self._stopped(watch.signals.number)
            self._evaluate(writer, self.trainer.state.global_step, "after")
        if self.trainer.is_world_process_zero():
            self._finish()

    def _tell_of_thresholds(self) -> None:
        """Say that thresholds which lie beside a pretrained model are not gone on with."""
        options = self.options
        if options.penalty == "none" or options.model in SIZES:
            return
        with suppress(ValueError):  # there are none
            load_thresholds(options.model, local_files_only=True)
            self.console.print(
                f"the thresholds saved with {options.model} are not used: --threshold starts them "
                f"at {options.threshold:g}"
            )

    def _records(self, step: int | None) -> RecordWriter:
        """Open the records, with what comes after the checkpoint taken out."""
        if not self.trainer.is_world_process_zero():
            return RecordWriter(os.devnull)
        if step is not None:
            self._check_records(step)
        self.folder.checkpoints.clear_after(step or 0)
        return RecordWriter(self.folder.records, keep_until=-1 if step is None else step)

    def _check_records(self, step: int) -> None:
        """Refuse to go on without the records of the steps before it, or with other heads."""
        if self.folder.records.is_file():
            records = read_records(self.folder.records)
            before = records.evaluation("before")
            if records.train and before is not None:
                heads = max(len(layer) for layer in before.statistics.entropy)
                if heads != self.shapes[1]:
                    raise self._other_model(step)
                return
        raise RunProblem(
            f"{self.folder.records} lacks what was recorded before the checkpoint; put it back, or "
            "start a new run with another --output."
        )

    def _other_model(self, step: int) -> UsageProblem:
        return UsageProblem(
            f"{self.folder.config} or the model that it names was changed: its model or penalty is "
            f"not that of checkpoint-{step}; put it back, or start again with another --output."
        )

    @contextmanager
    def _other_model_in_words(self, step: int) -> Iterator[None]:
        """Turn what torch says of a checkpoint that does not fit into a sentence."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if not any(words in str(error) for words in OTHER_MODEL):
                raise
            raise self._other_model(step) from error

    def _watch(self, writer: RecordWriter) -> Watch:
        options = self.options
        lines = []
        if self.trainer.is_world_process_zero():
            lines = read_records(self.folder.records).train
        return Watch(
            self.model,
            self.folder,
            writer,
            self.band,
            self.console,
            tokens=self._tokens,
            elapsed=lines[-1]["elapsed"] if lines else 0.0,
            evaluate=lambda step: self._evaluate(writer, step, "during"),
            evaluate_every=options.evaluation_steps,
        )

    def _tokens(self, steps: int) -> int:
        """Return how many tokens all ranks have seen: the last step of an epoch may have fewer."""
        arguments, contexts = self.trainer.args, len(self.blocks)
        at_once: int = arguments.train_batch_size * arguments.world_size
        if arguments.world_size > 1:  # the last batches are filled up, so that all ranks have one
            contexts = math.ceil(contexts / at_once) * at_once
        step = at_once * arguments.gradient_accumulation_steps
        epochs, further = divmod(steps, math.ceil(contexts / step))
        return (epochs * contexts + further * step) * self.options.context_length

    def _evaluate(
        self, writer: RecordWriter, step: int, when: Literal["before", "during", "after"]
    ) -> None:
        found = evaluate(
            self.model,
            self.held_out.blocks,
            batch_size=self.options.batch_size,
            band=self.band,
            starting_band=self.starting_band,
        )
        if self.trainer.is_world_process_zero():
            writer.write(
                "evaluation",
                step,
                found.statistics,
                when=when,
                loss=found.loss,
                perplexity=found.perplexity,
                tokens=found.tokens,
                in_starting_band=found.in_starting_band,
            )
        self.console.print(f"held-out perplexity {when} training: {found.perplexity:,.2f}")
        if when == "after" and not math.isfinite(found.perplexity):
            self.console.print(
                f"the run diverged: its held-out loss is {found.loss:.4g}; start again with a "
                "lower --learning-rate or --loss-coeff."
            )

    def _stopped(self, number: int) -> Stopped:
        return Stopped(self.folder.where_it_stopped(), EXIT_CODES[number])

    def _finish(self) -> None:
        """Write the model, the heat-maps, and last the result, which says that all is there."""
        self.model.save_pretrained(self.folder.model)
        self.tokenizer.save_pretrained(self.folder.model)
        records = read_records(self.folder.records)
        before, after, train = (
            records.evaluation("before"),
            records.evaluation("after"),
            records.train,
        )
        assert before is not None
        assert after is not None
        save_heatmaps(
            self.folder.heatmaps,
            before.statistics.utilisation,
            after.statistics.utilisation,
            quantity="mean H / log n",
            maximum=1.0,
            title="Entropy of every head, as a share of what its rows can reach",
        )
        write_json(
            self.folder.result,
            {
                "steps": self.trainer.state.global_step,
                "before": numbers_of(before),
                "after": numbers_of(after),
                "penalty": {"start": train[0]["penalty"], "end": train[-1]["penalty"]},
                "tokens": int(train[-1]["tokens"]),
                "seconds": train[-1]["elapsed"],
                "tokens_per_second": statistics.median(line["tokens_per_second"] for line in train),
            },
        )
