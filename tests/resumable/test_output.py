"""Output is complete under its final name or not there, whatever happens, and two runs never write into one folder."""

import errno
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sq_llava.early_checks import LOCK_FILE, require_new_folder
from sq_llava.output import (
    FullDiskError,
    folder_written_whole,
    output_lock,
    temporary_folder,
    write_text,
    written_whole,
)


def in_child(function, *arguments) -> tuple[int, str]:
    """Calls a function in another process. Returns the exit code (0, or minus a signal) and the text of its error."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)
        except Exception as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def take(folder: Path, part: str = "") -> None:
    with output_lock(folder, part):
        pass


def take_and_die(folder: Path) -> None:
    with output_lock(folder):
        os.kill(os.getpid(), signal.SIGKILL)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_second_process_is_refused_and_told_who_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/sq-llava", "evaluate", "--out", "a folder"])
    with output_lock(tmp_path):
        text = f"{tmp_path}: another run writes into this folder: process {os.getpid()} on {socket.gethostname()}, "
        text += "started with `sq-llava evaluate --out 'a folder'`. Wait for it to end, or choose another folder."
        # A refused process must not erase the holder's name for the next one.
        assert [in_child(take, tmp_path) for _ in range(2)] == [(0, text)] * 2
    assert in_child(take, tmp_path) == (0, "")


def test_lock_of_a_killed_process_is_taken_over(tmp_path):
    assert in_child(take_and_die, tmp_path) == (-signal.SIGKILL, "")
    assert names(tmp_path) == {LOCK_FILE}
    require_new_folder(tmp_path)  # the lock is no content
    with output_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert names(tmp_path) == set()


def test_lock_ends_with_its_process_even_if_a_process_that_it_forked_lives_on(tmp_path):
    child = os.fork()
    if child == 0:
        with output_lock(tmp_path):
            if os.fork():
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1)
            os._exit(0)
    os.waitpid(child, 0)
    take(tmp_path)


def test_lock_is_released_by_its_last_holder_in_the_process(tmp_path):
    out = tmp_path / "a" / "out"
    with output_lock(out):
        with output_lock(out):
            pass
        assert "another run" in in_child(take, out)[1]
    assert names(tmp_path) == set()


def test_parts_of_a_folder_are_locked_apart(tmp_path):
    with output_lock(tmp_path, "shard-1"):
        assert in_child(take, tmp_path, "shard-2") == (0, "")
        assert f"{tmp_path / 'shard-1'}: another run" in in_child(take, tmp_path, "shard-1")[1]


def test_folder_without_locks_gives_a_warning(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with (
        pytest.warns(UserWarning, match="cannot be locked .* Start no other run into this folder"),
        output_lock(tmp_path),
    ):
        pass


def test_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/out cannot be written: Not a directory. Choose another folder"):
        take(tmp_path / "file" / "out")


def test_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "report.md"
    write_text(path, "old")
    with written_whole(path) as new:
        new.write_text("new")
        assert path.read_text() == "old" and new.suffix == ".md"
    assert path.read_text() == "new" and names(tmp_path) == {"report.md"}
    with pytest.raises(KeyboardInterrupt), written_whole(path) as new:
        new.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "new" and names(tmp_path) == {"report.md"}


def die_while_writing(path: Path) -> None:
    with written_whole(path) as new:
        new.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_next_run_removes_what_a_killed_one_left_but_nothing_else(tmp_path):
    path, host = tmp_path / "report.md", socket.gethostname()
    others = {
        f".half-written-{host}-{os.getppid()}-1-report.md",
        f".half-written-{host}x-1-1-report.md",
        ".half-written-report.md",
    }
    for name in others:
        (tmp_path / name).touch()
    assert in_child(die_while_writing, path)[0] == -signal.SIGKILL
    assert len(names(tmp_path)) == 4
    write_text(path, "whole")
    assert names(tmp_path) == {"report.md", *others}


def test_threads_that_write_the_same_file_do_not_disturb_each_other(tmp_path):
    both_have_written = threading.Barrier(2)

    def write(text: str) -> None:
        with written_whole(tmp_path / "report.md") as new:
            new.write_text(text)
            both_have_written.wait(10)
            assert new.read_text() == text

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, ["one", "other"]))
    assert names(tmp_path) == {"report.md"}


def test_file_that_is_a_device_is_written_itself():
    write_text("/dev/null", "text")
    assert Path("/dev/null").is_char_device()


def use_temporary_folder(ends: bool) -> None:
    with temporary_folder("push-") as folder:
        (folder / "weights").touch()
        if not ends:
            os.kill(os.getpid(), signal.SIGKILL)


def test_temporary_folder_of_a_killed_process_is_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "push-of-somebody").mkdir()
    with temporary_folder("push-"):
        assert in_child(use_temporary_folder, False)[0] == -signal.SIGKILL
        assert len(list(tmp_path.iterdir())) == 3
        use_temporary_folder(ends=True)
        assert len(list(tmp_path.iterdir())) == 2  # the one in use stays
    assert names(tmp_path) == {"push-of-somebody"}


@pytest.mark.parametrize("text", ["", "{}", "[]", "null"])
def test_strange_lock_of_another_user_does_no_harm(tmp_path, monkeypatch, text):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "push-of-somebody").mkdir()
    (tmp_path / "push-of-somebody" / LOCK_FILE).write_text(text)
    with temporary_folder("push-") as folder:
        assert folder.is_dir()
    assert names(tmp_path) == {"push-of-somebody", f"push-of-somebody/{LOCK_FILE}"}


def make_folder(out: Path) -> None:
    with folder_written_whole(out) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("text")
        assert folder.name == out.resolve().name and not list(out.glob("*"))


def test_folder_appears_when_it_is_complete(tmp_path):
    make_folder(tmp_path / "out")
    assert names(tmp_path) == {"out", "out/sub", "out/sub/file"}
    with pytest.raises(ValueError, match="out is not empty: give a new folder"):
        make_folder(tmp_path / "out")


@pytest.mark.parametrize("linked", [False, True])
def test_empty_folder_is_replaced_even_with_a_dead_lock(tmp_path, linked):
    out = tmp_path / "out"
    out.mkdir()
    if linked:
        (tmp_path / "link").symlink_to(out)
    in_child(take_and_die, out)
    make_folder(tmp_path / ("link" if linked else "out"))
    assert names(out) == {"sub", "sub/file"}


def test_folder_in_which_a_run_has_begun_is_not_replaced(tmp_path):
    with output_lock(tmp_path / "out"):
        assert "out: another run writes into this folder" in in_child(make_folder, tmp_path / "out")[1]
    with pytest.raises(ValueError, match="out is not empty"), folder_written_whole(tmp_path / "out"):
        (tmp_path / "out" / "file").mkdir(parents=True)
    assert names(tmp_path) == {"out", "out/file"}


def test_mount_point_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda path: path.exists())
    with pytest.raises(ValueError, match=r"is a mount point: give a new folder inside it, such as .*/model\."):
        make_folder(tmp_path)


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=["python", "safetensors"])
@pytest.mark.parametrize("write", [folder_written_whole, written_whole])
def test_full_disk_names_the_output_and_the_free_space_and_leaves_nothing(tmp_path, write, error):
    with pytest.raises(FullDiskError) as raised, write(tmp_path / "out") as new:
        (new / "file" if new.is_dir() else new).write_text("half")
        raise error
    text = str(raised.value)
    assert text.startswith(f"{tmp_path / 'out'} could not be written: No space left on device (")
    assert " free). Free some space" in text and "\n" not in text
    assert names(tmp_path) == set()


def test_other_errors_keep_their_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"), written_whole(tmp_path / "out"):
        (tmp_path / "none").read_bytes()


def test_files_reach_the_disk_before_they_get_their_name(tmp_path, monkeypatch):
    flush, move, calls = os.fsync, os.rename, []

    def noted_flush(file):
        flush(file)
        calls.append(Path(os.readlink(f"/proc/self/fd/{file}")).name.rpartition("-")[2])

    def noted_move(source, target):
        move(source, target)
        calls.append("MOVE")

    monkeypatch.setattr(os, "fsync", noted_flush)
    monkeypatch.setattr(os, "rename", noted_move)
    monkeypatch.setattr(os, "replace", noted_move)
    make_folder(tmp_path / "whole")
    assert calls[-2:] == ["MOVE", tmp_path.name.rpartition("-")[2]]
    assert {"file", "sub", "whole"} == set(calls[:-2])
    calls.clear()
    write_text(tmp_path / "file", "text")
    assert calls == ["file", "MOVE", tmp_path.name.rpartition("-")[2]]
