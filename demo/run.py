"""The demo: a small SQ-LLaVA from nothing to asking and answering, in minutes on a CPU, and a LLaVA beside it.

    python -m demo.run                                          into runs/demo
    python -m demo.run --seed 1 --output-dir runs/demo-seed1    another seed
    python -m demo.run --quick --output-dir runs/quick          a few training steps: only to see that it runs

Steps: write the data, pretrain a tiny CLIP and a tiny Llama, train both stages with `train_sft.py`, merge, evaluate,
report; and at the same time the same for a LLaVA of the same parts and budget. Each step runs in a process of its own
and leaves a note when it is complete: run again, the demo resumes after the last complete step. Two processes with
half of the cores each are faster than one after the other on all cores, because the models are small.
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
from sq_llava.resources import find_resource


RECIPES = find_resource("recipes") / "easy-vqa"
# What LLaVA has in place of the recipes' settings. The learning rates were chosen for SQ-LLaVA and stay, but for a
# language model that is trained in full, which has half of LoRA's.
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
    """The questions of stage 2, and the texts whose words the base models know."""
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
    print(f"CLIP: {accuracy:.1%} of held-out images are closest to their own caption, of 24")


def make_llama(run: Path, seed: int, quick: bool) -> None:
    from demo.base_models import build_tokenizer, pretrain_llama

    questions, texts = read_texts(run)
    tokenizer = build_tokenizer(texts, adds_end=False)
    accuracy = pretrain_llama(questions, tokenizer, run / "llama", **pretraining_settings(seed, quick))
    print(f"Llama: {accuracy:.1%} of questions about written scenes are answered right")


def train_stage(run: Path, seed: int, quick: bool, stage: str, out: Path | None = None, **more) -> None:
    """
    Trains a stage: the recipe, and what it leaves open.

    Args:
        out (`Path`, *optional*): For the stages of another system, whose settings are `more`; default: `run`.
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
    """Makes the plain checkpoint and measures it."""
    from demo.evaluate import evaluate
    from sq_llava.checkpoints.load import merge_adapter

    merge_adapter(str(run / "stage2"), str(run / "model"))
    limits = {"max_rows": 200, "num_images": 12} if quick else {}
    evaluate(run / "model", run / "data", run / "evaluation.json", seed, **limits)


def make_llava(run: Path, seed: int, quick: bool) -> None:
    """A LLaVA of the same parts, on the same rows, in as many steps."""
    from demo.evaluate import evaluate_answers

    folder = run / "llava"
    for stage, settings in LLAVA.items():
        train_stage(run, seed, quick, stage, folder, **settings)
    accuracy = evaluate_answers(folder / "stage2", run / "data", folder, max_rows=200 if quick else None)
    (folder / "evaluation.json").write_text(json.dumps(accuracy, indent=2) + "\n")


# What each step runs, and what it writes.
STEPS = {
    "data": (make_data, ["data", "images"]),
    "CLIP": (make_clip, ["clip"]),
    "Llama": (make_llama, ["llama"]),
    "stage 1": (partial(train_stage, stage="stage1"), ["stage1"]),
    "stage 2": (partial(train_stage, stage="stage2"), ["stage2"]),
    "evaluation": (merge_and_evaluate, ["model", "evaluation", "evaluation.json"]),
    "LLaVA": (make_llava, ["llava"]),
}
# Steps that come one after another, and the one that runs at the same time.
ROUNDS = [(["data"], None), (["CLIP"], "Llama"), (["stage 1", "stage 2", "evaluation"], "LLaVA")]


def note_of(run: Path, name: str) -> Path:
    return run / "steps" / f"{name.replace(' ', '-')}.json"


def work(name: str, run: Path, seed: int, quick: bool, log: Path | None, begin: float) -> None:
    """Body of a step's process."""
    import torch

    from demo.processes import end_with_parent, threads_of_each

    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, which Ctrl-C stops too, ends this process
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
    note.write_text(json.dumps(facts) + "\n")


class Step:
    """A step in a process of its own, unless its note says that it is complete; `log` takes its output."""

    def __init__(self, name: str, run: Path, seed: int, quick: bool, log: Path | None = None):
        from demo.processes import training_context

        self.name, self.note, self.log, self.process = name, note_of(run, name), log, None
        if self.note.is_file():
            print(f"=== {name}: done before")
            return
        for output in STEPS[name][1]:
            shutil.rmtree(run / output, ignore_errors=True)
        print(f"=== {name}" + (f", at the same time: its output goes to {log}" if log else ""), flush=True)
        arguments = (name, run, seed, quick, log, time.time())
        self.process = training_context().Process(target=work, args=arguments)
        self.process.start()

    def end(self) -> dict:
        """Waits for it; returns the note."""
        if self.process is not None:
            if self.log is not None and self.process.is_alive():
                print(f"=== {self.name}: waiting for its end", flush=True)
            self.process.join()
            if self.process.exitcode != 0:
                where = self.log or "above"
                raise SystemExit(f"Step '{self.name}' failed, see {where}. Run the demo again to resume there.")
        return json.loads(self.note.read_text())

    def stop(self) -> None:
        if self.process is not None and self.process.is_alive():
            self.process.terminate()


def run_steps(run: Path, seed: int, quick: bool) -> dict[str, dict]:
    """What each step took."""
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
    """Notes the settings of a new run, and refuses to resume one with other settings."""
    note = run / "settings.txt"
    text = f"{' '.join(settings)}; steps: {', '.join(STEPS)}"
    if note.is_file() and note.read_text().strip() != text:
        raise SystemExit(
            f"{run} holds a run with other settings ({note.read_text().strip()}): give another --output-dir, or "
            "remove it (make demo-clean)."
        )
    run.mkdir(parents=True, exist_ok=True)
    note.write_text(text + "\n")


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--quick", action="store_true", help="a few training steps: only to see that it runs")
    args = parser.parse_args(args)
    run = args.output_dir
    settings = ["--seed", str(args.seed)] + ["--quick"] * args.quick
    check_settings(run, settings)
    try:
        steps = run_steps(run, args.seed, args.quick)
    except KeyboardInterrupt:
        print("Stopped. Run the demo again to resume after the last complete step.", file=sys.stderr)
        raise SystemExit(STOPPED) from None

    from demo.report import write_report

    write_report(run, steps, args.seed)
    print(f"=== Report: {run / 'report.md'}")
    print((run / "report.md").read_text())


if __name__ == "__main__":
    with one_line_when_stopped():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        main()
