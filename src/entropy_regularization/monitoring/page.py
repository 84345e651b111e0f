"""Pages: a template and its contents -> HTML that needs no network."""

from typing import Any

from entropy_regularization.monitoring.tables import colour_rules


def render(template: str, contents: dict[str, Any]) -> str:
    """Return a page.

    Args:
        template: a file among the templates of this room.
        contents: what it names, but for the colours of maps.

    Raises:
        ModuleNotFoundError: if jinja2 or matplotlib is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the page needs jinja2; install entropy-regularization[report]."
        ) from error
    environment = Environment(
        loader=PackageLoader("entropy_regularization.monitoring"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(contents, colours=colour_rules())
