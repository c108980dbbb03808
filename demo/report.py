"""Writes the demo's report: `report.md`, `report.json`, the loss curves and a contact sheet.

The demo writes it at its end. This command writes it again from the same results:

    python -m demo.report --run runs/demo
"""

import argparse
import json
import platform
from pathlib import Path

import matplotlib
import torch
import transformers
from PIL import Image

from demo.processes import threads_of_each
from sq_llava.evaluation.easy_vqa import KINDS
from sq_llava.output import write_json, write_text, written_whole


matplotlib.use("Agg")
import matplotlib.pyplot as plt


STAGES = {"stage1": "Stage 1: alignment on captions", "stage2": "Stage 2: conversations with self-questions"}


REPORT = """# A small SQ-LLaVA on easy-VQA

A tiny CLIP and a tiny Llama were pretrained. SQ-LLaVA was built from them and trained in both stages. Seed {seed},
{device}, {version_list}. The whole demo took {seconds:.0f} s.

## Answers about unseen images

The table shows exact match on {num_test_questions:,} test questions, with one question per prompt and greedy decoding.
The best blind guess is each question's most frequent answer in training.
[The evaluation report](evaluation/report.md) has every answer.

| kind of question | SQ-LLaVA | LLaVA | best blind guess |
|---|---|---|---|
{accuracy_table}

With a blank image, SQ-LLaVA reaches {blank_image_accuracy:.1%} (on every fourth question, {num_blank_questions:,} in
all). LLaVA has the same CLIP, Llama, rows and number of steps. Its stage 1 trains a linear projector. Its stage 2 also
trains the whole language model.

## Questions that the model asks

The model was asked for {questions_asked} questions about test images, after one answered turn (temperature 1.2,
top-k 300, top-p 0.95). {questions_distinct} are distinct. {questions_valid_share:.1%} are valid: they have a form of
easy-VQA and presume nothing false about the image.

![Unseen test images with answers, the model's questions and its answers to them](contact_sheet.png)

## Losses

![Losses of both stages](losses.png)

## Cost

| step | wall time | peak memory |
|---|---|---|
{step_table}

CLIP and Llama are trained at the same time. LLaVA is trained and evaluated at the same time as stage 1, stage 2 and
the evaluation of SQ-LLaVA.

The model is in `model/`, as a complete checkpoint with its code:

    sq-llava ask IMAGE --model runs/demo/model
"""


def draw_losses(run: Path) -> None:
    """Draws the losses on answers and questions of both stages into `losses.png`."""
    figure, axes = plt.subplots(1, len(STAGES), figsize=(11, 3.8))
    for axis, (stage, title) in zip(axes, STAGES.items()):
        log = json.loads((run / stage / "trainer_state.json").read_text())["log_history"]
        label = "captions" if stage == "stage1" else "answers"
        for key, name in (("loss_answers", label), ("loss_questions", "questions")):
            points = [(entry["step"], entry[key]) for entry in log if key in entry and "train_runtime" not in entry]
            if points:
                axis.plot(*zip(*points), label=name)
        axis.set(title=title, xlabel="optimizer step", ylabel="loss (nats per token)", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    with written_whole(run / "losses.png") as new:
        figure.savefig(new, dpi=110)
    plt.close(figure)


def draw_contact_sheet(run: Path, sheet: list[dict]) -> None:
    """Draws test images with the model's answers, its own questions and its answers to them."""
    figure, axes = plt.subplots(3, 4, figsize=(12, 10.5))
    for axis, entry in zip(axes.flat, sheet):
        with Image.open(entry["image"]) as image:
            axis.imshow(image.convert("RGB"))
        axis.set_axis_off()
        lines = [f"{question}  {answer}" for question, answer in entry["turns"]]
        lines += [f"[vusr] {question}\n          {answer}" for question, answer in entry["own_turns"]]
        axis.text(0, 68, "\n".join(lines), va="top", fontsize=8, wrap=True)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.98, bottom=0.12, hspace=0.5, wspace=0.25)
    with written_whole(run / "contact_sheet.png") as new:
        figure.savefig(new, dpi=110)
    plt.close(figure)


def seconds_of(steps: dict[str, dict]) -> float:
    """The time during which at least one step ran. Some steps run at the same time."""
    total, end = 0.0, 0.0
    for step in sorted(steps.values(), key=lambda step: step["begin"]):
        step_end = step["begin"] + step["seconds"]
        total += max(0.0, step_end - max(end, step["begin"]))
        end = max(end, step_end)
    return total


def write_report(run: Path, steps: dict[str, dict], seed: int) -> None:
    """
    Args:
        run: Folder of the demo.
        steps: `begin` (seconds since the epoch), `seconds` and `peak_memory_mib` of each step.
        seed: Random seed of the run.
    """
    result = json.loads((run / "evaluation.json").read_text())
    draw_losses(run)
    draw_contact_sheet(run, result.pop("contact_sheet"))
    result |= {
        "llava_accuracy": json.loads((run / "llava" / "evaluation.json").read_text()),
        "seed": seed,
        "steps": steps,
        "seconds": seconds_of(steps),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, two processes of {threads_of_each()} thread(s)",
    }
    write_json(run / "report.json", result)
    write_text(run / "report.md", to_markdown(result))


def to_markdown(result: dict) -> str:
    percent = "{:.1%}".format
    rows = [
        ("all", result["test_accuracy"], result["blind_guess_accuracy"]),
        *((kind, result["accuracy_by_kind"][kind], result["blind_guess_by_kind"][kind]) for kind in KINDS),
    ]
    llava = result["llava_accuracy"]
    accuracy_table = "\n".join(
        f"| {kind} | {percent(value)} | {percent(llava[kind])} | {percent(blind)} |" for kind, value, blind in rows
    )
    step_table = "\n".join(
        f"| {name} | {step['seconds']:.0f} s | {step['peak_memory_mib']:,.0f} MiB |"
        for name, step in result["steps"].items()
    )
    version_list = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return REPORT.format(**result, accuracy_table=accuracy_table, step_table=step_table, version_list=version_list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="Folder of the demo.")
    run = parser.parse_args().run
    report = json.loads((run / "report.json").read_text())
    write_report(run, report["steps"], report["seed"])


if __name__ == "__main__":
    main()
