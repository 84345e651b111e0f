"""entropy-reg: the group of commands, and how each of them fails."""

import os
import sys
from io import TextIOWrapper
from textwrap import shorten
from typing import Any

try:
    import click
except ModuleNotFoundError:
    sys.exit(
        "entropy-reg: the command line needs the package click; run: "
        "pip install 'entropy-regularization[all]'"
    )

from entropy_regularization import __version__
from entropy_regularization.cli.analyse import analyse
from entropy_regularization.cli.bench import bench
from entropy_regularization.cli.check import check
from entropy_regularization.cli.demo import demo
from entropy_regularization.cli.errors import BROKEN_PIPE, FAILURE, INTERRUPTED
from entropy_regularization.cli.report import report
from entropy_regularization.cli.train import train


class Commands(click.Group):
    """Turns every expected failure into one sentence on standard error."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command; with --debug, a failure is shown with its traceback."""
        kwargs["standalone_mode"] = False
        # On a shared machine OpenMP threads that spin while they wait slow each other down tenfold.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="replace")  # a name may have what a terminal has not
        try:
            super().main(*args, **kwargs)
            sys.exit(0)
        except (click.exceptions.Abort, KeyboardInterrupt):
            click.echo("entropy-reg: interrupted; give the same command again.", err=True)
            sys.exit(INTERRUPTED)
        except click.ClickException as error:
            if "--debug" in sys.argv:
                raise
            # What a library put into its message must not break the one line.
            sentence = " ".join(error.format_message().split())
            command = getattr(getattr(error, "ctx", None), "command", None)
            if command is train and "unexpected extra argument" in sentence:
                sentence = f"{shorten(sentence, 200)}; quote a pattern of files: --data 'src/*.py'."
            click.echo(f"entropy-reg: {sentence}", err=True)
            sys.exit(error.exit_code)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is flushed at the end
            sys.exit(BROKEN_PIPE)
        except OSError as error:  # of a path that was typed: no access, too long
            if "--debug" in sys.argv or error.filename is None:
                raise
            said = f"{error.filename}: {error.strerror}; pass a place that can be read and written."
            click.echo(f"entropy-reg: {said}", err=True)
            sys.exit(FAILURE)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
)
@click.version_option(__version__, prog_name="entropy-reg")
@click.pass_context
def main(context: click.Context) -> None:
    """Measure and control the entropy of every attention head of a transformer.

    Begin with entropy-reg demo, with entropy-reg analyse --model MODEL, or with entropy-reg train
    --output RUN; then look at the page that entropy-reg report RUN writes. Every command has its
    own --help.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (train, analyse, report, demo, check, bench):
    main.add_command(command)
