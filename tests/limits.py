"""Limits on time and memory, for tests of inputs that would otherwise never end or take all memory."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def limited(seconds: float, mebibytes: int = 1024) -> Iterator[None]:
    """
    Runs the body with a limit on its time, and on the memory that it takes in addition.

    Raises:
        AssertionError: after `seconds`.
        MemoryError: for too much memory (or the error that a library makes of it).
    """

    def stop(number, frame):
        raise AssertionError(f"it took more than {seconds} seconds")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + mebibytes * 2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
