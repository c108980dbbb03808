"""What data is worth that a model made of images alone: a fresh stage 2 on it, beside one on people's questions.

    python -m benchmarks.self_training --plan     # what is to do; needs runs/demo, of `make demo`
    python -m benchmarks.self_training --jobs 2   # writes benchmarks/results/self_training.{json,md}

The images are the 200 of easy-VQA's training half that the demo keeps out of both stages: nothing was trained on
their questions. A model asks and answers about them as `sq-llava generate-data self` does; a stage 2 from the demo's
stage 1 trains on what came out, unfiltered and filtered, or on the real questions about the same images, for the same
number of steps; its accuracy is taken on test images. Two models make data: the demo's, and a weak one, whose stage 2
was short and whose answers are often wrong.

A finished run is a JSON file in `--work`; started again, the command does what is missing. "Sure" is 95% a token,
chosen by the answers of the demo's model to its own questions, before anything was trained on them. The balanced sets
were added when the others had been measured.
"""

import argparse
import json
import math
import os
import random
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks import ablation
from benchmarks.ablation import Scale, interval, points, read_note, run_all, score, seed_data, train
from benchmarks.common import RESULTS, write
from demo.data import conversation_rows, image_root
from demo.evaluate import FIRST_QUESTION
from sq_llava.evaluation.questions import AskSettings, captions_of, easy_vqa_figures, read_pictures
from sq_llava.generation.filters import FilterSettings
from sq_llava.generation.self_generation import SelfGeneration, generate
from sq_llava.inference.assistant import Assistant, load


COMMAND = "python -m benchmarks.self_training"
FILTERS = {
    "unfiltered": FilterSettings("off", 0.0, None, None, None, None, None),
    "filtered": FilterSettings(),
    "filtered, balanced": FilterSettings(balance_yes_no=True),
    "filtered, sure": FilterSettings(min_log_probability=math.log(0.95)),
    "filtered, sure, balanced": FilterSettings(min_log_probability=math.log(0.95), balance_yes_no=True),
    "filtered, blank test of each turn": FilterSettings("turn"),
}
# Of the data that a model made, what is trained on.
GENERATORS = {"demo": ["unfiltered", "filtered"], "weak": list(FILTERS)}


@dataclass(frozen=True)
class Task(ablation.Task):
    """One piece of work with a model of the demo."""

    base: str
    seed: int
    budget: int
    weak_steps: int
    num_questions: int
    test_stride: int
    generator: str | None = None
    data: str | None = None

    @property
    def name(self) -> str:
        return f"seed-{self.seed}/" + "-".join(part for part in (self.generator, self.data) if part).replace(", ", "-")

    @property
    def facts(self) -> dict:
        return {name: value for name, value in asdict(self).items() if name != "work"}

    @property
    def scale(self) -> Scale:
        return Scale(self.base, test_stride=self.test_stride, num_images=2)


@dataclass(frozen=True)
class WeakModel(Task):
    """A short stage 2 on the demo's data."""

    def run(self) -> dict:
        data = seed_data(self) / "stage2_train.json"
        return train_and_score(self, data, self.weak_steps, self.work / self.name)


@dataclass(frozen=True)
class Generation(Task):
    """A model makes data, once; each of the `FILTERS` makes a set of it."""

    @property
    def weak_model(self) -> WeakModel:
        return WeakModel(**asdict(self) | {"data": "model"})

    def is_ready(self) -> bool:
        return self.generator == "demo" or self.weak_model.note.is_file()

    def run(self) -> dict:
        folder = self.work / f"{self.name}-data"
        model = f"{self.base}/model" if self.generator == "demo" else str(self.work / self.weak_model.name)
        holdout = str(seed_data(self) / "holdout.json")
        run = SelfGeneration(
            model=model,
            images=holdout,
            image_root=str(image_root()),
            out=folder / "made",
            ask=AskSettings(self.num_questions, FIRST_QUESTION, max_new_tokens=20, seed=self.seed),
            device="cpu",
            batch_size=16,
        )
        start = time.time()
        sets = {}
        for name, filters in FILTERS.items():
            made = generate(replace(run, filters=replace(filters, seed=self.seed)))
            path = data_of(self, name)
            shutil.copyfile(run.out / "data.jsonl", path)
            sets[name] = asdict(made) | quality(path, holdout)
        return {"sets": sets, "generation_seconds": time.time() - start}


@dataclass(frozen=True)
class Training(Task):
    """A stage 2 on real questions, on data that a model made, or none at all; and its accuracy."""

    def is_ready(self) -> bool:
        return self.generator is None or self.generation.note.is_file()

    @property
    def generation(self) -> Generation:
        return Generation(**asdict(self) | {"data": None})

    def run(self) -> dict:
        if self.data == "no stage 2":
            return score(load(f"{self.base}/stage1", device="cpu"), seed_data(self), self.scale)
        data = data_of(self.generation, self.data) if self.generator else self._real_questions()
        with tempfile.TemporaryDirectory() as folder:
            return train_and_score(self, data, self.budget, Path(folder))

    def _real_questions(self) -> Path:
        holdout = json.loads((seed_data(self) / "holdout.json").read_text())
        questions: dict[int, list[tuple[str, str]]] = {}
        for row in holdout:
            question, answer = (turn["value"].removeprefix("<image>\n") for turn in row["conversations"])
            questions.setdefault(int(Path(row["image"]).stem), []).append((question, answer))
        path = self.work / f"seed-{self.seed}" / "real.json"
        path.write_text(json.dumps(conversation_rows(questions, 8, random.Random(self.seed))))
        return path


def data_of(generation: Generation, filters: str) -> Path:
    return generation.work / f"{generation.name}-data" / f"{filters.replace(', ', '-')}.jsonl"


def train_and_score(task: Task, data: Path, steps: int, folder: Path) -> dict:
    start = time.time()
    stage1 = f"{task.base}/stage1"
    trainer = train("stage2", task.seed, steps, output_dir=folder, dataset_path=data, model_name_or_path=stage1)
    seconds = time.time() - start
    assistant = Assistant(trainer.model.merge_and_unload().eval(), trainer.processing_class)
    return score(assistant, seed_data(task), task.scale) | {"training_seconds": seconds}


def quality(data: Path, holdout: str) -> dict:
    """What a set holds: questions that presume nothing false, right answers, the share of "yes"."""
    pictures = read_pictures(holdout, str(image_root()))
    captions = dict(zip((Path(picture.image).stem for picture in pictures), captions_of(pictures), strict=True))
    known = {question for picture in pictures for question, _ in picture.pairs}
    asked, of_row = [], []
    for row in map(json.loads, data.read_text().splitlines()):
        texts = [message["content"][-1]["text"] for message in row["messages"]]
        asked.append({"questions": texts[::2], "answers": texts[1::2], "error": None})
        of_row.append(captions[Path(row["images"][0]).stem])
    answers = [answer for line in asked for answer in line["answers"]]
    yes_no = [answer == "yes" for answer in answers if answer in ("yes", "no")]
    questions = [question for line in asked for question in line["questions"]]
    figures = easy_vqa_figures(asked, of_row, known)
    return figures | {"distinct": len(set(questions)), "yes_of_yes_no": sum(yes_no) / max(1, len(yes_no))}


def list_tasks(arguments: argparse.Namespace) -> list[Task]:
    """Seed by seed: after each, the tables are complete."""
    shared = {"work": arguments.work, "base": str(arguments.base), "budget": arguments.budget}
    shared |= {"weak_steps": arguments.weak_steps, "num_questions": arguments.num_questions}
    shared |= {"test_stride": arguments.test_stride}
    tasks: list[Task] = []
    for seed in arguments.seeds:
        tasks += [WeakModel(**shared, seed=seed, generator="weak", data="model")]
        tasks += [Generation(**shared, seed=seed, generator=generator) for generator in GENERATORS]
        tasks += [Training(**shared, seed=seed, data="real questions")]
        tasks += [
            Training(**shared, seed=seed, generator=generator, data=name)
            for generator, names in GENERATORS.items()
            for name in names
        ]
    return [Training(**shared, seed=arguments.seeds[0], data="no stage 2"), *tasks]


def to_markdown(tasks: list[Task], notes: dict[str, dict]) -> str:
    seeds = sorted({task.seed for task in tasks})
    first = tasks[-1]
    none = notes[tasks[0].name]
    lines = [
        "# What data is worth that a model makes by itself",
        "",
        f"Made by `{COMMAND}`, seeds {', '.join(map(str, seeds))}; torch {torch.__version__}, a CPU thread each run.",
        "",
        "200 images of easy-VQA's training half, of which neither stage of the demo saw a question; "
        f"{first.num_questions} questions an image, filters at their defaults. Each training is {first.budget} steps "
        f"of stage 2 from the demo's stage 1, on batches of 16 conversations. Accuracy: every {first.test_stride}th "
        f"test question ({none['test_questions']:,}), asked alone, greedy, exact match; without a stage 2 it is "
        f"{none['accuracy']:.1%}. Differences are within a seed, in points, with 95% intervals by Student's t; bold "
        "where 0 is outside. Balanced, which was added when the others had been measured, is as many yes as no; sure "
        "is a mean log-probability of log(0.95) and more.",
        "",
        "| trained on | turns | questions valid | answers right | yes, of yes/no | accuracy | beside real | beside "
        "unfiltered |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    accuracies = {
        (task.generator, task.data): [notes[replace(task, seed=seed).name]["accuracy"] for seed in seeds]
        for task in tasks
        if isinstance(task, Training) and task.data != "no stage 2" and task.seed == seeds[0]
    }
    for (generator, data), values in accuracies.items():
        cells = [f"{data}, by the {generator} model" if generator else data]
        cells += _cells_of_set(notes, seeds, generator, data) if generator else ["1,961", "100%", "100%", "49%"]
        cells.append(f"{statistics.fmean(values):.1%} ({100 * min(values):.1f} to {100 * max(values):.1f})")
        for other in ((None, "real questions"), (generator, "unfiltered")):
            is_other = other in accuracies and other != (generator, data)
            differences = [own - beside for own, beside in zip(values, accuracies.get(other, values))]
            cells.append(points(interval(differences)) if is_other else "")
        lines.append("| " + " | ".join(cells) + " |")
    weak = [notes[f"seed-{seed}/weak-model"]["accuracy"] for seed in seeds]
    lines += ["", f"The weak model had {first.weak_steps} steps; its own accuracy is {statistics.fmean(weak):.1%}."]
    return "\n".join([*lines, "", *_left_out(notes, seeds)])


def _cells_of_set(notes: dict[str, dict], seeds: list[int], generator: str, data: str) -> list[str]:
    sets = [notes[f"seed-{seed}/{generator}"]["sets"][data] for seed in seeds]
    turns = f"{statistics.fmean(each['num_kept'] for each in sets):,.0f}"
    cells = [turns]
    for name in ("premise_is_true", "own_answer_is_right", "yes_of_yes_no"):
        values = [each[name] for each in sets if each[name] is not None]  # of no valid question, no answer is right
        cells.append(f"{statistics.fmean(values):.1%}" if values else "")
        if name == "yes_of_yes_no":
            cells[-1] += f" ({100 * min(values):.0f} to {100 * max(values):.0f})"
    return cells


def _left_out(notes: dict[str, dict], seeds: list[int]) -> list[str]:
    lines = ["What each filter left out, of all seeds:", "", "| model | filters | rule | turns |", "|---|---|---|--:|"]
    for generator in GENERATORS:
        for data in list(FILTERS)[1:]:
            counts: dict[str, int] = {}
            for seed in seeds:
                for rule, count in notes[f"seed-{seed}/{generator}"]["sets"][data]["left_out"].items():
                    counts[rule] = counts.get(rule, 0) + count
            lines += [f"| {generator} | {data} | {rule} | {count:,} |" for rule, count in sorted(counts.items())]
    return lines


def write_report(tasks: list[Task], output_dir: Path | None) -> None:
    notes = {task.name: read_note(task) for task in tasks}
    markdown = to_markdown(tasks, notes)
    print(markdown)
    if output_dir is not None:
        runs = {name: {key: value for key, value in note.items() if key != "base"} for name, note in notes.items()}
        report = {"command": COMMAND, "torch": torch.__version__, "runs": runs}
        write(output_dir, "self_training", report, markdown + "\n")


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runs/demo"), help="folder with model and stage1")
    parser.add_argument("--work", type=Path, default=Path("runs/self_training"), help="folder of the finished runs")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="folder of the report")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="at most 20")
    parser.add_argument("--budget", type=int, default=60, help="steps of stage 2")
    parser.add_argument("--weak-steps", type=int, default=40, help="of the stage 2 that the weak model had")
    parser.add_argument("--num-questions", type=int, default=10, help="for each image")
    parser.add_argument("--test-stride", type=int, default=10, help="every so many of the test questions")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: only to see that it runs")
    parser.add_argument("--plan", action="store_true", help="only say what is to do")
    arguments = parser.parse_args(args)
    if arguments.quick:
        arguments.seeds, arguments.budget, arguments.weak_steps = arguments.seeds[:1], 2, 2
        arguments.num_questions, arguments.test_stride = 2, 200
    tasks = list_tasks(arguments)
    left = [task.name for task in tasks if read_note(task) is None]
    print(f"{len(left)} of {len(tasks)} to do: {', '.join(left)}")
    if arguments.plan:
        return
    for part in ("model/config.json", "stage1/adapter_config.json"):
        if not (arguments.base / part).is_file():
            raise ValueError(f"{arguments.base / part} is not there: run `make demo` first, or give --base.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_all(tasks, arguments.jobs)
    write_report(tasks, None if arguments.quick else arguments.output_dir)


if __name__ == "__main__":
    main()
