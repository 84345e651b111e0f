"""entropy-reg check: whether the numbers are right on this machine."""

from typing import TYPE_CHECKING

import click

from entropy_regularization.cli.errors import TRAINING, RunProblem, require

if TYPE_CHECKING:
    from rich.table import Table

    from entropy_regularization.cli.agreement import Agreement


@click.command()
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def check(debug: bool) -> None:
    """Compare what this machine computes with what is right.

    Every implementation of attention in every precision against the definition in float64, values
    and gradients; and a small GPT-2 that is recorded against the published formula on its
    attention matrices. Takes some seconds, on a GPU some minutes, in which kernels are compiled.
    """
    require(*TRAINING)
    import torch

    from entropy_regularization.cli.agreement import agreements, model_agreement
    from entropy_regularization.cli.console import PlainConsole
    from entropy_regularization.cli.surroundings import surroundings

    console = PlainConsole()
    ran_on = surroundings()
    console.print(", ".join(f"{name} {version}" for name, version in ran_on["versions"].items()))
    wrong: list[str] = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        where = torch.cuda.get_device_name() if device == "cuda" else ran_on["machine"]["processor"]
        console.print(f"\n{device}: {where}")
        found = list(agreements(device))
        console.print(table_of(found))
        for each in found:
            name = f"{each.implementation} in {str(each.dtype).removeprefix('torch.')}"
            wrong += [f"{name} on {device} ({problem})" for problem in each.differs]
        model = model_agreement(device)
        console.print(
            f"GPT-2, recorded, against the published formula on its matrices: entropy "
            f"{model.entropy:.1e} nats, penalty {model.loss:.1e}, gradients {model.gradient:.1e}"
        )
        if not model.agrees:
            wrong.append(f"the recorded GPT-2 on {device}")
    if wrong:
        raise RunProblem(
            f"these differ by more than rounding: {', '.join(wrong)}; use an implementation that "
            "agrees in their place, and report this output."
        )
    console.print("\nall agree")


def table_of(found: "list[Agreement]") -> "Table":
    """Return a table of the largest errors."""
    from rich.table import Table

    table = Table(caption="largest errors: shares of the largest number, of the entropy nats")
    for title in ("implementation", "precision", "problems", "output", "entropy", "gradients"):
        table.add_column(
            title, justify="left" if title in ("implementation", "precision") else "right"
        )
    for each in found:
        precision = str(each.dtype).removeprefix("torch.")
        if each.cannot is not None:
            table.add_row(each.implementation, precision, "none", "", "", "")
            continue
        tried = len(each.agrees) + len(each.differs)
        table.add_row(
            each.implementation,
            precision,
            f"{len(each.agrees)} of {tried} agree",
            *(f"{error:.1e}" for error in (each.output, each.entropy, each.gradient)),
        )
    for reason in dict.fromkeys(f"{e.implementation}: {e.cannot}" for e in found if e.cannot):
        table.caption = f"{table.caption}\n{reason}"
    return table
