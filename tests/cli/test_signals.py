"""Signals that stop a run: the first is kept, the second acts as it did before."""

import signal
from collections.abc import Iterator

import pytest

from entropy_regularization.cli.signals import EXIT_CODES, StopSignals


@pytest.fixture
def acted() -> Iterator[list[int]]:
    """Return the signals that reach what would end the process."""
    found: list[int] = []
    before = {
        number: signal.signal(number, lambda came, _: found.append(came)) for number in EXIT_CODES
    }
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("second", EXIT_CODES)
@pytest.mark.parametrize("first", EXIT_CODES)
def test_second_signal_acts_at_once(first: int, second: int, acted: list[int]) -> None:
    said: list[str] = []
    with StopSignals(said.append) as signals:
        signal.raise_signal(first)
        assert (signals.number, acted) == (first, [])
        signal.raise_signal(second)
        assert (signals.number, acted) == (first, [second])
    signal.raise_signal(first)
    assert acted == [second, first]
    assert said == ["stopping after this step; once more to stop at once"]
