"""How a command ends that is stopped by Ctrl-C, or whose output nobody reads any more: one line, and no traceback.

    with one_line_when_stopped():
        main()

Nothing but the standard library is imported here, so that Ctrl-C is heard from a command's first import on.
"""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


STOPPED = 128 + signal.SIGINT  # what shells show for a process that Ctrl-C ended
# The outcome of a run that Ctrl-C stopped, where what was done is written all the same.
INTERRUPTED = "stopped by Ctrl-C. Run again: what was done is kept."


@contextmanager
def one_line_when_stopped() -> Iterator[None]:
    """Ends the process with the code 130 on Ctrl-C, and with 1 where standard output is closed or a disk is full."""
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
    """The exit code and the line for a command that was stopped; `None` for one that ends as it would."""
    if is_caused_by(error, KeyboardInterrupt):
        return STOPPED, "Stopped."
    if error is None or isinstance(error, SystemExit):
        try:
            if sys.__stdout__ is not None:
                sys.__stdout__.flush()
        except OSError as reason:
            error = reason
    if isinstance(error, SystemExit | BrokenPipeError) and is_caused_by(error, BrokenPipeError):
        return 1, "Stopped: nobody reads the output any more."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return 1, f"Error: {error}"
    return None


def is_caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    """
    Whether an error is of a kind, or was raised while one of that kind was handled: libraries turn a KeyboardInterrupt
    in the middle of an import into errors of their own, and typer turns it into an exit code.
    """
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


@contextmanager
def children_miss_interrupts() -> Iterator[None]:
    """Processes that are started inside never see Ctrl-C, which a terminal sends to all: their parent ends them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """A handler of SIGINT for a process that has nothing to clean up, such as one that imports its libraries."""
    os.write(2, b"Stopped.\n")
    os._exit(STOPPED)


def _drop_unwritable_output() -> None:
    """Else, the interpreter complains at its end about what it cannot write (docs.python.org, note on SIGPIPE)."""
    for stream in (sys.__stdout__, sys.__stderr__):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
