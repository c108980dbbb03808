"""Does a model answer better if it asks itself first? easy-VQA with the demo's model, and scenes.

    python -m benchmarks.asking_first      # writes benchmarks/results/asking_first.{json,md}, about 20 minutes

It needs runs/demo, the output of `make demo`. The same test questions are answered in these ways:

    plain             the answer, greedy
    1, 2, 4 asked     after 1, 2 or 4 questions that the model asked itself and answered (`self_questions`)
    2 asked, 5 votes  five times with other questions; the most frequent answer counts
    5 samples         five sampled answers (temperature 1); the most frequent answer counts. This is the rival at
                      about the cost of a few questions

Each way is compared with `plain` on the same questions: the difference in percentage points, and its 95% interval over
images (questions about one image are not independent). The cost is the time of a way beside that of `plain`.

easy-VQA's questions need no thought, and in training, the model never saw a user's question after its own. So this
says what asking first costs, and whether it does harm; it is not the setting in which it could help most.

The scenes are those of `benchmarks/scenes.py`: referring phrases and open answers. A model is trained for each seed,
with self-questions and the study's large budget. In all ways, the conversation begins with another question about the
picture and its right answer, as in training. Comparisons and relations are not asked: models of this size answer them
at chance.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import common
from benchmarks.ablation import require_base
from benchmarks.scene_models import Sizes, train_run
from benchmarks.scene_world import draw_picture
from benchmarks.scenes import ARMS, BUDGETS, QUICK_BUDGET, QUICK_SIZES, Budget, make_bases, test_data, train_data
from sq_llava.evaluation import easy_vqa
from sq_llava.evaluation.comparison import difference_interval
from sq_llava.evaluation.metrics import exact_match
from sq_llava.evaluation.run import read_examples
from sq_llava.evaluation.settings import Evaluation
from sq_llava.evaluation.uncertainty import share_interval
from sq_llava.inference.assistant import Assistant, load
from sq_llava.inference.settings import SelfQuestioning


CORNER = ("referring", "open")
SEEDS = (0, 1, 2)
BATCH = 16
MAX_NEW_TOKENS = 32


def plain(assistant: Assistant, requests: list[tuple], seeds: list[int]) -> list[str]:
    return assistant.answer_batch(requests, MAX_NEW_TOKENS)


def after_asking(
    settings: SelfQuestioning, assistant: Assistant, requests: list[tuple], seeds: list[int]
) -> list[str]:
    return [found.answer for found in assistant.consider_batch(requests, settings, MAX_NEW_TOKENS, seeds)]


def sampled(votes: int, assistant: Assistant, requests: list[tuple], seeds: list[int]) -> list[str]:
    torch.manual_seed(seeds[0])
    repeated = [request for request in requests for _ in range(votes)]
    answers = assistant.answer_batch(repeated, MAX_NEW_TOKENS, do_sample=True, temperature=1.0)
    return [Counter(answers[begin : begin + votes]).most_common(1)[0][0] for begin in range(0, len(answers), votes)]


WAYS: dict[str, Callable] = {
    "plain": plain,
    "1 asked": partial(after_asking, SelfQuestioning(1)),
    "2 asked": partial(after_asking, SelfQuestioning(2)),
    "4 asked": partial(after_asking, SelfQuestioning(4)),
    "2 asked, 5 votes": partial(after_asking, SelfQuestioning(2, votes=5)),
    "5 samples": partial(sampled, 5),
}


@dataclass(frozen=True)
class Trial:
    """A model and its test questions: requests as `Assistant.answer` takes them, answers, and a name of each image."""

    assistant: Assistant
    requests: list[tuple]
    references: list
    images: list[str]


def easy_vqa_trial(demo: Path, stride: int) -> Trial:
    examples = read_examples(easy_vqa.TASK, Evaluation("", ["easy_vqa"], str(demo / "data"), demo))[::stride]
    requests = [(list(example.images), example.prompt) for example in examples]
    references = [example.reference for example in examples]
    return Trial(load(str(demo / "model")), requests, references, [str(example.images[0]) for example in examples])


def scene_trial(work: Path, sizes: Sizes, budget: Budget, seed: int) -> Trial:
    """Trains a model of the study, and asks it the second of each test picture's questions."""
    _, facts, _ = train_data(work, sizes)
    base = work / "base-none"
    model, processor, _ = train_run(base, ARMS["sq-1"], CORNER, budget.pictures, budget.steps, seed, sizes, facts)
    del model.model.get_vision_features  # it was trained on features, and is asked about pictures
    scenes, test_facts = test_data(work, sizes)
    requests, references = [], []
    for scene, (first, second, *_) in zip(scenes, test_facts):
        (opening, answer), (question, reference) = first.turns[CORNER], second.turns[CORNER]
        messages = [("user", opening), ("assistant", answer), ("user", question)]
        requests.append((draw_picture(scene), [{"role": role, "content": text} for role, text in messages]))
        references.append(reference)
    return Trial(Assistant(model, processor), requests, references, [str(number) for number in range(len(scenes))])


def measure_way(way: Callable, trials: list[Trial]) -> dict:
    correct, start = [], time.perf_counter()
    for trial in trials:
        for begin in range(0, len(trial.requests), BATCH):
            requests = trial.requests[begin : begin + BATCH]
            answers = way(trial.assistant, requests, [begin + place for place in range(len(requests))])
            correct += map(exact_match, answers, trial.references[begin : begin + BATCH])
    return {"correct": [float(value) for value in correct], "seconds": time.perf_counter() - start}


def measure(trials: list[Trial]) -> dict:
    """All ways on the same questions, in turn."""
    images = [image for trial in trials for image in trial.images]
    found = {name: measure_way(way, trials) for name, way in WAYS.items()}
    first = found["plain"]
    ways = {
        name: {
            "accuracy": float(np.mean(result["correct"])),
            "difference": difference(first["correct"], result["correct"], images),
            "times_as_long": result["seconds"] / first["seconds"],
        }
        for name, result in found.items()
    }
    return {"models": len(trials), "questions": len(images), "images": len(set(images)), "ways": ways}


def difference(one: list[float], other: list[float], images: list[str]) -> dict[str, float]:
    """Mean of `other` - `one` in percentage points, with a 95% bootstrap interval over images if there is one."""
    change = np.array(other) - np.array(one)
    low, high = difference_interval(change, 10_000, seed=0, units=images) or (change.mean(), change.mean())
    return {"mean": 100 * change.mean(), "low": 100 * low, "high": 100 * high}


def to_markdown(report: dict) -> str:
    sections = []
    for task, found in report["tasks"].items():
        rows = [
            [
                way,
                f"{result['accuracy']:.1%}",
                "" if way == "plain" else "{mean:+.1f} ({low:+.1f} to {high:+.1f})".format(**result["difference"]),
                f"{result['times_as_long']:.1f}",
            ]
            for way, result in found["ways"].items()
        ]
        sections += [
            f"## {task}",
            f"{found['questions']} test questions about {found['images']} images, {found['models']} model(s).",
            common.table(["way", "accuracy", "minus plain", "times as long"], rows),
            "Where no answer changed, the interval has width 0. On other images, up to "
            f"{share_interval(0, found['images'])[1]:.1%} could change (Wilson's interval).",
        ]
    return common.text(
        "# Asking before answering",
        "The difference is in percentage points, with a 95% interval over images.",
        *sections,
    )


def main():
    arguments = common.parse_arguments(
        __doc__,
        base=("runs/demo", "Folder of `make demo`."),
        scenes=("runs/scenes", "Folder of `python -m benchmarks.scenes`. What it lacks is made."),
        test_stride=(24, "Evaluate on every N-th test question of easy-VQA."),
    )
    demo, work, sizes, budget, seeds = Path(arguments.base), Path(arguments.scenes), Sizes(), BUDGETS["large"], SEEDS
    require_base(demo, "model/config.json", "data/test.json")
    if arguments.quick:
        work, sizes, budget, seeds = work.with_name("scenes-trial"), QUICK_SIZES, QUICK_BUDGET, SEEDS[:1]
    work.mkdir(parents=True, exist_ok=True)
    make_bases(work, sizes, ["none"])
    easy = easy_vqa_trial(demo, 400 if arguments.quick else arguments.test_stride)
    tasks = {
        "easy-VQA, with the demo's model": measure([easy]),
        "Scenes, referring and open": measure([scene_trial(work, sizes, budget, seed) for seed in seeds]),
    }
    common.save("asking_first", {"tasks": tasks}, to_markdown, arguments)


if __name__ == "__main__":
    main()
