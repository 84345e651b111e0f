"""Where the commands that train print."""

from rich.console import Console


class PlainConsole(Console):
    """Leaves lines whole and unadorned, and stops a command whose reader has gone (| head).

    Args:
        quiet: print nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        # markup and emoji: what a person typed may hold [brackets] and :colons:
        super().__init__(soft_wrap=True, highlight=False, markup=False, emoji=False, quiet=quiet)

    def on_broken_pipe(self) -> None:
        """Print nothing more, and leave the end to the group of commands.

        Raises:
            BrokenPipeError: always.
        """
        self.quiet = True
        raise BrokenPipeError
