"""entropy-reg report: one HTML page about a run."""

from pathlib import Path

import click

from entropy_regularization.cli.errors import RunProblem, UsageProblem


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write the page. [default: RUN/report.html]",
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def report(run: Path, output: Path | None, debug: bool) -> None:
    """Write one HTML page about the run in the folder RUN."""
    from entropy_regularization.monitoring.report import write_report

    if run.is_file():
        raise UsageProblem(f"{run} is a file; pass the folder of the run, {run.parent}.")
    if (run / "analysis.json").is_file():
        raise UsageProblem(f"{run} holds an analysis, whose page is {run / 'report.html'}.")
    try:
        page = write_report(run, output)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.filename is not None:
            raise RunProblem(
                f"{error.filename}: {error.strerror}; pass a place that can be read, and one that "
                "can be written to for --output."
            ) from error
        raise RunProblem(str(error)) from error
    click.echo(page)
