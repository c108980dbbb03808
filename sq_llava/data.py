"""Training data: LLaVA's JSON -> rows with `row_id`, `id`, `messages` and `images`.

A row of LLaVA's JSON (a list in `.json`, one object a line in `.jsonl`)

    {"id": "17", "image": "17.png", "conversations": [
        {"from": "human", "value": "<image>\\nWhat animal is this?"}, {"from": "gpt", "value": "A dog."}]}

becomes

    {"row_id": 0, "id": "17", "images": ["ROOT/17.png"], "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What animal is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}]}

and, by the chat template, the text of `sq_llava/self_questioning.py`. A single `<image>` is moved to the front of its
turn, as LLaVA does; where a turn holds several they stay in place. `image` may be a path, a list, or absent. Images
are paths here; they are opened when a batch is made.
"""

import json
from pathlib import Path

from datasets import Dataset
from PIL import Image
from tqdm import tqdm

from processing_sq_llava import IMAGE_TOKEN, SQLlavaProcessor


ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def load_rows(path: str, image_root: str | None = None) -> Dataset:
    """
    Reads and checks a file of LLaVA rows.

    Args:
        path (`str`): A `.json` or `.jsonl` file.
        image_root (`str`, *optional*): Folder that the image paths are relative to and must stay inside of. Default:
            the folder of the file.

    Returns:
        `datasets.Dataset` with the columns `row_id`, `id`, `messages`, `images`.

    Raises:
        ValueError: with file, row, id, field, value and mend, for the first row that is wrong.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{path}: no such file. Give a .json or .jsonl file in LLaVA's format.")
    root = Path(image_root) if image_root else file.parent
    if not root.is_dir():
        raise ValueError(f"image_root {root}: no such folder.")
    rows = _read_json(file)
    if not rows:
        raise ValueError(f"{path}: no rows.")
    rows = [
        parse_row(row, row_id, f"{path}, row {row_id}", root.resolve())
        for row_id, row in enumerate(tqdm(rows, desc=f"Checking {file.name}", unit=" rows"))
    ]
    return Dataset.from_list(rows)


def _read_json(file: Path) -> list:
    try:
        if file.suffix == ".jsonl":
            with file.open(encoding="utf-8") as lines:
                return [json.loads(line) for line in lines if line.strip()]
        rows = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # broken JSON or broken UTF-8
        raise ValueError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{file}: holds a {type(rows).__name__}, expected a list of rows.")
    return rows


def parse_row(row: dict, row_id: int, place: str, image_root: Path) -> dict:
    """One row of LLaVA's JSON, checked; `place` names it in errors. See the module's example."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: is {row!r:.100}, expected an object.")
    place = f"{place} (id {row.get('id')!r})"
    images = row.get("image") or []
    images = [images] if isinstance(images, str) else images
    messages = _parse_conversations(row.get("conversations"), place)
    num_placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if num_placeholders != len(images):
        raise ValueError(
            f"{place}: {num_placeholders} {IMAGE_TOKEN} in 'conversations', but {len(images)} in 'image': write one "
            f"{IMAGE_TOKEN} for each image."
        )
    return {
        "row_id": row_id,
        "id": str(row.get("id", row_id)),
        "messages": messages,
        "images": [_resolve_image(image, image_root, place) for image in images],
    }


def _parse_conversations(turns, place: str) -> list[dict]:
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{place}: 'conversations' is {turns!r:.100}, expected a list of turns that is not empty.")
    messages = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") not in ROLES or not isinstance(turn.get("value"), str):
            raise ValueError(
                f"{place}: turn {index} is {turn!r:.100}, expected an object with 'from' ({', '.join(ROLES)}) and a "
                "text 'value'."
            )
        messages.append({"role": ROLES[turn["from"]], "content": _parse_value(turn["value"])})
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if roles != ["user", "assistant"] * (len(roles) // 2) or "system" in [m["role"] for m in messages[1:]]:
        raise ValueError(
            f"{place}: the turns are from {', '.join(turn['from'] for turn in turns)}: they must alternate, human "
            "then gpt, and end with gpt (a system turn may stand first)."
        )
    return messages


def _parse_value(value: str) -> list[dict]:
    texts = value.split(IMAGE_TOKEN)
    if len(texts) == 2:
        texts = ["", "".join(texts).strip()]
    content = []
    for index, text in enumerate(texts):
        if index > 0:
            content.append({"type": "image", "text": None})
            # The template writes the line break after the images that begin a turn.
            text = text.removeprefix("\n") if not any(part["text"] for part in content) else text
        if text:
            content.append({"type": "text", "text": text})
    return content or [{"type": "text", "text": ""}]


def _resolve_image(image, image_root: Path, place: str) -> str:
    if not isinstance(image, str):
        raise ValueError(f"{place}: 'image' is {image!r:.100}, expected a path relative to {image_root}.")
    path = (image_root / image).resolve()
    if not path.is_relative_to(image_root):
        raise ValueError(f"{place}: image {image!r} leaves the image root {image_root}: give a path inside of it.")
    if not path.is_file():
        raise ValueError(f"{place}: image {image!r} does not exist in {image_root}.")
    return str(path)


def check_rows(rows: Dataset, processor: SQLlavaProcessor) -> None:
    """
    Checks what needs the tokenizer or the image files, before the first step: control tokens inside texts, and images
    whose header cannot be read.

    Raises:
        ValueError: for the first row that is wrong.
    """
    seen = set()
    for row in tqdm(rows, desc="Checking texts and images", unit=" rows"):
        place = f"Row {row['row_id']} (id {row['id']!r})"
        for message in row["messages"]:
            for part in message["content"]:
                found = [token for token in processor.control_tokens if token in (part["text"] or "")]
                if found:
                    raise ValueError(
                        f"{place}: the text {part['text']!r:.100} contains {found[0]!r}, a control token of this "
                        "model: remove it from the text."
                    )
        for path in row["images"]:
            if path in seen:
                continue
            seen.add(path)
            try:
                with Image.open(path):
                    pass
            except OSError as error:
                raise ValueError(f"{place}: image {path} cannot be read: {error}") from error
