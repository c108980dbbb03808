"""The value of data that a model makes from images alone: a new stage 2 on it, compared with people's questions.

    python -m benchmarks.self_training --plan     # shows what is missing; needs runs/demo, the output of `make demo`
    python -m benchmarks.self_training --jobs 2   # writes benchmarks/results/self_training.{json,md}

The images are the 200 of easy-VQA's training half that the demo keeps out of both stages. A model asks and answers
questions about them as `sq-llava generate-data self` does. Then a stage 2, started from the demo's stage 1, trains on
this data, unfiltered or filtered, or on the real questions about the same images. The number of steps is always the
same. Accuracy is measured on test images. Two models make data: the demo's model, and a weak model with a short stage
2, whose answers are often wrong.

A finished run is a JSON file in `--work`. The same command later runs only the missing runs. "Sure" means 95% per
token; it was chosen on the answers of the demo's model to its own questions, before anything was trained on them. The
balanced sets were added after the others had been measured.
"""

import argparse
import json
import math
import random
import shutil
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks import ablation
from benchmarks.ablation import Scale, interval, points, read_note, run_all, score, seed_data, train
from benchmarks.common import document, table, text, write
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
# Turns, valid questions, right answers and the share of yes of the real questions.
REAL_QUALITY = ["1,961", "100%", "100%", "49%"]
# The sets of each model's data that are trained on.
GENERATORS = {"demo": ["unfiltered", "filtered"], "weak": list(FILTERS)}


@dataclass(frozen=True)
class Task(ablation.Task):
    """A piece of work. `generator` is the model that makes the data, `data` the name of the set."""

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
    """The weak model: a short stage 2 on the demo's data."""

    def run(self) -> dict:
        data = seed_data(self) / "stage2_train.json"
        return train_and_score(self, data, self.weak_steps, self.work / self.name)


@dataclass(frozen=True)
class Generation(Task):
    """A model makes data once; each of the `FILTERS` makes a set from it."""

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
    """A stage 2 on real questions or on a model's data, or no stage 2 at all; and its accuracy."""

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
    """Quality of a set: valid questions, right answers, distinct questions, the share of "yes"."""
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
    """All tasks, seed by seed, so that the tables are complete after each seed."""
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


def to_markdown(report: dict) -> str:
    runs = {(run["generator"], run["data"], run["seed"]): run for run in report["runs"].values()}
    seeds = sorted({seed for _, _, seed in runs})
    first, none = next(iter(runs.values())), runs[None, "no stage 2", seeds[0]]
    accuracies = {
        (generator, data): [runs[generator, data, each]["accuracy"] for each in seeds]
        for generator, data, seed in runs
        if seed == seeds[0] and data not in (None, "model", "no stage 2")
    }
    sets = {generator: [runs[generator, None, seed]["sets"] for seed in seeds] for generator in GENERATORS}
    rows, quality = [], []
    for (generator, data), values in accuracies.items():
        name = f"{data}, by the {generator} model" if generator else data
        quality.append(
            [name, *(quality_cells([each[data] for each in sets[generator]]) if generator else REAL_QUALITY)]
        )
        cells = [name, f"{statistics.fmean(values):.1%} ({100 * min(values):.1f} to {100 * max(values):.1f})"]
        for other in ((None, "real questions"), (generator, "unfiltered")):
            is_other = other in accuracies and other != (generator, data)
            differences = [own - theirs for own, theirs in zip(values, accuracies.get(other, values))]
            cells.append(points(interval(differences)) if is_other else "")
        rows.append(cells)
    removed = []
    for generator in GENERATORS:
        for data in list(FILTERS)[1:]:
            counts = Counter()
            for each in sets[generator]:
                counts.update(each[data]["left_out"])
            removed += [[generator, data, rule, f"{count:,}"] for rule, count in sorted(counts.items())]
    weak = statistics.fmean(runs["weak", "model", seed]["accuracy"] for seed in seeds)
    return text(
        "# The value of data that a model makes by itself",
        f"Measured with `{report['command']}` for the seeds {', '.join(map(str, seeds))}; torch {report['torch']}, "
        "one CPU thread per run.",
        "The images are 200 of easy-VQA's training half. Neither stage of the demo has seen their questions. A model "
        f"asks and answers {first['num_questions']} questions about each image: the demo's model, or a weak model "
        f"with {first['weak_steps']} steps of stage 2 and an accuracy of {weak:.1%}. The filters have their default "
        "settings. Balanced means as many yes as no; these sets were added after the others had been measured. Sure "
        "means a mean log-probability of at least log(0.95).",
        f"Each training is {first['budget']} steps of stage 2 from the demo's stage 1, with batches of 16 "
        f"conversations. Accuracy is exact match on every {first['test_stride']}th test question "
        f"({none['test_questions']:,}), asked alone and answered greedily. Without a stage 2 it is "
        f"{none['accuracy']:.1%}. Differences are in percentage points between runs of the same seed, with 95% "
        "intervals by Student's t. They are bold where the interval does not include 0.",
        table(["trained on", "accuracy", "minus real questions", "minus unfiltered"], rows),
        "The data that was trained on:",
        table(["data", "turns", "valid questions", "right answers", "yes among yes/no answers"], quality),
        "Turns that each filter removed, over all seeds:",
        table(["model", "filters", "rule", "turns"], removed, left=3),
    )


def quality_cells(sets: list[dict]) -> list[str]:
    """Turns, valid questions, right answers and the share of yes of one set, as means over the seeds."""
    cells = [f"{statistics.fmean(each['num_kept'] for each in sets):,.0f}"]
    for name in ("premise_is_true", "own_answer_is_right", "yes_of_yes_no"):
        values = [each[name] for each in sets if each[name] is not None]  # without a valid question, there is no value
        cells.append(f"{statistics.fmean(values):.1%}" if values else "")
        if name == "yes_of_yes_no":
            cells[-1] += f" ({100 * min(values):.0f} to {100 * max(values):.0f})"
    return cells


def write_report(tasks: list[Task], output_dir: Path | None) -> None:
    notes = {task.name: read_note(task) for task in tasks}
    runs = {name: {key: value for key, value in note.items() if key != "base"} for name, note in notes.items()}
    report = {"command": COMMAND, "torch": torch.__version__, "runs": runs}
    markdown = document(report, to_markdown)
    print(markdown)
    if output_dir is not None:
        write(output_dir, "self_training", report, markdown)


def main(args: list[str] | None = None) -> None:
    parser = ablation.make_parser(__doc__, "model and stage1", "runs/self_training", [0, 1, 2])
    parser.add_argument("--budget", type=int, default=60, help="Number of steps of stage 2.")
    parser.add_argument("--weak-steps", type=int, default=40, help="Number of steps of the weak model's stage 2.")
    parser.add_argument("--num-questions", type=int, default=10, help="Number of questions per image.")
    parser.add_argument("--test-stride", type=int, default=10, help="Evaluate on every N-th test question.")
    arguments = parser.parse_args(args)
    if arguments.quick:
        arguments.seeds, arguments.budget, arguments.weak_steps = arguments.seeds[:1], 2, 2
        arguments.num_questions, arguments.test_stride = 2, 200
    tasks = list_tasks(arguments)
    left = [task.name for task in tasks if read_note(task) is None]
    print(f"{len(left)} of {len(tasks)} to run: {', '.join(left)}")
    if arguments.plan:
        return
    ablation.require_base(arguments.base, "model/config.json", "stage1/adapter_config.json")
    run_all(tasks, arguments.jobs)
    write_report(tasks, None if arguments.quick else arguments.output_dir)


if __name__ == "__main__":
    main()
