"""What the commands share: where they print, how they fail, how their help shows examples."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape


console = Console()
messages_console = Console(stderr=True)


def examples(*lines: str) -> str:
    # Empty lines keep each example on a line of its own.
    return "Examples:\n\n" + "\n\n".join(lines)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends the command with the exit code 1 where the input is wrong, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        messages_console.print(f"[red]Error:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error
