"""What a training needs before it starts: text, tokenizer, blocks of tokens, model."""

import json
import os
from typing import Any, NamedTuple

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from entropy_regularization.cli.errors import RunProblem, UsageProblem
from entropy_regularization.cli.loading import load_model, read_tokenizer
from entropy_regularization.cli.models import (
    build_model,
    check_loss,
    check_tokens,
    enable_checkpointing,
    layers_and_heads,
    size_of,
)
from entropy_regularization.cli.options import Size, TrainOptions
from entropy_regularization.cli.runs import RunFolder
from entropy_regularization.data.text import Corpus, DataError, Text, load_corpus
from entropy_regularization.data.tokenization import (
    Frame,
    TokenBlocks,
    frame_of,
    train_tokenizer,
)


class Materials(NamedTuple):
    """What a training needs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: TokenBlocks
    held_out: TokenBlocks
    shapes: tuple[int, int]  # attention calls of the model, and the most heads of one


def prepare(
    options: TrainOptions, folder: RunFolder, arguments: TrainingArguments, console: Console
) -> Materials:
    """Read the text and build the model; write config.json when everything is in order.

    Args:
        options: what was asked for.
        folder: of the run; its tokenizer is used if it has one.
        arguments: know which rank this is; the main one goes first.
        console: where to say what is done.

    Returns:
        Model, tokenizer and blocks.

    Raises:
        UsageProblem: if the options do not fit together, the text or the model, or if the text is
            not the one that the run began with.
        RunProblem: if the model cannot be used.
    """
    size = size_of(options)
    console.print(f"reading {options.data}")
    try:
        with arguments.main_process_first(local=False):
            corpus = load_corpus(
                options.data,
                text_column=options.text_column,
                limit_characters=options.text_limit * 1_000_000,
            )
            tell_of_text(corpus.text, options.text_limit, console)
            if size is None:
                model, tokenizer = load_model(options)
            else:
                tokenizer = _own_tokenizer(options, folder, corpus)
                model = build_model(options, size, tokenizer)
            frame = Frame(frame_of(tokenizer).before, [])  # what ends a text ends documents
            blocks = TokenBlocks(tokenizer, corpus.train, options.context_length, frame=frame)
            held_out = _held_out_blocks(options, tokenizer, corpus, frame)
            check_tokens(options.model, model, blocks.blocks, held_out.blocks)
            _check_batch(options, len(blocks))
            if options.gradient_checkpointing:
                enable_checkpointing(model)
            shapes = layers_and_heads(model, options.model)
            if size is None:
                check_loss(model, options.model)
            sums = {"train": blocks.crc32, "held_out": held_out.crc32}
            if folder.config.is_file():
                folder.check_text(sums, options.data)
            if arguments.process_index == 0:
                # Only now: a command that failed above leaves nothing in the way of the next one.
                if not folder.config.is_file():
                    given = options.from_anywhere()
                    folder.write_config("train", given.as_dict(), _acting(given, size), sums)
                if size is not None:
                    _keep_tokenizer(tokenizer, folder)
    except DataError as error:
        raise UsageProblem(f"--data {options.data}: {error}") from error
    console.print(
        f"{len(blocks):,} contexts of {options.context_length} tokens to train on, "
        f"{len(held_out):,} held out; {model.num_parameters():,} parameters"
    )
    return Materials(model, tokenizer, blocks, held_out, shapes)


def tell_of_text(text: Text, limit: int, console: Console) -> None:
    """Say what of a source was not read.

    Args:
        text: what was read.
        limit: after how many million characters no further document was read.
        console: where to say it.
    """
    if text.limited:
        console.print(f"took the first {limit} million characters; --text-limit reads more")
    if text.left_out:
        console.print(
            f"left out {text.left_out:,} of {text.found:,} files, which are not UTF-8 text"
        )


def _acting(options: TrainOptions, size: Size | None) -> dict[str, Any]:
    """Return the options that act in a run, by name."""
    idle = {"vocabulary", "dropout"} if size is None else set()
    if options.penalty == "none":
        idle.add("loss_coeff")
    return {name: value for name, value in options.in_effect().items() if name not in idle}


def _check_batch(options: TrainOptions, contexts: int) -> None:
    if options.batch_size > contexts:
        raise UsageProblem(
            f"--batch-size {options.batch_size} is more than the {contexts} contexts of the text; "
            "pass a smaller one, or more text."
        )


def _own_tokenizer(
    options: TrainOptions, folder: RunFolder, corpus: Corpus
) -> PreTrainedTokenizerBase:
    """Train a tokenizer, or load the one that this run (or its main rank) trained before."""
    if folder.tokenizer.is_dir():
        return _kept_tokenizer(folder)
    tokenizer = train_tokenizer(corpus.train, options.tokens)
    tokenizer.model_max_length = options.context_length
    return tokenizer


def _kept_tokenizer(folder: RunFolder) -> PreTrainedTokenizerBase:
    todo = (
        f"copy the one of a checkpoint in {folder.checkpoints.path}, or start a new run with "
        "another --output."
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder.tokenizer / name
        try:
            json.loads(path.read_bytes())
        except (OSError, ValueError):
            raise RunProblem(f"{path} is missing or damaged; {todo}") from None
    try:
        return read_tokenizer(folder.tokenizer)
    except ValueError as error:
        raise RunProblem(f"{folder.tokenizer} cannot be loaded ({error}); {todo}") from None


def _keep_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: RunFolder) -> None:
    if not folder.tokenizer.is_dir():
        beside = folder.tokenizer.with_name("tokenizer.new")  # whole, or not there
        tokenizer.save_pretrained(beside)
        os.replace(beside, folder.tokenizer)


def _held_out_blocks(
    options: TrainOptions, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, frame: Frame
) -> TokenBlocks:
    try:
        return TokenBlocks(
            tokenizer, corpus.held_out, options.context_length, options.evaluation_blocks, frame
        )
    except DataError as error:
        raise DataError(f"the held-out twentieth is too short: {error}") from error


def check_precision(options: TrainOptions) -> None:
    """Check that this machine can train in the precision.

    Raises:
        UsageProblem: if it cannot.
    """
    if options.precision == "float16" and not torch.cuda.is_available():
        raise UsageProblem("--precision float16 needs a GPU; pass bfloat16 or float32.")
