"""Processes that train: each begins at once where that is safe, and none outlives the command that started it.

context = training_context()
context.Process(target=work).start()      # whose first line is end_with_parent()
"""

import multiprocessing
import os
import sys
import threading
from multiprocessing.context import BaseContext

import torch


def training_context() -> BaseContext:
    """
    How processes are started: forked from a server that has imported the libraries, which takes longer than many a
    small step; anew where a fork does not work: bitsandbytes, which PEFT imports, asks a GPU what it can, after which
    no fork can use it, and macOS' libraries start threads.
    """
    if sys.platform != "linux" or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_sft", "demo.evaluate"])
    return context


def threads_of_each() -> int:
    """Threads of each of two processes that run at the same time: half of those that one would have."""
    return max(1, torch.get_num_threads() // 2)


def end_with_parent() -> None:
    """Else, a killed command would leave processes behind that write to the folders of its successor's."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
