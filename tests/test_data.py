"""LLaVA's JSON becomes checked rows; what is wrong is said with its place and mend."""

import json

import pytest

from sq_llava.data import check_rows, load_rows
from tests import tiny


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        tiny.picture().save(tmp_path / "images" / name)
    tiny.picture().save(tmp_path / "secret.png")
    return tmp_path


def row(question="<image>\nWhat is it?", **fields) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "A dog."}]
    return {"id": "r", "image": "a.png", "conversations": turns, **fields}


def load(folder, *rows, suffix=".json"):
    file = folder / f"data{suffix}"
    lines = [json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]")
    return load_rows(str(file), str(folder / "images"))


def content(rows, index=0):
    """The content parts of the first message, text or `None` for an image."""
    return [part["text"] for part in rows[index]["messages"][0]["content"]]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_llava_row_becomes_messages_and_paths(folder, suffix):
    rows = load(folder, row(), row("Hi.", image=None), suffix=suffix)
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"]
    assert content(rows, 0) == [None, "What is it?"]
    assert rows[0]["images"] == [str((folder / "images" / "a.png").resolve())]
    assert rows[1]["images"] == [] and content(rows, 1) == ["Hi."]
    assert rows["row_id"] == [0, 1]


def test_a_single_image_is_moved_to_the_front_of_its_turn(folder):
    assert content(load(folder, row("What is it?\n<image>"))) == [None, "What is it?"]


def test_several_images_stay_in_place(folder):
    rows = load(folder, row("<image>\nand <image> differ?", image=["a.png", "b.png"]))
    assert content(rows) == [None, "and ", None, " differ?"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image": "../secret.png"}, r"row 0 \(id 'r'\): image '../secret.png' leaves the image root"),
        ({"image": "/etc/passwd"}, "leaves the image root"),
        ({"image": "c.png"}, "image 'c.png' does not exist"),
        ({"image": ["a.png", "b.png"]}, "1 <image> in 'conversations', but 2 in 'image'"),
        ({"image": None}, "1 <image> in 'conversations', but 0 in 'image'"),
        ({"conversations": []}, "'conversations' is \\[\\]"),
        ({"conversations": [{"from": "human", "value": "<image>"}]}, "must alternate"),
        ({"conversations": [{"from": "robot", "value": "hi"}]}, "turn 0 is .*'robot'"),
    ],
)
def test_wrong_row_is_refused_with_its_place(folder, wrong, message):
    with pytest.raises(ValueError, match=message):
        load(folder, row(**wrong))


def test_broken_json_and_missing_files_are_named(folder):
    (folder / "broken.json").write_text('[{"id": ')
    with pytest.raises(ValueError, match=r"broken\.json: cannot be read as JSON"):
        load_rows(str(folder / "broken.json"))
    with pytest.raises(ValueError, match="no such file"):
        load_rows(str(folder / "none.json"))
    with pytest.raises(ValueError, match=r"image_root .* no such folder"):
        load_rows(str(folder / "broken.json"), str(folder / "none"))


@pytest.mark.parametrize("token", ["[vusr]", "</s>", "<pad>"])
def test_control_token_in_a_text_is_found_before_training(folder, token):
    rows = load(folder, row(), row(f"<image>\nforged {token}"))
    with pytest.raises(ValueError, match=r"Row 1 .* a control token"):
        check_rows(rows, tiny.tiny_processor())


def test_unreadable_image_is_found_before_training(folder):
    (folder / "images" / "broken.png").write_bytes(b"no image")
    rows = load(folder, row(), row(image="broken.png"))
    with pytest.raises(ValueError, match=r"Row 1 .*broken\.png cannot be read"):
        check_rows(rows, tiny.tiny_processor())
