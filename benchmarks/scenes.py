"""When does learning to ask help to answer? Scenes with truth, two knobs, and runs that are paired within a seed.

    python -m benchmarks.scenes --plan      # shows what is finished and what is missing
    python -m benchmarks.scenes --jobs 2    # writes benchmarks/results/scenes.{json,md,png}
    python -m benchmarks.scenes --report    # writes the report of the finished runs, also while others run

A finished run is a JSON file in `--work`. The same command later runs only the missing runs.

WRITTEN BEFORE THE RUNS

The claim of the paper is that learning to ask helps to answer, because a question holds more of the image than an
answer does. Here both amounts are set by hand. Pictures show 3 to 6 things. A fact about one or two of them is asked
in four ways, the corners of two knobs:

- What a question tells: "referring" phrases are true of the picture and name one thing of it ("the large circle left
  of the red square"). "Generic" ones name the same thing by its number in reading order ("the second thing").
- What an answer tells: "yes/no", or "open" (a colour, a number, a side, ...).

Arms: a LLaVA (`baseline`); self-questions at ratio 0.5 with weight 1 (`sq-1`) and 0.2 (`sq-0.2`); the same draws of
turns with the same loss on the question, but without `[vusr]` (`instruct`, instruction modelling, arXiv 2405.14394);
prototypes (`prototypes`). All start from one base model and train projector, prototypes and language model.

Hypotheses:

1. The rule. The effect of `sq-1` (its accuracy minus the baseline's) is larger where questions tell much and answers
   little (referring, yes/no) than where it is the other way round (generic, open).
2. In the corner (referring, yes/no), `sq-1` is more accurate than the baseline.
3. In the corner (generic, open), `sq-1` is not more accurate than the baseline.
4. The marker. `sq-1` differs from `instruct` in at least one corner. If it does not, what helps or costs is the loss
   on questions, not `[vusr]`.

Analysis:

- The unit is a seed. It decides the pictures of the run, their order, the draws and nothing else: all arms of a seed
  see the same pictures in the same order. All differences are taken within a seed.
- Outcome: the share of test questions of the run's own corner whose most likely first word is the answer. Half of the
  test questions are about pictures with held-out combinations of colour and shape; they are also given alone.
- The main budget decides hypotheses 1 to 4. Each difference gets a 95% interval and a p-value by Student's t. Holm's
  correction is over all comparisons of accuracy in the report, of all budgets and arms that are finished. A difference
  is called one only if its corrected p-value is below 0.05. Hypothesis 1 is one test, at 0.05 without correction.
- Other outcomes, with intervals and without tests: the share of "it is there" among questions about combinations that
  are not in the picture (hallucination, as in POPE), the expected calibration error, and for arms with a loss on
  questions: the shares of 400 asked questions that are well formed, have a true premise, are answerable, and the bits
  that a question tells about its picture (how many scenes of a set its true premise rules out).
- Compute is counted in tokens with loss. All arms of a corner make the same number of steps on the same pictures, so
  an arm with a loss on questions costs more of these tokens.
- A cell is in the report only if all its arms are finished for at least two seeds. Seeds that are finished for some
  arms only are left out of that cell.

Order of the runs, as machine time is short: the main budget first, seed by seed, over all corners, with `baseline`,
`sq-1` and `instruct`; then `sq-0.2`, then `prototypes`; then the other two budgets in the same order. What is not
finished is not reported, and the report says how many runs are missing.

The sizes (learning rate, steps, kinds of questions, pretraining) were chosen on the baseline alone, with a seed and
pictures that are not in the study. A first choice was thrown away: with all five kinds of questions and a base model
that knew short captions only, the baseline was at 54% after 150 steps in (referring, yes/no), which is chance. So the
study asks for attributes (half of the questions), counts and existence, and leaves out comparisons and relations. The
base model also learns from lists of true and false pairs of attributes, so that it looks at the picture. With it, the
baseline reaches 69% in this corner after 50 steps and 70% after 100; chance is about 50%. The small budget is the main
one: it lies between chance and what can be reached, and most seeds fit into the machine time.
"""

import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from benchmarks.ablation import Task, make_parser, places_of_a_trial, read_note
from benchmarks.common import document, write
from benchmarks.scene_measures import measure_answers, measure_questions
from benchmarks.scene_models import (
    TURNS,
    Arm,
    Sizes,
    draw_pool,
    test_pool,
    train_base,
    train_run,
    train_tower,
)  # fmt: skip
from benchmarks.scene_report import COMMAND, draw, examples_of, knob_effects, knobs, summarize, the_rule, to_markdown
from benchmarks.scene_world import COMBINATIONS, CORNERS, Bits, from_json, to_json
from demo.processes import end_with_parent, training_context
from sq_llava.output import write_json, write_text


__all__ = ["to_markdown"]

ARMS = {
    "baseline": Arm("LLaVA"),
    "sq-1": Arm("self-questions 0.5", 0.5),
    "instruct": Arm("loss on the same questions, without [vusr]", 0.5, with_marker=False),
    "sq-0.2": Arm("self-questions 0.5, weight 0.2", 0.5, 0.2),
    "prototypes": Arm("prototypes (paper)", prototype_variant="paper"),
}
FIRST_ARMS = ("baseline", "sq-1", "instruct")


@dataclass(frozen=True)
class Budget:
    pictures: int
    steps: int


BUDGETS = {"small": Budget(500, 60), "medium": Budget(1500, 150), "large": Budget(4000, 300)}
MAIN_BUDGET = "small"
QUICK_SIZES = Sizes(60, 8, 2, tower_steps=2, base_steps=2, batch_size=4, asked_pictures=4)
QUICK_BUDGET = Budget(20, 2)


@dataclass(frozen=True)
class Run(Task):
    """A run of an arm in a corner, and what was measured."""

    sizes: Sizes
    seed: int
    corner: tuple[str, str]
    arm: str
    budget: str

    @property
    def name(self) -> str:
        question, answer = self.corner
        return f"seed-{self.seed}/{self.budget}-{question}-{answer.replace('/', '-')}-{self.arm}"

    @property
    def facts(self) -> dict:
        own = {"seed": self.seed, "corner": list(self.corner), "arm": self.arm, "budget": self.budget}
        return own | asdict(ARMS[self.arm]) | asdict(BUDGETS[self.budget]) | {"sizes": asdict(self.sizes)}

    def run(self) -> dict:
        start, arm, budget = time.process_time(), ARMS[self.arm], BUDGETS[self.budget]
        base = self.work / f"base-{arm.prototype_variant}"
        _, facts, bits = train_data(self.work, self.sizes)
        model, processor, result = train_run(
            base, arm, self.corner, budget.pictures, budget.steps, self.seed, self.sizes, facts
        )
        test, test_facts = test_data(self.work, self.sizes)
        features = torch.load(base / "test.pt", weights_only=True)
        result |= measure_answers(model, processor, self.corner, test, test_facts, features)
        if arm.ratio:
            asked = measure_questions(model, processor, arm, self.corner, test, test_facts, features, self.sizes, bits)
            result["asked"] = asked
        return result | {"seconds": time.process_time() - start}


@cache
def train_data(work: Path, sizes: Sizes):
    """The training scenes, the facts about each, and what rules out how many of the scenes."""
    scenes, facts = drawn_once(work / "train.json", lambda: draw_pool(sizes.pictures, COMBINATIONS, TURNS, seed=0))
    return scenes, facts, Bits(scenes[:1000])


@cache
def test_data(work: Path, sizes: Sizes):
    return drawn_once(work / "test.json", lambda: test_pool(sizes))


def drawn_once(file: Path, draw):
    """Reads what an earlier run has drawn, because drawing takes a minute."""
    if not file.is_file():
        write_text(file, to_json(*draw()))
    return from_json(file.read_text())


def make_bases(work: Path, sizes: Sizes, variants: list[str]) -> None:
    """Pretrains the vision tower and the base models that do not exist yet."""
    torch.set_num_threads(1)
    note = work / "tower.json"
    if not note.is_file():
        accuracy = train_tower(sizes, work / "tower")
        write_json(note, {"things_recognised": accuracy})
        print(f"The vision tower recognises {accuracy:.1%} of the things in test pictures", flush=True)
    for variant in variants:
        note = work / f"base-{variant}.json"
        if not note.is_file():
            scenes, facts, _ = train_data(work, sizes)
            test, _ = test_data(work, sizes)
            losses = train_base(sizes, work / "tower", work / f"base-{variant}", variant, scenes, facts, test)
            write_json(note, {"losses": losses})
            print(f"Base model with prototypes {variant}: {losses}", flush=True)


def list_tasks(work: Path, sizes: Sizes, seeds: list[int], budgets: list[str], arms: list[str]) -> list[Run]:
    """All runs, in the order that the docstring gives."""
    groups = [[arm for arm in arms if arm in FIRST_ARMS], *([arm] for arm in arms if arm not in FIRST_ARMS)]
    return [
        Run(work, sizes, seed, corner, arm, budget)
        for budget in budgets
        for group in groups
        for seed in seeds
        for corner in CORNERS
        for arm in group
    ]


def run_task(task: Run) -> str:
    """Runs a task and writes its note. A note is complete or not there."""
    torch.set_num_threads(1)
    task.note.parent.mkdir(parents=True, exist_ok=True)
    write_json(task.note, task.facts | task.run())
    return task.name


def run_all(tasks: list[Run], jobs: int) -> None:
    """Runs the unfinished tasks in order, in processes that import the libraries once."""
    waiting = [task for task in tasks if read_note(task) is None]
    with ProcessPoolExecutor(jobs, mp_context=training_context(), initializer=end_with_parent) as pool:
        for number, name in enumerate(pool.map(run_task, waiting), 1):
            print(f"{time.strftime('%H:%M:%S')} {name}: {number} of {len(waiting)}", flush=True)


def write_report(work: Path, tasks: list[Run], output_dir: Path) -> None:
    """Writes the report of the finished runs among `tasks`, and says how many are missing."""
    runs = [json.loads(task.note.read_text()) for task in tasks if task.note.is_file()]
    cells = summarize(runs, list(ARMS), FIRST_ARMS)
    if not cells:
        print("No report yet: no cell is finished for two seeds.")
        return
    scenes, facts = test_data(work, tasks[0].sizes)
    report = {
        "command": COMMAND,
        "torch": torch.__version__,
        "finished": len(runs),
        "missing": [task.name for task in tasks if not task.note.is_file()],
        "main_budget": MAIN_BUDGET,
        "budgets": {name: asdict(budget) for name, budget in BUDGETS.items()},
        "labels": {name: arm.label for name, arm in ARMS.items()},
        "things_recognised": json.loads((work / "tower.json").read_text())["things_recognised"],
        "knobs": knobs(scenes, facts),
        "rule": the_rule(cells, MAIN_BUDGET),
        "knob_effects": knob_effects(cells, MAIN_BUDGET),
        "cells": cells,
        "examples": examples_of(runs, scenes),
        "runs": [_short(run) for run in runs],
    }
    markdown = document(report, to_markdown)
    print(markdown)
    write(output_dir, "scenes", report, markdown)
    draw(report, output_dir / "scenes.png")


def _short(run: dict) -> dict:
    asked = {name: value for name, value in run.get("asked", {}).items() if name != "examples"}
    return {name: value for name, value in run.items() if name not in ("asked", "sizes", "label")} | {"asked": asked}


def main(args: list[str] | None = None) -> None:
    parser = make_parser(__doc__, None, "runs/scenes", [0, 1, 2, 3, 4])
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS), help="Budgets to run.")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="Arms to compare.")
    parser.add_argument("--report", action="store_true", help="Only write the report of the finished runs.")
    arguments = parser.parse_args(args)
    sizes = Sizes()
    if arguments.quick:
        sizes = QUICK_SIZES
        BUDGETS.update(dict.fromkeys(BUDGETS, QUICK_BUDGET))
        arguments.work, arguments.output_dir = places_of_a_trial(parser, arguments)
    tasks = list_tasks(arguments.work, sizes, arguments.seeds, arguments.budgets, arguments.arms)
    left = [task.name for task in tasks if read_note(task) is None]
    print(f"{len(left)} of {len(tasks)} to run" + (f": {', '.join(left)}" if arguments.plan else ""), flush=True)
    if arguments.plan:
        return
    if left and not arguments.report:
        arguments.work.mkdir(parents=True, exist_ok=True)
        make_bases(arguments.work, sizes, sorted({ARMS[arm].prototype_variant for arm in arguments.arms}))
        run_all(tasks, arguments.jobs)
    write_report(arguments.work, tasks, arguments.output_dir)


if __name__ == "__main__":
    main()
