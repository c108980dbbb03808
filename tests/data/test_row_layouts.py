"""Rows in the layouts of other trainers become the same messages and images; errors name the layout."""

import base64
import json
import re

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sq_llava.data.images import open_image
from sq_llava.data.row_layouts import KNOWN_FIELDS, KNOWN_PART_KEYS, measure
from sq_llava.data.rows import load_rows, parse_row, read_row
from sq_llava.data.sources import DataSource
from tests import ROOT, tiny
from tests.pictures import encoded


PICTURE, OTHER = (encoded(tiny.picture(seed), "PNG") for seed in range(2))
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


def asked(content, **fields) -> dict:
    return {"messages": [user(content), answer()], **fields}


def llava(role: str, value: str | None = "Hi.") -> dict:
    return {"conversations": [{"from": role, "value": value}]}


def shorthand(row: dict) -> list[tuple]:
    """Returns the role of each message and its parts: a text, or `None` for an image."""
    return [(message["role"], [part.get("text") for part in message["content"]]) for message in row["messages"]]


A = {"response": "A."}
Q = {"query": "What?", **A}
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
    "messages without a place": (asked("What is it?"), ASKED),
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
        # The base64 of an image is not counted as text.
        assert max(whole["length"]) < 120
        for row in (dict(zip(whole, values)) for values in zip(*whole.values())):
            assert shorthand(row) == expected
            (image,) = row["images"]
            assert image in (path, EMBEDDED) and open_image(image).tobytes() == tiny.picture(0).tobytes()


PARTS = {
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


@pytest.mark.parametrize("kind", PARTS)
def test_an_image_may_stand_in_the_message_and_goes_to_its_place_among_the_others(folder, tmp_path, kind):
    raw = {
        "messages": [user([{"type": "image"}, text("or "), PARTS[kind], text("?")]), answer([text("Both.")])],
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


NO_COMPLETION = {"prompt": "What?", "completion": None}
WRONG = [
    (
        {"query": "<image>?", **A},
        "image_count",
        r"read as query \+ response: 1 <image> in 'query' and 'response'",
    ),
    (
        asked([PARTS["path"]], images=["b.png"]),
        "image_count",
        "read as TRL's messages: 0 <image>.*, and 1 in image parts, but 1",
    ),
    ({**Q, "image": "a.png", "images": ["b.png"]}, "image_count", "'image' and 'images' hold different images"),
    (asked([{"type": "image", "index": 1}], images=["a.png"]), "image_count", "has 'index' 1 in the part of image 0"),
    ({"question": "What?", "answer": "A."}, "no_turns", "the fields are question, answer: this is no known layout"),
    ({"prompt": "What?", "chosen": "A.", "rejected": "B."}, "no_turns", "the fields are prompt, chosen, rejected"),
    ({"conversations": []}, "no_turns", r"'conversations' is \[\].*at least one turn"),
    (llava("human"), "turn_order", "the roles of the turns are user. They must alternate"),
    (llava("bot"), "unknown_role", "turn 0 has 'from' 'bot'. Use one of human, user, gpt, assistant, system"),
    (llava("human", value=None), "wrong_turn", "turn 0 has 'value' None. Give a text"),
    ({"conversations": [{"value": "x"}]}, "wrong_turn", "Give an object with 'from' and 'value'"),
    (
        {"conversations": [*llava("human")["conversations"], answer()]},
        "wrong_turn",
        "LLaVA's conversations: turn 1 is",
    ),
    (NO_COMPLETION, "wrong_turn", r"read as prompt \+ completion: 'completion' has None"),
    ({**Q, "history": ["What?"]}, "wrong_turn", r"'history' holds 'What\?'"),
    ({**Q, "history": 3}, "wrong_turn", "'history' holds 3"),
    (asked([{**text("What?"), "image": "a.png"}]), "wrong_turn", "put the image in its own part"),
    ({"query": "What?", "response": " "}, "no_label", "nothing can be learned"),
    ({**Q, "image": 3}, "wrong_image", "an image is 3. Give a path"),
    ({**Q, "image": f"data:image/png;base64,{BASE64[:-3]}"}, "wrong_image", "not valid base64"),
    ({**Q, "image": "https://x.org/a.png"}, "image_is_url", "is a URL. Download it"),
    (asked([{"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}]), "image_is_url", "is a URL"),
    (asked([{"type": "image", "image": "../a.png"}]), "image_outside_root", "'../a.png' is outside the image root"),
    ({**Q, "image": "file:///etc/passwd"}, "image_outside_root", "'/etc/passwd' is outside the image root"),
    ({"messages": [user("What?"), {**answer(), "loss": False}]}, "unread_field", "turn 1 has 'loss' is False"),
    (asked("What?", tools="[{}]"), "unread_field", "'tools'"),
]
MEDIA = {
    "a field": {**Q, "videos": ["a.mp4"]},
    "another": {**Q, "audio_path": "a.wav"},
    "an image by another name": {**Q, "image_path": "a.png"},
    "a second image": {**Q, "image": "a.png", "image_2": "b.png"},
    "a field of a turn": {"messages": [{**user("What?"), "images": ["a.png"]}, answer()]},
    "a part": asked([text("What?"), {"type": "video", "video": "a.mp4"}]),
    "a part of audio": asked([{"type": "input_audio", "input_audio": {"data": "AAAA"}}]),
    "a part's field": asked([{**text("What?"), "video": "a.mp4"}]),
    **{
        tag: {"query": f"{tag}What?", **A}
        for tag in (
            "<video>", "<audio>", "<img>", "</img>", "<Image>", "<image_1>", "<image1>", "<|image_pad|>",
            "<|video_pad|>", "<|image|>", "<|image_1|>", "<|vision_start|>", "<ImageHere>", "<start_of_image>",
            "<IMG_CONTEXT>", "<im_patch>", "<image_soft_token>", "[IMG]", "<|AUDIO|>", "<image-placeholder>",
        )
    },
}  # fmt: skip


def test_every_layout_of_the_docs_is_read_to_the_same_messages(folder):
    examples = re.findall(r"^```json\n(.+?)^```", (ROOT / "docs/data.md").read_text(), re.M | re.S)
    rows = [parse_row(json.loads(example), example, folder) for example in examples]
    assert len(rows) == 9 and all(shorthand(row) == ASKED and len(row["images"]) == 1 for row in rows)


@pytest.mark.parametrize(("raw", "code", "message"), WRONG)
def test_wrong_row_is_an_error_with_its_place_and_the_layout_that_was_recognized(folder, raw, code, message):
    with pytest.raises(ValueError, match=f"^here: .*{message}"):
        parse_row(raw, "here", folder)
    assert code in [fault.code for fault in read_row(raw, folder).faults]


@pytest.mark.parametrize("name", MEDIA)
def test_other_media_and_fields_that_look_like_them_are_errors(folder, name):
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
            "response": 'HTML: <video src="a"></video>, <img src="b"> <image/> <imagery> 3 < 4 <|im_start|>',
        },
    ],
)
def test_fields_without_media_are_ignored(folder, fields):
    assert read_row({**Q, **fields}, folder).faults == []


@pytest.mark.parametrize("place", ["text", "path", "turn", "bytes", "broken"])
def test_no_fault_shows_bytes_or_base64(folder, place):
    long = base64.b64encode(OTHER * 20).decode()
    raw = {
        "text": {"messages": [user([{**text("What?"), "image": DATA_URL}]), answer()]},
        "path": {**Q, "image_2": long, "image": {"url": {"url": long}}},
        "turn": {"messages": [{"role": "user", "image": long}], "video": long},
        "bytes": {"messages": [user([{"type": "image", "bytes": OTHER, "image": OTHER}]), answer()]},
        "broken": {**Q, "image": f"data:image/png;base64,{long[:-3]}"},
    }[place]
    faults = read_row(raw, folder).faults
    printed = " ".join(fault.message + fault.fix for fault in faults)
    assert faults and "iVBOR" not in printed and "\\x" not in printed
    assert long[:12] not in printed and len(printed) < 800


NAMES = sorted({*KNOWN_FIELDS, *KNOWN_PART_KEYS, "from", "value", "role", "content", "user", "assistant", "loss"})
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["human", "gpt", "<image>", "good.png"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=20,
)


@given(raw=JSON_VALUES)
def test_any_json_value_gives_messages_or_faults(folder, raw):
    faults, messages, _ = read_row(raw, folder)
    assert all(fault.message and fault.fix for fault in faults) and (faults or messages)
