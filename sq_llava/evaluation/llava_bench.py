"""LLaVA-Bench: a judge compares a model's answers with those of a text-only GPT-4 that read image descriptions.

    sq-llava evaluate --model M --tasks llava_bench,llava_bench_coco --data DIR --judge-model gpt-4o

`llava_bench` (In-the-Wild) has 60 questions about 24 images with human captions. `llava_bench_coco` has 90 questions
about 30 images of COCO val2014 with captions and boxes. The categories are conversation, detail and complex reasoning
(https://arxiv.org/abs/2304.08485, section 5).

The judge does not see the image. It reads the captions, the question, the reference answer and the model's answer, and
scores both answers from 1 to 10. `relative_score` is 100 * mean(model) / mean(reference), overall and per category.
Its standard error is bootstrapped. With `--judge-swap`, the judge also reads the answers in the other order. This adds
`swapped/`, `both_orders/` (the mean) and `position_bias` (swapped minus unswapped).

Differences from LLaVA: the rubric and the scale are the same, but the wording is our own. Reviews that cannot be
parsed are left out (LLaVA counts them as -1). An example without an answer is not sent to the judge; the model gets 1
and the reference 10. Scores of different judges cannot be compared. `reviews.jsonl` has LLaVA's format; in
`reviews_swapped.jsonl` the first score is the model's.

LLaVA's folder: questions.jsonl (question_id, image, text, category), context.jsonl (image, caption),
answers_gpt4.jsonl (question_id, text) and images. For COCO: qa90_questions.jsonl, caps_boxes_coco2014_val_80.jsonl
(image, captions, instances), qa90_gpt4_answer.jsonl, and val2014 or images; file names may start with COCO_val2014_.
In a Hub table without question_id, the id is the row number, from 0.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sq_llava.evaluation.judge import Judge, Messages, Verdict
from sq_llava.evaluation.metrics import relative_score
from sq_llava.evaluation.reading import Data, TaskImage, check_fields, id_of, read_jsonl, unique_by
from sq_llava.evaluation.task import Example, Record, Score, Task
from sq_llava.resumable.jsonl import write_jsonl


CATEGORIES = ("conv", "detail", "complex")
LOWEST, HIGHEST = 1.0, 10.0
# What judges write around two scores: marks of Markdown and JSON, labels, the scale.
_AROUND_SCORES = re.compile(
    r"""[*_`#|\[\](){}":=]|(?<!\S)[-\u2013\u2022](?!\S)|(?:/|\bout\ of)\ ?10\b(?!\.)
    |\bassistant\ ?[12]\b(?:'s)?|\b(?:scores?|ratings?)(?:[ _]?[12](?="?\ ?[:=]))?(?![^\W_])
    |\b(?:here|the|final|of|for|is|are|and|gets)\b""",
    re.I | re.X,
)
_SCORES = re.compile(r"(\d+(?:\.\d+)?)[,;&\s]+(\d+(?:\.\d+)?)\s*[.,;]?")

SYSTEM_MESSAGE = "You compare answers, and you are fair and exact."
INSTRUCTION = """\
A user looked at an image and asked the question above; two assistants answered it. You do not see the image: the \
context says what is in it{boxes}. Consider how helpful, relevant, accurate and detailed each answer is, and give it \
one score from 1 to 10; higher is better.
The first line of your reply holds the two scores and nothing else: that of assistant 1, a space, that of assistant \
2. Explain them from the second line on. Which answer comes first must not matter to you."""
BOXES = "; a box is given as `label: [left, top, right, bottom]`, in shares of the image's width and height"


def read(data: Data, read_folder: Callable[[Data], list[Example]]) -> list[Example]:
    if not data.is_table:
        data.split_of_files("train")  # as in the Hub's table
        return read_folder(data)
    rows = data.rows(["question", "image", "caption", "gpt_answer", "category"], default_split="train")
    return [
        _example(
            {
                "question_id": id_of(row, number),
                "text": row["question"],
                "category": row["category"],
                "reference": row["gpt_answer"],
            },
            row["image"],
            _lines(row["caption"]),
            f"{data}, row {number}",
        )
        for number, row in enumerate(rows)
    ]


def read_wild_folder(data: Data) -> list[Example]:
    rows = _join(
        data.file("questions.jsonl"),
        data.file("context.jsonl"),
        data.file("answers_gpt4.jsonl"),
        ["image", "caption"],
    )
    return [
        _example(row, data.image(data.folder / "images", row["image"]), _lines(context["caption"]), place)
        for row, context, place in rows
    ]


def read_coco_folder(data: Data) -> list[Example]:
    contexts = data.file("caps_boxes_coco2014_val_80.jsonl")
    rows = _join(
        data.file("qa90_questions.jsonl"),
        contexts,
        data.file("qa90_gpt4_answer.jsonl"),
        ["image", "captions", "instances"],
    )
    root = data.file("val2014", "images")
    examples = []
    for row, context, place in rows:
        image = data.image(root, row["image"])
        if not image.is_file():
            image = data.image(root, f"COCO_val2014_{row['image']}")
        for number, each in enumerate(context["instances"]):
            check_fields(each, ["category", "bbox"], f"{contexts}, image {row['image']!r}, instance {number}")
        boxes = [f"{each['category']}: {each['bbox']}" for each in context["instances"]]
        text = "\n".join([_lines(context["captions"]), "", *boxes])
        examples.append(_example({**row, "has_boxes": True}, image, text, place))
    return examples


def _join(questions: Path, contexts: Path, answers: Path, fields: Sequence[str]):
    """Yields each question with its reference answer, the context of its image, and its place for error messages."""
    rows = read_jsonl(questions, ["question_id", "image", "text", "category"])
    context_of = unique_by(read_jsonl(contexts, fields), "image", str(contexts))
    answer_of = unique_by(read_jsonl(answers, ["question_id", "text"]), "question_id", str(answers))
    for row in rows:
        id = row["question_id"]
        if id not in answer_of:
            raise ValueError(f"{answers}: has no answer for question_id {id!r} of {questions}.")
        if row["image"] not in context_of:
            raise ValueError(f"{contexts}: has no image {row['image']!r}, which question_id {id!r} is about.")
        answer = answer_of[id]
        joined = {**row, "reference": answer["text"], "reference_id": answer.get("answer_id", id)}
        yield joined, context_of[row["image"]], f"{questions}, question_id {id!r}"


def _example(row: dict[str, Any], image: TaskImage, context: str, place: str) -> Example:
    if row["category"] not in CATEGORIES:
        raise ValueError(f"{place}: category is {row['category']!r}, expected one of {', '.join(CATEGORIES)}.")
    return Example(
        id=str(row["question_id"]),
        prompt=row["text"],
        images=[image],
        reference=row["reference"],
        details={
            "category": row["category"],
            "context": context,
            "has_boxes": row.get("has_boxes", False),
            "question_id": row["question_id"],
            "reference_id": row.get("reference_id", row["question_id"]),
        },
    )


def _lines(caption: str | Sequence[str]) -> str:
    return caption if isinstance(caption, str) else "\n".join(caption)


def question_for_judge(record: Record, swapped: bool = False) -> Messages:
    example = record.example
    answers = [record.answer, example.reference] if swapped else [example.reference, record.answer]
    parts = [f"[Context]\n{example.details['context']}", f"[Question]\n{example.prompt}"]
    for number, answer in enumerate(answers, start=1):
        parts.append(f"[Assistant {number}]\n{answer}\n[End of Assistant {number}]")
    parts.append("[Task]\n" + INSTRUCTION.format(boxes=BOXES if example.details["has_boxes"] else ""))
    return [{"role": "system", "content": SYSTEM_MESSAGE}, {"role": "user", "content": "\n\n".join(parts)}]


def parse_review(text: str) -> tuple[float, float]:
    """
    The two scores on the first line of the judge's answer. Judges also write labels, `/10` and marks around them.

        >>> parse_review("8 6.5\\nAssistant 1 is right."), parse_review("**Scores:** 9/10, 7/10")
        ((8.0, 6.5), (9.0, 7.0))

    Raises:
        ValueError: If the line has anything else, or a score is not from 1 to 10.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # A label or a score may have a line of its own.
    for num_lines in (1, 2, 3):
        numbers = _AROUND_SCORES.sub(" ", " ".join(lines[:num_lines]))
        found = _SCORES.fullmatch(numbers.strip())
        if found is not None:
            break
    first = lines[0] if lines else ""
    if found is None:
        raise ValueError(f"the first line is {first[:80]!r}, expected two scores")
    scores = float(found[1]), float(found[2])
    if not all(LOWEST <= score <= HIGHEST for score in scores):
        raise ValueError(f"the scores are {first!r}, expected numbers from 1 to 10")
    return scores


def judge(records: Sequence[Record], judge: Judge, folder: Path, category_prefix: str) -> list[Score]:
    verdicts = {}
    for swapped in (False, True) if judge.settings.swap else (False,):
        order = "model's answer first" if swapped else "reference first"
        questions = {
            record.example.id: question_for_judge(record, swapped) for record in records if record.error is None
        }
        verdicts[swapped] = judge.complete_all(questions, parse_review, f"LLaVA-Bench: judging, {order}")
        path = folder / ("reviews_swapped.jsonl" if swapped else "reviews.jsonl")
        _write_reviews(records, verdicts[swapped], path, category_prefix)
    return [
        score(record, {swapped: each.get(record.example.id) for swapped, each in verdicts.items()})
        for record in records
    ]


def score(record: Record, verdicts: dict[bool, Verdict | None]) -> Score:
    """
    The score of an answer, from one verdict for each order.

    Args:
        verdicts: Whether the order was swapped -> the judge's verdict; `None` for an example without an answer.
    """
    values, texts = {}, []
    for swapped, verdict in verdicts.items():
        if verdict is not None and verdict.error is not None:
            return Score({}, is_parsed=False, prediction=verdict.text, judge_error=verdict.error)
        if record.error is not None:
            reference, model = HIGHEST, LOWEST
        else:
            reference, model = reversed(verdict.value) if swapped else verdict.value
            texts.append(verdict.text)
        prefix = "swapped/" if swapped else ""
        values |= {f"{prefix}model_score": model, f"{prefix}reference_score": reference}
    return Score(values, is_parsed=record.error is None, prediction=texts)


def corpus_metrics(records: Sequence[Record]) -> dict[str, float]:
    figures = {}
    for prefix in ("", "swapped/"):
        if f"{prefix}model_score" in records[0].score.values:
            figures[f"{prefix}relative_score"] = relative_score(
                [record.score.values[f"{prefix}model_score"] for record in records],
                [record.score.values[f"{prefix}reference_score"] for record in records],
            )
    if "swapped/relative_score" in figures:
        unswapped, swapped = figures.values()
        figures["both_orders/relative_score"] = (unswapped + swapped) / 2
        figures["position_bias"] = swapped - unswapped
    return figures


def _write_reviews(records: Sequence[Record], verdicts: dict[str, Verdict], path: Path, category_prefix: str) -> None:
    """Writes the reviews that could be parsed, in the format of LLaVA's summary script."""
    lines = []
    for number, record in enumerate(records, start=1):
        details, verdict = record.example.details, verdicts.get(record.example.id)
        if verdict is None or verdict.error is not None:
            continue
        line = {
            "id": number,
            "question_id": details["question_id"],
            "answer1_id": details["reference_id"],
            "answer2_id": details["question_id"],
            "category": category_prefix + details["category"],
            "content": verdict.text,
            "tuple": verdict.value,
        }
        lines.append(line)
    write_jsonl(path, lines)


TASK = Task(
    name="llava_bench",
    title="LLaVA-Bench (In-the-Wild)",
    hub_id="lmms-lab-encoder/llava-bench-in-the-wild",
    folder="llava-bench-in-the-wild",
    read=partial(read, read_folder=read_wild_folder),
    score=None,
    judge=partial(judge, category_prefix="llava_bench_"),
    main_metric="relative_score",
    corpus_metrics=corpus_metrics,
    num_resamples=1000,
    breakdown="category",
    max_new_tokens=1024,
    scale=1.0,
    metrics_are_shares=False,
)
COCO_TASK = replace(
    TASK,
    name="llava_bench_coco",
    title="LLaVA-Bench (COCO)",
    hub_id="lmms-lab-encoder/llava-bench-coco",
    folder="coco2014_val_qa_eval",
    read=partial(read, read_folder=read_coco_folder),
    judge=partial(judge, category_prefix=""),
)
