"""entropy-reg demo: placeholder until the table below it exists."""
import click
@click.command()
def demo() -> None:
    """Demo."""
