"""Images and rows that were made to hang, to fill the memory or to reach other files are refused with their name."""

import io
import json
import os
import socket
import struct
import zlib
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import image_processing_sq_llava
from sq_llava.data import json_file
from sq_llava.data.images import image_faults, open_image, require_whole_images
from sq_llava.data.json_file import JsonFile
from sq_llava.data.rows import load_rows
from sq_llava.data.sources import DataSource
from sq_llava.early_checks import find_images, require_image
from sq_llava.serving.images import decode_image, num_pixels
from tests import tiny
from tests.limits import limited


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


# A GIF with a comment of two million blocks, and JPEG and PNG files whose header has very many parts.
GIF = b"GIF89a\x01\0\x01\0\0\0\0!\xfe" + b"\x01a" * 2_000_000 + b"\0;"
ATTACKS = {
    "blocks.gif": (GIF, "too many blocks"),
    "segments.jpg": (b"\xff\xd8" + b"\xff\xfe\0\x02" * 1_000_000, "too many blocks"),
    "chunks.png": (png(4, 4, *[(b"teXt", b"")] * 200_000), "too many blocks"),
    "bomb.png": (png(60_000, 60_000), "could be decompression bomb"),
    "huge.png": (png(10_000, 10_000), "pixels are more than the 89,478,485 that are allowed"),
    "strip.png": (png(100_000, 1), "one side is more than 200 times the other"),
    "text.png": (b"no image", "cannot identify image file"),
    "empty.png": (b"", "cannot identify image file"),
    "comment.ppm": (b"P6 #" + b"a" * 1_000_000, "too many blocks"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_image_that_was_made_to_hang_is_refused_by_path_in_a_row_and_in_a_request(tmp_path, name):
    data, error = ATTACKS[name]
    path = tmp_path / name
    path.write_bytes(data)
    with limited(5, mebibytes=256):
        for image in (path, str(path), {"path": str(path), "bytes": None}, data):
            with pytest.raises(ValueError, match=error):
                open_image(image)
        assert [fault.level for fault in image_faults(path)] == ["error"]
        with pytest.raises(ValueError, match=r"image .* (is|has|cannot be)"):
            require_whole_images([path])
        with pytest.raises(ValueError, match="is"):
            num_pixels(data) and decode_image(data)


@pytest.fixture
def places(tmp_path):
    """Places that are no image files."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.png"))
        yield [tmp_path / name for name in ("pipe.png", "folder.png", "device.png", "s.png")]


def test_pipe_device_socket_and_folder_are_not_opened_as_an_image(places):
    with limited(5):
        for place in places:
            with pytest.raises(ValueError, match=r"\.png: cannot be read as an image \(it is no file"):
                open_image(place)
            assert [fault.code for fault in image_faults(place)] == ["image_unreadable"]
            with pytest.raises(ValueError, match="no such image"):
                require_image(place)


def test_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(image_processing_sq_llava, "MAX_IMAGE_BYTES", 1000)
    data = b"x" * 1001
    (tmp_path / "a.png").write_bytes(data)
    for image in (tmp_path / "a.png", data, io.BytesIO(data)):
        with pytest.raises(ValueError, match="1,001 bytes are more than the 1,000 that are allowed"):
            open_image(image)


def test_image_of_any_format_passes_the_check_of_its_first_bytes(tmp_path):
    for form in ("bmp", "gif", "jpg", "png", "ppm", "tga", "tif", "webp"):
        tiny.picture().save(tmp_path / f"a.{form}")
    (tmp_path / "b.png").write_bytes(b"no image")
    assert len(find_images([path for path in tmp_path.iterdir() if path.stem == "a"])) == 8
    with pytest.raises(ValueError, match="unknown image format"):
        find_images([tmp_path / "b.png"])


DEEP = "[" * 100_000 + "]" * 100_000
ROWS = {
    "deep.jsonl": (DEEP + "\n", "row 0: cannot be read as JSON: it is nested too deeply"),
    "deep.json": (f"[{DEEP}]", "the row is nested too deeply"),
    "open.json": ("[" * 100_000, "the row is nested too deeply"),
    "digits.jsonl": ('{"id": ' + "1" * 5000 + "}\n", "row 0: cannot be read as JSON: Exceeds the limit"),
    "long.jsonl": ('{"id": "' + "a" * 2000 + '"}\n', "line 1, column 1: the row has more than 1,000 bytes"),
    "long.json": ('[{"id": "' + "a" * 2000 + '"}]', "Unterminated string"),
    "null.jsonl": ("null\n", "row 0: the row is None, not an object"),
}


@pytest.mark.parametrize("name", ROWS)
def test_row_that_is_very_long_or_deeply_nested_is_refused_with_its_place(tmp_path, monkeypatch, name):
    if name.startswith("long"):
        monkeypatch.setattr(json_file, "MAX_ROW_BYTES", 1000)
        monkeypatch.setattr(json_file, "WINDOW", 500)
    content, error = ROWS[name]
    (tmp_path / name).write_text(content)
    with limited(5, mebibytes=256), pytest.raises(ValueError, match=error):
        load_rows([DataSource(str(tmp_path / name))])[0]


def test_line_without_end_is_not_read_into_memory(tmp_path):
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.truncate(2**40)
    with limited(10, mebibytes=512):
        assert "the row has more than 67,108,864 bytes" in JsonFile(str(tmp_path / "a.jsonl")).broken


OUTSIDE = ["../secret.png", "sub/../../secret.png", "/etc/hostname", "file:///etc/hostname"]
OUTSIDE += ["link.png", "linked/secret.png"]  # symbolic links that lead out of the folder
TURNS = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A dog."}]
LLAVA = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A dog."}]
PART = {"type": "text", "text": "What?"}
ANSWER = {"role": "assistant", "content": "A dog."}
LAYOUTS = {
    "image": lambda path: {"messages": TURNS, "image": path},
    "images": lambda path: {"messages": TURNS, "images": [path]},
    "struct": lambda path: {"messages": TURNS, "images": [{"path": path, "bytes": None}]},
    "LLaVA": lambda path: {"conversations": LLAVA, "image": path},
    "texts": lambda path: {"texts": [{"user": "What?", "assistant": "A dog."}], "images": [path]},
    "query": lambda path: {"query": "<image>What?", "response": "A dog.", "images": [path]},
    "instruction": lambda path: {"instruction": "<image>What?", "output": "A dog.", "image": path},
    "prompt": lambda path: {"prompt": TURNS[:1], "completion": TURNS[1:], "images": [path]},
    **{
        key: lambda path, key=key: {
            "messages": [{"role": "user", "content": [{"type": "image", key: path}, PART]}, ANSWER]
        }
        for key in ("image", "path", "url")
    },
    "image_url": lambda path: {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": path}}, PART]}, ANSWER]
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_image_outside_the_folder_is_refused_in_every_layout(tmp_path, layout):
    root, secret = tmp_path / "root", tmp_path / "secret.png"
    (root / "sub").mkdir(parents=True)
    tiny.picture().save(secret)
    (root / "link.png").symlink_to(secret)
    (root / "linked").symlink_to(tmp_path)
    (root / "rows.jsonl").write_text("".join(json.dumps(LAYOUTS[layout](path)) + "\n" for path in OUTSIDE))
    rows = load_rows([DataSource(str(root / "rows.jsonl"))])
    for number in range(len(OUTSIDE)):
        with pytest.raises(ValueError, match=rf"row {number}: image .* is outside the image root"):
            rows[number]


TEXTS = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
TABLES = {
    "numbers": {"messages": pa.array([1, 2])},
    "text": {"messages": pa.array(["a", "b"])},
    "binary": {"messages": pa.array([b"a", b"b"])},
    "list of numbers": {"messages": pa.array([[1], [2]])},
    "map": {"messages": pa.array([[("role", "user")], []], pa.map_(pa.string(), pa.string()))},
    "empty": {"messages": pa.array([[], None], TEXTS)},
    "dictionary": {"messages": pa.array(["a", "a"]).dictionary_encode()},
    "dates": {"messages": pa.array([0, 1], pa.timestamp("s"))},
    "nested": {"messages": pa.array([[[[["a"]]]], []])},
    "images of numbers": {"messages": pa.array([TURNS, TURNS], TEXTS), "images": pa.array([[1], [2]])},
    "image of a number": {"messages": pa.array([TURNS, TURNS], TEXTS), "image": pa.array([1.5, 2.5])},
    "image of a map": {
        "messages": pa.array([TURNS, TURNS], TEXTS),
        "image": pa.array([[("path", "a")], []], pa.map_(pa.string(), pa.string())),
    },
    "other columns": {"x": pa.array([1, 2])},
}


@pytest.mark.parametrize("kind", TABLES)
def test_table_of_other_types_is_refused_with_its_row_or_its_columns(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pq.write_table(pa.table(TABLES[kind]), tmp_path / "a.parquet")
    with limited(20), pytest.raises(ValueError, match=r"a\.parquet(, row 0|: the columns are|: cannot be loaded)"):
        load_rows([DataSource(str(tmp_path / "a.parquet"))])[0]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\xff" * 1000 + b"PAR1", b"no table"])
def test_damaged_table_is_refused(tmp_path, content, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Path(tmp_path / "a.parquet").write_bytes(content)
    with limited(20), pytest.raises(ValueError, match=r"a\.parquet: cannot be loaded"):
        load_rows([DataSource(str(tmp_path / "a.parquet"))])
