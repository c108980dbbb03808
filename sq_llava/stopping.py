"""Ends a command with one line and no traceback, on Ctrl-C and when its output cannot be written.

    with one_line_when_stopped():
        main()

Only the standard library is imported here, so that Ctrl-C works even while a command imports its libraries.
"""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


STOPPED = 128 + signal.SIGINT  # the exit code that shells show for a process ended by Ctrl-C
# The outcome of resumable work that was stopped by Ctrl-C.
INTERRUPTED = "stopped by Ctrl-C. Finished work is kept: run the same command again to resume."


@contextmanager
def one_line_when_stopped() -> Iterator[None]:
    """Exits with code 130 on Ctrl-C, and with code 1 if standard output is closed or a disk is full."""
    try:
        yield
    except BaseException as error:
        ending = _ending_of(error)
        if ending is None:
            raise
    else:
        ending = _ending_of(None)
    finally:
        signal.signal(signal.SIGINT, stop_at_once)
        _drop_unwritable_output()
    if ending is not None:
        code, line = ending
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)
        sys.exit(code)


def _ending_of(error: BaseException | None) -> tuple[int, str] | None:
    """Exit code and message of a stopped command. `None` if the command ended in another way."""
    if is_caused_by(error, KeyboardInterrupt):
        return STOPPED, "Stopped."
    if error is None or isinstance(error, SystemExit):
        try:
            if sys.__stdout__ is not None:
                sys.__stdout__.flush()
        except OSError as reason:
            error = reason
    if isinstance(error, SystemExit | BrokenPipeError) and is_caused_by(error, BrokenPipeError):
        return 1, "Stopped: standard output was closed."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return 1, f"Error: {error}"
    return None


def is_caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    """
    `True` if an error is of this kind, or was raised while one of this kind was handled. Libraries that are
    interrupted during their import raise other errors, and typer turns a KeyboardInterrupt into an exit code.
    """
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


@contextmanager
def children_miss_interrupts() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C, which a terminal sends to all processes. The parent ends them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """SIGINT handler for a process with nothing to clean up, e.g. while it imports its libraries."""
    os.write(2, b"Stopped.\n")
    os._exit(STOPPED)


def _drop_unwritable_output() -> None:
    """Discards output that cannot be written. Otherwise Python complains when it exits.

    Source: https://docs.python.org/3/library/signal.html#note-on-sigpipe
    """
    for stream in (sys.__stdout__, sys.__stderr__):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
