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
        self._bar: Progress | None = None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
            )
            self._task = self._bar.add_task("training", total=total, completed=done, numbers="")
            self._bar.start()

    def step(self, done: int) -> None:
        """Show that steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        """Show the numbers of a step."""
        text = (
            f"loss {numbers['loss']:.3f}  penalty {numbers['penalty']:.4f}  "
            f"entropy {numbers['entropy']:.2f} nats  {numbers['tokens_per_second']:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=text)
        else:
            self.console.print(f"step {step}/{self.total}  {text}")

    def say(self, sentence: str) -> None:
        """Print a sentence above the bar."""
        self.console.print(sentence)

    def close(self) -> None:
        """Take the bar away; the last numbers stay."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
