"""Training processes that start quickly and never outlive the command that started them.

Example:

    context = training_context()
    context.Process(target=work).start()      # the first line of `work` is end_with_parent()
"""

import multiprocessing
import os
import sys
import threading
from multiprocessing.context import BaseContext

import torch


def training_context() -> BaseContext:
    """
    The `multiprocessing` context of the demo. Processes are forked from a server that has already imported the
    libraries, because importing takes longer than many of the small steps. Forking does not work with a GPU, because
    PEFT imports bitsandbytes, which initialises CUDA. It does not work on macOS either, whose libraries start threads.
    There, each process imports the libraries itself.
    """
    if sys.platform != "linux" or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_sft", "demo.evaluate"])
    return context


def threads_of_each() -> int:
    """Number of threads per process when two run at the same time: half of the usual number."""
    return max(1, torch.get_num_threads() // 2)


def end_with_parent() -> None:
    """Ends this process when its parent ends. Otherwise it would write into the folders of the next run."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
