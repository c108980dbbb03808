"""Processes that tests start, kill and wait for, without the seconds that importing the libraries takes.

A child is forked from a server that has imported everything but run nothing. So it starts at once, and a kill is a
real kill.
"""

import gc
import json
import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sq_llava.__main__ import main
from sq_llava.output import output_lock


PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = [
    "tests.runs", "demo.evaluate", "sq_llava.evaluation.run", "sq_llava.generation.llava",
    "sq_llava.generation.self_generation",
]  # fmt: skip


@contextmanager
def locked_by_another_process(folder: Path, part: str = "") -> Iterator[None]:
    """While the block runs, another process holds the lock of an output folder."""
    here, there = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            here.close()
            with output_lock(folder, part):
                there.send(b"locked")
                there.recv(1)  # empty as soon as the other end is closed
        finally:
            os._exit(0)
    there.close()
    with here:
        assert here.recv(10) == b"locked"
        yield
    os.waitpid(child, 0)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sq_llava(*arguments: str) -> None:
    """Runs the `sq-llava` command in this process."""
    sys.argv = ["sq-llava", *arguments]
    main()


def run_script(file: str, *arguments: str) -> None:
    """Runs a script in this process, as `python FILE` does."""
    sys.argv = [file, *arguments]
    runpy.run_path(file, run_name="__main__")


def run_child(function: Callable, arguments: tuple, log: str, environment: dict[str, str], prepare) -> None:
    """
    Runs in a child process.

    Args:
        function, arguments: What the child runs.
        log: File that the child's output is appended to.
        environment: Environment variables to set.
        prepare: A function and its arguments, called before `function`; or `None`.
    """
    gc.freeze()  # otherwise the garbage collector would copy all the memory shared with the server
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)  # a test that waits for a line then sees it at once
    os.environ.update(environment)
    torch.set_num_threads(1)
    if prepare is not None:
        first, *rest = prepare
        first(*rest)
    function(*arguments)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environments_of(processes: int) -> list[dict[str, str]]:
    """The variables that torchrun sets for each of several processes. A single process gets none."""
    if processes == 1:
        return [{}]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(processes)]


def fork(
    function: Callable,
    arguments: tuple,
    log: Path,
    prepare=None,
    processes: int = 1,
    environment: dict[str, str] | None = None,
) -> list[multiprocessing.Process]:
    """
    Calls `function` in this many child processes. Their output is appended to `log`.

    Args:
        prepare: A function and its arguments, called in each child before.
        environment: Added to the environment of this process.
    """
    outer = os.environ | (environment or {})
    PROCESSES.set_forkserver_preload(PRELOADED)
    children = [
        # The server keeps the environment that it was started with, so the child is given this one.
        PROCESSES.Process(target=run_child, args=(function, arguments, str(log), outer | own, prepare))
        for own in environments_of(processes)
    ]
    for child in children:
        child.start()
    return children


def ended(children: list[multiprocessing.Process], seconds: float = 60) -> list[int]:
    """
    Waits for the processes and returns their exit codes. A negative code is the signal that ended the process. A
    process that is alive after this many seconds is killed.
    """
    for child in children:
        child.join(seconds)
        if child.is_alive():
            child.kill()
            child.join()
    return [child.exitcode for child in children]
