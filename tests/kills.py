"""Ends each writing command in bad ways, in a process of its own that has loaded everything before.

The command runs beside another one, with a full disk, and is killed at random moments.
"""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.progress import Progress

from sq_llava.checkpoints import convert, load
from sq_llava.checkpoints.layouts import recognise
from sq_llava.cli.generate_data import prompts
from sq_llava.cli.recipes import copy_recipes
from sq_llava.data.sources import DataSource
from sq_llava.doctor.check import DataCheck, examine
from sq_llava.doctor.report import write_sound_rows
from sq_llava.early_checks import LOCK_FILE
from sq_llava.evaluation import question_run, run
from sq_llava.generation.review_sheet import Entry, write_sheet
from sq_llava.generation.rows import Card, Shard, make_row, write_output
from sq_llava.inference.settings import AskSettings
from sq_llava.output import HALF_WRITTEN, FullDiskError
from sq_llava.training.adapter import LoraSize, add_adapter
from sq_llava.training.recovery import CONFIGURATIONS
from tests import released, runs, tiny
from tests.assistants import tiny_assistant
from tests.evaluation_layouts import write_easy_vqa
from tests.processes import locked_by_another_process


NUM_KILLS = 20
# Parts of commands: the lock was taken before.
LOCKED_BY_THE_CALLER = ("generating", "training")
# Files that grow line by line. Their lines are complete, or removed by the next run.
JOURNALS = ("answers-", "asked-")

Write = Callable[[Path], object]


def merging(root: Path) -> Write:
    processor = tiny.tiny_processor()
    model = add_adapter(tiny.tiny_model_for(processor), LoraSize(4, 8, 0), LoraSize(4, 8, 0), train_vusr=True)
    model.save_pretrained(root / "adapter")
    load.load_checkpoint = lambda adapter: (model, processor)
    return lambda out: load.merge_adapter(str(root / "adapter"), str(out / "model"))


def converting(root: Path) -> Write:
    released.write_clip(root / "clip")
    source = recognise(released.write_llava(root / "source", vision=root / "clip"), None, None)
    conversion = convert.plan(source, root / "model", max_shard_size="100KB")
    return lambda out: convert.write(replace(conversion, out=out / "model"), Progress(disable=True))


def fixing(root: Path) -> Write:
    tiny.write_rows(root, lambda index: [("What is this?", "" if index == 3 else f"A dog {index}.")])
    check = DataCheck([DataSource(str(root / "train.json"), str(root))], tiny.tiny_processor())
    report = examine(check, Progress(disable=True), num_proc=1)
    return lambda out: write_sound_rows(check, report, out / "model")


def copying_prompts(root: Path) -> Write:
    return lambda out: prompts("llava", out / "model")


def copying_recipes(root: Path) -> Write:
    return lambda out: copy_recipes("sq-llava-7b", out / "recipes")


def generating(root: Path) -> Write:
    rows = [make_row(str(number), [f"{number}.png"], [("What?", "A dog. " * 50)]) for number in range(300)]
    entries = [Entry(str(number), tiny.picture(number), "A dog.") for number in range(5)]

    def write(out: Path) -> None:
        write_output(out, Shard(), rows, [], {}, Card("Rows", "Made.", {}))
        write_sheet(out / "review.html", entries, "5 descriptions")

    return write


def evaluating(root: Path) -> Write:
    data = write_easy_vqa(root / "data", ["is it red?", "is it a circle?"])
    evaluation = run.Evaluation(tiny.save_model(root / "model"), ["easy_vqa"], str(data), root, device="cpu")
    assistant = tiny_assistant()
    run.load_any = lambda *arguments: assistant
    return lambda out: run.evaluate(replace(evaluation, out=out))


def evaluating_questions(root: Path) -> Write:
    (root / "images").mkdir()
    tiny.picture().save(root / "images" / "1.png")
    assistant = tiny_assistant()
    question_run.load_any = lambda *arguments: assistant
    evaluation = question_run.QuestionEvaluation(
        tiny.save_model(root / "model"), str(root / "images"), out=root, device="cpu",
        settings=AskSettings(num_questions=1, max_new_tokens=2),
    )  # fmt: skip
    return lambda out: question_run.evaluate_questions(replace(evaluation, out=out))


def training(root: Path) -> Write:
    trainer = runs.train(runs.make_parts(root), root / "run", max_steps=1, save_strategy="no", doctor="off")

    def write(out: Path) -> None:
        trainer.args.output_dir = str(out)
        trainer.save_model()
        trainer.save_state()

    return write


WRITERS = {
    function.__name__: function
    for function in (
        converting, copying_prompts, copying_recipes, evaluating, evaluating_questions, fixing, generating, merging,
        training,
    )
}  # fmt: skip


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def is_final(name: str) -> bool:
    return not any(
        part.startswith((HALF_WRITTEN, f".{HALF_WRITTEN}", LOCK_FILE, *JOURNALS)) for part in name.split("/")
    )


def check_whole_or_absent(out: Path, whole: dict[str, bytes]) -> None:
    """Each file is complete. A folder with a model has all of its files."""
    found = {name: content for name, content in files_of(out).items() if is_final(name)}
    for name, content in found.items():
        assert content == whole[name], f"{name} has {len(content)} bytes of {len(whole[name])}"
    if (out / "model").exists() or any((out / name).exists() for name in CONFIGURATIONS):
        missing = {name for name in whole if is_final(name) and name != "trainer_state.json"} - found.keys()
        assert not missing, f"missing: {missing}"


def reason_of(error: BaseException) -> BaseException:
    """The error that ended a command, which prints it and exits."""
    return error.__context__ if isinstance(error, SystemExit) else error


def check_full_disk(write: Write, out: Path, whole: dict[str, bytes]) -> None:
    """If the largest file does not fit, the command names it in one line, and leaves no half-written file."""
    child = os.fork()
    if child == 0:
        runs.limit_file_size(max(map(len, whole.values())) // 2)
        try:
            write(out)
        except (FullDiskError, SystemExit) as error:
            text = str(reason_of(error))
            is_told = str(out) in text and "could not be written: File too large (" in text and "\n" not in text
            os._exit(not is_told)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "a full disk was not told"
    check_whole_or_absent(out, whole)
    assert not [name for name in files_of(out) if HALF_WRITTEN in name]


def remove_output(out: Path) -> None:
    """Leaves only what a killed run leaves, and the journals."""
    for name in filter(is_final, files_of(out)):
        (out / name).unlink()
    shutil.rmtree(out / "model", ignore_errors=True)


def check_refused(write: Write, out: Path) -> None:
    """While another process writes the same output, the command ends at once and writes nothing."""
    with (
        locked_by_another_process(out),
        locked_by_another_process(out / "recipes"),
        locked_by_another_process(out / f"{HALF_WRITTEN}model"),
    ):
        begin = time.monotonic()
        try:
            write(out)
        except (ValueError, SystemExit) as error:
            assert "another run writes into this folder: process" in str(reason_of(error)), reason_of(error)
        else:
            raise AssertionError("a second run was not refused")
        assert not any(map(is_final, files_of(out))) and time.monotonic() - begin < 1


def kill_at_random_moments(name: str, root: Path) -> None:
    """Runs a command beside another process, then many times, killed at moments drawn over the time that it takes."""
    write, out = WRITERS[name](root), root / "out"
    if name not in LOCKED_BY_THE_CALLER:
        check_refused(write, out)
    for _ in range(2):  # the first time is longer, because libraries are imported
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        begin = time.monotonic()
        write(out)
        seconds = time.monotonic() - begin
    whole, draw, num_killed = files_of(out), random.Random(name), 0
    remove_output(out)
    check_full_disk(write, out, whole)
    for _ in range(NUM_KILLS):
        remove_output(out)
        child = os.fork()
        if child == 0:
            try:
                write(out)
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        num_killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        check_whole_or_absent(out, whole)
    remove_output(out)
    write(out)
    assert files_of(out).keys() == whole.keys(), "files of the killed runs are left"
    print(json.dumps({"command": name, "seconds": seconds, "killed": num_killed}))
