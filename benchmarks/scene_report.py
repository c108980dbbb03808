"""The report of `python -m benchmarks.scenes`: paired differences with Holm's correction, tables, and the plot.

This module is not a benchmark.
"""

import statistics
from pathlib import Path

import matplotlib
import torch

from benchmarks.ablation import draw_differences, interval, plain_points
from benchmarks.common import table, text
from benchmarks.scene_world import CORNERS, Bits, Scene, parse, write_scene


matplotlib.use("Agg")
import matplotlib.pyplot as plt


COMMAND = "python -m benchmarks.scenes"
TITLE = "# When does asking help? Scenes with truth"
OUTCOMES = {
    "accuracy_held_out_combinations": "held-out combinations",
    "hallucination": "hallucination",
    "calibration_error": "calibration error",
}
ASKED = ("well_formed", "premise_true", "true_elsewhere", "answerable", "bits")


def p_value(differences: list[float]) -> float | None:
    """
    The two-sided p-value of Student's t test that the mean difference is 0. `None` without a spread, unless all
    differences are 0.
    """
    count = len(differences)
    if count < 2 or statistics.stdev(differences) == 0:
        return 1.0 if count > 1 and differences[0] == 0 else None
    t = abs(statistics.fmean(differences)) / (statistics.stdev(differences) / count**0.5)
    places = torch.linspace(0, t, 20_001, dtype=torch.float64)
    density = torch.distributions.StudentT(torch.tensor(count - 1.0, dtype=torch.float64)).log_prob(places).exp()
    return max(0.0, 1 - 2 * torch.trapezoid(density, places).item())


def holm(p_values: list[float]) -> list[float]:
    """Holm's correction (1979): p-values that hold together, in the given order."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


def corner_name(corner) -> str:
    return ", ".join(corner)


def summarize(runs: list[dict], arms: list[str], first_arms: tuple[str, ...]) -> list[dict]:
    """
    The cells: an arm in a corner at a budget, over the seeds for which it and all `first_arms` are finished.

    Args:
        runs: The notes of the finished runs.
        arms: The arms in the order of the tables.
        first_arms: The arms that are run together; the first of them is the baseline.
    """
    found = {(run["budget"], tuple(run["corner"]), run["arm"], run["seed"]): run for run in runs}
    cells = []
    for budget in dict.fromkeys(run["budget"] for run in runs):
        for corner in CORNERS:
            for arm in arms:
                cell = _cell(found, budget, corner, arm, first_arms)
                if cell is not None:
                    cells.append(cell)
    found = [difference for cell in cells for difference in cell["minus"].values() if difference["p"] is not None]
    for difference, p in zip(found, holm([difference["p"] for difference in found])):
        difference["holm"] = p
    return cells


def _cell(found: dict, budget: str, corner: tuple[str, str], arm: str, first_arms: tuple[str, ...]) -> dict | None:
    def seeds_of(name: str) -> set[int]:
        return {seed for b, c, a, seed in found if (b, c, a) == (budget, corner, name)}

    def values(name: str, outcome: str) -> list[float]:
        return [found[budget, corner, name, seed][outcome] for seed in seeds]

    seeds = sorted(seeds_of(arm).intersection(*map(seeds_of, first_arms)))
    if len(seeds) < 2:
        return None
    own = [found[budget, corner, arm, seed] for seed in seeds]
    others = [] if arm == "baseline" else ["baseline"]
    others += ["instruct"] if arm == "sq-1" else []
    cell = {"budget": budget, "corner": list(corner), "arm": arm, "seeds": seeds, "minus": {}}
    cell["accuracies"] = values(arm, "accuracy")
    for other in others:
        differences = [mine - theirs for mine, theirs in zip(cell["accuracies"], values(other, "accuracy"))]
        cell["minus"][other] = tested(differences) | {"holm": None}
    for outcome in OUTCOMES:
        cell[outcome] = interval([a - b for a, b in zip(values(arm, outcome), values("baseline", outcome))])
        cell[outcome]["own"] = statistics.fmean(values(arm, outcome))
    names = ("answer_tokens", "question_tokens", "last_loss", "seconds")
    cell |= {name: statistics.fmean(run[name] for run in own) for name in names}
    kinds = [name for name in own[0] if name.startswith("accuracy_") and "combinations" not in name]
    cell["kinds"] = {name.removeprefix("accuracy_"): statistics.fmean(run[name] for run in own) for name in kinds}
    if "asked" in own[0]:
        cell["asked"] = {name: statistics.fmean(run["asked"][name] for run in own) for name in ASKED}
    return cell


def tested(values: list[float]) -> dict:
    """The mean of paired differences with its interval and its p-value."""
    return interval(values) | {"values": values, "p": p_value(values)}


def contrast(cells: list[dict], budget: str, signs: dict[tuple[str, str], float]) -> dict | None:
    """The sum of the effects of `sq-1` in these corners, with these signs, over the seeds that all of them have."""
    effects = {
        tuple(cell["corner"]): dict(zip(cell["seeds"], cell["minus"]["baseline"]["values"]))
        for cell in cells
        if cell["arm"] == "sq-1" and cell["budget"] == budget
    }
    seeds = sorted(set.intersection(*(set(effects.get(corner, ())) for corner in signs)))
    if len(seeds) < 2:
        return None
    values = [sum(sign * effects[corner][seed] for corner, sign in signs.items()) for seed in seeds]
    return tested(values) | {"seeds": seeds}


def the_rule(cells: list[dict], budget: str) -> dict | None:
    """Hypothesis 1: the effect of `sq-1` where questions tell much and answers little, minus where it is reversed."""
    return contrast(cells, budget, {("referring", "yes/no"): 1, ("generic", "open"): -1})


def knob_effects(cells: list[dict], budget: str) -> dict[str, dict]:
    """How the effect of `sq-1` changes with each knob, over both positions of the other. Not planned beforehand."""
    changes = {}
    for place, (name, value) in enumerate((("referring minus generic", "referring"), ("yes/no minus open", "yes/no"))):
        signs = {corner: 0.5 if corner[place] == value else -0.5 for corner in CORNERS}
        if (change := contrast(cells, budget, signs)) is not None:
            changes[name] = change
    return changes


def knobs(scenes: list[Scene], facts: list, number: int = 150) -> list[dict]:
    """What the questions and answers of each corner tell, in bits: means over test facts."""
    bits, rows = Bits(scenes[: len(scenes) // 2]), []
    for corner in CORNERS:
        turns = [fact.turns[corner] for of_picture in facts[: len(facts) // 2][:number] for fact in of_picture]
        questions = [parse(question) for question, _ in turns]
        told = [bits.of_answer(question, answer) for question, (_, answer) in zip(questions, turns)]
        rows.append({
            "corner": list(corner), "example": max(turns, key=lambda turn: len(turn[0])),
            "question_bits": statistics.fmean(map(bits.of_question, questions)),
            "answer_bits": statistics.fmean(told),
        })  # fmt: skip
    return rows


def examples_of(runs: list[dict], scenes: list[Scene], of_each: int = 3) -> list[dict]:
    """The first questions that `sq-1` asked in each corner, with a true and with a false premise; scene and bits."""
    examples = []
    for corner in CORNERS:
        asked = [run for run in runs if run["arm"] == "sq-1" and tuple(run["corner"]) == corner]
        kept = [example for run in asked for example in run["asked"]["examples"] if " the " in example["question"]]
        for is_true in (True, False):
            for example in [each for each in kept if each["premise_is_true"] == is_true][:of_each]:
                examples.append({"corner": list(corner), "scene": write_scene(scenes[example["picture"]])} | example)
    return examples


def _points(difference: dict) -> str:
    """A difference of accuracies; bold if its corrected p-value is below 0.05."""
    plain = plain_points(difference)
    return f"**{plain}**" if difference["holm"] is not None and difference["holm"] < 0.05 else plain


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value >= 0.001 else "< 0.001"


def accuracy_table(cells: list[dict], labels: dict[str, str]) -> str:
    rows = []
    for cell in cells:
        minus = cell["minus"]
        row = [corner_name(cell["corner"]), labels[cell["arm"]], len(cell["seeds"])]
        row.append(f"{statistics.fmean(cell['accuracies']):.1%}")
        for other in ("baseline", "instruct"):
            row += [_points(minus[other]), _p(minus[other]["holm"])] if other in minus else ["", ""]
        rows.append([*row, f"{cell['answer_tokens']:,.0f}", f"{cell['question_tokens']:,.0f}"])
    header = ["corner", "arm", "seeds", "accuracy", "minus LLaVA", "p", "minus `instruct`", "p", "answer tokens"]
    return table([*header, "question tokens"], rows, left=2)


def outcome_table(cells: list[dict], labels: dict[str, str]) -> str:
    rows = []
    for cell in cells:
        row = [corner_name(cell["corner"]), labels[cell["arm"]]]
        for name in OUTCOMES:
            beside = f" ({plain_points(cell[name])})" if cell["arm"] != "baseline" else ""
            row.append(f"{cell[name]['own']:.1%}{beside}")
        rows.append([*row, *(f"{value:.1%}" for value in cell["kinds"].values())])
    return table(["corner", "arm", *OUTCOMES.values(), *cells[0]["kinds"]], rows, left=2)


def asked_table(cells: list[dict], labels: dict[str, str]) -> str:
    rows = []
    for cell in (cell for cell in cells if "asked" in cell):
        shares = [f"{cell['asked'][name]:.1%}" for name in ASKED[:-1]]
        rows.append([corner_name(cell["corner"]), labels[cell["arm"]], *shares, f"{cell['asked']['bits']:.2f}"])
    header = ["corner", "arm", "well formed", "premise true", "true of another picture", "answerable", "bits"]
    return table(header, rows, left=2)


def to_markdown(report: dict) -> str:
    labels, cells = report["labels"], report["cells"]
    rows = [
        [corner_name(k["corner"]), f"{k['example'][0]} {k['example'][1]}", f"{k['question_bits']:.2f}",
         f"{k['answer_bits']:.2f}"]
        for k in report["knobs"]
    ]  # fmt: skip
    blocks = [
        TITLE,
        f"Measured with `{report['command']}`, torch {report['torch']}: {report['finished']} of "
        f"{report['finished'] + len(report['missing'])} runs are finished. A cell needs two seeds. Hypotheses and "
        "analysis were written into `benchmarks/scenes.py` before the runs. The vision tower recognises "
        f"{report['things_recognised']:.1%} of the things in test pictures (size, colour and shape, all right).",
        "What the questions and the answers of each corner tell about the picture:",
        table(["corner (question, answer)", "example", "bits of the question", "bits of the answer"], rows, left=2),
        "Differences are in percentage points between runs of the same seed, with 95% intervals by Student's t. p is "
        "corrected by Holm's method over all comparisons of accuracy on this page. Differences are bold if it is "
        "below 0.05. `instruct` is the loss on the same questions without `[vusr]`.",
    ]
    rule = report["rule"]
    if rule is not None:
        blocks.append(
            "The rule (hypothesis 1): the effect of self-questions in the corner (referring, yes/no), minus that in "
            f"the corner (generic, open): {plain_points(rule)} points, p = {_p(rule['p'])} (not corrected), "
            f"{len(rule['seeds'])} seeds."
        )
    for name, change in report["knob_effects"].items():
        blocks.append(
            f"Looked at after the runs: the same effect, {name}, over both positions of the other knob: "
            f"{plain_points(change)} points, p = {_p(change['p'])} (not corrected)."
        )
    for budget in dict.fromkeys(cell["budget"] for cell in cells):
        own = [cell for cell in cells if cell["budget"] == budget]
        size = report["budgets"][budget]
        blocks += [
            f"## {budget}: {size['steps']} steps on {size['pictures']:,} pictures",
            accuracy_table(own, labels),
            "Other outcomes, with the difference from LLaVA, and accuracy by kind of question:",
            outcome_table(own, labels),
            "Questions that the models ask after one answered turn:",
            asked_table(own, labels),
        ]
    rows = [
        [corner_name(e["corner"]), e["scene"], e["question"], "yes" if e["premise_is_true"] else "no",
         f"{e['bits'] + 0:.1f}"]
        for e in report["examples"]
    ]  # fmt: skip
    blocks += [
        "## Examples of asked questions",
        "The first three with a phrase that is true and with one that is false, in each corner.",
        table(["corner", "picture", "question", "true", "bits"], rows, left=4),
    ]
    return text(*blocks, "![Accuracy minus LLaVA's in the four corners](scenes.png)")


def draw(report: dict, file: Path) -> None:
    """The four corners: accuracy minus LLaVA's at the main budget; a dot for each seed, the mean with its interval."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.5), sharex=True, sharey=True)
    for axis, corner in zip(axes.flat, CORNERS):
        cells = [
            cell for cell in report["cells"]
            if tuple(cell["corner"]) == corner and cell["budget"] == report["main_budget"] and cell["minus"]
        ]  # fmt: skip
        minus = [cell["minus"]["baseline"] for cell in cells]
        names = [report["labels"][cell["arm"]].replace(", ", ",\n") for cell in cells]
        draw_differences(axis, [(value["values"], value) for value in minus], names)
        bits = next(k for k in report["knobs"] if tuple(k["corner"]) == corner)
        axis.set_title(
            f"{corner[0]} questions ({bits['question_bits']:.1f} bits)\n{corner[1]} answers "
            f"({bits['answer_bits']:.1f} bits)",
            fontsize=10,
        )
    for axis in axes[1]:
        axis.set_xlabel("accuracy minus LLaVA's, percentage points")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
