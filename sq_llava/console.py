"""Code that all commands share: consoles for output and messages, errors in one line, examples in the help."""

import errno
import gc
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from rich.console import Console
from rich.markup import escape

from sq_llava.stopping import is_caused_by


# With torchrun, the first process prints an error at once. torchrun ends the others before they print the same.
SECONDS_FOR_THE_FIRST = 3


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # rich would exit silently; `one_line_when_stopped` handles the BrokenPipeError


# Without emoji: rich would replace `:cat:` in file names and answers.
console = _Console(emoji=False)
messages_console = _Console(stderr=True, emoji=False)


@cache
def print_in_first_process(line: str) -> None:
    """Prints a message to stderr, once in a launch: only in its first process, and not again."""
    if is_first_process():
        messages_console.print(line, markup=False, highlight=False, soft_wrap=True)


def quiet_warnings() -> None:
    """
    Hides the warnings of other packages: they speak to programmers, and the user of a command cannot act on them. This
    library's warnings and all errors stay. With PYTHONWARNINGS or `python -W`, everything is shown.
    """
    if sys.warnoptions:
        return
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module="sq_llava")
    logging.lastResort.setLevel(logging.ERROR)  # for loggers that nobody configured
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@contextmanager
def loading(message: str = "Loading libraries") -> Iterator[None]:
    """
    Shows a message while large libraries are imported. Python's garbage collector is off in the meantime: it would
    search the thousands of new modules again and again, and would find nothing.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        with messages_console.status(message):
            yield
    finally:
        if was_on:
            gc.enable()


def examples(*lines: str) -> str:
    """The epilog of a command's help. Empty lines keep each example on its own line."""
    return "Examples:\n\n" + "\n\n".join(lines)


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """
    Wraps an import of optional packages.

    Raises:
        ValueError: if a package is not installed. The message names the extra of sq-llava that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'sq-llava[{extra}]'.") from error


def is_first_process() -> bool:
    """`True` in the first process of a launch with several (such as torchrun), and in a process without launcher."""
    return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def errors_in_one_line(traceback_of: Callable | None = None) -> Iterator[None]:
    """
    Prints errors about the input (`ValueError`, `OSError`) in one line, and exits with code 1, without a traceback.

    Args:
        traceback_of (`Callable`, *optional*): Errors raised inside this function are bugs: they keep their traceback.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        # Output that cannot be written is handled by `one_line_when_stopped`, which also flushes the rest of it.
        if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC):
            raise
        if is_caused_by(error, KeyboardInterrupt) or (traceback_of is not None and _ran_in(traceback_of, error)):
            raise
        if not is_first_process():
            time.sleep(SECONDS_FOR_THE_FIRST)
        text = " ".join(line.strip() for line in str(error).splitlines())  # errors of libraries can have several
        messages_console.print(f"[red]Error:[/red] {escape(text)}", soft_wrap=True)
        sys.exit(1)


def _ran_in(function: Callable, error: BaseException) -> bool:
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_code is function.__code__ for frame in frames)
