"""EntropyMonitor: the statistics of every head over a window of training steps."""

from entropy_regularization.monitoring.statistics import Band, HeadStatistics, HeadSums, head_sums
from entropy_regularization.recording.recording import EntropyRecording


class EntropyMonitor:
    """Watch the heads of a model over a window of steps, in any training loop.

        monitor = EntropyMonitor()
        for batch in batches:
            with record_entropy(model, gradient=False) as recording:
                model(**batch)
            monitor.update(recording)
        print(monitor.summary().metrics())
        monitor.reset()

    Keeps two numbers per head and statistic, whatever the length of the window, no graph, and
    waits for the device in ``summary`` alone.

    Args:
        band: adds the share of row entropies inside a band around the thresholds.

    Raises:
        TypeError: if band is something else.
    """

    def __init__(self, band: Band | None = None) -> None:
        if not isinstance(band, Band | None):
            raise TypeError(
                f"band is a {type(band).__name__}; pass Band(thresholds), or "
                "Band.of(regularization)."
            )
        self.band = band
        self.updates = 0
        self._sums = HeadSums({})

    def update(self, recording: EntropyRecording) -> None:
        """Add the rows of a forward pass.

        Args:
            recording: what record_entropy gave; its graph is not kept.

        Raises:
            TypeError: if it is no recording.
            ValueError: if the recording is empty, a layer changed its number of heads, or the
                thresholds of the band do not fit.
        """
        self._sums = self._sums.plus(head_sums(recording, self.band))
        self.updates += 1

    def summary(self, *, over_ranks: bool = False) -> HeadStatistics:
        """Return means over all rows since the last reset; waits for the device once.

        Args:
            over_ranks: over the rows of all ranks of the default process group, whether each of
                them had an update or not; every rank must call it, and all get the same.

        Raises:
            ValueError: if there was no update.
        """
        sums = self._sums.over_ranks() if over_ranks else self._sums
        if not sums.layers:
            raise ValueError("the monitor has seen no recording; call update(recording) first.")
        return sums.statistics()

    def reset(self) -> None:
        """Start a new window."""
        self.updates = 0
        self._sums = HeadSums({})
