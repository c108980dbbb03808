"""What the commands share: where they print, how they fail, how their help shows examples, which extra is missing."""

import errno
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

from sq_llava.stopping import is_caused_by


# Of torchrun's processes, the first one speaks at once. torchrun ends the others before they say the same.
SECONDS_FOR_THE_FIRST = 3


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError, for `one_line_when_stopped`; rich would end the process here, without a word


console = _Console()
messages_console = _Console(stderr=True)


def examples(*lines: str) -> str:
    # Empty lines keep each example on a line of its own.
    return "Examples:\n\n" + "\n\n".join(lines)


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """
    Around an import of optional packages.

    Raises:
        ValueError: if one of them is not installed: with the extra of sq-llava that has it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'sq-llava[{extra}]'.") from error


@contextmanager
def errors_in_one_line(traceback_of: Callable | None = None) -> Iterator[None]:
    """
    Ends the process with the exit code 1 where the input is wrong, without a traceback.

    Args:
        traceback_of (`Callable`, *optional*): A function whose errors are not about the input: they pass.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        # Output that cannot be written is told by `one_line_when_stopped`, which sees what is left of it, too.
        if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC):
            raise
        if is_caused_by(error, KeyboardInterrupt) or (traceback_of is not None and _ran_in(traceback_of, error)):
            raise
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(SECONDS_FOR_THE_FIRST)
        messages_console.print(f"[red]Error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)


def _ran_in(function: Callable, error: BaseException) -> bool:
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_code is function.__code__ for frame in frames)
