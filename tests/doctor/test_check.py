"""Real files with one row for each fault: the doctor finds each fault in its row and no other; training agrees."""

import ast
import base64
import json
import re
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

import train_sft
from demo.base_models import build_tokenizer
from sq_llava.cli.main import app
from sq_llava.data.images import image_faults
from sq_llava.data.rows import load_rows
from sq_llava.data.sources import DataSource
from sq_llava.doctor import check as doctor
from sq_llava.doctor.check import DataCheck, examine
from sq_llava.doctor.report import print_preview, print_report, write_sound_rows
from sq_llava.training.collator import SelfQuestioningCollator
from tests import ROOT, tiny
from tests.pictures import encoded


MAX_LENGTH = 200
CODES = {
    "error": (
        "broken_json broken_encoding not_an_object no_turns wrong_turn unknown_role broken_text turn_order no_label "
        "image_in_answer image_count wrong_image image_is_url image_outside_root image_missing image_empty "
        "image_unreadable image_truncated image_huge image_float control_token too_long unread_media unread_field"
    ),
    "warning": "empty_turn role_marker cut duplicate_id control_character",
    "info": "image_animated image_cmyk image_16_bit image_palette image_rotated",
}
LEVELS = {code: level for level, codes in CODES.items() for code in codes.split()}


def png_that_claims(width: int, height: int) -> bytes:
    """Returns a small file whose header gives this size."""
    data = encoded(tiny.picture(), "PNG")
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


CUT_BASE64 = base64.b64encode(encoded(tiny.picture(), "PNG")[:2000]).decode()


def write_images(folder: Path) -> None:
    picture, rotated = tiny.picture(), Image.Exif()
    rotated[0x0112] = 6
    frames = [tiny.picture(seed).convert("P") for seed in range(3)]
    levels = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    files = {
        "good.jpg": encoded(picture, "JPEG"),
        "good.png": encoded(picture, "PNG"),
        "good.gif": encoded(picture.convert("P"), "GIF"),
        "good.webp": encoded(picture, "WEBP"),
        "good.bmp": encoded(picture, "BMP"),
        "trailing.jpg": encoded(picture, "JPEG") + b"what a camera left behind",
        "empty.jpg": b"",
        "text.jpg": b"this is no picture",
        "no_size.jpg": encoded(picture, "JPEG").replace(struct.pack(">HH", 40, 60), bytes(4)),
        "huge.png": png_that_claims(50_000, 50_000),
        "large.png": png_that_claims(10_000, 10_000),
        "float.tiff": encoded(Image.fromarray(levels.astype(np.float32)), "TIFF"),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "cmyk.jpg": encoded(picture.convert("CMYK"), "JPEG"),
        "deep.png": encoded(Image.fromarray(levels), "PNG"),
        "palette.png": encoded(picture.convert("P"), "PNG"),
        "rotated.jpg": encoded(picture, "JPEG", exif=rotated),
    }
    for kind in ("jpg", "png", "gif", "webp", "bmp"):
        files[f"cut.{kind}"] = files[f"good.{kind}"][: len(files[f"good.{kind}"]) * 2 // 3]
    (folder / "images").mkdir()
    for name, data in files.items():
        (folder / "images" / name).write_bytes(data)
    (folder / "secret.png").write_bytes(files["good.png"])
    (folder / "images" / "link.png").symlink_to(folder / "secret.png")
    (folder / "images" / "inner.png").symlink_to(folder / "images" / "good.png")


def talk(*texts: str, roles=("human", "gpt")) -> list[dict]:
    return [{"from": roles[index % 2], "value": text} for index, text in enumerate(texts)]


def row(image: str | None = "good.png", turns=None, **fields) -> dict:
    question = "What is it?" if image is None else "<image>\nWhat is it?"
    fields = {"image": image, "conversations": turns or talk(question, "A dog."), **fields}
    return {name: value for name, value in fields.items() if name != "image" or value is not None}


def rows_with_their_faults() -> list[tuple[str | None, dict | list | bytes]]:
    """Returns pairs of the expected code (or `None`) and the row. Bytes are a line of the file."""
    exchange = talk("<image>\nWhat is it?", "A dog.")
    wordy = "the shape is a rectangle " * 60
    images = {
        "image_missing": ["absent.png"],
        "image_empty": ["empty.jpg"],
        "image_unreadable": ["text.jpg", "no_size.jpg", "."],
        "image_truncated": ["cut.jpg", "cut.png", "cut.gif", "cut.webp", "cut.bmp"],
        "image_huge": ["huge.png", "large.png"],
        "image_float": ["float.tiff"],
        "image_outside_root": ["../secret.png", "link.png", "/etc/passwd", "sub/../../secret.png"],
        "wrong_image": ["a\0b", 7, {"bytes": "text", "path": None}],
        "image_is_url": ["https://example.org/a.png"],
        "image_animated": ["animated.gif"],
        "image_cmyk": ["cmyk.jpg"],
        "image_16_bit": ["deep.png"],
        "image_palette": ["palette.png"],
        "image_rotated": ["rotated.jpg"],
        None: ["good.jpg", "good.png", "good.gif", "good.webp", "good.bmp", "trailing.jpg", "inner.png", None],
    }
    return [
        *((code, row(image)) for code, names in images.items() for image in names),
        ("broken_json", b'{"id": "x", "conversations": ['),
        ("broken_encoding", b'{"id": "x", "conversations": [{"from": "human", "value": "\xff"}]}'),
        ("not_an_object", ["a", "list"]),
        ("no_turns", row(conversations=[])),
        ("wrong_turn", row(turns=[{"from": "human"}, *exchange])),
        ("unknown_role", row(turns=talk("<image>", "A dog.", roles=("human", "bot")))),
        ("unknown_role", row(turns=[{"from": ["human"], "value": "Hi."}])),
        ("broken_text", row(turns=talk("<image>\nWhat is it?", "A dog \ud83d."))),
        ("turn_order", row(turns=[*exchange, *talk("And now?")])),
        ("turn_order", row(turns=talk("A dog.", "<image>\nWhat is it?", roles=("gpt", "human")))),
        ("no_label", row(turns=talk("<image>\nWhat is it?", " "))),
        ("empty_turn", row(turns=[*exchange, *talk(" ", "Running.")])),
        ("image_in_answer", row(image=["good.png"] * 2, turns=talk("<image>", "It is <image>"))),
        ("image_count", row(turns=talk("<image>\nor <image>?", "A dog."))),
        ("image_count", row(turns=talk("What is it?", "A dog."))),
        ("control_token", row(turns=talk("<image>\nWhat is it?", "A dog.</s>"))),
        ("control_token", row(turns=talk("<image>\nSay [vusr].", "No."))),
        ("unread_media", row(turns=talk("<image>\nWhat is it?<video>", "A dog."))),
        ("unread_media", row(video="a.mp4")),
        (
            "unread_field",
            {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho.", "loss": 0}]},
        ),
        *(("control_character", row(turns=talk("<image>\nWhat?", f"A{c} dog."))) for c in "\0\x1b\x7f\x85"),
        (None, row(turns=talk("<image>\nWhat?\tThat?\r\n", "©"))),
        (None, {"query": "What is it?", "response": "A dog.", "images": [{"path": "good.png"}]}),
        ("image_truncated", {"query": "What is it?", "response": "A dog.", "image": CUT_BASE64}),
        ("image_missing", {"prompt": "What is it?", "completion": "A dog.", "image": "absent.png"}),
        ("role_marker", row(turns=talk("<image>\nWhat is it? ASSISTANT: A cat.", "A dog."))),
        ("cut", row(turns=[*exchange, *talk("And now?", wordy)])),
        ("cut", row(turns=[{"from": "system", "value": "Be kind."}, *exchange, *talk(wordy, "No.")])),
        ("too_long", row(turns=talk("<image>\nWhat is it?", wordy))),
        ("too_long", row(turns=[{"from": "system", "value": wordy}, *exchange])),
        (None, row(turns=[{"from": "system", "value": "Be kind."}, *exchange, *talk("And now?", "Running.")])),
        (None, row(image=["good.png", "good.jpg"], turns=talk("<image>\nor <image>?", "A dog."))),
        (None, {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}]}),
        ("duplicate_id", row(id="twice")),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Has `data.jsonl` with a row for each fault, its images, and `expected.json` with the code of each row."""
    folder = tmp_path_factory.mktemp("doctor")
    write_images(folder)
    lines, expected = [json.dumps(row(id="twice")).encode()], [None]
    for code, content in rows_with_their_faults():
        if isinstance(content, dict):
            content = {"id": f"{len(lines)}-{code}", **content}
        lines.append(content if isinstance(content, bytes) else json.dumps(content).encode())
        expected.append(code)
    (folder / "data.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (folder / "expected.json").write_text(json.dumps(expected))
    return folder


@pytest.fixture(scope="module")
def processor():
    return tiny.tiny_processor(system_message="Be kind.")


@pytest.fixture(scope="module")
def check(folder, processor) -> DataCheck:
    return DataCheck(
        [DataSource(str(folder / "data.jsonl"), str(folder / "images"))], processor, max_length=MAX_LENGTH
    )


def look(check: DataCheck, **settings):
    return examine(check, Progress(disable=True), **settings)


@pytest.fixture
def check_rows(folder, processor, tmp_path):
    """Makes the check of rows in a new file."""

    def check(rows: list[dict], weight: float | None = None, **settings) -> DataCheck:
        (tmp_path / "data.json").write_text(json.dumps(rows))
        source = DataSource(str(tmp_path / "data.json"), str(folder / "images"), weight=weight)
        return DataCheck([source], processor, **settings)

    return check


@pytest.fixture(scope="module")
def report(check):
    return look(check)


def test_each_fault_is_found_in_its_row_and_no_other(folder, report):
    expected = json.loads((folder / "expected.json").read_text())
    assert {code for code in expected if code} == set(LEVELS)
    found = [(finding.row, finding.code, finding.level) for finding in report.findings]
    assert found == [(index, code, LEVELS[code]) for index, code in enumerate(expected) if code]
    assert all(finding.message and finding.fix and finding.file.endswith("data.jsonl") for finding in report.findings)


def test_training_refuses_just_the_rows_that_have_errors_and_names_them(check, report):
    rows = load_rows(check.sources, image_seq_length=check.processor.image_seq_length)
    collator = SelfQuestioningCollator(check.processor, max_length=MAX_LENGTH)
    refused = set()
    for index in range(len(rows)):
        try:
            batch = collator([rows[index]])
        except ValueError as error:
            assert f"row {index}" in str(error).lower()
            refused.add(index)
        else:
            assert (batch["labels"] != -100).any()
    assert refused == report.left_out[0]


@pytest.mark.slow
def test_report_is_the_same_for_any_number_of_processes(check, report, monkeypatch):
    monkeypatch.setattr(doctor, "ROWS_AT_A_TIME", 7)
    monkeypatch.setattr(doctor, "IMAGES_AT_A_TIME", 3)
    assert look(check, num_proc=2) == report


def test_cut_tokens_are_counted_as_in_the_collator(check, report):
    rows = load_rows(check.sources)
    whole = SelfQuestioningCollator(check.processor, self_question_ratio=0.0)
    cutting = SelfQuestioningCollator(check.processor, self_question_ratio=0.0, max_length=MAX_LENGTH)
    cut = [finding.row for finding in report.findings if finding.code == "cut"]
    lost = [whole([rows[i]])["input_ids"].shape[1] - cutting([rows[i]])["input_ids"].shape[1] for i in cut]
    assert len(cut) == 2 and min(lost) > 0
    assert report.summary["tokens"]["tokens_cut"] == sum(lost)
    assert report.summary["tokens"]["rows_cut"] == 2


def test_row_whose_words_the_tokenizer_mostly_does_not_know_is_reported(folder, tmp_path):
    words = build_tokenizer(["a red circle", "what is there?"], adds_end=False)
    answers = ["a red circle", "a teal circle", "un cercle rouge", "Ein roter Kreis"]
    (tmp_path / "data.json").write_text(json.dumps([row(turns=talk("<image>\nwhat is there?", a)) for a in answers]))
    source = DataSource(str(tmp_path / "data.json"), str(folder / "images"))
    for plain, reported in ((True, [2, 3]), (False, [])):  # stage 1 uses the answers alone
        findings = look(DataCheck([source], tiny.tiny_processor(words), plain)).findings
        assert [(each.row, each.code, each.level) for each in findings] == [
            (number, "unknown_tokens", "warning") for number in reported
        ]
    finding = look(DataCheck([source], tiny.tiny_processor(words), plain=True)).findings[0]
    assert finding.file == source.path
    assert finding.message.startswith("3 of the 3 tokens of its texts are '<unk>'")


def test_an_image_of_many_rows_is_checked_once(check_rows, monkeypatch):
    checked = []
    monkeypatch.setattr(doctor, "image_faults", lambda path: checked.append(path) or image_faults(path))
    report = look(check_rows([row("cut.png", id=str(index)) for index in range(5)]))
    assert len(checked) == 1 and [finding.row for finding in report.findings] == [0, 1, 2, 3, 4]


def test_summary_counts_images_self_questions_and_tokens(check_rows):
    rows = [row("good.png", talk("<image>\nWhat?", "A.", "And?", "B.", "And?", "C.")), row(None)]
    summary = look(check_rows(rows, weight=3.0, self_question_ratio=0.25)).summary
    assert summary["text_only_share"] == 0.5
    assert summary["self_questions_per_epoch"] == 3 * 2 * 0.25
    assert summary["images"] == summary["image_files"] == 1
    tokens = summary["tokens"]
    assert tokens["rows"] == sum(bar["rows"] for bar in tokens["histogram"]) == 2
    assert tokens["histogram"][-1]["from"] <= tokens["longest"] <= tokens["histogram"][-1]["to"]


def test_a_limit_checks_rows_from_the_whole_file(check):
    report = look(check, limit=9)
    (source,) = report.summary["sources"]
    assert source["rows_looked_at"] == 9 < source["rows"]
    (chosen,) = doctor.choose_rows(check, 9)
    assert chosen[0] == 0 and chosen[-1] == source["rows"] - 1 and len(set(chosen)) == 9


@pytest.mark.parametrize(("text", "row"), [('[{}, {"a" 1}]', 1), ("", 0), ("[]", 0)])
def test_a_file_that_ends_early_is_an_error(tmp_path, processor, text, row):
    (tmp_path / "data.json").write_text(text)
    report = look(DataCheck([DataSource(str(tmp_path / "data.json"))], processor))
    assert (report.findings[-1].code, report.findings[-1].row) == ("no_rows" if text == "[]" else "broken_json", row)


def test_sound_rows_are_written_as_they_were_and_the_others_listed(check, report, tmp_path):
    (entry,) = write_sound_rows(check, report, tmp_path / "clean")
    before = Path(check.sources[0].path).read_bytes().splitlines()
    kept = [json.loads(line) for index, line in enumerate(before) if index not in report.left_out[0]]
    assert [json.loads(line) for line in Path(entry["path"]).read_bytes().splitlines()] == kept
    left_out = [json.loads(line) for line in (tmp_path / "clean" / "left_out.jsonl").read_text().splitlines()]
    assert {line["row"] for line in left_out} == report.left_out[0]
    assert len(left_out) + len(kept) == len(before)
    again = look(DataCheck([DataSource(**entry)], check.processor, max_length=MAX_LENGTH))
    assert again.num_errors == 0
    with pytest.raises(ValueError, match="clean is not empty"):
        write_sound_rows(check, report, tmp_path / "clean")
    with pytest.raises(ValueError, match="remove --limit"):
        write_sound_rows(check, look(check, limit=3), tmp_path / "other")


@pytest.mark.parametrize("kind", ["parquet", "save_to_disk"])
def test_tables_with_embedded_images_are_checked_and_written_without_errors(folder, processor, tmp_path, kind):
    names = ["good.png", "cut.png", "good.jpg"]
    rows = [
        {
            "id": name,
            "images": [{"bytes": (folder / "images" / name).read_bytes(), "path": name}],
            "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}],
        }
        for name in names
    ]
    table = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    path = tmp_path / ("data.parquet" if kind == "parquet" else "data")
    table.to_parquet(path) if kind == "parquet" else table.save_to_disk(path)
    check = DataCheck([DataSource(str(path))], processor)
    report = look(check)
    assert [(finding.row, finding.code, finding.id) for finding in report.findings] == [
        (1, "image_truncated", "cut.png")
    ]
    (entry,) = write_sound_rows(check, report, tmp_path / "clean")
    rows = load_rows([DataSource(**entry)])
    assert rows[:]["id"] == ["good.png", "good.jpg"]
    assert rows[0]["images"][0]["bytes"] == (folder / "images" / "good.png").read_bytes()


@pytest.fixture(scope="module")
def recipe(folder) -> list[str]:
    """Arguments of a run whose towers have configurations, tokenizer and image processor, but no weights."""
    tiny.save_towers(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    lines = {
        "stage": "instruct",
        "vision_model_name_or_path": folder / "clip",
        "text_model_name_or_path": folder / "llama",
        "system_message": "Be kind.",
        "dataset_path": folder / "data.jsonl",
        "image_root": folder / "images",
        "output_dir": folder / "output",
        "max_length": MAX_LENGTH,
    }
    (folder / "recipe.yaml").write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    return ["--config", str(folder / "recipe.yaml")]


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def test_command_reports_faults_lengths_and_the_loss_and_writes_a_set_without_the_errors(recipe, report, tmp_path):
    result = run(*recipe, "--fix", tmp_path / "clean")
    assert result.exit_code == 1, result.output
    for code in LEVELS:
        assert f" {code} " in result.stdout
    for finding in report.findings:
        assert finding.message in result.stdout
    assert "Tokens of a row" in result.stdout and "█" in result.stdout
    assert "<image> x 9" in result.stdout and "ASSISTANT:* A dog.</s>*" in result.stdout
    assert CUT_BASE64[:20] not in result.output + json.dumps(report.to_json())
    lines = (tmp_path / "clean" / "data.jsonl").read_bytes().splitlines()
    assert len(lines) == report.summary["sources"][0]["rows"] - len(report.left_out[0])
    assert str(tmp_path / "clean" / "data.jsonl") in result.stderr


def test_command_prints_json_and_nothing_else(recipe, report, capfd):
    with pytest.raises(SystemExit) as ended:
        app(["doctor", *recipe, "--json"])
    assert ended.value.code == 1
    assert json.loads(capfd.readouterr().out) == report.to_json()


def test_sound_data_ends_with_code_0_and_settings_can_be_overridden(recipe, folder, tmp_path):
    (tmp_path / "good.json").write_text(json.dumps([row(id="0")]))
    result = run(*recipe, "--dataset_path", tmp_path / "good.json", "--max_length", 100, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["summary"]["tokens"]["max_length"] == 100
    result = run(*recipe, "--max_lenght", 100)
    assert result.exit_code == 1 and "max_lenght" in result.stderr


def test_command_can_leave_out_images_and_lengths(recipe):
    found = json.loads(run(*recipe, "--no-images", "--no-lengths", "--json").stdout)
    assert found["summary"]["tokens"] is None
    codes = {finding["code"] for finding in found["findings"]}
    assert "control_token" in codes and not codes & {"image_truncated", "image_missing", "cut", "too_long"}


@pytest.mark.parametrize("wrong", ["a full folder", "a file", "--limit"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_any_row_is_read(tmp_path, monkeypatch, wrong):
    monkeypatch.setattr("sq_llava.training.settings.parse_settings", lambda *_: pytest.fail("read"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "any.yaml").write_text("stage: align")
    place, message, *more = {
        "a full folder": ["full", "full is not empty: give a new folder"],
        "a file": ["full/file", "file is a file: give a new folder"],
        "--limit": ["new", "leave --limit out", "--limit", "3"],
    }[wrong]
    result = run("--config", tmp_path / "any.yaml", "--fix", tmp_path / place, *more)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())


def test_a_table_with_paths_of_images_and_instructions_is_written_without_errors(folder, processor, tmp_path):
    messages = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "A dog."}]
    names = ["good.png", "absent.png"]
    table = datasets.Dataset.from_list([{"messages": messages, "image": {"path": n, "bytes": None}} for n in names])
    pq.write_table(table.cast_column("image", datasets.Image()).data.table, tmp_path / "table.parquet")
    source = DataSource(str(tmp_path / "table.parquet"), str(folder / "images"), instructions=["Describe it."])
    check = DataCheck([source], processor)
    (entry,) = write_sound_rows(check, look(check), tmp_path / "clean")
    (left,) = load_rows([DataSource(**entry)])
    assert left["images"] == [str(folder.resolve() / "images" / "good.png")]
    assert left["messages"][0]["content"][1]["text"] == "Describe it."


def test_many_findings_of_a_code_are_shortened(check_rows, capsys):
    report = look(check_rows([row(f"absent{index}.png") for index in range(25)]))
    assert len(report.findings) == 25
    print_report(report, Console(width=80))
    shown = capsys.readouterr().out
    assert shown.count("no such file") == 10 and "and 15 more" in shown


def test_preview_marks_self_questions_and_answers_and_escapes_control_characters(check_rows, capsys):
    turns = talk("<image>\nWhat\x1b[31m?", "A dog.", "What is it doing?", "Running.")
    check = check_rows([row(turns=turns)], self_question_ratio=1.0)
    print_preview(check, look(check), 0, Console(width=200))
    shown = capsys.readouterr().out
    assert "[vusr]* What is it doing?</s>*" in shown and "ASSISTANT:* Running.</s>*" in shown
    assert "\\x1b[31m" in shown and "\x1b" not in shown


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[], ["--doctor", "full"]])
def test_training_stops_at_wrong_data_before_the_model_is_loaded(recipe, monkeypatch, settings):
    monkeypatch.setattr(train_sft, "load_base", lambda *_: pytest.fail("loaded"))
    with pytest.raises(
        ValueError, match=r"errors in \d+ rows of the data(?s:.*)sq-llava doctor --config .*recipe.yaml"
    ):
        train_sft.main([*recipe, "--use_cpu", "true", *settings])


def test_training_continues_with_the_doctor_off_or_warnings_only(recipe, folder, tmp_path, monkeypatch, capsys):
    class Loaded(Exception):
        pass

    def load_base(*_):
        raise Loaded

    monkeypatch.setattr(train_sft, "load_base", load_base)
    with pytest.raises(Loaded):
        train_sft.main([*recipe, "--use_cpu", "true", "--doctor", "off"])
    (tmp_path / "data.json").write_text(json.dumps([row(id="same"), row(id="same")]))
    with pytest.raises(Loaded):
        train_sft.main([*recipe, "--use_cpu", "true", "--dataset_path", str(tmp_path / "data.json")])
    assert "duplicate_id 1" in capsys.readouterr().out


def codes_of_source() -> set[str]:
    files = [file for package in ("data", "doctor") for file in (ROOT / "sq_llava" / package).glob("*.py")]
    calls = [
        node
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("Fault", "_Unread")
    ]
    return {each.value for call in calls for each in ast.walk(call.args[0]) if isinstance(each, ast.Constant)}


def test_docs_list_every_code_with_its_level():
    in_docs = {}
    for section in re.split(r"^#{2,3} ", (ROOT / "docs/data.md").read_text(), flags=re.M):
        level = section.partition(" codes\n")[0].lower()
        in_docs |= dict.fromkeys(re.findall(r"^\| `(\w+)` \|", section, re.M) if level in CODES else (), level)
    assert in_docs == LEVELS | {"no_rows": "error", "unknown_tokens": "warning"}
    assert in_docs.keys() == codes_of_source()
