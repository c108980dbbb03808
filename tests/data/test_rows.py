"""Files of every format become the same checked rows; errors name the place and say what to do."""

import json

import datasets
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sq_llava.data import json_file
from sq_llava.data.images import open_image
from sq_llava.data.json_file import JsonFile
from sq_llava.data.rows import hold_out, load_rows
from sq_llava.data.sources import DataSource
from tests import tiny
from tests.pictures import encoded


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        tiny.picture().save(tmp_path / "images" / name)
    return tmp_path


def row(question="<image>\nWhat is it?", **fields) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "A dog."}]
    return {"id": "r", "image": "a.png", "conversations": turns, **fields}


def write(folder, *rows, suffix=".json") -> str:
    file = folder / f"data{suffix}"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
    return str(file)


def load(folder, *rows, suffix=".json"):
    return load_rows([DataSource(write(folder, *rows, suffix=suffix), str(folder / "images"))])


def content(rows, index=0):
    """Returns the parts of the first message: a text, or `None` for an image."""
    return [part.get("text") for part in rows[index]["messages"][0]["content"]]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_llava_row_becomes_messages_and_paths(folder, suffix):
    rows = load(folder, row(), row("Hi.", image=None), suffix=suffix)
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"]
    assert content(rows, 0) == [None, "What is it?"]
    assert rows[0]["images"] == [str((folder / "images" / "a.png").resolve())]
    assert rows[1]["images"] == [] and content(rows, 1) == ["Hi."]
    assert rows[:]["row_id"] == [0, 1] and rows[:]["num_images"] == [1, 0]


def test_a_single_image_is_moved_to_the_front_of_its_turn_and_several_stay_in_place(folder):
    rows = load(folder, row("What is it?\n<image>"), row("<image>\nand <image> differ?", image=["a.png", "b.png"]))
    assert content(rows) == [None, "What is it?"]
    assert content(rows, 1) == [None, "and ", None, " differ?"]


PICTURE = encoded(tiny.picture(), "PNG")


def trl_row(question: str, *images: bytes, **fields) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "A dog."}]
    return {"messages": messages, "images": [{"bytes": image, "path": None} for image in images], **fields}


def trl_dataset(*rows: dict) -> datasets.Dataset:
    rows = rows or (trl_row("What is it?", PICTURE, id="0"), trl_row("Hi.", id="1"))
    return datasets.Dataset.from_list(list(rows)).cast_column("images", datasets.List(datasets.Image()))


def save_as(kind: str, folder) -> str:
    if kind == "parquet file":
        trl_dataset().to_parquet(folder / "data.parquet")
        return str(folder / "data.parquet")
    if kind == "parquet folder":
        (folder / "shards").mkdir()
        for shard in range(2):
            trl_dataset().shard(2, shard, contiguous=True).to_parquet(folder / "shards" / f"{shard}.parquet")
        return str(folder / "shards")
    if kind == "save_to_disk with splits":
        datasets.DatasetDict({"train": trl_dataset(), "other": trl_dataset().select([1])}).save_to_disk(folder / "d")
    else:
        trl_dataset().save_to_disk(folder / "d")
    return str(folder / "d")


@pytest.mark.parametrize("kind", ["parquet file", "parquet folder", "save_to_disk", "save_to_disk with splits"])
def test_trl_messages_with_embedded_images_are_read_undecoded_from_tables(folder, kind):
    split = "train" if "splits" in kind else None
    rows = load_rows([DataSource(save_as(kind, folder), split=split)])
    assert len(rows) == 2 and [row["id"] for row in rows] == ["0", "1"]
    # As in TRL, the images begin the first user turn if no text says where they belong.
    assert content(rows) == [None, "What is it?"] and content(rows, 1) == ["Hi."]
    assert rows[0]["images"][0]["bytes"] == PICTURE and rows[1]["images"] == []
    assert open_image(rows[0]["images"][0]).tobytes() == tiny.picture().tobytes()
    assert rows[:]["num_images"] == [1, 0]


def test_opening_a_table_copies_no_image(folder):
    trl_dataset(*[trl_row("What is it?", bytes(10**6))] * 20).save_to_disk(folder / "d")
    usual = pa.default_memory_pool()
    counting = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(counting)
    try:
        rows = load_rows([DataSource(str(folder / "d"))])
    finally:
        pa.set_memory_pool(usual)
    assert rows[:]["num_images"] == [1] * 20 and counting.max_memory() < 10**6


def test_llava_layout_in_parquet_equals_the_same_rows_in_json(folder):
    rows = [row(), row("Hi.", image=None), row("<image>", id="s")]
    datasets.Dataset.from_list(rows).to_parquet(folder / "data.parquet")
    from_table = load_rows([DataSource(str(folder / "data.parquet"), str(folder / "images"))])
    from_json = load(folder, *rows)
    for name in ("id", "messages", "images", "num_images"):
        assert from_table[:][name] == from_json[:][name]


def test_sources_are_mixed_by_weight_and_row_count(folder):
    first = write(folder, *(row("Hi.", image=None, id=f"a{i}") for i in range(10)))
    second = write(folder, *(row("Hi.", image=None, id=f"b{i}") for i in range(4)), suffix=".jsonl")
    rows = load_rows([DataSource(first, weight=0.5), DataSource(second, num_rows=6)], seed=3)
    ids = rows[:]["id"]
    assert rows[:]["row_id"] == list(range(11))
    chosen, repeated = ids[:5], ids[5:]
    assert len(set(chosen)) == 5 and all(name.startswith("a") for name in chosen)
    assert repeated[:4] == ["b0", "b1", "b2", "b3"] and len(set(repeated[4:])) == 2
    assert ids == load_rows([DataSource(first, weight=0.5), DataSource(second, num_rows=6)], seed=3)[:]["id"]
    assert ids != load_rows([DataSource(first, weight=0.5), DataSource(second, num_rows=6)], seed=4)[:]["id"]


@pytest.mark.parametrize(("num_rows", "weight"), [(1, 0.5), (400, 0.001)])
def test_a_source_with_a_small_weight_gives_at_least_one_row(folder, num_rows, weight):
    path = write(folder, *[row("Hi.", image=None)] * num_rows)
    assert len(load_rows([DataSource(path, weight=weight)])) == 1


def test_an_id_of_null_is_no_id(folder):
    rows = load(folder, row(id=None), row("Hi.", id=None))
    assert rows[0]["id"] == ""
    with pytest.raises(ValueError, match=r"data.json, row 1: read as"):
        rows[1]


@pytest.mark.parametrize("suffix", [".JSON", ".JSONL", ".PARQUET"])
def test_the_suffix_of_a_file_may_be_in_upper_case(folder, suffix):
    file = folder / f"DATA{suffix}"
    if suffix == ".PARQUET":
        datasets.Dataset.from_list([row("Hi.", image=None)]).to_parquet(file)
    else:
        file.write_text(json.dumps(row("Hi.", image=None) if suffix == ".JSONL" else [row("Hi.", image=None)]))
    assert content(load_rows([DataSource(str(file))])) == ["Hi."]


def test_a_question_without_text_always_becomes_the_same_instruction(folder):
    instructions = ["Describe it.", "What is it?"]
    path = write(folder, *[row("<image>")] * 20, row("<image>\nIs it a dog?"), row("Hi.", image=None))
    source = DataSource(path, str(folder / "images"), instructions=instructions)
    rows = load_rows([source])
    asked = [content(rows, index) for index in range(20)]
    assert {tuple(parts) for parts in asked} == {(None, instruction) for instruction in instructions}
    assert content(rows, 20) == [None, "Is it a dog?"] and content(rows, 21) == ["Hi."]
    shuffled = load_rows([source], seed=5)
    assert [content(shuffled, index) for index in range(20)] == asked
    assert content(load(folder, row("<image>"))) == [None]


def test_a_question_of_an_image_and_blank_text_gets_an_instruction_too(folder):
    blank = [{"type": "text", "text": ""}, {"type": "image"}, {"type": "text", "text": " "}]
    path = write(folder, {**trl_row(blank), "images": ["a.png"]})
    rows = load_rows([DataSource(path, str(folder / "images"), instructions=["Describe it."])])
    assert content(rows) == [None, "Describe it."]


def test_held_out_rows_are_not_trained_on_in_any_copy(folder):
    path = write(folder, *(row("Hi.", image=None, id=f"a{i}") for i in range(10)))
    rows = load_rows([DataSource(path, weight=2.5)])
    train, held_out = hold_out(rows, 3, seed=1)
    assert len(set(held_out[:]["id"])) == 3 and not set(held_out[:]["id"]) & set(train[:]["id"])
    assert len(set(train[:]["id"])) == 7 and set(train[:]["row_id"]) <= set(range(25))
    assert hold_out(rows, 3, seed=1)[1][:]["id"] == held_out[:]["id"]
    with pytest.raises(ValueError, match="num_eval_rows is 10, but there are only 10 rows"):
        hold_out(rows, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 1.0, "num_rows": 3}, "weight and num_rows are both set"),
        ({"weight": 0.0}, "weight is 0.0: it must be greater than 0"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"num_rows": -1}, "num_rows is -1"),
    ],
)
def test_wrong_weights_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataSource("x.json", **settings)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@given(
    rows=st.lists(st.dictionaries(st.text(), JSON_VALUES), max_size=12),
    window=st.integers(1, 200),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    mark=st.booleans(),
)
def test_every_row_of_a_json_list_is_found_whatever_the_window(
    tmp_path_factory, rows, window, indent, ascii_only, mark
):
    file = tmp_path_factory.mktemp("list") / "data.json"
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    file.write_text(text, encoding="utf-8-sig" if mark else "utf-8", errors="surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_file, "WINDOW", window)
        found = JsonFile(str(file))
        assert found.broken is None
        assert [json.loads(found.read(i).decode("utf-8", "surrogatepass")) for i in range(len(found))] == rows


@pytest.mark.slow
@given(
    rows=st.lists(st.dictionaries(st.text(), JSON_VALUES), max_size=8), blank=st.sampled_from(["\n", "\r\n", " \n\n"])
)
def test_every_line_of_jsonl_is_found(tmp_path_factory, rows, blank):
    file = tmp_path_factory.mktemp("lines") / "data.jsonl"
    file.write_text(blank.join(json.dumps(row) for row in rows), newline="")
    found = JsonFile(str(file))
    assert [found[index] for index in range(len(found))] == rows


def test_error_of_a_wrong_row_has_file_number_id_and_what_to_do(folder):
    rows = load(folder, row(), row(image="../a.png"))
    with pytest.raises(ValueError, match=r"data.json, row 1 \(id 'r'\): image '../a.png' is outside .* Move the"):
        rows[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{}, {]", "after row 0: .* line 1, column 7"),
        ('[\n{},\n{"a": 1}', "after row 1: .* line 3, column 9: the list is not closed"),
        ("[{}] [{}]", "there is text after the end of the list"),
        ("{}", "one row per line must be named .jsonl"),
        ("[]", "no rows"),
    ],
)
def test_broken_json_is_refused_with_its_line(folder, text, message):
    (folder / "broken.json").write_text(text)
    with pytest.raises(ValueError, match=rf"broken.json.*{message}"):
        load_rows([DataSource(str(folder / "broken.json"))])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.json", "no such file"),
        ("none.csv", "no such file or folder"),
        ("rows.csv", r"rows.csv: the suffix of a data file must be .json, .jsonl, .parquet\. Convert the file"),
        ("/none/there", "no such file or folder"),
        ("images", "the folder has neither data files"),
    ],
)
def test_error_names_a_source_that_cannot_be_opened(folder, path, message, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "rows.csv").touch()
    with pytest.raises(ValueError, match=message):
        load_rows([DataSource(path)])


def test_missing_image_root_and_splits_of_json_are_refused(folder):
    path = write(folder, row())
    with pytest.raises(ValueError, match=r"image_root .*none: no such folder"):
        load_rows([DataSource(path, str(folder / "none"))])
    with pytest.raises(ValueError, match="a JSON file has no splits"):
        load_rows([DataSource(path, split="train")])


def test_lengths_of_tables_and_json_grow_with_the_text(folder):
    long = row("<image>\n" + "word " * 400)
    datasets.Dataset.from_list([row(), long]).to_parquet(folder / "data.parquet")
    for path in (str(folder / "data.parquet"), write(folder, row(), long)):
        short_length, long_length = load_rows([DataSource(path, str(folder / "images"))], image_seq_length=100)[:][
            "length"
        ]
        assert 100 < short_length < 150 and 480 < long_length - short_length < 520
