"""A program that replaces `python` in tests and starts fast, because PyTorch is already imported.

    subprocess.run([warm_python(), "-m", "sq_llava", "ask", ...])

Tests start dozens of processes, and importing PyTorch is most of their start-up time. The program passes its
arguments, folder, environment and open files to a server, which forks a process that behaves like `python`. The server
has imported PyTorch, but nothing that reads the environment and nothing of this library. Killing the program also
kills the process, a moment later. `multiprocessing` can use the program to start its processes. Of Python's options it
knows only -B, -c, -m, -P and -u. `make test-wheel` tests real starts.
"""

import array
import atexit
import contextlib
import fcntl
import functools
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


MOST_FILES = 250
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Modules that take long to import and do not depend on the environment.
PRELOADED = ("torch", "torch._inductor.compile_fx", "torch.nn.attention.flex_attention", "pandas", "PIL.Image")


@functools.cache
def warm_python() -> str:
    """Starts the server, once for each process. Returns the path of the program."""
    if sys.platform != "linux":
        return sys.executable
    folder = Path(tempfile.mkdtemp(prefix="warm-python-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program, socket_file = folder / "python", folder / "socket"
    program.write_text(
        f"#!{sys.executable} -SE\n"
        "import runpy, sys\n"
        f"runpy.run_path({__file__!r})['ask_server']({str(socket_file)!r}, sys.argv)\n"
    )
    program.chmod(0o755)
    # The server ends with this process: the other end of its standard input is then closed.
    server = subprocess.Popen([sys.executable, "-P", __file__, str(socket_file)], stdin=subprocess.PIPE)
    while not socket_file.exists():
        if server.poll() is not None:
            raise RuntimeError(f"The server of {__file__} did not start: it ended with code {server.returncode}.")
        time.sleep(0.02)
    return str(program)


def ask_server(socket_file: str, argv: list[str]) -> None:
    """Runs in the program: sends the request to the server, and ends as the forked process ends."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(socket_file)
        files = [file for file in map(int, os.listdir("/proc/self/fd")) if is_inherited(file)]
        request = json.dumps([argv[1:], os.getcwd(), dict(os.environ), argv[0], files]).encode()
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))
        server.sendmsg([len(request).to_bytes(8, "big")], [rights])
        server.sendall(request)
        replies = server.makefile()
        process = int(replies.readline())
        for number in FORWARDED:
            signal.signal(number, lambda number, frame: os.kill(process, number))
        status = int(replies.readline())
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def is_inherited(file: int) -> bool:
    """True if a child process inherits this open file."""
    try:
        return os.get_inheritable(file)
    except OSError:  # the listing itself, which is closed
        return False


def serve(path: str) -> list[str]:
    """Forks a process for each request. Returns the arguments in the forked process; the server runs on."""
    for name in PRELOADED:
        __import__(name)
    gc.freeze()  # otherwise the garbage collector would copy all the memory shared with the forked processes
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + "~")
    listener.listen(64)
    os.rename(path + "~", path)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        if sys.stdin in select.select([sys.stdin, listener], [], [])[0]:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            return keep(connection)
        connection.close()


def keep(connection: socket.socket) -> list[str]:
    """Forks the process, reports how it ended, and kills it if its program was killed."""
    size, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(MOST_FILES * 4))
    files = array.array("i", ancillary[0][2])
    request = connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
    arguments, folder, environment, program, numbers = json.loads(request)
    process = os.fork()
    if process == 0:
        connection.close()
        # Moved to high numbers first, so that they do not overwrite each other.
        files = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, MOST_FILES) for file in files]
        os.closerange(3, MOST_FILES)
        for number, file in zip(numbers, files, strict=True):
            os.dup2(file, number)
            os.close(file)
        become(folder, environment, program)
        return arguments
    connection.sendall(f"{process}\n".encode())
    end = os.pidfd_open(process)
    if connection in select.select([connection, end], [], [])[0]:
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{status}\n".encode())
    os._exit(0)


def become(folder: str, environment: dict[str, str], program: str) -> None:
    """Gives this process the folder, the environment and the standard streams of the program."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = program
    for stream, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        mode, buffering = "w" if number else "r", 1 if number == 2 else -1
        opened = open(number, mode, buffering, closefd=False)  # noqa: SIM115
        setattr(sys, stream, opened)
        setattr(sys, f"__{stream}__", opened)
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    torch.seed()


def run(arguments: list[str]) -> None:
    """Does what `python ARGUMENTS` does."""
    is_safe = False
    while arguments[0] in ("-B", "-P", "-u"):
        is_safe = is_safe or arguments[0] == "-P"
        del arguments[0]
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(":") if path]
    option, rest = arguments[0], arguments[1:]
    if option in ("-c", "-m"):
        sys.path[:0] = paths if is_safe else ["" if option == "-c" else os.getcwd(), *paths]
        sys.argv = [option, *rest[1:]]
        if option == "-c":
            exec(compile(rest[0], "<string>", "exec"), sys.modules["__main__"].__dict__)
        else:
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[:0] = paths if is_safe else [str(Path(option).resolve().parent), *paths]
        sys.argv = [option, *rest]
        runpy.run_path(option, run_name="__main__")


def run_to_the_end(arguments: list[str]) -> int:
    """Does what `python ARGUMENTS` does, with its exit handlers. Returns its exit code."""
    status = 0
    try:
        run(arguments)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    # The interpreter's normal end would free every object, which takes seconds with PyTorch.
    os._exit(run_to_the_end(serve(sys.argv[1])))
