"""Ctrl-C and SIGTERM: the step in hand ends, then the run stops where it can go on."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from entropy_regularization.cli.errors import INTERRUPTED, TERMINATED

EXIT_CODES = {int(signal.SIGINT): INTERRUPTED, int(signal.SIGTERM): TERMINATED}


class StopSignals:
    """A context that catches the first signal; a second one ends the process at once.

    Args:
        say: called with a sentence when the signal comes.

    Attributes:
        number: of the signal that came, None before.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.number: int | None = None
        self._say = say
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in EXIT_CODES:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()  # of both: a second signal may be the other one
        self._say("stopping after this step; once more to stop at once")

    def came_to_any(self, device: torch.device) -> bool:
        """Tell whether a signal came to any rank: they must stop at the same step, or some wait."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            number = torch.tensor([self.number or 0], device=device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            self.number = int(number.item()) or None
        return self.number is not None
