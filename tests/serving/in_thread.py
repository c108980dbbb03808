"""A server in a thread of this process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from tests.processes import free_port


@contextmanager
def in_thread(app) -> Iterator[int]:
    """Yields the port."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    try:
        while not server.started:
            assert time.monotonic() < end, "timeout"
            time.sleep(0.02)
        yield port
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
