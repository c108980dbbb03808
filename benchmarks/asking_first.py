"""Does a model answer better if it asks itself first? easy-VQA, with the demo's model.

    python -m benchmarks.asking_first      # writes benchmarks/results/asking_first.{json,md}, about 10 minutes

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
"""

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import common
from benchmarks.ablation import require_base
from sq_llava.evaluation import easy_vqa
from sq_llava.evaluation.comparison import difference_interval
from sq_llava.evaluation.metrics import exact_match
from sq_llava.evaluation.run import read_examples
from sq_llava.evaluation.settings import Evaluation
from sq_llava.evaluation.task import Example
from sq_llava.evaluation.uncertainty import share_interval
from sq_llava.inference.assistant import Assistant, load
from sq_llava.inference.settings import SelfQuestioning


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


def measure_way(way: Callable, assistant: Assistant, examples: list[Example]) -> dict:
    correct, start = [], time.perf_counter()
    for begin in range(0, len(examples), BATCH):
        batch = examples[begin : begin + BATCH]
        requests = [(list(example.images), example.prompt) for example in batch]
        answers = way(assistant, requests, [begin + place for place in range(len(batch))])
        correct += [exact_match(answer, example.reference) for answer, example in zip(answers, batch, strict=True)]
    return {"correct": [float(value) for value in correct], "seconds": time.perf_counter() - start}


def difference(one: list[float], other: list[float], images: list[str]) -> dict[str, float]:
    """Mean of `other` - `one` in percentage points, with a 95% bootstrap interval over images."""
    change = np.array(other) - np.array(one)
    low, high = difference_interval(change, 10_000, seed=0, units=images)
    return {"mean": 100 * change.mean(), "low": 100 * low, "high": 100 * high}


def to_markdown(report: dict) -> str:
    rows = [
        [
            way,
            f"{found['accuracy']:.1%}",
            "" if way == "plain" else "{mean:+.1f} ({low:+.1f} to {high:+.1f})".format(**found["difference"]),
            f"{found['times_as_long']:.1f}",
        ]
        for way, found in report["ways"].items()
    ]
    return common.text(
        "# Asking before answering",
        f"{report['questions']} test questions of easy-VQA about {report['images']} images, with the demo's model. "
        "The difference is in percentage points, with a 95% interval over images.",
        common.table(["way", "accuracy", "minus plain", "times as long"], rows),
        f"An interval of width 0 means that no answer changed. Up to {share_interval(0, report['images'])[1]:.1%} of "
        f"the answers could change on other images (Wilson's interval for {report['images']} images).",
    )


def main():
    arguments = common.parse_arguments(
        __doc__,
        base=("runs/demo", "Folder of `make demo`."),
        test_stride=(24, "Evaluate on every N-th test question."),
    )
    demo = Path(arguments.base)
    require_base(demo, "model/config.json", "data/test.json")
    assistant = load(str(demo / "model"))
    examples = read_examples(easy_vqa.TASK, Evaluation("", ["easy_vqa"], str(demo / "data"), demo))
    examples = examples[:: 400 if arguments.quick else arguments.test_stride]
    images = [str(example.images[0]) for example in examples]
    found = {name: measure_way(way, assistant, examples) for name, way in WAYS.items()}
    first = found["plain"]
    ways = {
        name: {
            "accuracy": float(np.mean(result["correct"])),
            "difference": difference(first["correct"], result["correct"], images),
            "times_as_long": result["seconds"] / first["seconds"],
        }
        for name, result in found.items()
    }
    report = {"questions": len(examples), "images": len(set(images)), "ways": ways}
    common.save("asking_first", report, to_markdown, arguments)


if __name__ == "__main__":
    main()
