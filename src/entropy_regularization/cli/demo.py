"""entropy-reg demo: the same training with and without the penalty, side by side."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from entropy_regularization.cli.errors import TRAINING, RunProblem, UsageProblem, require
from entropy_regularization.cli.options import TrainOptions
from entropy_regularization.cli.runs import RunFolder
from entropy_regularization.cli.train import start

if TYPE_CHECKING:
    from rich.table import Table

STEPS = 300
BASELINE = "baseline"  # folder of the arm without penalty, in that of the arm with it
ARMS = (("without penalty", "none"), ("with penalty", "calibrated"))


@click.command()
@click.option(
    "--output",
    default="runs/demo",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder of the run with the penalty; the one without lies in its folder baseline.",
)
@click.option(
    "--steps", default=STEPS, show_default=True, type=click.IntRange(min=1), help="Steps per arm."
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def demo(output: Path, steps: int, debug: bool) -> None:
    """Train a small GPT-2 without and with the penalty.

    Both arms have the same seed, steps and text (Python's own source). Stopped halfway, it
    goes on where it was; when it is finished, it shows its table again.
    """
    require(*TRAINING, "jinja2")
    from entropy_regularization.cli.console import PlainConsole

    console = PlainConsole()
    with folder_of(output, "calibrated") as regularized, folder_of(output, "none") as plain:
        folders = {"none": plain, "calibrated": regularized}
        for penalty, folder in folders.items():
            _check_arm(folder, options_of(penalty, steps), output)
            folder.go_on = f"entropy-reg demo --output {shlex.quote(str(output))}"
            if steps != STEPS:
                folder.go_on += f" --steps {steps}"
        if not regularized.config.is_file():
            regularized.begin(beside=(BASELINE,))  # refuse before the first arm is trained
        for name, penalty in ARMS:
            _train_arm(name, options_of(penalty, steps), folders[penalty], console)
    from entropy_regularization.monitoring.report import write_report

    page = write_report(output)
    console.print(table_of(output))
    console.print(f"the page about it: {page}")


def folder_of(output: Path, penalty: str) -> RunFolder:
    """Return where an arm lies."""
    return RunFolder(output / BASELINE if penalty == "none" else output)


def options_of(penalty: str, steps: int) -> TrainOptions:
    """Return the options of an arm: they differ in the penalty alone."""
    return TrainOptions(penalty=penalty, steps=steps, tolerance=0.2, evaluation_blocks=96)


def _check_arm(folder: RunFolder, options: TrainOptions, output: Path) -> None:
    """Refuse a run that lies where an arm is to be and has other options."""
    if not folder.config.is_file():
        return
    wanted, begun = options.from_anywhere().in_effect(), folder.options().in_effect()
    others = [
        f"--{name.replace('_', '-')} {begun[name]} in place of {value}"
        for name, value in wanted.items()
        if begun[name] != value
    ]
    if others:
        raise UsageProblem(
            f"{folder.path} holds a run with {', '.join(others)}, which is not the demo's; choose "
            f"another --output than {output}."
        )


def _train_arm(name: str, options: TrainOptions, folder: RunFolder, console: Any) -> None:
    if folder.finished:
        console.print(f"{name}: finished before, in {folder.path}")
        return
    resume = folder.config.is_file()
    if resume:
        folder.take()
    else:
        folder.begin(beside=(BASELINE,))
    console.print(f"\n{name}: {options.steps} steps, in {folder.path}")
    start(options, folder, resume=resume)


def table_of(output: Path) -> "Table":
    """Return the table of both arms.

    Raises:
        RunProblem: if an arm is not finished.
    """
    from rich.table import Table

    results = []
    for _, penalty in ARMS:
        folder = folder_of(output, penalty)
        if not folder.finished:
            raise RunProblem(f"{folder.path} is not finished; run entropy-reg demo again.")
        results.append(json.loads(folder.result.read_bytes()))
    options = options_of("calibrated", STEPS)
    table = Table(
        title="the same GPT-2, text and seed, before -> after training",
        caption=f"band: {options.threshold} ± {options.band} of the entropy that a row can reach",
    )
    table.add_column("")
    for name, _ in ARMS:
        table.add_column(name, justify="right")
    for label, show in ROWS:
        table.add_row(label, *(show(result) for result in results))
    return table


def _shown(number: float | None, form: str) -> str:
    return "not finite" if number is None else f"{number:{form}}"


def _change(key: str, form: str) -> Any:
    def show(result: dict[str, Any]) -> str:
        return " -> ".join(_shown(result[when][key], form) for when in ("before", "after"))

    return show


ROWS = (
    ("held-out perplexity", _change("perplexity", ",.1f")),
    ("row entropies in the first band", _change("in_starting_band", ".1%")),
    ("mean entropy (nats)", _change("mean_entropy", ".2f")),
    ("share of reachable entropy", _change("utilisation", ".1%")),
    ("heads collapsed", _change("collapsed", "d")),
    ("heads well-behaved", _change("well_behaved", "d")),
    ("heads overloaded", _change("overloaded", "d")),
    ("penalty", lambda r: " -> ".join(_shown(r["penalty"][k], ".4f") for k in ("start", "end"))),
    ("training speed (tokens/s)", lambda r: f"{r['tokens_per_second']:,.0f}"),
)
