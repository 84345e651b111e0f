"""entropy-reg train: train or fine-tune a language model with the entropy penalty."""

import os
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from entropy_regularization.cli.errors import INTERRUPTED, TRAINING, Stopped, UsageProblem, require
from entropy_regularization.cli.options import TrainOptions, train_options
from entropy_regularization.cli.runs import RunFolder


@click.command()
@train_options
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the run: model, records, heat-maps, checkpoints.",
)
@click.option(
    "--resume", is_flag=True, help="Go on with the run in --output, with the options it has."
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_context
def train(context: click.Context, /, output: Path, resume: bool, debug: bool, **given: Any) -> None:
    """Train or fine-tune a language model with the entropy penalty.

    Every option has a default that works: entropy-reg train --output RUN trains a small GPT-2 on
    Python's own standard library. Ctrl-C leaves a checkpoint; --resume goes on from it.
    """
    require(*TRAINING)
    main_process = os.environ.get("RANK", "0") == "0"  # of torchrun and accelerate launch
    with RunFolder(output) as folder:
        if resume:
            options = _options_to_resume(context, folder, given)
            if main_process:
                folder.take()
        else:
            options = TrainOptions(**given)
            options.check()
            if main_process:
                folder.begin()
        start(options, folder, resume=resume)
    if main_process:
        click.echo(f"finished: {folder.path}")
        click.echo(f"its page: entropy-reg report {folder.path}")


def start(options: TrainOptions, folder: RunFolder, *, resume: bool) -> None:
    """Import torch and train; see run_training."""
    try:
        from entropy_regularization.cli.training import run_training

        run_training(options, folder, resume=resume)
    except KeyboardInterrupt:
        raise Stopped(folder.where_it_stopped(), INTERRUPTED) from None


def _options_to_resume(
    context: click.Context, folder: RunFolder, given: dict[str, Any]
) -> TrainOptions:
    """Return the options of the run; refuse one that contradicts them."""
    options = folder.reopen()
    here = TrainOptions(**given).from_anywhere()
    begun = options.in_effect()
    for name, value in given.items():
        typed = context.get_parameter_source(name) == ParameterSource.COMMANDLINE
        if typed and begun[name] not in (value, getattr(here, name)):
            option = "--" + name.replace("_", "-")
            raise UsageProblem(
                f"{option} {value} was given, but the run in {folder.path} was started with "
                f"{begun[name]}; leave it out, or start a new run."
            )
    return options
