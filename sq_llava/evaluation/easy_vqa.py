"""easy-VQA: questions about one coloured shape (https://github.com/vzhou842/easy-VQA), the demo's data.

    sq-llava evaluate --model runs/demo/model --tasks easy_vqa --data runs/demo/data

Reads `test.json` (or `<split>.json`) as `python -m demo.data` writes it: LLaVA's rows with a single question, and
`kind`, the kind of question. Images stand in the package `easy_vqa`, or in `images` beside the file. An answer is
right if it equals the reference, case and a trailing period aside.
"""

from importlib.util import find_spec
from pathlib import Path

from sq_llava.evaluation.metrics import exact_match
from sq_llava.evaluation.reading import Data, check_fields, read_json
from sq_llava.evaluation.task import Example, Score, Task


def read(data: Data) -> list[Example]:
    file = data.file(f"{data.split or 'test'}.json")
    root = _image_root(file)
    examples = []
    for number, row in enumerate(read_json(file)):
        check_fields(row, ["id", "image", "kind", "conversations"], f"{file}, row {number}")
        question, answer = (turn["value"] for turn in row["conversations"])
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


def _image_root(file: Path) -> Path:
    if (file.parent / "images").is_dir():
        return file.parent / "images"
    package = find_spec("easy_vqa")
    if package is None:
        raise ValueError(f"{file.parent}: has no folder images. Put them there, or install the package easy-vqa.")
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
