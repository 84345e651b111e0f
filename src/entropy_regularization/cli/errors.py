"""How a command fails: one sentence and an exit code; a traceback only with --debug."""

import importlib
import importlib.util

import click

TRAINING = ("rich", "transformers", "tokenizers", "accelerate", "matplotlib")

USAGE, FAILURE, INTERRUPTED, BROKEN_PIPE, TERMINATED = 2, 1, 130, 141, 143


def require(*packages: str) -> None:
    """Check, before a command begins, that the packages that it imports are installed.

    Raises:
        RunProblem: if one of them is not, or transformers is too old.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise RunProblem(
            f"this command needs {' and '.join(missing)}; run: "
            "pip install 'entropy-regularization[all]'"
        )
    if "transformers" in packages:
        try:
            importlib.import_module("entropy_regularization.integrations.transformers")
        except ImportError as error:
            raise RunProblem(str(error)) from error


class UsageProblem(click.ClickException):
    """What was typed cannot be done; the sentence says what to type instead."""

    exit_code = USAGE


class RunProblem(click.ClickException):
    """The work failed; the sentence says what is left and what to do."""

    exit_code = FAILURE


class Stopped(click.ClickException):
    """The work was stopped from outside; the sentence says how to go on."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]
