"""Whether the transformers that is installed is supported."""

from importlib.util import find_spec

OLDEST = "5.17"  # attention interface with mask functions; the lower bound of pyproject.toml


def unsupported_reason() -> str | None:
    """Return why transformers models cannot be recorded here, in one sentence; None if they can."""
    if find_spec("transformers") is None:
        return (
            "entropies of transformers models need the package transformers; run: "
            "pip install 'entropy-regularization[transformers]'"
        )
    # both come with it
    from packaging.version import Version
    from transformers import __version__

    if Version(__version__) >= Version(OLDEST):
        return None
    return (
        f"transformers {__version__} is installed, and entropies of its models need {OLDEST} or "
        f"newer; run: pip install --upgrade 'transformers>={OLDEST}'"
    )
