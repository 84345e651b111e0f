"""The training behind entropy-reg train: data, model, Trainer, records, checkpoints, result."""

import math
import os
import signal
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from entropy_regularization.cli.errors import (
    INTERRUPTED,
    TERMINATED,
    RunProblem,
    Stopped,
    UsageProblem,
)
from entropy_regularization.cli.models import build_model, load_model, size_of
from entropy_regularization.cli.options import TrainOptions
from entropy_regularization.cli.progress import TrainingProgress
from entropy_regularization.cli.runs import RunFolder, write_json
from entropy_regularization.data.text import Corpus, DataError, load_corpus
from entropy_regularization.data.tokenization import TokenBlocks, train_tokenizer
from entropy_regularization.integrations.transformers.trainer import EntropyRegularizedTrainer
from entropy_regularization.monitoring.monitor import EntropyMonitor
from entropy_regularization.monitoring.plots import save_heatmaps
from entropy_regularization.monitoring.records import RecordWriter, read_records
from entropy_regularization.monitoring.statistics import (
    Band,
    HeadStatistics,
    mean_of_heads,
)
from entropy_regularization.recording.recorder import Recorder, make_recorder, record_entropy
from entropy_regularization.regularization import EntropyRegularization
from entropy_regularization.thresholds import HeadThresholds


@dataclass(frozen=True)
class Evaluation:
    """What held-out text says of a model."""

    loss: float
    perplexity: float
    tokens: int
    statistics: HeadStatistics
    start_band: float

    def numbers(self) -> dict[str, Any]:
        """Return what goes into result.json."""
        classes = self.statistics.classify()
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "mean_entropy": mean_of_heads(self.statistics.entropy),
            "utilisation": mean_of_heads(self.statistics.utilisation),
            "collapsed": classes.collapsed,
            "well_behaved": classes.well_behaved,
            "overloaded": classes.overloaded,
            "in_starting_band": self.start_band,
        }


def run_training(options: TrainOptions, folder: RunFolder, *, resume: bool = False) -> None:
    """Train as the options say, and leave everything in the folder.

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
    size = size_of(options)
    _check_precision(options)
    console = Console(soft_wrap=True, highlight=False)
    main_process = int(os.environ.get("RANK", "0")) == 0
    if not main_process:
        console = Console(quiet=True)
    try:
        console.print(f"reading {options.data}")
        corpus = load_corpus(options.data, text_column=options.text_column)
        if size is None:
            model, tokenizer = load_model(options)
        else:
            tokenizer = _own_tokenizer(options, folder, corpus)
            model = build_model(options, size, tokenizer)
        blocks = TokenBlocks(tokenizer, corpus.train, options.context_length)
        held_out = _held_out_blocks(options, tokenizer, corpus)
    except DataError as error:
        raise UsageProblem(f"--data {options.data}: {error}") from error
    if main_process and not resume:
        folder.write_config("train", options.as_dict())
    console.print(
        f"{len(blocks):,} contexts of {options.context_length} tokens to train on, "
        f"{len(held_out):,} held out; {model.num_parameters():,} parameters"
    )
    Run(options, folder, model, tokenizer, blocks, held_out, console).run(resume=resume)


def _check_precision(options: TrainOptions) -> None:
    if options.precision == "float16" and not torch.cuda.is_available():
        raise UsageProblem("--precision float16 needs a GPU; pass bfloat16 or float32.")


def _own_tokenizer(
    options: TrainOptions, folder: RunFolder, corpus: Corpus
) -> PreTrainedTokenizerBase:
    """Train a tokenizer, or load the one that this run trained before it was stopped."""
    if (folder.tokenizer / "tokenizer.json").is_file():
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder.tokenizer)
        return found
    tokenizer = train_tokenizer(corpus.train, options.vocabulary)
    tokenizer.model_max_length = options.context_length
    tokenizer.save_pretrained(folder.tokenizer)
    return tokenizer


def _held_out_blocks(
    options: TrainOptions, tokenizer: PreTrainedTokenizerBase, corpus: Corpus
) -> TokenBlocks:
    try:
        return TokenBlocks(
            tokenizer, corpus.held_out, options.context_length, options.evaluation_blocks
        )
    except DataError as error:
        raise DataError(f"the held-out twentieth is too short: {error}") from error


class Run:
    """One training: the model, the Trainer, and what is written while it runs."""

    def __init__(
        self,
        options: TrainOptions,
        folder: RunFolder,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        blocks: TokenBlocks,
        held_out: TokenBlocks,
        console: Console,
    ) -> None:
        self.options, self.folder, self.console = options, folder, console
        self.model, self.tokenizer, self.held_out = model, tokenizer, held_out
        layers, heads = self._layers_and_heads()
        self.regularized = options.penalty != "none"
        self.thresholds = HeadThresholds(
            layers, heads, options.threshold, learnable=not options.fixed_thresholds
        )
        self.starting_band = Band(options.threshold, options.band)
        self.band = Band(self.thresholds, options.band) if self.regularized else self.starting_band
        if options.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.trainer = self._trainer(blocks)
        self.trainer.remove_callback(PrinterCallback)

    def _layers_and_heads(self) -> tuple[int, int]:
        """Run the model once on two tokens and look at its attention."""
        ids = torch.zeros(1, 2, dtype=torch.int64, device=self.model.device)
        try:
            with torch.no_grad(), record_entropy(self.model, gradient=False) as recording:
                self.model(input_ids=ids, use_cache=False)
        except ValueError as error:
            raise RunProblem(f"--model {self.options.model}: {error}") from error
        return len(recording), max(layer.heads for layer in recording)

    def _trainer(self, blocks: TokenBlocks) -> Any:
        options = self.options
        arguments = TrainingArguments(
            output_dir=str(self.folder.checkpoints),
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
            save_total_limit=2,
            seed=options.seed,
            data_seed=options.seed,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        common: dict[str, Any] = {
            "model": self.model,
            "args": arguments,
            "train_dataset": blocks,
            "processing_class": self.tokenizer,
        }
        if not self.regularized:
            from transformers import Trainer

            return Trainer(**common)
        strength = options.loss_coeff
        if options.penalty == "published":
            settings = EntropyRegularization(
                1e-5 if strength is None else strength, options.band, options.context_length
            )
        else:
            settings = EntropyRegularization.calibrated(
                1.0 if strength is None else strength, options.band
            )
        return EntropyRegularizedTrainer(
            **common, regularization=settings, thresholds=self.thresholds
        )

    def run(self, *, resume: bool) -> None:
        """Evaluate, train, evaluate, write."""
        checkpoint = self.folder.last_checkpoint() if resume else None
        done = 0 if checkpoint is None else checkpoint[0]
        main_process = self.trainer.is_world_process_zero()
        before = None
        if resume and self.folder.records.is_file():
            writer = RecordWriter(self.folder.records, keep_until=done if checkpoint else -1)
        else:
            writer = RecordWriter(self.folder.records if main_process else os.devnull)
        with writer:
            if checkpoint is None:
                before = self.evaluate()
                self._write_evaluation(writer, 0, "before", before)
            else:
                self.console.print(f"going on from step {done}")
            watch = Watch(self, writer, done)
            self.trainer.add_callback(watch)
            try:
                with watch.signals():
                    self.trainer.train(
                        resume_from_checkpoint=None if checkpoint is None else str(checkpoint[1])
                    )
            finally:
                watch.close()
            if watch.stopped is not None:
                raise self._stopped(watch.stopped)
            after = self.evaluate()
            self._write_evaluation(writer, self.trainer.state.global_step, "after", after)
        if main_process:
            self._finish(after, watch)

    def evaluate(self) -> Evaluation:
        """Return perplexity and the heads' statistics on held-out text."""
        model, size = self.model, self.options.batch_size
        monitor, starting = EntropyMonitor(self.band), EntropyMonitor(self.starting_band)
        training = model.training
        model.eval()
        total, tokens = 0.0, 0
        try:
            with torch.no_grad():
                for start in range(0, len(self.held_out), size):
                    ids = self.held_out.blocks[start : start + size].to(model.device)
                    with record_entropy(model, gradient=False) as recording:
                        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                    count = ids.shape[0] * (ids.shape[1] - 1)
                    total, tokens = total + loss.item() * count, tokens + count
                    monitor.update(recording)
                    starting.update(recording)
        finally:
            model.train(training)
        mean = total / tokens
        inside = starting.summary().in_band
        return Evaluation(
            mean,
            math.exp(min(mean, 700.0)),
            tokens,
            monitor.summary(),
            mean_of_heads(inside) if inside else math.nan,
        )

    def _write_evaluation(
        self, writer: RecordWriter, step: int, when: Any, found: Evaluation
    ) -> None:
        writer.write(
            "evaluation",
            step,
            found.statistics,
            when=when,
            loss=found.loss,
            perplexity=found.perplexity,
            tokens=found.tokens,
            in_starting_band=found.start_band,
        )
        self.console.print(f"held-out perplexity {when} training: {found.perplexity:,.2f}")

    def _stopped(self, number: int) -> Stopped:
        checkpoint = self.folder.last_checkpoint()
        step = 0 if checkpoint is None else checkpoint[0]
        return Stopped(
            f"stopped at step {step}; go on with: entropy-reg train --resume --output "
            f"{self.folder.path}",
            INTERRUPTED if number == signal.SIGINT else TERMINATED,
        )

    def _finish(self, after: Evaluation, watch: "Watch") -> None:
        """Write the model, the heat-maps, and last the result, which says that all is there."""
        self.model.save_pretrained(self.folder.model)
        self.tokenizer.save_pretrained(self.folder.model)
        lines = read_records(self.folder.records)
        first = lines.evaluation("before")
        assert first is not None
        save_heatmaps(
            self.folder.heatmaps,
            first.statistics.utilisation,
            after.statistics.utilisation,
            quantity="mean H / log n",
            maximum=1.0,
            title="Entropy of every head, as a share of what its rows can reach",
        )
        train = lines.train
        classes = first.statistics.classify()
        before = {
            "loss": first["loss"],
            "perplexity": first["perplexity"],
            "mean_entropy": mean_of_heads(first.statistics.entropy),
            "utilisation": mean_of_heads(first.statistics.utilisation),
            "collapsed": classes.collapsed,
            "well_behaved": classes.well_behaved,
            "overloaded": classes.overloaded,
            "in_starting_band": first["in_starting_band"],
        }
        write_json(
            self.folder.result,
            {
                "steps": self.trainer.state.global_step,
                "before": before,
                "after": after.numbers(),
                "penalty": {"start": train[0]["penalty"], "end": train[-1]["penalty"]},
                "tokens": int(train[-1]["tokens"]),
                "seconds": train[-1]["elapsed"],
                "tokens_per_second": watch.mean_speed(),
            },
        )


class Watch(TrainerCallback):
    """Writes records, shows progress, marks checkpoints, and stops a run that has to stop."""

    def __init__(self, run: Run, writer: RecordWriter, done: int) -> None:
        self.run, self.writer, self.done = run, writer, done
        self.stopped: int | None = None
        self.progress: TrainingProgress | None = None
        self.monitor = EntropyMonitor(run.band)
        self.recorder: Recorder = make_recorder(run.model, gradient=False)
        self.listening = False
        self.parts: list[tuple[torch.Tensor, torch.Tensor]] = []  # (loss, penalty), micro-batches
        self.scaled = False
        self.hook = run.model.register_forward_hook(self._keep_loss, with_kwargs=True)
        lines = read_records(run.folder.records).train
        self.elapsed = lines[-1]["elapsed"] if lines else 0.0
        self.window_start, self.window_step = time.monotonic(), done
        self.trained = 0.0  # seconds of training in this process, evaluations left out
        self._previous: dict[int, Any] = {}

    def _keep_loss(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Keep the loss of a micro-batch: Trainer logs means that depend on where it resumed."""
        loss = getattr(output, "loss", None)
        if not model.training or loss is None:
            return
        # With num_items_in_batch the losses of a step add up to its loss, else they are averaged.
        self.scaled = kwargs.get("num_items_in_batch") is not None
        loss = loss.detach()
        added = torch.zeros_like(loss)
        handle = getattr(self.run.trainer, "regularized", None)
        if handle is not None and handle.added is not None:
            added = handle.added.to(loss)
        self.parts.append((loss - added, added))

    def _loss_of_step(self, ranks: int) -> tuple[float, float]:
        """Return the model's own loss and the penalty of this step."""
        own, added = (torch.stack(each).sum() for each in zip(*self.parts, strict=True))
        factor = ranks if self.scaled else 1 / len(self.parts)
        return own.item() * factor, added.item() * factor

    # A signal lets the step end, saves a checkpoint, and stops; a second one is not caught.

    def signals(self) -> "Watch":
        """Return itself, as the context in which signals are caught."""
        return self

    def __enter__(self) -> "Watch":
        """Catch SIGINT and SIGTERM."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stopped = number
        signal.signal(number, self._previous[number])
        if self.progress is not None:
            self.progress.say("stopping after this step; once more to stop at once")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Show the bar."""
        self.progress = TrainingProgress(state.max_steps, state.global_step, self.run.console)
        self.window_start, self.window_step = time.monotonic(), state.global_step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Listen to the heads in the steps that are recorded."""
        self.parts.clear()
        step = state.global_step + 1
        if step == 1 or step % args.logging_steps == 0 or step == state.max_steps:
            self.recorder.start()
            self.listening = True

    def _stop_listening(self) -> None:
        if self.listening:
            self.listening = False
            self.monitor.update(self.recorder.stop())

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take the heads of the first micro-batch."""
        self._stop_listening()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Check the loss, and stop if a signal came."""
        self._stop_listening()
        if self.progress is not None:
            self.progress.step(state.global_step)
        if state.global_step == state.max_steps:
            control.should_log = True
        checked = control.should_log or control.should_save or self.run.model.device.type == "cpu"
        if checked:
            self._check_finite(state.global_step)
        if self.stopped is not None:
            control.should_save = True
            control.should_training_stop = True

    def _check_finite(self, step: int) -> None:
        loss = self.parts[-1][0] if self.parts else None
        if loss is not None and not bool(torch.isfinite(loss)):
            checkpoint = self.run.folder.last_checkpoint()
            kept = (
                "no checkpoint was written before it"
                if checkpoint is None
                else f"the checkpoint of step {checkpoint[0]} is kept in {checkpoint[1]}"
            )
            raise RunProblem(
                f"the loss became {loss.item()} at step {step}; {kept}. Start again with a "
                "lower --learning-rate or --loss-coeff."
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write a record of the step."""
        if logs is None or "loss" not in logs or not self.monitor.updates:
            return
        now = time.monotonic()
        seconds, steps = now - self.window_start, state.global_step - self.window_step
        self.trained += seconds
        self.elapsed += seconds
        options = self.run.options
        per_step = options.batch_size * options.accumulation * args.world_size
        per_step *= options.context_length
        statistics = self.monitor.summary()
        self.monitor.reset()
        loss, penalty = self._loss_of_step(args.world_size)
        numbers = {
            "loss": loss,
            "penalty": penalty,
            "learning_rate": logs.get("learning_rate", math.nan),
            "gradient_norm": float(logs.get("grad_norm", math.nan)),
            "tokens": state.global_step * per_step,
            "tokens_per_second": steps * per_step / max(seconds, 1e-9),
            "elapsed": self.elapsed,
        }
        if state.is_world_process_zero:
            self.writer.write("train", state.global_step, statistics, **numbers)
        if self.progress is not None:
            shown = {**numbers, "entropy": mean_of_heads(statistics.entropy)}
            self.progress.numbers(state.global_step, shown)
        self.window_start, self.window_step = time.monotonic(), state.global_step
        every = options.evaluation_steps
        if every and state.global_step % every == 0 and state.global_step < state.max_steps:
            found = self.run.evaluate()
            self.run._write_evaluation(self.writer, state.global_step, "during", found)
            self.window_start = time.monotonic()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Mark the checkpoint as whole."""
        if state.is_world_process_zero:
            self.run.folder.mark_complete(state.global_step)

    def mean_speed(self) -> float:
        """Tokens a second over the steps of this process."""
        options = self.run.options
        steps = self.run.trainer.state.global_step - self.done
        tokens = steps * options.batch_size * options.accumulation * options.context_length
        return tokens / self.trained if self.trained > 0 else math.nan

    def close(self) -> None:
        """Take the bar and the hook away."""
        if self.progress is not None:
            self.progress.close()
        self.hook.remove()
