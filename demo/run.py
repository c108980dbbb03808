"""The demo: trains a small SQ-LLaVA from scratch in minutes on a CPU, and a LLaVA for comparison.

    python -m demo.run                                          writes to runs/demo
    python -m demo.run --seed 1 --output-dir runs/demo-seed1    uses another seed
    python -m demo.run --quick --output-dir runs/quick          runs a few training steps, to see that it works

The steps are: write the data, pretrain a tiny CLIP and a tiny Llama, train both stages with `train_sft.py`, merge,
evaluate, report. A LLaVA of the same parts and budget is trained at the same time. Each step runs in its own process
and writes a note when it is complete, so the demo resumes after the last complete step when it is run again. Where two
steps run at the same time, each has half of the cores. The models are small, so this is faster than one step after the
other on all cores.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

from sq_llava.stopping import STOPPED, one_line_when_stopped, stop_at_once


if __name__ == "__main__":  # before the imports below, which take seconds
    signal.signal(signal.SIGINT, stop_at_once)

from demo.data import caption_rows, provide_images, questions_and_answers, read_questions, write_data
from sq_llava.console import errors_in_one_line
from sq_llava.output import output_lock, write_json, write_text
from sq_llava.resources import find_resource


RECIPES = find_resource("recipes") / "easy-vqa"
# LLaVA's changes to the recipes. The learning rates were chosen for SQ-LLaVA and are kept, with one exception: LLaVA
# trains its language model in full, with half of LoRA's learning rate.
PLAIN = {"prototype_variant": "none", "projector_type": "linear", "vision_lora_r": 0}
LLAVA = {
    "stage1": PLAIN,
    "stage2": PLAIN | {"full_finetuning": True, "lora_r": 0, "self_question_ratio": 0.0, "learning_rate": 1e-3},
}


def make_data(run: Path, seed: int, quick: bool) -> None:
    write_data(run / "data", seed=seed)
    provide_images(run / "images")


def read_data(run: Path, name: str) -> list[dict]:
    return json.loads((run / "data" / f"{name}.json").read_text())


def read_texts(run: Path) -> tuple[list[str], list[str]]:
    """The questions of stage 2, and the texts with all words that the base models know."""
    questions = [question for question, _ in questions_and_answers(read_data(run, "stage2_train"))]
    captions = [row["conversations"][1]["value"] for row in read_data(run, "stage1_train")]
    return questions, [*captions, *questions, "yes", "no"]


def pretraining_settings(seed: int, quick: bool) -> dict:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"seed": seed, "device": device, **({"num_steps": 5} if quick else {})}


def make_clip(run: Path, seed: int, quick: bool) -> None:
    from demo.base_models import build_tokenizer, pretrain_clip

    holdout_images = {row["image"] for row in read_data(run, "holdout")}
    holdout = [row for row in caption_rows(read_questions("train")) if row["image"] in holdout_images]
    tokenizer = build_tokenizer(read_texts(run)[1], adds_end=True)
    accuracy = pretrain_clip(
        read_data(run, "stage1_train"), holdout, tokenizer, run / "clip", **pretraining_settings(seed, quick)
    )
    print(f"CLIP picks the right one of 24 captions for {accuracy:.1%} of the held-out images")


def make_llama(run: Path, seed: int, quick: bool) -> None:
    from demo.base_models import build_tokenizer, pretrain_llama

    questions, texts = read_texts(run)
    tokenizer = build_tokenizer(texts, adds_end=False)
    accuracy = pretrain_llama(questions, tokenizer, run / "llama", **pretraining_settings(seed, quick))
    print(f"Llama answers {accuracy:.1%} of the questions about written scenes correctly")


def train_stage(run: Path, seed: int, quick: bool, stage: str, out: Path | None = None, **more) -> None:
    """
    Trains a stage with its recipe.

    Args:
        run: Folder of the demo.
        seed: Random seed.
        quick: Train three steps only.
        stage: `"stage1"` or `"stage2"`.
        out: Folder for the stages, if they are not those of SQ-LLaVA. Default: `run`.
        more: Settings that replace those of the recipe.
    """
    import train_sft
    from sq_llava.training.settings import parse_recipe

    out = out or run
    settings = {
        "seed": seed,
        "output_dir": out / stage,
        "dataset_path": run / "data" / f"{stage}_train.json",
        "image_root": run / "images",
    }
    if stage == "stage1":
        settings |= {"vision_model_name_or_path": run / "clip", "text_model_name_or_path": run / "llama"}
    else:
        settings |= {"model_name_or_path": out / "stage1"}
    settings |= more
    if quick:
        settings |= {"max_steps": 3, "logging_steps": 1}
    train_sft.train(*parse_recipe(RECIPES / f"{stage}.yaml", **settings))


def merge_and_evaluate(run: Path, seed: int, quick: bool) -> None:
    """Merges stage 2 into a plain checkpoint and evaluates it."""
    from demo.evaluate import evaluate
    from sq_llava.checkpoints.load import merge_adapter

    merge_adapter(str(run / "stage2"), str(run / "model"))
    limits = {"max_rows": 200, "num_images": 12} if quick else {}
    evaluate(run / "model", run / "data", run / "evaluation.json", seed, **limits)


def make_llava(run: Path, seed: int, quick: bool) -> None:
    """Trains a LLaVA of the same parts on the same rows for the same number of steps, and evaluates it."""
    from demo.evaluate import evaluate_answers

    folder = run / "llava"
    for stage, settings in LLAVA.items():
        train_stage(run, seed, quick, stage, folder, **settings)
    accuracy = evaluate_answers(folder / "stage2", run / "data", folder, max_rows=200 if quick else None)
    write_json(folder / "evaluation.json", accuracy)


# The function of each step, and what it writes.
STEPS = {
    "data": (make_data, ["data", "images"]),
    "CLIP": (make_clip, ["clip"]),
    "Llama": (make_llama, ["llama"]),
    "stage 1": (partial(train_stage, stage="stage1"), ["stage1"]),
    "stage 2": (partial(train_stage, stage="stage2"), ["stage2"]),
    "evaluation": (merge_and_evaluate, ["model", "evaluation", "evaluation.json"]),
    "LLaVA": (make_llava, ["llava"]),
}
# Each round has steps that run one after another, and a step that runs at the same time as these.
ROUNDS = [(["data"], None), (["CLIP"], "Llama"), (["stage 1", "stage 2", "evaluation"], "LLaVA")]


def note_of(run: Path, name: str) -> Path:
    return run / "steps" / f"{name.replace(' ', '-')}.json"


def work(name: str, run: Path, seed: int, quick: bool, log: Path | None, begin: float) -> None:
    """Runs a step in its process and writes its note. Its output goes to `log`, if there is one."""
    import torch

    from demo.processes import end_with_parent, threads_of_each

    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C stops the parent too, which ends this process
    if log is not None:
        with log.open("w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
    torch.set_num_threads(threads_of_each())
    STEPS[name][0](run, seed, quick)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts = {"begin": begin, "seconds": time.time() - begin, "peak_memory_mib": peak / unit}
    note = note_of(run, name)
    note.parent.mkdir(parents=True, exist_ok=True)
    os.sync()  # a power failure must not damage the output of a step that counts as complete
    write_text(note, json.dumps(facts) + "\n")


class Step:
    """A step in its own process. It is not started if its note says that it is complete."""

    def __init__(self, name: str, run: Path, seed: int, quick: bool, log: Path | None = None):
        from demo.processes import training_context

        self.name, self.note, self.log, self.process = name, note_of(run, name), log, None
        if self.note.is_file():
            print(f"=== {name}: already complete")
            return
        for output in STEPS[name][1]:
            shutil.rmtree(run / output, ignore_errors=True)
        print(f"=== {name}" + (f" (at the same time; its output goes to {log})" if log else ""), flush=True)
        arguments = (name, run, seed, quick, log, time.time())
        self.process = training_context().Process(target=work, args=arguments)
        self.process.start()

    def end(self) -> dict:
        """Waits until the step is complete and returns its note."""
        if self.process is not None:
            if self.log is not None and self.process.is_alive():
                print(f"=== {self.name}: waiting until it is complete", flush=True)
            self.process.join()
            if self.process.exitcode != 0:
                where = f"in {self.log}" if self.log else "above"
                raise SystemExit(
                    f"Step '{self.name}' failed. Its error is {where}. Run the demo again to resume there."
                )
        return json.loads(self.note.read_text())

    def stop(self) -> None:
        if self.process is not None and self.process.is_alive():
            self.process.terminate()


def run_steps(run: Path, seed: int, quick: bool) -> dict[str, dict]:
    """Runs all steps. Returns the note of each: when it began, its seconds and its peak memory."""
    begun = []

    def begin(name: str, log: Path | None = None) -> Step:
        begun.append(Step(name, run, seed, quick, log))
        return begun[-1]

    facts = {}
    try:
        for names, beside in ROUNDS:
            other = begin(beside, run / f"{beside}.log") if beside else None
            facts |= {name: begin(name).end() for name in names}
            if other is not None:
                facts[beside] = other.end()
    finally:
        for step in begun:
            step.stop()
    return facts


def check_settings(run: Path, settings: list[str]) -> None:
    """Writes down the settings of a new run. A run with other settings is not resumed."""
    note = run / "settings.txt"
    text = f"{' '.join(settings)}; steps: {', '.join(STEPS)}"
    if note.is_file() and note.read_text().strip() != text:
        raise SystemExit(
            f"{run} has a run with other settings ({note.read_text().strip()}). Choose another --output-dir, or "
            "remove this run with `make demo-clean`."
        )
    write_text(note, text + "\n")


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="Random seed.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"), help="Folder of the run: %(default)s.")
    parser.add_argument("--quick", action="store_true", help="Run a few training steps, to see that it works.")
    args = parser.parse_args(args)
    run = args.output_dir
    with errors_in_one_line(), output_lock(run):
        make(run, args.seed, args.quick)


def make(run: Path, seed: int, quick: bool) -> None:
    """Runs all steps that are not complete, and writes the report."""
    check_settings(run, ["--seed", str(seed)] + ["--quick"] * quick)
    try:
        steps = run_steps(run, seed, quick)
    except KeyboardInterrupt:
        print("Stopped. Run the demo again to resume after the last complete step.", file=sys.stderr)
        raise SystemExit(STOPPED) from None

    from demo.report import write_report

    write_report(run, steps, seed)
    print(f"=== The report is {run / 'report.md'}")
    print((run / "report.md").read_text())


if __name__ == "__main__":
    with one_line_when_stopped():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        main()
