"""POPE: does the model see objects that are not there? (https://arxiv.org/abs/2305.10355)

    sq-llava evaluate --model M --tasks pope --data DIR

Yes/no questions about COCO val2014 images. The three categories differ in how the absent objects were chosen: random,
popular, adversarial. `llava/` uses the parser of POPE's authors, as LLaVA does. The paper reports `llava/mean_f1`, the
mean of the F1 scores of the three categories.

`lmms_eval/` has the metrics of lmms-eval 0.7.3. There, the whole answer must be "yes" or "no". An answer that is
neither counts as wrong for `accuracy`, but `precision` and `recall` leave it out. `yes_ratio` is computed from the
labels, not from the answers.

The questions about an image are not independent: they are resampled together for standard errors and intervals.

LLaVA's folder: `llava_pope_test.jsonl` (question_id, image, text, category), the images in `val2014`, and
`coco/coco_pope_*.json` (JSON Lines with image and label). Labels are matched by image, in the order of its questions,
because the wording of the questions is not always the same in both files.
"""

from collections.abc import Callable, Sequence

import numpy as np

from sq_llava.evaluation.metrics import weighted_binary_scores
from sq_llava.evaluation.reading import Data, read_jsonl
from sq_llava.evaluation.short_answers import INSTRUCTION
from sq_llava.evaluation.task import Example, Record, Score, Task


CATEGORIES = ("adversarial", "popular", "random")


def read(data: Data) -> list[Example]:
    if not data.is_table:
        return _read_folder(data)
    rows = data.rows(["question_id", "question", "answer", "image", "category"], default_split="test")
    return [
        Example(
            id=f"{row['category']}/{row['question_id']}",
            prompt=row["question"] + INSTRUCTION,
            images=[row["image"]],
            reference=_checked_label(row["answer"], f"{data}, row {number}"),
            details={"category": row["category"], "image": row.get("image_source")},
        )
        for number, row in enumerate(rows)
    ]


def _read_folder(data: Data) -> list[Example]:
    data.split_of_files("test")
    file = data.file("llava_pope_test.jsonl")
    questions = read_jsonl(file, ["question_id", "image", "text", "category"])
    examples = []
    for category in CATEGORIES:
        asked = [row for row in questions if row["category"] == category]
        label_file = data.file(f"coco/coco_pope_{category}.json", f"coco_pope_{category}.json")
        labels = read_jsonl(label_file, ["image", "label"])
        if len(labels) != len(asked):
            raise ValueError(f"{label_file}: has {len(labels)} labels, but {file} has {len(asked)} questions.")
        waiting: dict[str, list[str]] = {}
        for number, label in enumerate(labels, start=1):
            waiting.setdefault(label["image"], []).append(
                _checked_label(label["label"], f"{label_file}, row {number}")
            )
        for row in asked:
            if not waiting.get(row["image"]):
                raise ValueError(f"{label_file}: lacks a label for question {row['question_id']} on {row['image']}.")
            examples.append(
                Example(
                    id=f"{category}/{row['question_id']}",
                    prompt=row["text"],  # includes the instruction
                    images=[data.image(data.folder / "val2014", row["image"])],
                    reference=waiting[row["image"]].pop(0),
                    details={"category": category, "image": row["image"]},
                )
            )
    return examples


def _checked_label(label: str, place: str) -> str:
    if label not in ("yes", "no"):
        raise ValueError(f"{place}: label is {label!r}, expected 'yes' or 'no'.")
    return label


def says_yes(answer: str) -> bool:
    """
    The parser of POPE's authors: an answer is "no" if its first sentence has the word "No", "no" or "not", else "yes".

        >>> says_yes("Yes, there is."), says_yes("There is not, I think. Yes."), says_yes("nothing")
        (True, False, True)
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def score(example: Example, answer: str) -> Score:
    said = answer.strip().lower()
    return Score(
        values={"lmms_eval/accuracy": float(said == example.reference)},
        is_parsed=said.rstrip(".") in ("yes", "no"),
        prediction="yes" if says_yes(answer) else "no",
    )


def weighted_metrics(records: Sequence[Record]) -> Callable[[np.ndarray], dict[str, float]]:
    """The metrics as a function of how often each record counts. A failed example counts as a wrong answer."""
    label = np.array([record.example.reference == "yes" for record in records])
    failed = np.array([record.error is not None for record in records])
    said = [record.answer.strip().lower() for record in records]
    words = {word: np.array([text == word for text in said]) & ~failed for word in ("yes", "no")}
    parsed_yes = np.where(failed, ~label, [record.score.prediction == "yes" for record in records])
    of_category = np.array([record.example.details["category"] for record in records])
    categories = sorted(set(of_category))

    def figures(times: np.ndarray) -> dict[str, float]:
        parsed = weighted_binary_scores(parsed_yes, ~parsed_yes, label, times)
        metrics = {f"llava/{name}": value for name, value in parsed.items()}
        if len(categories) > 1:
            weights = [times * (of_category == name) for name in categories]
            f1 = [weighted_binary_scores(parsed_yes, ~parsed_yes, label, each)["f1"] for each in weights]
            metrics["llava/mean_f1"] = sum(f1) / len(f1)
        exact = weighted_binary_scores(words["yes"], words["no"], label, times)
        metrics |= {f"lmms_eval/{name}": exact[name] for name in ("precision", "recall", "f1")}
        return {**metrics, "lmms_eval/yes_ratio": float(times @ label / times.sum())}

    return figures


def corpus_metrics(records: Sequence[Record]) -> dict[str, float]:
    return weighted_metrics(records)(np.ones(len(records), dtype=int))


TASK = Task(
    name="pope",
    title="POPE",
    hub_id="lmms-lab-encoder/POPE",
    read=read,
    score=score,
    corpus_metrics=corpus_metrics,
    weighted_metrics=weighted_metrics,
    unit=lambda example: example.details.get("image") or example.id,
    main_metric="llava/mean_f1",
    breakdown="category",
)
