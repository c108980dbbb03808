"""Measures the model of the example and writes `report.md` and `losses.png`.

python -m examples.smollm2.report --run runs/smollm2    writes the report again from the same results
"""

import argparse
import json
import platform
from pathlib import Path

import torch
import transformers
from PIL import Image

from demo.report import draw_losses
from examples.smollm2.data import DESCRIBE
from sq_llava import load
from sq_llava.evaluation.report import as_text
from sq_llava.output import write_text
from sq_llava.training.text_probe import METRIC


BATCH_SIZE = 16
# The tables show every second photograph and every eighth part of one.
SHOWN_WHOLE, SHOWN_PARTS = 2, 8

REPORT = """# SmolLM2-135M and {num_pictures} pictures

SmolLM2-135M-Instruct (real weights, from 4 bits) and a small CLIP, which was trained here from scratch, became an
SQ-LLaVA. Stage 1 was trained on captions of {num_pictures} pictures: {num_photographs} photographs of scikit-image and
parts of them. Stage 2 was trained on conversations about the {num_photographs} whole photographs, with {num_questions}
questions. All texts were written for this example. Seed {seed}, {versions}.

**So little data teaches no vision in general.** The model can learn which answer belongs to which of these pictures.
Nothing in the data lets it learn what other pictures show; the last tables show what it says about some.

## Losses

![Losses of both stages](losses.png)

The CLIP picks the right one of {num_pictures} captions for {clip_accuracy:.0%} of the pictures (a guess: {guess:.0%}).

## Does it look at the picture?

{num_asked} of the {num_questions} questions of stage 2, asked one at a time and answered greedily. An answer counts if
it is exactly the one that was written. The pictures are shown without the cuts and changes of brightness that training
made.

| picture | right answers |
|---|---|
| its own | {own:.1%} |
| that of another question | {other:.1%} |
| a gray one | {gray:.1%} |

The difference between the first row and the others is what the picture adds to the question. With so few questions, a
difference of two or three answers can be chance.

## What SmolLM2 loses

`text_probe` in `stage2.yaml`: the mean loss of an answer token on {probe_rows} text-only prompts. The answers are
those that SmolLM2 itself gave before any training, decoded greedily. So a rise shows how far the model has moved from
itself, not how much knowledge it has lost.

| | mean loss of a token |
|---|---|
| before stage 2 | {loss_before:.3f} |
| after stage 2 | {loss_after:.3f} |

Text prompts after stage 2, answered without a picture:

{text_table}

## Photographs that both stages were trained on

The reference is what was written for the data. After the first answer, the model asks a question itself
(`[vusr]`; temperature 1.2, top-p 0.95, top-k 300) and answers it.

{seen_table}

## Parts of these photographs

Stage 1 has the captions of these parts, stage 2 has no questions about them.

{parts_table}

## Photographs that it has never seen

{unseen_table}

## Time

All steps took {minutes:.0f} minutes. `CPU seconds` is the processor time of this run alone; other work on the machine
makes a step take longer.

{step_table}
"""


def evaluate(run: Path, seed: int, limit: int | None = None) -> dict:
    """
    Answers and asks with the merged model.

    Args:
        run: Folder of the run, with `model/` and `data/`.
        seed: Random seed of the asked questions.
        limit: Use at most this many pictures of each table, and as many questions.
    """
    assistant = load(str(run / "model"))
    pictures = json.loads((run / "data" / "pictures.json").read_text())
    for picture in pictures:
        picture["question"], picture["reference"] = picture["questions"][0]
    trained = [picture for picture in pictures if not picture.get("unseen")]
    whole = [picture for picture in trained if picture["box"] is None]
    parts = [picture for picture in trained if picture["box"]][::SHOWN_PARTS]
    unseen = [picture for picture in pictures if picture.get("unseen")]
    probe = [json.loads(line) for line in (run / "data" / "text_probe.jsonl").read_text().splitlines()]
    shown = probe[:: max(1, len(probe) // 6)][:limit]
    said = assistant.answer_batch([([], row["prompt"]) for row in shown], max_new_tokens=40)
    return {
        "num_pictures": len(trained),
        "num_photographs": len(whole),
        "num_questions": sum(len(picture["questions"]) for picture in whole),
        **measure_answers(assistant, whole, run / "data", limit),
        "text": [{**row, "said": text} for row, text in zip(shown, said)],
        "seen": look(assistant, whole[::SHOWN_WHOLE][:limit], seed),
        "parts": look(assistant, parts[:limit], seed),
        "unseen": look(assistant, unseen[:limit], seed),
    }


def measure_answers(assistant, pictures: list[dict], data: Path, limit: int | None) -> dict[str, float]:
    """The share of right answers to every other question: with its picture, that of another one, and a gray one."""
    Image.new("RGB", (128, 128), "gray").save(data / "gray.png")
    asked = [(picture["image"], *pair) for picture in pictures for pair in picture["questions"]]
    asked = asked[::2][:limit]
    own = [image for image, _, _ in asked]
    # Far enough away to show another photograph.
    shift = len(own) // 2
    shares = {"num_asked": len(asked)}
    shown = {"own": own, "other": own[shift:] + own[:shift], "gray": [data / "gray.png"] * len(own)}
    for name, images in shown.items():
        requests = [(image, question) for image, (_, question, _) in zip(images, asked)]
        answers = []
        for begin in range(0, len(requests), BATCH_SIZE):
            answers += assistant.answer_batch(requests[begin : begin + BATCH_SIZE], max_new_tokens=24)
        shares[name] = sum(said.strip() == answer for said, (_, _, answer) in zip(answers, asked)) / len(asked)
    return shares


def look(assistant, pictures: list[dict], seed: int) -> list[dict]:
    """Describes each picture, answers its first question, asks a question and answers it."""
    images, questions = ([picture[name] for picture in pictures] for name in ("image", "question"))
    described = assistant.answer_batch([(image, DESCRIBE) for image in images], max_new_tokens=40)
    answers = assistant.answer_batch(list(zip(images, questions)), max_new_tokens=24)
    histories = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in zip(questions, answers)
    ]
    asked = assistant.ask_batch(images, histories, max_new_tokens=24, seeds=[seed] * len(images))
    requests = [
        (image, [*history, {"role": "user", "content": question}])
        for image, history, [question] in zip(images, histories, asked)
    ]
    own_answers = assistant.answer_batch(requests, max_new_tokens=24)
    said = zip(pictures, described, answers, asked, own_answers)
    return [
        {**picture, "described": description, "answer": answer, "asked": question, "own_answer": own_answer}
        for picture, description, answer, [question], own_answer in said
    ]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(line)} |" for line in [header, *rows]]
    return "\n".join([lines[0], f"|{'---|' * len(header)}", *lines[1:]])


def looks_table(looks: list[dict]) -> str:
    header = ["photograph", "description", "question and answer", "the model's own question and answer"]
    rows = [
        [
            f"`{seen['file']}`: {seen['caption']}",
            as_text(seen["described"]),
            f"{seen['question']} **{as_text(seen['answer'])}** (reference: {seen['reference']})",
            f"{as_text(seen['asked'])} **{as_text(seen['own_answer'])}**",
        ]
        for seen in looks
    ]
    return table(header, rows)


def time_of(name: str, step: dict) -> list[str]:
    return [name, f"{step['seconds']:,}", f"{step['cpu_seconds']:,}"]


def write_report(run: Path, steps: dict[str, dict], seed: int) -> None:
    """
    Args:
        run: Folder of the run.
        steps: Seconds and results of each step, as `run_steps` returns them.
        seed: Random seed of the run.
    """
    draw_losses(run)
    result = json.loads((run / "evaluation.json").read_text())
    log = json.loads((run / "stage2" / "trainer_state.json").read_text())["log_history"]
    probed = [entry[METRIC] for entry in log if METRIC in entry]
    versions = {"Python": platform.python_version(), "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__}
    text_rows = [[row["prompt"], as_text(row["completion"]), as_text(row["said"])] for row in result["text"]]
    write_text(
        run / "report.md",
        REPORT.format(
            **result,
            seed=seed,
            versions=", ".join(f"{name} {version}" for name, version in versions.items()),
            minutes=sum(step["seconds"] for step in steps.values()) / 60,
            clip_accuracy=steps["CLIP"]["accuracy"],
            guess=1 / result["num_pictures"],
            probe_rows=steps["text probe"]["rows"],
            loss_before=probed[0],
            loss_after=probed[-1],
            text_table=table(["prompt", "SmolLM2 before", "after stage 2"], text_rows),
            seen_table=looks_table(result["seen"]),
            parts_table=looks_table(result["parts"]),
            unseen_table=looks_table(result["unseen"]),
            step_table=table(["step", "seconds", "CPU seconds"], [time_of(*item) for item in steps.items()]),
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/smollm2"), help="Folder of the run.")
    args = parser.parse_args()
    seed = json.loads((args.run / "settings.json").read_text())["seed"]
    write_report(args.run, json.loads((args.run / "steps.json").read_text()), seed)


if __name__ == "__main__":
    main()
