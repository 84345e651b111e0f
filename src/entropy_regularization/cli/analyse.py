"""entropy-reg analyse: the heads of models that are there, on a text."""

from pathlib import Path
from typing import Any

import click

from entropy_regularization.cli.errors import TRAINING, require
from entropy_regularization.cli.options import POSITIVE


@click.command()
@click.option(
    "--model",
    "models",
    required=True,
    multiple=True,
    help="Local folder or hub name; several times to set models side by side.",
)
@click.option(
    "--data",
    default="stdlib",
    show_default=True,
    help="stdlib (Python's own standard library source), a text file, a folder, a glob, or hf:NAME "
    "for a hub data set.",
)
@click.option(
    "--text-column",
    default="text",
    show_default=True,
    help="Column of a hub data set that holds the text.",
)
@click.option(
    "--text-limit",
    default=100,
    show_default=True,
    type=POSITIVE,
    help="Read no further document after this many million characters.",
)
@click.option(
    "--held-out",
    is_flag=True,
    help="Read only the twentieth of the text that entropy-reg train holds out.",
)
@click.option(
    "--context-length",
    type=click.IntRange(min=2),
    help="Tokens in a context. [default: the largest power of two, up to 1024, for which all "
    "models have positions]",
)
@click.option(
    "--contexts",
    default=32,
    show_default=True,
    type=POSITIVE,
    help="Contexts to read, evenly spaced over the text.",
)
@click.option(
    "--batch-size", default=1, show_default=True, type=POSITIVE, help="Contexts at a time."
)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Of the weights; auto is as they were saved.",
)
@click.option(
    "--device",
    help="cpu, cuda, cuda:1, mps ..., or auto to spread a model over all GPUs, memory and disk. "
    "[default: cuda if there is one]",
)
@click.option(
    "--no-perplexity",
    is_flag=True,
    help="Leave perplexity out, and with it the logits, which take most memory in long contexts.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for the numbers of every head (analysis.json), heat-maps and a page.",
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def analyse(models: tuple[str, ...], output: Path | None, debug: bool, **options: Any) -> None:
    """Measure the heads of models that are there, on your text.

    Perplexity, the entropy of every head, and how it grows with the length of the context; nothing
    is trained. entropy-reg analyse --model gpt2 needs nothing else.
    """
    require(*TRAINING, *(("jinja2",) if output else ()))
    from entropy_regularization.cli.analysis import analyse_models

    analyse_models(models, options, output)
