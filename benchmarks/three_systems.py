"""LLaVA, MiniGPT-4 and SQ-LLaVA on easy-VQA: tiny models, trained on the same rows for the same number of steps.

    python -m benchmarks.three_systems            # after `make demo`; about half an hour on two cores

All start from the Llama of `make demo`. LLaVA and SQ-LLaVA use its CLIP; MiniGPT-4 uses a BLIP-2 that was trained on
the same captions for as long. Each trains both stages of recipes/easy-vqa with the changes in `SYSTEMS`. The learning
rates were chosen for SQ-LLaVA and are the same for all. Only a language model that is trained in full has half of
LoRA's rate. Nothing was chosen on test questions. All use the Llama's prompt, because its vocabulary lacks MiniGPT-4's
markers.

A finished run is a file in `--work`. The same command later runs only the missing runs. The result does not say which
system is better at full size, with other towers, data and budgets.
"""

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import common
from benchmarks.ablation import require_base, train
from demo.blip2 import make_blip2
from demo.data import blind_guess, write_data
from demo.evaluate import BLANK_SHARE, measure_answers, measure_blank
from demo.run import LLAVA, PLAIN
from sq_llava import load
from sq_llava.evaluation import easy_vqa
from sq_llava.evaluation.easy_vqa import KINDS
from sq_llava.evaluation.run import Evaluation, read_examples
from sq_llava.training.adapter import count_parameters


@dataclass(frozen=True)
class System:
    """A system: the parts that it trains, and the changes of its stages to the demo's recipes."""

    trains: str
    blip2: bool = False
    stage1: dict = field(default_factory=dict)
    stage2: dict = field(default_factory=dict)


SYSTEMS = {
    "LLaVA": System(
        "projector; then projector and language model in full",
        stage1=LLAVA["stage1"],
        stage2=LLAVA["stage2"],
    ),
    "MiniGPT-4": System(
        "projector, in both stages",
        blip2=True,
        stage1=PLAIN,
        stage2=PLAIN | {"lora_r": 0, "self_question_ratio": 0.0},
    ),
    "SQ-LLaVA": System("ViT-LoRA, prototype extractor and projector; then LLM-LoRA and [vusr] too"),
}


def run(name: str, seed: int, arguments) -> dict:
    """Trains both stages of a system and evaluates it on the test questions."""
    system, folder = SYSTEMS[name], arguments.work / f"seed-{seed}"
    note = folder / f"{name}-{arguments.stage1_steps}-{arguments.steps}.json"
    if note.is_file():
        return json.loads(note.read_text())
    data = folder / "data"
    write_data(data, seed=seed)
    vision = arguments.work / "blip2" if system.blip2 else arguments.base / "clip"
    parts = {"vision_model_name_or_path": vision, "text_model_name_or_path": arguments.base / "llama"}
    if system.blip2:
        parts["qformer_model_name_or_path"] = vision
    stage1, stage2 = (folder / f"{name}-{stage}" for stage in ("stage1", "stage2"))
    begin = time.time()
    first = train(
        "stage1", seed, arguments.stage1_steps, output_dir=stage1, dataset_path=data / "stage1_train.json",
        **parts, **system.stage1,
    )  # fmt: skip
    trainer = train(
        "stage2", seed, arguments.steps, output_dir=stage2, dataset_path=data / "stage2_train.json",
        model_name_or_path=stage1, **system.stage2,
    )  # fmt: skip
    seconds = time.time() - begin
    trained = [sum(trained for trained, _ in count_parameters(t.model).values()) for t in (first, trainer)]
    assistant = load(str(stage2))
    examples = read_examples(easy_vqa.TASK, Evaluation("", ["easy_vqa"], str(data), data))
    examples = examples[:: arguments.test_stride]
    result = {
        "seed": seed,
        "trained_parameters": trained,
        "image_tokens": assistant.processor.image_seq_length,
        "training_seconds": seconds,
        "num_questions": len(examples),
        "accuracy": measure_answers(assistant, examples, folder / f"{name}-answers"),
        "blank_image_accuracy": measure_blank(assistant, examples[::BLANK_SHARE], folder / f"{name}-blank"),
    }
    note.write_text(json.dumps(result, indent=1) + "\n")
    return result


def to_markdown(report: dict) -> str:
    rows, trained = [], []
    for name, system in SYSTEMS.items():
        own = report["runs"][name]
        accuracies = [run["accuracy"]["all"] for run in own]
        numbers = "; ".join(f"{number:,}" for number in own[0]["trained_parameters"])
        trained.append([name, system.trains, numbers, own[0]["image_tokens"]])
        cells = [f"**{name}**", f"**{statistics.fmean(accuracies):.1%}**"]
        cells += [f"{100 * min(accuracies):.1f} to {100 * max(accuracies):.1f}"]
        cells += [f"{statistics.fmean(run['accuracy'][kind] for run in own):.1%}" for kind in KINDS]
        rows.append([*cells, f"{statistics.fmean(run['blank_image_accuracy'] for run in own):.1%}"])
    return common.text(
        "# Three systems on easy-VQA: tiny models at one budget",
        f"Stage 1 has {report['stage1_steps']} steps with 64 captions each, stage 2 has {report['steps']} steps with "
        f"16 conversations each. The {report['num_questions']:,} test questions are each asked alone. The best guess "
        f"without an image reaches {report['blind_guess']:.1%}. Accuracy is the mean of the seeds "
        f"{', '.join(map(str, report['seeds']))}:",
        common.table(["", "accuracy", "lowest to highest seed", *KINDS, "blank image"], rows),
        "The parts that each system trains:",
        common.table(["", "trained parts", "trained parameters, stage 1; 2", "tokens per image"], trained, left=2),
        "Only SQ-LLaVA trains its vision tower, so the table compares recipes. The effect of its prototypes and "
        "questions by themselves is in `ablation`.",
    )


def main() -> None:
    arguments = common.parse_arguments(
        __doc__,
        base=("runs/demo", "Folder of `make demo`."),
        work=("runs/three_systems", "Folder for the finished runs."),
        num_seeds=(3, "Number of seeds."),
        steps=(120, "Number of steps of stage 2."),
        stage1_steps=(100, "Number of steps of stage 1."),
        blip2_steps=(900, "Number of steps of BLIP-2's pretraining."),
        test_stride=(4, "Evaluate on every N-th test question."),
    )
    if arguments.quick:
        arguments.work, arguments.num_seeds, arguments.test_stride = "runs/three_systems_quick", 1, 40
        arguments.steps = arguments.stage1_steps = arguments.blip2_steps = 2
    arguments.base, arguments.work = Path(arguments.base), Path(arguments.work)
    require_base(arguments.base, "clip", "llama", "data")
    make_blip2(arguments.base / "data", arguments.work / "blip2", arguments.blip2_steps)
    seeds = list(range(arguments.num_seeds))
    runs = {name: [] for name in SYSTEMS}
    for seed in seeds:
        for name in SYSTEMS:
            runs[name].append(run(name, seed, arguments))
            print(f"{name}, seed {seed}: {runs[name][-1]['accuracy']['all']:.1%}", flush=True)
    data = arguments.work / "seed-0" / "data"
    asked = json.loads((data / "test.json").read_text())[:: arguments.test_stride]
    report = {
        "seeds": seeds,
        "stage1_steps": arguments.stage1_steps,
        "steps": arguments.steps,
        "num_questions": len(asked),
        "blind_guess": blind_guess(json.loads((data / "stage2_train.json").read_text()), asked)["all"],
        "runs": runs,
    }
    common.save("three_systems", report, to_markdown, arguments)


if __name__ == "__main__":
    main()
