"""The line of a training: steps and remaining time are whole on a terminal of any width."""

import io

import pytest
from rich.console import Console

from entropy_regularization.cli.progress import TrainingProgress

NUMBERS = {"loss": 5.5361, "penalty": 0.16, "entropy": 2.551, "tokens_per_second": 12742.4}


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (120, "loss 5.536  penalty 0.1600  entropy 2.55 nats  12,742 tokens/s"),
        (80, "loss 5.536  penalty 0.1600  entropy 2.55 nats"),
        (60, "loss 5.536  penalty 0.1600"),
        (40, "loss 5.536"),
        (26, "0:00:00"),
    ],
)
def test_line_on_a_terminal(width: int, shown: str) -> None:
    out = io.StringIO()
    console = Console(width=width, force_terminal=True, file=out, color_system=None)
    progress = TrainingProgress(20_000, 1_234, console)
    progress.numbers(20_000, NUMBERS)
    progress.close()
    line = out.getvalue().split("\x1b[2K")[-1].split("\n")[0].rstrip()
    assert " 20000/20000 0:00:00" in line
    assert line.endswith(shown)
    assert len(line) <= width
    assert "…" not in line
    assert "━━" in line


def test_lines_of_a_file() -> None:
    out = io.StringIO()
    TrainingProgress(20, 0, Console(width=40, file=out, soft_wrap=True)).numbers(3, NUMBERS)
    shown = "loss 5.536  penalty 0.1600  entropy 2.55 nats  12,742 tokens/s"
    assert out.getvalue() == f"step 3/20  {shown}\n"
