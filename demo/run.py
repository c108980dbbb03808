"""The demo: a small SQ-LLaVA from nothing to asking and answering, in minutes on a CPU.

    python -m demo.run                                          into runs/demo
    python -m demo.run --seed 1 --output-dir runs/demo-seed1    another seed
    python -m demo.run --baseline --output-dir runs/beside      a LLaVA of the same parts and budget beside it
    python -m demo.run --quick --output-dir runs/quick          a few training steps: only to see that it runs

Steps: write the data, pretrain a tiny CLIP and a tiny Llama, train both stages with `train_sft.py`, merge, evaluate,
report. Each step runs in a process of its own and leaves a note when it is complete; run again, the demo goes on
after the last complete step.
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import sys
import time
from functools import partial
from pathlib import Path

from demo.data import caption_rows, image_root, questions_and_answers, read_questions, write_data


RECIPES = Path("recipes/easy-vqa")
# Forked from a server that has imported the libraries, which takes longer than many a step of `--quick`.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["train_sft", "demo.evaluate"])
# What LLaVA has in place of the recipes' settings. The learning rates were chosen for SQ-LLaVA and stay, but for a
# language model that is trained in full, which has half of LoRA's.
PLAIN = {"prototype_variant": "none", "projector_type": "linear", "vision_lora_r": 0}
LLAVA = {
    "stage1": PLAIN,
    "stage2": PLAIN | {"full_finetuning": True, "lora_r": 0, "self_question_ratio": 0.0, "learning_rate": 1e-3},
}


def make_base_models(run: Path, seed: int, quick: bool) -> None:
    """Writes the data, and pretrains the two base models on it."""
    import torch

    from demo.base_models import build_tokenizer, pretrain_clip, pretrain_llama

    paths = write_data(run / "data", seed=seed)
    captions = json.loads(paths["stage1_train"].read_text())
    conversations = json.loads(paths["stage2_train"].read_text())
    holdout_images = {row["image"] for row in json.loads(paths["holdout"].read_text())}
    holdout_captions = [row for row in caption_rows(read_questions("train")) if row["image"] in holdout_images]
    questions = [question for question, _ in questions_and_answers(conversations)]
    texts = [row["conversations"][1]["value"] for row in captions] + questions + ["yes", "no"]
    settings = {"seed": seed, "device": "cuda" if torch.cuda.is_available() else "cpu"}
    settings |= {"num_steps": 5} if quick else {}
    clip_accuracy = pretrain_clip(
        captions, holdout_captions, build_tokenizer(texts, adds_end=True), run / "clip", **settings
    )
    print(f"CLIP: {clip_accuracy:.1%} of held-out images are closest to their own caption, of 24")
    llama_accuracy = pretrain_llama(questions, build_tokenizer(texts, adds_end=False), run / "llama", **settings)
    print(f"Llama: {llama_accuracy:.1%} of questions about written scenes are answered right")


def train_stage(run: Path, seed: int, quick: bool, stage: str, out: Path | None = None, **more) -> None:
    """
    Trains a stage as anybody would: the recipe, and on the command line what it leaves open.

    Args:
        out (`Path`, *optional*): For the stages of another system, whose settings are `more`; default: `run`.
    """
    import train_sft

    out = out or run
    settings = {
        "config": RECIPES / f"{stage}.yaml",
        "seed": seed,
        "output_dir": out / stage,
        "dataset_path": run / "data" / f"{stage}_train.json",
        "image_root": image_root(),
    }
    if stage == "stage1":
        settings |= {"vision_model_name_or_path": run / "clip", "text_model_name_or_path": run / "llama"}
    else:
        settings |= {"model_name_or_path": out / "stage1"}
    settings |= more
    if quick:
        settings |= {"max_steps": 3, "logging_steps": 1}
    train_sft.main([text for name, value in settings.items() for text in (f"--{name}", str(value))])


def merge_and_evaluate(run: Path, seed: int, quick: bool) -> None:
    """Makes the plain checkpoint and measures it."""
    from demo.evaluate import evaluate
    from sq_llava.checkpoint import merge_adapter

    merge_adapter(str(run / "stage2"), str(run / "model"))
    limits = {"max_rows": 200, "num_images": 12} if quick else {}
    evaluate(run / "model", run / "data", run / "evaluation.json", seed, **limits)


def train_and_measure_baseline(run: Path, seed: int, quick: bool) -> None:
    """A LLaVA of the same parts, on the same rows, in as many steps."""
    from demo.evaluate import evaluate_answers

    folder = run / "llava"
    for stage, settings in LLAVA.items():
        train_stage(run, seed, quick, stage, folder, **settings)
    accuracy = evaluate_answers(folder / "stage2", run / "data", folder, max_rows=200 if quick else None)
    (folder / "evaluation.json").write_text(json.dumps(accuracy, indent=2) + "\n")


# What each step runs, and what it writes.
STEPS = {
    "base models": (make_base_models, ["data", "clip", "llama"]),
    "stage 1": (partial(train_stage, stage="stage1"), ["stage1"]),
    "stage 2": (partial(train_stage, stage="stage2"), ["stage2"]),
    "evaluation": (merge_and_evaluate, ["model", "evaluation", "evaluation.json"]),
    "baseline": (train_and_measure_baseline, ["llava"]),
}


def note_of(run: Path, name: str) -> Path:
    return run / "steps" / f"{name.replace(' ', '-')}.json"


def work(name: str, run: Path, seed: int, quick: bool) -> None:
    """Body of a step's process."""
    start = time.time()
    STEPS[name][0](run, seed, quick)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    note_of(run, name).parent.mkdir(parents=True, exist_ok=True)
    note_of(run, name).write_text(json.dumps({"seconds": time.time() - start, "peak_memory_mib": peak / unit}) + "\n")


def run_step(name: str, run: Path, seed: int, quick: bool) -> dict:
    """Runs a step in a child process, unless its note says that it is complete; returns the note."""
    note = note_of(run, name)
    if note.is_file():
        print(f"=== {name}: done before")
        return json.loads(note.read_text())
    for output in STEPS[name][1]:
        shutil.rmtree(run / output, ignore_errors=True)
    print(f"=== {name}", flush=True)
    process = PROCESSES.Process(target=work, args=(name, run, seed, quick))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"The step '{name}' failed, see above. Run the demo again to go on from there.")
    return json.loads(note.read_text())


def check_settings(run: Path, settings: list[str]) -> None:
    """Notes the settings of a new run; one with other settings must not be gone on with."""
    note = run / "settings.txt"
    if note.is_file() and note.read_text().split() != settings:
        raise SystemExit(
            f"{run} holds a run with other settings ({note.read_text().strip()}): give another --output-dir, or "
            "remove it (make demo-clean)."
        )
    run.mkdir(parents=True, exist_ok=True)
    note.write_text(" ".join(settings) + "\n")


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--quick", action="store_true", help="a few training steps: only to see that it runs")
    parser.add_argument("--baseline", action="store_true", help="a LLaVA of the same budget too: four minutes more")
    args = parser.parse_args(args)
    run = args.output_dir
    settings = ["--seed", str(args.seed)] + ["--quick"] * args.quick
    check_settings(run, settings)
    wanted = [name for name in STEPS if args.baseline or name != "baseline"]
    steps = {name: run_step(name, run, args.seed, args.quick) for name in wanted}

    from demo.report import write_report

    write_report(run, steps, args.seed)
    print(f"=== Report: {run / 'report.md'}")
    print((run / "report.md").read_text())


if __name__ == "__main__":
    main()
