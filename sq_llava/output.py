"""Output: one run at a time writes into a folder, and a file gets its final name when it is complete.

    with output_lock(out):                              # a second run into this folder is refused
        write_text(out / "report.md", text)

    with folder_written_whole("merged") as folder:      # takes a lock too
        model.save_pretrained(folder)

A file or folder is written beside its final name, flushed to the disk (fsync) and then renamed. So a kill, a full disk
or a power failure leaves the complete output under the final name, or nothing. The next run of the same command
removes what a killed run left beside it.

The lock is the file `.sq-llava.lock` inside the folder. It is locked with `flock`, which the kernel ends together with
the process, so no run has to be unlocked by hand. The file itself is removed at the end of a run. It stays after a
kill, and the next run takes it over. On a shared file system, the server ends the lock of a machine that has died:
with NFS after about 90 seconds. A file system without locks gives a warning.

Only small modules are imported here, so that commands can use it before they import their libraries.
"""

import errno
import glob
import json
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from sq_llava.early_checks import LOCK_FILE, require_new_folder


HALF_WRITTEN = "half-written-"
# The file system has no locks.
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class FullDiskError(OSError):
    """A file could not be written because its disk is full, or because of a limit on disk usage or file size."""


@contextmanager
def output_lock(folder: str | os.PathLike, part: str = "", needed: bool = True) -> Iterator[None]:
    """
    Keeps other processes from writing into a folder. The same process may take the lock several times.

    Args:
        folder (`str` or `Path`): Folder of the output. It is created, and removed again if it stays empty.
        part (`str`): Name of the part of the output to lock, such as a shard or a file. Other parts stay free.
        needed (`bool`): `False` for the processes of a launch other than the first, which takes the lock for all.

    Raises:
        ValueError: If another process holds the lock. The message names the process.
        OSError: If the folder cannot be written.
    """
    if not needed:
        yield
        return
    folder = Path(folder).expanduser().resolve()
    created = [each for each in (folder, *folder.parents) if not each.exists()]
    lock = _acquire(folder, part)
    try:
        yield
    finally:
        if lock is not None:
            if lock.lock_counter == 1:
                # While it is locked: a process that has opened the file meanwhile sees that it is gone.
                Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
        for each in created:
            with suppress(OSError):  # it is not empty
                each.rmdir()


def _acquire(folder: Path, part: str):
    """The held lock, or `None` if the file system has no locks."""
    from filelock import FileLock, Timeout

    file = folder / (LOCK_FILE if not part else f"{LOCK_FILE}-{part}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # All threads of this process share one object.
        lock = FileLock(file, blocking=False, thread_local=False, is_singleton=True, fallback_to_soft=False)
        lock.acquire()
        if lock.lock_counter == 1:
            file.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "command": command_line()}))
    except Timeout as error:
        raise ValueError(
            f"{folder / part}: another run writes into this folder{_holder(file)}. Wait for it to end, or choose "
            "another folder."
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise OSError(f"{folder} cannot be written: {error.strerror}. Choose another folder.") from error
        warnings.warn(f"{folder}: cannot be locked ({error}). Start no other run into this folder.", stacklevel=4)
        return None
    return lock


def _holder(file: Path) -> str:
    """Which process holds a lock; empty if it has not written this yet."""
    try:
        holder = json.loads(file.read_text())
        return f": process {holder['pid']} on {holder['host']}, started with `{holder['command']}`"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@contextmanager
def new_folder_lock(path: str | os.PathLike) -> Iterator[Path]:
    """
    The lock of a folder that [`folder_written_whole`] writes, to take before long work. Errors as there.

    Yields:
        `half-written-NAME`, beside the final folder. It is removed at the end.
    """
    path = Path(path).expanduser()
    require_new_folder(path)
    path = path.resolve()
    if path.is_dir():
        with output_lock(path):  # removes the lock file of a run that was killed
            pass
    unfinished = path.with_name(HALF_WRITTEN + path.name)
    with output_lock(unfinished):
        yield unfinished
    with suppress(OSError):
        unfinished.rmdir()


@contextmanager
def folder_written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """
    Gives a folder to write into. It gets its final name at the end of the block. After an error it is removed.

    Args:
        path (`str` or `Path`): The final folder. It must be new or empty.

    Yields:
        `Path` of a folder with the same name in `half-written-NAME`, beside the final folder.

    Raises:
        ValueError: If the final folder is not empty, or another process is writing it.
        FullDiskError: If the disk is full.
    """
    path = Path(path).expanduser()
    with new_folder_lock(path) as unfinished:
        path = path.resolve()
        folder = unfinished / path.name  # with the final name, because a model card is named after its folder
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed
        try:
            with full_disk_named(path):
                folder.mkdir()
                yield folder
                sync(folder)
                require_new_folder(path)
                folder.rename(path)
                sync_path(path.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A folder in the machine's folder of temporary files. Those that killed processes have left are removed."""
    for lock in Path(tempfile.gettempdir()).glob(f"{prefix}*/{LOCK_FILE}"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # in use, of another user, or without a holder
            if json.loads(lock.read_text())["pid"] != os.getpid():
                with output_lock(lock.parent):
                    shutil.rmtree(lock.parent)
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder, output_lock(folder):
        yield Path(folder)


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """
    Gives a path to write a file to. The file gets its final name at the end of the block, in place of an older one.

    Raises:
        FullDiskError: If the disk is full.
    """
    path = Path(path).expanduser().resolve()
    if path.exists() and not path.is_file():  # such as /dev/stdout
        yield path
        return
    # Several threads, processes and machines may write the same file at the same time: each has a file of its own.
    writer = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    new = path.with_name(f".{HALF_WRITTEN}{writer}-{path.name}")
    _remove_left_over(path)
    try:
        with full_disk_named(path):
            yield new
            sync_path(new)
            new.replace(path)
            sync_path(path.parent)
    finally:
        new.unlink(missing_ok=True)


def _remove_left_over(path: Path) -> None:
    """Removes what killed processes of this machine left of a file."""
    start = f".{HALF_WRITTEN}{socket.gethostname()}-"
    name = re.compile(rf"{re.escape(start)}(\d+)-\d+-{re.escape(path.name)}")
    for left in path.parent.glob(f"{glob.escape(start)}*-{glob.escape(path.name)}"):
        writer = name.fullmatch(left.name)
        if writer and not _is_alive(int(writer[1])):
            left.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # a process of another user
        pass
    return True


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file in UTF-8 as [`written_whole`] does."""
    with written_whole(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes an indented JSON file as [`written_whole`] does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def full_disk_named(path: str | os.PathLike) -> Iterator[None]:
    """
    Wraps the writing of a file or folder.

    Raises:
        FullDiskError: Instead of the many errors of a full disk. The message names the path and the free space.
    """
    try:
        yield
    except Exception as error:
        reason = _full_disk(error)
        if reason is None or isinstance(error, FullDiskError):
            raise
        folder = next(each for each in Path(path).absolute().parents if each.is_dir())
        raise FullDiskError(
            f"{path} could not be written: {reason} ({decimal(shutil.disk_usage(folder).free)} free). Free some "
            "space, then run the same command again."
        ) from error


def _full_disk(error: Exception) -> str | None:
    """The reason, if an error comes from a full disk. Safetensors, Arrow and shutil have it only in their text."""
    for number in FULL:
        told = re.search(rf"\b(os error|errno) {number}\b", str(error), re.IGNORECASE)
        if getattr(error, "errno", None) == number or told:
            return os.strerror(number)
    return None


def sync(folder: Path) -> None:
    """Flushes a folder and everything in it to the disk. Without it, files could be empty after a power failure."""
    for parent, _, names in os.walk(folder):
        for path in (*(Path(parent, name) for name in names), Path(parent)):
            with suppress(FileNotFoundError):  # another process of the launch has removed it
                sync_path(path)
    sync_path(folder.absolute().parent)


def sync_path(path: Path) -> None:
    """Flushes a file, or the list of files of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_LOCKS:  # some file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def command_line() -> str:
    """The command that started this process, as it can be typed: `sq-llava evaluate ...`, `python -m demo.run ...`."""
    program = Path(sys.argv[0])
    is_module = program.suffix == ".py" and (program.parent / "__init__.py").is_file()
    if program.stem == "sq-llava" or program == files("sq_llava") / "__main__.py":
        start = ["sq-llava"]
    elif is_module:
        start = ["python", "-m", f"{program.parent.name}.{program.stem}"]
    else:
        start = ["python", str(program)]
    return shlex.join([*start, *sys.argv[1:]])
