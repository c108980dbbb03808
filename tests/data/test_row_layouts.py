"""Rows as other trainers have them become the same messages and images; what is not read is named with its layout."""

import base64
import io
import json

import datasets
import pytest

from sq_llava.data.images import open_image
from sq_llava.data.row_layouts import measure
from sq_llava.data.rows import load_rows, parse_row, read_row
from sq_llava.data.sources import DataSource
from tests import tiny


def encoded(seed: int) -> bytes:
    stream = io.BytesIO()
    tiny.picture(seed).save(stream, "PNG")
    return stream.getvalue()


PICTURE, OTHER = encoded(0), encoded(1)
BASE64 = base64.b64encode(PICTURE).decode()
DATA_URL = f"data:image/png;base64,{BASE64}"
EMBEDDED = {"bytes": PICTURE, "path": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts").resolve()
    (folder / "a.png").write_bytes(PICTURE)
    (folder / "b.png").write_bytes(OTHER)
    return folder


def user(content) -> dict:
    return {"role": "user", "content": content}


def answer(content="A dog.") -> dict:
    return {"role": "assistant", "content": content}


def text(content: str) -> dict:
    return {"type": "text", "text": content}


def shorthand(row: dict) -> list[tuple]:
    """Roles, and texts with `None` for an image."""
    return [(message["role"], [part.get("text") for part in message["content"]]) for message in row["messages"]]


ASKED = [("user", [None, "What is it?"]), ("assistant", ["A dog."])]
TWICE = [*ASKED, ("user", ["And now?"]), ("assistant", ["It runs."])]
BRIEFED = [("system", ["Be kind."]), *ASKED]
LAYOUTS = {
    "LLaVA": (
        {"conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."}]},
        ASKED,
    ),
    "conversations of role and content": ({"conversations": [user("<image>What is it?"), answer()]}, ASKED),
    "conversations of user and assistant names": (
        {"conversations": [{"from": "user", "value": "<image>What is it?"}, {"from": "assistant", "value": "A dog."}]},
        ASKED,
    ),
    "conversation of ms-swift": (
        {"system": "Be kind.", "conversation": [{"human": "<image>What is it?", "assistant": "A dog."}]},
        BRIEFED,
    ),
    "texts of FineVision": (
        {
            "texts": [{"user": "What is it?", "assistant": "A dog."}, {"user": "And now?", "assistant": "It runs."}],
            "source": "x",
        },
        TWICE,
    ),
    "messages without a place": ({"messages": [user("What is it?"), answer()]}, ASKED),
    "messages with system": (
        {"messages": [{"role": "system", "content": "Be kind."}, user("<image>What is it?"), answer()]},
        BRIEFED,
    ),
    "messages of parts": (
        {"messages": [user([{"type": "image"}, text("What is it?")]), answer([text("A dog.")])]},
        ASKED,
    ),
    "messages with None for what Arrow lacks": (
        {
            "messages": [
                user(
                    [
                        {"type": "image", "text": None, "image": None, "index": 0},
                        {"type": "text", "text": "What is it?", "image": {"bytes": None, "path": None}, "index": None},
                    ]
                ),
                answer([{**text("A dog."), "image": None}]),
            ]
        },
        ASKED,
    ),
    "prompt and completion": ({"prompt": "<image>What is it?", "completion": "A dog."}, ASKED),
    "prompt and completion of messages": ({"prompt": [user("What is it?")], "completion": [answer()]}, ASKED),
    "query and response": ({"query": "What is it?", "response": "A dog.", "system": "Be kind."}, BRIEFED),
    "query, response and history": (
        {"query": "And now?", "response": "It runs.", "history": [["<image>What is it?", "A dog."]]},
        TWICE,
    ),
    "Alpaca": ({"instruction": "<image>", "input": "What is it?", "output": "A dog."}, ASKED),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_messages_in_json_and_in_a_table(folder, tmp_path, name):
    fields, expected = LAYOUTS[name]
    path = str(folder / "a.png")
    rows = [
        {**fields, "image": "a.png"},
        {**fields, "image": None, "images": ["a.png"]},
        {**fields, "images": [{"path": "a.png", "bytes": None}]},
        {**fields, "image": DATA_URL},
        {**fields, "image": BASE64},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = datasets.Dataset.from_list([{**fields, "image": EMBEDDED}])
    table.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "table")
    for place in ("rows.jsonl", "table"):
        read = load_rows([DataSource(str(tmp_path / place), str(folder))], image_seq_length=0)
        whole = read[:]
        assert whole["num_images"] == [1] * len(read)
        # An image is no text, also where it is written as one.
        assert max(whole["length"]) < 120
        for row in (dict(zip(whole, values)) for values in zip(*whole.values())):
            assert shorthand(row) == expected
            (image,) = row["images"]
            assert image in (path, EMBEDDED) and open_image(image).tobytes() == tiny.picture(0).tobytes()


INLINE = {
    "path": {"type": "image", "image": "a.png"},
    "key path": {"type": "image", "path": "a.png"},
    "file address": {"type": "image", "url": "file://a.png"},
    "undecoded": {"type": "image", "image": EMBEDDED},
    "bytes": {"type": "image", "image": PICTURE},
    "key bytes": {"type": "image", "bytes": PICTURE},
    "base64": {"type": "image", "base64": BASE64},
    "bytes in JSON": {"type": "image", "image": {"bytes": BASE64}},
    "data address": {"type": "image", "url": DATA_URL},
    "OpenAI": {"type": "image_url", "image_url": {"url": DATA_URL, "detail": "low"}},
    "OpenAI, short": {"type": "image_url", "image_url": DATA_URL},
}


@pytest.mark.parametrize("kind", INLINE)
def test_an_image_may_stand_in_the_message_and_goes_to_its_place_among_the_others(folder, tmp_path, kind):
    raw = {
        "messages": [user([{"type": "image"}, text("or "), INLINE[kind], text("?")]), answer([text("Both.")])],
        "images": ["b.png"],
    }
    row = parse_row(raw, "here", folder)
    assert shorthand(row)[0] == ("user", [None, "or ", None, "?"])
    first, second = map(open_image, row["images"])
    assert first.tobytes() == tiny.picture(1).tobytes() and second.tobytes() == tiny.picture(0).tobytes()
    assert measure(raw)[0] == 2
    datasets.Dataset.from_list([raw, raw]).save_to_disk(tmp_path / "saved")
    read = load_rows([DataSource(str(tmp_path / "saved"), str(folder))])
    assert read[1]["images"] == row["images"] and read[1]["messages"] == row["messages"]
    assert read[:]["num_images"] == [2, 2]


WRONG = {
    "a count that does not fit": (
        {"query": "<image>?", "response": "A."},
        "image_count",
        r"read as query \+ response: 1 <image> in 'query' and 'response', but 0 images in",
    ),
    "a count in parts": (
        {"messages": [user([INLINE["path"]]), answer()], "images": ["b.png"]},
        "image_count",
        "read as TRL's messages: 0 <image>.*and 1 images in the turns themselves, but 1 images",
    ),
    "two fields of images": (
        {"prompt": "What?", "completion": "A.", "image": "a.png", "images": ["b.png"]},
        "image_count",
        "hold different images",
    ),
    "an index out of order": (
        {"messages": [user([{"type": "image", "index": 1}]), answer()], "images": ["a.png"]},
        "image_count",
        "shows image 1 where image 0 is due",
    ),
    "no layout": (
        {"question": "What?", "answer": "A.", "image": "a.png"},
        "no_turns",
        "has question, answer, image: it is of no layout",
    ),
    "a second turn of another form": (
        {"conversations": [{"from": "human", "value": "Hi."}, answer()]},
        "wrong_turn",
        "read as LLaVA's conversations: turn 1 is .*",
    ),
    "no completion": ({"prompt": "What?", "completion": None}, "wrong_turn", "read as prompt.*'completion' has None"),
    "a history that is none": ({"query": "And?", "response": "A.", "history": ["What?"]}, "wrong_turn", ".*"),
    "a history that is no list": (
        {"query": "And?", "response": "A.", "history": 3},
        "wrong_turn",
        "'history' holds 3",
    ),
    "broken base64": (
        {"query": "What?", "response": "A.", "image": f"data:image/png;base64,{BASE64[:-3]}"},
        "wrong_image",
        "not valid base64",
    ),
    "an address": (
        {"messages": [user([{"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}]), answer()]},
        "image_is_url",
        "is an address",
    ),
    "a path outside, inline": (
        {"messages": [user([{"type": "image", "image": "../a.png"}]), answer()]},
        "image_outside_root",
        "leaves",
    ),
    "a file address outside": (
        {"query": "What?", "response": "A.", "image": "file:///etc/passwd"},
        "image_outside_root",
        "leaves",
    ),
    "text beside an image": (
        {"messages": [user([{**text("What?"), "image": "a.png"}]), answer()]},
        "wrong_turn",
        "no image beside it",
    ),
    "a loss switched off": (
        {"messages": [user("What?"), {**answer(), "loss": False}]},
        "unread_field",
        "turn 1 has 'loss' is False",
    ),
    "tools": ({"messages": [user("What?"), answer()], "tools": "[{}]"}, "unread_field", "'tools'"),
    "a preference": (
        {"prompt": "What?", "chosen": "A.", "rejected": "B."},
        "no_turns",
        "has prompt, chosen, rejected",
    ),
}
MEDIA = {
    "a field": {"query": "What?", "response": "A.", "videos": ["a.mp4"]},
    "another": {"query": "What?", "response": "A.", "audio_path": "a.wav"},
    "an image by another name": {"query": "What?", "response": "A.", "image_path": "a.png"},
    "a second image": {"query": "What?", "response": "A.", "image": "a.png", "image_2": "b.png"},
    "a field of a turn": {"messages": [{**user("What?"), "images": ["a.png"]}, answer()]},
    "a part": {"messages": [user([text("What?"), {"type": "video", "video": "a.mp4"}]), answer()]},
    "a part of audio": {"messages": [user([{"type": "input_audio", "input_audio": {"data": "AAAA"}}]), answer()]},
    "a part's field": {"messages": [user([{**text("What?"), "video": "a.mp4"}]), answer()]},
    **{
        tag: {"query": f"{tag}What?", "response": "A."}
        for tag in (
            "<video>", "<audio>", "<img>", "</img>", "<Image>", "<image_1>", "<image1>", "<|image_pad|>",
            "<|video_pad|>",
            "<|image|>", "<|image_1|>", "<|vision_start|>", "<ImageHere>", "<start_of_image>", "<IMG_CONTEXT>",
            "<im_patch>", "<image_soft_token>", "[IMG]", "<|AUDIO|>", "<image-placeholder>",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_read_is_named_with_the_layout_that_was_recognized(folder, name):
    raw, code, message = WRONG[name]
    with pytest.raises(ValueError, match=f"^here: .*{message}"):
        parse_row(raw, "here", folder)
    assert code in [fault.code for fault in read_row(raw, folder).faults]


@pytest.mark.parametrize("name", MEDIA)
def test_other_media_and_what_looks_like_them_are_errors(folder, name):
    faults = read_row(MEDIA[name], folder).faults
    assert [(fault.code, fault.level) for fault in faults] == [("unread_media", "error")]


@pytest.mark.parametrize(
    "fields",
    [
        {"image": "a.png", "image_url": "https://x.org/a.png", "image_id": 7, "image_path": "a.png"},
        {"videos": [], "audios": None, "tools": [], "num_images": 0, "has_video": False, "weight": 1},
        {
            "source": "x",
            "width": 8,
            "response": 'HTML: <video src="a"></video>, <img src="b"> <image/> <imagery> 3 < 4',
        },
    ],
)
def test_what_tells_of_a_row_but_holds_no_media_is_left_alone(folder, fields):
    assert read_row({"query": "What?", "response": "A.", **fields}, folder).faults == []


@pytest.mark.parametrize("place", ["text", "path", "turn", "bytes", "broken"])
def test_no_fault_shows_bytes_or_base64(folder, place):
    long = base64.b64encode(OTHER * 20).decode()
    raw = {
        "text": {"messages": [user([{**text("What?"), "image": DATA_URL}]), answer()]},
        "path": {"query": "What?", "response": "A.", "image_2": long, "image": {"url": {"url": long}}},
        "turn": {"messages": [{"role": "user", "image": long}], "video": long},
        "bytes": {"messages": [user([{"type": "image", "bytes": OTHER, "image": OTHER}]), answer()]},
        "broken": {"query": "What?", "response": "A.", "image": f"data:image/png;base64,{long[:-3]}"},
    }[place]
    faults = read_row(raw, folder).faults
    said = " ".join(fault.message + fault.fix for fault in faults)
    assert faults and "iVBOR" not in said and "\\x" not in said and long[:12] not in said and len(said) < 800
