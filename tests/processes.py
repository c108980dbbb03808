"""Processes that tests start, kill and wait for, without the seconds that importing the libraries takes.

A child is forked from a server that has imported everything and run nothing: it starts at once, and a kill is real.
"""

import gc
import json
import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from sq_llava.__main__ import main


PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = [
    "tests.runs", "demo.evaluate", "sq_llava.evaluation.run", "sq_llava.generation.llava",
    "sq_llava.generation.self_generation",
]  # fmt: skip


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sq_llava(*arguments: str) -> None:
    """The command, as a process runs it."""
    sys.argv = ["sq-llava", *arguments]
    main()


def run_script(file: str, *arguments: str) -> None:
    """A script, as `python FILE` runs it."""
    sys.argv = [file, *arguments]
    runpy.run_path(file, run_name="__main__")


def run_child(function: Callable, arguments: tuple, log: str, environment: dict[str, str], prepare) -> None:
    """Body of a child process: `prepare` is a function, or one with its arguments, that is called first."""
    gc.freeze()  # else, collecting garbage copies all the memory that is shared with the server
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)  # whoever waits for a line sees it at once
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
    """What torchrun gives each of several processes; nothing for one."""
    if processes == 1:
        return [{}]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(processes)]


def fork(
    function: Callable, arguments: tuple, log: Path, prepare=None, processes: int = 1
) -> list[multiprocessing.Process]:
    """Calls `function` in as many processes; what they print is added to `log`."""
    PROCESSES.set_forkserver_preload(PRELOADED)
    children = [
        # The server's own environment is that of its start.
        PROCESSES.Process(target=run_child, args=(function, arguments, str(log), os.environ | environment, prepare))
        for environment in environments_of(processes)
    ]
    for child in children:
        child.start()
    return children


def ended(children: list[multiprocessing.Process]) -> list[int]:
    """Exit codes of the processes; a negative one is the number of the signal that ended it."""
    for child in children:
        child.join(60)
        if child.is_alive():
            child.kill()
            child.join()
    return [child.exitcode for child in children]
