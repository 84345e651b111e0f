"""How a training is shown: a progress bar on a terminal, plain lines elsewhere."""

from collections.abc import Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column


class TrainingProgress:
    """Shows steps with loss, penalty, mean entropy and tokens a second.

    Args:
        total: optimizer steps in all.
        done: steps done before, in a resumed run.
        console: where to show them.
    """

    def __init__(self, total: int, done: int = 0, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True, highlight=False)
        self.total = total
        self._numbers: list[str] = []
        self._bar: Progress | None = None
        if self.console.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=None),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TimeRemainingColumn(table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=True)),
                console=self.console,
            )
            self._task = self._bar.add_task("training", total=total, completed=done, numbers="")
            self._bar.start()

    def step(self, done: int) -> None:
        """Show that steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, numbers=self._fitting())

    def numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        """Show the numbers of a step."""
        self._numbers = [
            f"loss {numbers['loss']:.3f}",
            f"penalty {numbers['penalty']:.4f}",
            f"entropy {numbers['entropy']:.2f} nats",
            f"{numbers['tokens_per_second']:,.0f} tokens/s",
        ]
        if self._bar is not None:
            self.step(step)
        else:
            self.console.print("  ".join([f"step {step}/{self.total}", *self._numbers]))

    def _fitting(self) -> str:
        """Return the numbers that a line has room for beside a short bar, steps and time."""
        room = self.console.width - len(f"━━━━ {self.total}/{self.total} 00:00:00 ")
        count = len(self._numbers)
        while count and len("  ".join(self._numbers[:count])) > room:
            count -= 1
        return "  ".join(self._numbers[:count])

    def say(self, sentence: str) -> None:
        """Print a sentence above the bar."""
        self.console.print(sentence)

    def close(self) -> None:
        """Take the bar away; the last numbers stay."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
