"""The effect of prototypes and self-questions on easy-VQA: LLaVA compared with parts of SQ-LLaVA at equal budgets.

    python -m benchmarks.ablation --plan      # shows what is finished, what is missing and how long it takes
    python -m benchmarks.ablation --report    # writes the report of the finished runs, also while others run
    python -m benchmarks.ablation --jobs 2    # writes benchmarks/results/ablation.{json,md,png}

Every run starts from the base models of `make demo` and trains both stages of recipes/easy-vqa. Runs differ only in
`SETTINGS`, in the seed, and in the budget: the number of steps of stage 2. The seed decides the order of the turns and
the rows, the new weights and the self-questions. The runs of one seed share stage 1 if it is the same for them, so
differences are taken within a seed. All seeds use the same base models, as the paper's runs use one CLIP and Vicuna.

A finished run is a JSON file in `--work`. The same command later runs only the missing runs. The report includes all
finished runs, so seeds, budgets and settings can be added later. Nothing is chosen on the test questions. The effect
of ViT-LoRA is not measured: every run has it.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import torch

import train_sft
from benchmarks.common import RESULTS, document, table, text, write
from demo.data import blind_guess, image_root, write_data
from demo.evaluate import measure_answers, measure_questions
from demo.processes import end_with_parent, training_context
from sq_llava.evaluation import easy_vqa
from sq_llava.evaluation.run import Evaluation, read_examples
from sq_llava.inference.assistant import Assistant
from sq_llava.training.settings import parse_recipe


matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True)
class Setting:
    """The changes of a run to the demo's recipe, and the settings that it is compared with."""

    label: str
    prototype_variant: str = "none"
    self_question_ratio: float = 0.0
    question_loss_weight: float = 1.0
    beside: tuple[str, ...] = ("baseline",)


SETTINGS = {
    "baseline": Setting("LLaVA", beside=()),
    "paper": Setting("prototypes (paper)", "paper"),
    "released": Setting("prototypes (released)", "released"),
    "sq-0.25": Setting("self-questions 0.25", "none", 0.25),
    "sq-0.5": Setting("self-questions 0.5", "none", 0.5),
    "sq-0.75": Setting("self-questions 0.75", "none", 0.75),
    "sq-0.5-light": Setting("self-questions 0.5, weight 0.2", "none", 0.5, 0.2),
    "all": Setting("prototypes (paper), self-questions 0.5", "paper", 0.5, 1.0, ("baseline", "paper")),
    "all-light": Setting(
        "prototypes (paper), self-questions 0.5, weight 0.2", "paper", 0.5, 0.2, ("baseline", "paper")
    ),
}
COMMAND = "python -m benchmarks.ablation"
RECIPES = Path(__file__).parent.parent / "recipes" / "easy-vqa"
# Quantiles of Student's t for two-sided 95% intervals, for 1, 2, 3, ... degrees of freedom.
T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093,
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """The values that all runs of a work folder share."""

    base: str
    stage1_steps: int = 150
    test_stride: int = 4  # every fourth test question: 2,419 of 9,673, which cover all 1,000 images
    num_images: int = 25  # the model asks four questions about each
    # Measured on one core; used to estimate the time.
    seconds_per_stage1_step: float = 0.4
    seconds_per_step: float = 0.35
    seconds_of_scoring: float = 20.0


@dataclass(frozen=True)
class Task:
    """A piece of work. When it is finished, its result is in the JSON file `note`."""

    work: Path

    @property
    def note(self) -> Path:
        return self.work / f"{self.name}.json"

    def is_ready(self) -> bool:
        return True


@dataclass(frozen=True)
class Stage1(Task):
    """Stage 1 of a seed. All runs of the seed with the same prototypes start from it."""

    scale: Scale
    seed: int
    prototype_variant: str

    @property
    def name(self) -> str:
        return f"seed-{self.seed}/stage1-{self.prototype_variant}"

    @property
    def facts(self) -> dict:
        return {"base": self.scale.base, "stage1_steps": self.scale.stage1_steps}

    @property
    def estimated_seconds(self) -> float:
        return self.scale.stage1_steps * self.scale.seconds_per_stage1_step

    def run(self) -> dict:
        base = Path(self.scale.base)
        train(
            "stage1",
            self.seed,
            self.scale.stage1_steps,
            output_dir=self.work / self.name,
            dataset_path=seed_data(self) / "stage1_train.json",
            prototype_variant=self.prototype_variant,
            vision_model_name_or_path=base / "clip",
            text_model_name_or_path=base / "llama",
        )
        return {}


@dataclass(frozen=True)
class Run(Task):
    """Stage 2 of a seed with one of the `SETTINGS`, and its scores."""

    scale: Scale
    seed: int
    setting: str
    budget: int

    @property
    def name(self) -> str:
        return f"seed-{self.seed}/{self.budget}-{self.setting}"

    @property
    def stage1(self) -> Stage1:
        return Stage1(self.work, self.scale, self.seed, SETTINGS[self.setting].prototype_variant)

    @property
    def facts(self) -> dict:
        setting = asdict(SETTINGS[self.setting])
        changed = {name: setting[name] for name in ("self_question_ratio", "question_loss_weight")}
        shared = {"test_stride": self.scale.test_stride, "num_images": self.scale.num_images}
        own = {"seed": self.seed, "setting": self.setting, "budget": self.budget}
        return own | {"prototype_variant": self.stage1.prototype_variant} | changed | self.stage1.facts | shared

    @property
    def estimated_seconds(self) -> float:
        return self.budget * self.scale.seconds_per_step + self.scale.seconds_of_scoring

    def is_ready(self) -> bool:
        return self.stage1.note.is_file()

    def run(self) -> dict:
        setting = SETTINGS[self.setting]
        start = time.time()
        with tempfile.TemporaryDirectory() as folder:
            trainer = train(
                "stage2",
                self.seed,
                self.budget,
                output_dir=folder,
                dataset_path=seed_data(self) / "stage2_train.json",
                model_name_or_path=self.work / self.stage1.name,
                self_question_ratio=setting.self_question_ratio,
                question_loss_weight=setting.question_loss_weight,
            )
        trained = time.time()
        model = trainer.model.merge_and_unload().eval()
        scores = score(Assistant(model, trainer.processing_class), seed_data(self), self.scale)
        return scores | {"training_seconds": trained - start, "scoring_seconds": time.time() - trained}


def seed_data(task: Task) -> Path:
    return task.work / f"seed-{task.seed}" / "data"


def train(stage: str, seed: int, steps: int, **settings):
    settings |= {"seed": seed, "max_steps": steps, "image_root": image_root()}
    settings |= {"doctor": "off", "disable_tqdm": True, "save_strategy": "no"}
    return train_sft.train(*parse_recipe(RECIPES / f"{stage}.yaml", **settings))


def score(assistant: Assistant, data: Path, scale: Scale) -> dict:
    """Accuracy on every `test_stride`-th test question, asked alone, and the quality of the model's own questions."""
    evaluation = Evaluation("", ["easy_vqa"], str(data), data)
    examples = read_examples(easy_vqa.TASK, evaluation)[:: scale.test_stride]
    with tempfile.TemporaryDirectory() as folder:
        accuracy = measure_answers(assistant, examples, Path(folder))
    questions = measure_questions(assistant, image_root(), scale.num_images, questions_per_image=4, seed=0)
    del questions["contact_sheet"]
    return {"test_questions": len(examples), "accuracy": accuracy.pop("all"), "accuracy_by_kind": accuracy} | questions


def list_tasks(work: Path, scale: Scale, seeds: list[int], budgets: list[int], settings: list[str]) -> list[Task]:
    """All tasks, seed by seed, and within a seed by budget. So the tables are complete after each seed."""
    tasks = []
    for seed in seeds:
        runs = [Run(work, scale, seed, setting, budget) for budget in sorted(budgets) for setting in settings]
        tasks += [*dict.fromkeys(run.stage1 for run in runs), *runs]
    return tasks


def read_note(task: Task) -> dict | None:
    """The note of a finished task, or `None`."""
    if not task.note.is_file():
        return None
    note = json.loads(task.note.read_text())
    for name, value in task.facts.items():
        if note[name] != value:
            raise ValueError(
                f"{task.note}: this run had {name}={note[name]!r}, but {value!r} is asked for. Choose another --work."
            )
    return note


def run_task(task: Task) -> None:
    """Runs a task in its own process. Its output goes to a log file."""
    end_with_parent()
    torch.set_num_threads(1)
    start = time.time()
    with task.note.with_suffix(".log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        result = task.run()
    part = task.note.with_suffix(".part")
    part.write_text(json.dumps(task.facts | result | {"seconds": time.time() - start}, indent=2) + "\n")
    part.rename(task.note)


def run_all(tasks: list[Task], jobs: int) -> None:
    """Runs the unfinished tasks in order. A run waits until its stage 1 is finished."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    waiting = [task for task in tasks if read_note(task) is None]
    for task in waiting:
        if not (seed_data(task) / "test.json").is_file():
            write_data(seed_data(task), seed=task.seed)
    running, total = {}, len(waiting)
    with ProcessPoolExecutor(jobs, mp_context=training_context(), max_tasks_per_child=1) as pool:
        while waiting or running:
            ready = [task for task in waiting if task.is_ready()][: jobs - len(running)]
            for task in ready:
                waiting.remove(task)
                running[pool.submit(run_task, task)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                try:
                    future.result()
                except Exception as error:
                    error.add_note(f"{task.name} failed. Its output is in {task.note.with_suffix('.log')}.")
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                seconds = read_note(task)["seconds"]
                done = total - len(waiting) - len(running)
                print(f"{time.strftime('%H:%M:%S')} {task.name}: {seconds:.0f} s, {done} of {total}", flush=True)


def plan(tasks: list[Task], jobs: int) -> str:
    left = [task for task in tasks if read_note(task) is None]
    hours = sum(task.estimated_seconds for task in left) / 3600
    lines = [
        f"{task.name}: " + (f"about {task.estimated_seconds:.0f} s" if task in left else "finished") for task in tasks
    ]
    summary = f"{len(left)} of {len(tasks)} to run: {hours:.1f} hours on one core, {hours / jobs:.1f} with {jobs} jobs"
    return "\n".join([*lines, summary])


def interval(differences: list[float]) -> dict:
    """The mean of paired differences, and half the width of its 95% interval (Student's t)."""
    if len(differences) < 2:
        return {"mean": differences[0], "half_width": None}
    error = statistics.stdev(differences) / len(differences) ** 0.5
    quantile = T_QUANTILES[min(len(differences) - 2, len(T_QUANTILES) - 1)]  # of 20, a little too wide, for more
    return {"mean": statistics.fmean(differences), "half_width": quantile * error}


def summarize(runs: list[dict]) -> list[dict]:
    """
    One table for each budget, with one row for each setting. A seed counts only when all settings of the budget are
    finished for it, so that all rows cover the same seeds.
    """
    tables = []
    for budget in sorted({run["budget"] for run in runs}):
        found = {(run["setting"], run["seed"]): run for run in runs if run["budget"] == budget}
        settings = [name for name in SETTINGS if any(name == setting for setting, _ in found)]
        all_seeds = sorted({seed for _, seed in found})
        seeds = [seed for seed in all_seeds if all((name, seed) in found for name in settings)]
        if not seeds:
            continue
        rows = []
        for name in settings:
            own = [found[name, seed] for seed in seeds]
            row = {"setting": name, "accuracies": [run["accuracy"] for run in own]}
            row["differences"] = {
                other: interval([run["accuracy"] - found[other, run["seed"]]["accuracy"] for run in own])
                for other in SETTINGS[name].beside
                if other in settings
            }
            row["accuracy_by_kind"] = {
                kind: statistics.fmean(run["accuracy_by_kind"][kind] for run in own)
                for kind in own[0]["accuracy_by_kind"]
            }
            for key in ("questions_asked", "questions_distinct", "questions_valid_share", "training_seconds"):
                row[key] = statistics.fmean(run[key] for run in own)
            rows.append(row)
        tables.append({"budget": budget, "seeds": seeds, "rows": rows})
    return tables


def plain_points(value: dict) -> str:
    """A difference in percentage points with its interval."""
    half = value["half_width"]
    return f"{100 * value['mean']:+.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def points(value: dict) -> str:
    """[`plain_points`], bold if the interval does not include 0."""
    half = value["half_width"]
    return f"**{plain_points(value)}**" if half is not None and abs(value["mean"]) > half else plain_points(value)


def table_of(budget: dict) -> str:
    kinds = list(budget["rows"][0]["accuracy_by_kind"])
    accuracy, details = [], []
    for row in budget["rows"]:
        label, accuracies, differences = SETTINGS[row["setting"]].label, row["accuracies"], row["differences"]
        cells = [label, f"{statistics.fmean(accuracies):.1%}"]
        cells += [f"{100 * min(accuracies):.1f}, {100 * max(accuracies):.1f}"]
        cells += [points(differences[other]) if other in differences else "" for other in ("baseline", "paper")]
        accuracy.append(cells)
        cells = [label, *(f"{value:.1%}" for value in row["accuracy_by_kind"].values())]
        details.append([*cells, f"{row['questions_valid_share']:.1%}", f"{row['questions_distinct']:.0f}"])
    return text(
        table(["setting", "accuracy", "lowest, highest seed", "minus LLaVA", "minus prototypes"], accuracy),
        "Accuracy by kind of question, and the questions that the model asks:",
        table(["setting", *kinds, "valid questions", "distinct questions"], details),
    )


def to_markdown(report: dict) -> str:
    comparisons = sum(len(row["differences"]) for budget in report["tables"] for row in budget["rows"])
    first, missing = report["runs"][0], len(report["missing"])
    blocks = [
        "# The effect of prototypes and self-questions on easy-VQA",
        f"Measured with `{report['command']}`: {len(report['runs'])} runs with torch {report['torch']} and one CPU "
        f"thread each; {missing} runs are missing. A table includes a seed only if all rows of the seed are finished.",
        "All runs start from the base models of `make demo` and have ViT-LoRA. Stage 1 has "
        f"{first['stage1_steps']} steps. Stage 2 has batches of 16 conversations. `self-questions 0.5` is the "
        "`self_question_ratio`, and `weight 0.2` is the `question_loss_weight` (1 if not given).",
        f"Accuracy is exact match on every {first['test_stride']}th test question ({first['test_questions']:,}), each "
        f"asked alone and answered greedily. The best blind guess reaches {report['blind_guess']:.1%}. "
        f"{first['questions_asked']} questions are sampled from the model after one answered turn. A question is "
        "valid if it has a form of easy-VQA and presumes nothing false about the image.",
        "Differences are in percentage points between runs of the same seed, with 95% intervals over the seeds by "
        "Student's t. They are bold where the interval does not include 0. The intervals are not corrected for the "
        f"{comparisons} comparisons: about one in twenty would be bold by chance. Runs without self-questions were "
        "never taught to ask: their `[vusr]` is untrained.",
    ]
    for budget in report["tables"]:
        seeds = ", ".join(map(str, budget["seeds"]))
        blocks += [f"## {budget['budget']} steps of stage 2: seeds {seeds}", table_of(budget)]
    return text(*blocks, "![Accuracy minus LLaVA's, within a seed](ablation.png)")


def draw_differences(axis, rows: list[tuple[list[float], dict]], labels: list[str]) -> None:
    """Draws differences in percentage points: a dot for each seed, the mean with its interval."""
    for place, (values, value) in enumerate(rows):
        axis.plot([100 * each for each in values], [place] * len(values), "o", color="0.65", markersize=4)
        half = 100 * (value["half_width"] or 0)
        axis.errorbar(100 * value["mean"], place, xerr=half, fmt="D", color="tab:blue", capsize=4)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), labels)
    axis.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)


def draw(report: dict, file: Path) -> None:
    """Draws the differences to LLaVA: a panel for each budget, a dot for each seed, the means with intervals."""
    tables = report["tables"]
    figure, axes = plt.subplots(1, len(tables), figsize=(4 + 4 * len(tables), 4.5), squeeze=False)
    for axis, budget in zip(axes[0], tables):
        baseline = next(row["accuracies"] for row in budget["rows"] if row["setting"] == "baseline")
        rows = [row for row in budget["rows"] if "baseline" in row["differences"]]
        labels = [SETTINGS[row["setting"]].label.replace("), ", "),\n") for row in rows]
        differences = [
            ([own - other for own, other in zip(row["accuracies"], baseline)], row["differences"]["baseline"])
            for row in rows
        ]
        draw_differences(axis, differences, labels if axis is axes[0, 0] else [])
        title = f"{budget['budget']} steps (LLaVA {statistics.fmean(baseline):.1%}, {len(baseline)} seeds)"
        axis.set(title=title, xlabel="accuracy minus LLaVA's, percentage points")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def write_report(work: Path, tasks: list[Task], output_dir: Path) -> None:
    """Writes the report of all finished runs of a work folder. It also says how many of `tasks` are missing."""
    notes = [json.loads(file.read_text()) for file in sorted(work.glob("seed-*/*.json"))]
    runs = [note for note in notes if "accuracy" in note]
    tables = summarize(runs)
    if not any(row["setting"] == "baseline" for table in tables for row in table["rows"]):
        print("No report yet: no seed is finished with all settings.")
        return
    data = work / f"seed-{tables[0]['seeds'][0]}" / "data"
    test = json.loads((data / "test.json").read_text())[:: runs[0]["test_stride"]]
    blind = blind_guess(json.loads((data / "stage2_train.json").read_text()), test)["all"]
    missing = [task.name for task in tasks if isinstance(task, Run) and read_note(task) is None]
    report = {
        "command": COMMAND,
        "missing": missing,
        "torch": torch.__version__,
        "blind_guess": blind,
        "tables": tables,
        "runs": runs,
    }
    markdown = document(report, to_markdown)
    write(output_dir, "ablation", report, markdown)
    draw(report, output_dir / "ablation.png")
    print(markdown)


def make_parser(doc: str, base: str | None, work: str, seeds: list[int]) -> argparse.ArgumentParser:
    """The options of benchmarks that consist of many runs. `base` says what `--base` must contain; `None`: no base."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if base is not None:
        parser.add_argument(
            "--base", type=Path, default=Path("runs/demo"), help=f"Folder of `make demo`, with {base}."
        )
    parser.add_argument("--work", type=Path, default=Path(work), help="Folder for the finished runs.")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="Folder for the report.")
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds, help="Random seeds, at most 20.")
    parser.add_argument("--jobs", type=int, default=2, help="Number of runs at a time, with one thread each.")
    parser.add_argument("--quick", action="store_true", help="Few steps and questions, to see that it works.")
    parser.add_argument("--plan", action="store_true", help="Only show what is missing.")
    return parser


def places_of_a_trial(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> tuple[Path, Path]:
    """`--work` and `--output-dir` of a run with `--quick`: it must not replace measured results, or mix with them."""
    work, output_dir = arguments.work, arguments.output_dir
    if work == parser.get_default("work"):
        work = work.with_name(f"{work.name}-quick")
    return work, work if output_dir == RESULTS else output_dir


def require_base(base: Path, *parts: str) -> None:
    for part in parts:
        if not (base / part).exists():
            raise ValueError(f"{base / part} does not exist. Run `make demo` first, or set --base.")


def main(args: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "clip and llama", "runs/ablation", [0, 1, 2, 3, 4])
    parser.add_argument("--budgets", type=int, nargs="+", default=[60, 240], help="Numbers of steps of stage 2.")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="Settings to compare.")
    parser.add_argument("--report", action="store_true", help="Only write the report of the finished runs.")
    args = parser.parse_args(args)
    scale = Scale(str(args.base))
    if args.quick:
        scale = Scale(str(args.base), stage1_steps=2, test_stride=200, num_images=2)
        args.work, args.output_dir = places_of_a_trial(parser, args)
    tasks = list_tasks(args.work, scale, args.seeds, args.budgets, args.settings)
    if not args.report:
        print(plan(tasks, args.jobs))
        if args.plan:
            return
        require_base(args.base, "clip/config.json", "llama/config.json")
        run_all(tasks, args.jobs)
    write_report(args.work, tasks, args.output_dir)


if __name__ == "__main__":
    main()
