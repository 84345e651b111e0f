"""entropy-reg bench: time and memory of the attention, from a checkout."""

import runpy
import sys
from pathlib import Path

import click

from entropy_regularization.cli.errors import RunProblem


# --help is the script's too, so that its options are described where they are taken
@click.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Time attention with entropy against plain attention."""
    script = Path(__file__).parents[3] / "benchmarks" / "attention.py"
    if not script.is_file():
        raise RunProblem(
            "the benchmarks are not part of the installed package; run entropy-reg bench from a "
            "checkout of the source (pip install -e .)."
        )
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
