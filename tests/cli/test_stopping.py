"""Ctrl-C and a closed output end a command in one line, at any moment, without a traceback."""

import os
import pty
import signal
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

import pytest

from sq_llava import stopping
from sq_llava.cli import chat as chat_command
from sq_llava.inference.assistant import Assistant
from sq_llava.training.trainer import SQLlavaTrainer
from tests import ROOT, tiny
from tests.processes import ended, fork, run_script, sq_llava
from tests.runs import arguments, in_step, make_parts, signal_self


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model that never ends its text, pictures, and the models and data of a training."""
    folder = tmp_path_factory.mktemp("stopping")
    processor = tiny.tiny_processor(system_message="")
    model = tiny.tiny_model_for(processor)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return make_parts(folder)


# Runs a program, and presses Ctrl-C when it imports the module of this name.
INTERRUPTED_IMPORT = """
import os, runpy, signal, sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == at:
            os.kill(os.getpid(), signal.SIGINT)

at, *sys.argv = sys.argv[1:]
sys.meta_path.insert(0, Interrupt())
run = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
run(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("typer", ["sq_llava", "--help"]),
        ("transformers", ["sq_llava", "answer", "1.png", "Hi", "--model", "model"]),
        ("accelerate", [str(ROOT / "train_sft.py"), "--help"]),
        ("demo.data", ["demo.run", "--help"]),
    ],
)
def test_ctrl_c_in_an_import_ends_in_one_line(module, command, folder):
    command = [sys.executable, "-c", INTERRUPTED_IMPORT, module, *command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.splitlines()[-1] == "Stopped." and "Traceback" not in done.stderr


def outcome(function, command: tuple[str, ...], folder: Path, prepare=None) -> tuple[int, str]:
    """Exit code and output of a command in a process of its own."""
    [code] = ended(fork(function, command, folder / "log", prepare))
    return code, (folder / "log").read_text()


def stop_in(owner, name: str) -> None:
    """Presses Ctrl-C when this function is called."""
    setattr(owner, name, lambda *args, **kwargs: signal_self(0, signal.SIGINT))


@pytest.mark.slow
def test_ctrl_c_in_an_answer_ends_in_one_line(folder, tmp_path):
    command = ("answer", str(folder / "1.png"), "Hi", "--model", str(folder / "model"))
    assert outcome(sq_llava, command, tmp_path, (stop_in, Assistant, "answer_batch")) == (130, "Stopped.\n")


@pytest.mark.slow
def test_ctrl_c_before_training_ends_in_one_line(folder, tmp_path):
    command = (str(ROOT / "train_sft.py"), *arguments(folder, tmp_path / "run"))
    code, text = outcome(run_script, command, tmp_path, (stop_in, SQLlavaTrainer, "__init__"))
    assert code == 130 and text.splitlines()[-1] == "Stopped." and "Traceback" not in text


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        ({"dataset_path": "none.json"}, 1, "Error: none.json: no such file."),
        ({"self_question_ratio": 2}, 1, "Error: self_question_ratio is 2.0: it must be a number from 0 to 1."),
        ({"stage": "alig"}, 2, "Error: argument --stage: invalid choice: 'alig'"),
    ],
)
def test_wrong_training_setting_is_refused_in_one_line(settings, code, message, folder, tmp_path):
    command = (str(ROOT / "train_sft.py"), *arguments(folder, tmp_path / "run", **settings))
    found, text = outcome(run_script, command, tmp_path)
    assert found == code and text.splitlines()[-1].startswith(message)
    assert "Traceback" not in text and "usage:" not in text


def fail():
    raise ValueError("a bug")


@pytest.mark.slow
def test_error_of_a_training_step_has_its_traceback(folder, tmp_path):
    command = (str(ROOT / "train_sft.py"), *arguments(folder, tmp_path / "run", doctor="off"))
    code, text = outcome(run_script, command, tmp_path, (in_step, 1, fail))
    assert code == 1 and "Traceback" in text and "ValueError: a bug" in text


def break_output() -> None:
    """Makes standard output a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)


def fill_output() -> None:
    """Makes standard output a file on a full disk."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prepare", "line"),
    [
        (break_output, "Stopped: standard output was closed.\n"),
        (fill_output, "Error: [Errno 28] No space left on device\n"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["by rich", "by print"])
def test_output_that_cannot_be_written_ends_in_one_line(prepare, line, options, folder, tmp_path):
    command = ("inspect", str(folder / "model"), *options)
    assert outcome(sq_llava, command, tmp_path, (prepare,)) == (1, line)


def test_chat_without_standard_input_ends_at_once_in_one_line(folder):
    command = f'"{sys.executable}" -m sq_llava chat 1.png --model model <&-'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: Standard input is closed, but chat reads your messages from it.\n"


def test_error_of_a_library_that_was_interrupted_counts_as_ctrl_c(monkeypatch, capsys):
    monkeypatch.setattr(stopping.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ending, stopping.one_line_when_stopped():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("numpy failed to import") from error
    assert ending.value.code == 130 and capsys.readouterr().err == "Stopped.\n"


def sit_at(terminal: str) -> None:
    """Gives this process a terminal of its own, whose Ctrl-C reaches it. Each answer prints a line when it starts."""
    os.setsid()
    os.dup2(os.open(terminal, os.O_RDWR), 0)
    ioctl(0, termios.TIOCSCTTY, 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    answer, ask = chat_command.Chat.answer, chat_command.Chat.ask

    def answer_aloud(self, line, prefix=""):
        print(f"{len(self.dialogue.messages[0])} messages before: {line}", flush=True)
        answer(self, line, prefix)

    def ask_aloud(self):
        print(f"{len(self.dialogue.messages[0])} messages before: /ask", flush=True)
        ask(self)

    chat_command.Chat.answer, chat_command.Chat.ask = answer_aloud, ask_aloud


def wait_for(log: Path, text: str, count: int = 1) -> None:
    end = time.monotonic() + 60
    while not log.is_file() or log.read_text().count(text) < count:
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_of_chat_and_a_second_one_ends_it(folder, tmp_path):
    keyboard, terminal = pty.openpty()
    log = tmp_path / "log"
    command = ("chat", str(folder / "1.png"), "--model", str(folder / "model"), "--max-new-tokens", "200")
    children = fork(sq_llava, command, log, (sit_at, os.ttyname(terminal)))
    wait_for(log, "> ")
    os.write(keyboard, b"What is it?\n")
    wait_for(log, "> ", 2)
    for count, line in enumerate((b"Go on.\n", b"/ask\n"), start=1):
        os.write(keyboard, line)
        wait_for(log, "messages before", 1 + count)
        os.write(keyboard, b"\x03")
        wait_for(log, "> ", 2 + count)
    os.write(keyboard, b"\x03")
    assert ended(children) == [130]
    text = log.read_text()
    assert "2 messages before: Go on." in text and "2 messages before: /ask" in text
    assert text.count("Stopped. This turn was dropped.") == 2
    assert text.endswith("\nStopped.\n") and "Traceback" not in text


@pytest.fixture
def interruptible():
    """Python's own handler of SIGINT: a shell starts processes in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_child_process_ignores_ctrl_c(capfd, interruptible):
    with stopping.children_miss_interrupts():
        child = subprocess.Popen(
            [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('alive')"]
        )
    assert child.wait() == 0 and capfd.readouterr().out == "alive\n"
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # in this thread, at once
