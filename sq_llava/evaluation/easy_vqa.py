"""easy-VQA: questions about images with one coloured shape (https://github.com/vzhou842/easy-VQA), the demo's data.

    sq-llava evaluate --model runs/demo/model --tasks easy_vqa --data runs/demo/data

Reads `test.json` (or `<split>.json`) as `python -m demo.data` writes it: rows in LLaVA's format with one question
each, and a field `kind` with the kind of question. The images are in a folder `images` beside the file or beside its
folder, otherwise in the installed package `easy_vqa`. An answer is correct if it equals the reference, ignoring case
and a trailing period.

The answers about an image tell its shape and colour. So this module can also check whether a new question assumes
something that is not in the image.
"""

import re
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from sq_llava.evaluation.metrics import exact_match
from sq_llava.evaluation.reading import Data, check_fields, read_json_rows
from sq_llava.evaluation.task import Example, Score, Task


SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
KINDS = ("yes/no shape", "yes/no colour", "shape", "colour")


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text))


def question_kind(question: str) -> str:
    """The kind of a question, one of the four `KINDS`: yes/no or open, about a shape or a colour.

    Example:
        >>> question_kind("is no teal shape present?"), question_kind("what is the blue shape?")
        ('yes/no colour', 'shape')
    """
    words = words_of(question)
    if "what" in words:
        return "colour" if "color" in words else "shape"
    if words & set(SHAPES):
        return "yes/no shape"
    if words & set(COLOURS):
        return "yes/no colour"
    raise ValueError(f"Question {question!r} does not have the form of an easy-VQA question.")


def answer_question(question: str, colour: str, shape: str) -> str | None:
    """Answers a question about an image with one shape.

    Returns:
        The answer, or `None` if the question assumes a shape or colour that is not in the image.

    Example:
        >>> answer_question("is no teal shape present?", "red", "circle")
        'yes'
    """
    words = words_of(question)
    is_held = words & {*SHAPES, *COLOURS} <= {colour, shape}
    kind = question_kind(question)
    if kind.startswith("yes/no"):
        is_negated = bool(words & {"not", "no"})
        return "yes" if is_held != is_negated else "no"
    if not is_held:
        return None
    return colour if kind == "colour" else shape


def presumes(question: str) -> bool:
    """True if a question assumes a shape or a colour, as "what is the red shape?" does."""
    is_open = not question_kind(question).startswith("yes/no")
    return is_open and bool(words_of(question) & {*SHAPES, *COLOURS})


def derive_caption(questions: list[tuple[str, str]]) -> str | None:
    """Derives an image's caption from the answers to its questions.

    Args:
        questions: (question, answer) pairs about one image.

    Returns:
        A caption such as "a red circle", or `None` if several shapes or colours fit all answers.

    Raises:
        ValueError: If the answers contradict each other.
    """
    fitting = [
        (colour, shape)
        for colour, shape in product(COLOURS, SHAPES)
        if all(answer_question(question, colour, shape) == answer for question, answer in questions)
    ]
    if not fitting:
        raise ValueError(f"The answers contradict each other, no shape and colour fit all of them: {questions}")
    return "a {} {}".format(*fitting[0]) if len(fitting) == 1 else None


def read(data: Data) -> list[Example]:
    file = data.file(f"{data.split or 'test'}.json")
    root = image_root_of(file)
    examples = []
    for number, row in enumerate(read_json_rows(file, ["id", "image", "kind", "conversations"])):
        turns = row["conversations"]
        if len(turns) != 2:
            raise ValueError(f"{file}, row {number}: has {len(turns)} turns, expected a question and its answer.")
        question, answer = (check_fields(turn, ["value"], f"{file}, row {number}")["value"] for turn in turns)
        examples.append(
            Example(
                id=row["id"],
                prompt=question.removeprefix("<image>\n"),
                images=[data.image(root, row["image"])],
                reference=answer,
                details={"kind": row["kind"]},
            )
        )
    return examples


def image_root_of(file: Path) -> Path:
    """
    The folder that a file's image paths are relative to.

    Raises:
        ValueError: If there is none.
    """
    for folder in (file.parent, file.absolute().parent.parent):  # `make demo` puts `images` beside the data folder
        if (folder / "images").is_dir():
            return folder / "images"
    package = find_spec("easy_vqa")
    if package is None:
        raise ValueError(
            f"{file.parent}: found no folder images in it or beside it. Put the images there, or install the package "
            "that contains them: pip install 'sq-llava[demo]'."
        )
    return Path(package.origin).parent / "data"


def score(example: Example, answer: str) -> Score:
    prediction = answer.strip().lower().rstrip(".")
    return Score({"accuracy": exact_match(answer, example.reference)}, prediction=prediction)


TASK = Task(
    name="easy_vqa",
    title="easy-VQA",
    hub_id=None,
    read=read,
    score=score,
    main_metric="accuracy",
    breakdown="kind",
    max_new_tokens=8,
)
