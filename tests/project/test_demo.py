"""The demo: its data, its tokenizer, its measures, and the whole demo with a few training steps."""

import errno
import json
import shutil
from pathlib import Path

import pytest

from demo import data, report, run
from demo.base_models import build_tokenizer
from demo.evaluate import is_valid
from sq_llava.evaluation import easy_vqa
from tests.processes import locked_by_another_process


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("what is the blue shape?", "shape"),
        ("what color is the shape?", "colour"),
        ("is no teal shape present?", "yes/no colour"),
        ("does the image not contain a circle?", "yes/no shape"),
    ],
)
def test_question_kinds(question, kind):
    assert easy_vqa.question_kind(question) == kind


def test_question_of_no_kind_is_refused():
    with pytest.raises(ValueError, match=r"'who is it\?' does not have the form"):
        easy_vqa.question_kind("who is it?")


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "test"])
def test_rules_give_the_answer_of_every_question_of_the_package(split):
    for questions in data.read_questions(split).values():
        caption = easy_vqa.derive_caption(questions)
        if caption is not None:
            _, colour, shape = caption.split()
            assert all(easy_vqa.answer_question(question, colour, shape) == answer for question, answer in questions)


def test_contradicting_answers_are_refused():
    with pytest.raises(ValueError, match="no shape and colour fit"):
        easy_vqa.derive_caption([("is there a circle?", "yes"), ("what shape is present?", "triangle")])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    paths = data.write_data(tmp_path_factory.mktemp("data"))
    return {name: json.loads(path.read_text()) for name, path in paths.items()}


def test_images_stand_beside_the_data_and_inside_their_root(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "write_data", lambda folder, seed: folder.mkdir())
    run.make_data(tmp_path, seed=0, quick=True)
    root = easy_vqa.image_root_of(tmp_path / "data" / "test.json")
    assert root == tmp_path / "images"
    for split, count in (("train", 4000), ("test", 1000)):
        images = list((root / split / "images").iterdir())
        assert len(images) == count and not images[0].is_symlink()
        path = data.image_path(split, 7)
        assert (root / path).read_bytes() == (data.image_root() / path).read_bytes()


def test_images_are_copied_where_they_cannot_be_linked(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(data.os, "link", refuse)
    (tmp_path / "source").write_bytes(b"image")
    data._link_or_copy(str(tmp_path / "source"), str(tmp_path / "target"))
    assert (tmp_path / "target").read_bytes() == b"image"


@pytest.mark.slow
def test_no_held_out_or_test_image_is_trained_on(files):
    images = {name: {row["image"] for row in rows} for name, rows in files.items()}
    trained = images["stage1_train"] | images["stage2_train"]
    assert not trained & images["holdout"] and not trained & images["test"]
    assert all(image.startswith("train/") for image in trained | images["holdout"])
    assert len(files["test"]) == 9673


def test_no_training_question_is_lost_when_conversations_are_split(files):
    questions = data.read_questions("train")
    held_out = {row["image"] for row in files["holdout"]}
    expected = sorted(
        pair for image, pairs in questions.items() if data.image_path("train", image) not in held_out for pair in pairs
    )
    assert sorted(data.questions_and_answers(files["stage2_train"])) == expected
    assert max(len(row["conversations"]) for row in files["stage2_train"]) == 16


def test_best_blind_guess_is_about_two_thirds(files):
    blind = data.blind_guess(files["stage2_train"], files["test"])
    assert blind["all"] == pytest.approx(0.670, abs=0.003)
    assert blind["yes/no colour"] > 0.85 and blind["colour"] < 0.15


def test_blind_guess_takes_the_most_frequent_answer():
    def row(*pairs):
        return {"conversations": [{"value": text} for pair in pairs for text in pair]}

    circle, colour = "is there a circle?", "what color is the shape?"
    train = [row((circle, "no"), (circle, "no"), (circle, "yes"), (colour, "red"))]
    kinds = [("is there a circle?", "yes"), (circle, "no"), (colour, "red"), ("what is the red shape?", "circle")]
    train.append(row(("what is the red shape?", "circle"), ("is there a red shape?", "no")))
    test = [row(*kinds, ("is there a red shape?", "no"))]
    assert data.blind_guess(train, test)["yes/no shape"] == 0.5


def test_tokenizer_gives_its_text_back_and_its_end_token_is_not_2():
    tokenizer = build_tokenizer(["what color is the shape?", "blue"], adds_end=True)
    ids = tokenizer("what color is the shape?").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "what color is the shape?"
    # With eos_token_id 2, transformers' CLIP takes its output at the highest token id instead.
    assert ids[-1] == tokenizer.eos_token_id != 2


def test_question_is_valid_if_known_and_true_to_the_image():
    known = {"what is the red shape?", "is there a teal shape?"}
    assert is_valid("what is the red shape?", known, "a red circle")
    assert not is_valid("what is the red shape?", known, "a blue circle")
    assert is_valid("is there a teal shape?", known, "a blue circle")
    assert not is_valid("red red?", known, "a red circle")


def test_run_with_other_settings_is_not_resumed(tmp_path):
    run.check_settings(tmp_path, ["--seed", "0"])
    run.check_settings(tmp_path, ["--seed", "0"])
    with pytest.raises(SystemExit, match=r"other settings \(--seed 0; steps: data, CLIP, "):
        run.check_settings(tmp_path, ["--seed", "1"])


def test_second_demo_into_a_folder_is_refused(tmp_path, capsys):
    with locked_by_another_process(tmp_path), pytest.raises(SystemExit):
        run.main(["--output-dir", str(tmp_path)])
    assert "another run writes into this folder" in capsys.readouterr().err


def test_time_of_steps_that_run_together_counts_once():
    steps = {"a": (10.0, 5.0), "beside a": (9.0, 3.0), "in a": (11.0, 1.0), "resumed": (100.0, 2.0)}
    steps = {name: {"begin": begin, "seconds": seconds} for name, (begin, seconds) in steps.items()}
    assert report.seconds_of(steps) == (15.0 - 9.0) + 2.0


@pytest.mark.walk
def test_quick_demo_writes_its_report_and_is_reused(tmp_path, capfd, quick_demo):
    folder = Path(shutil.copytree(quick_demo, tmp_path / "quick"))
    result = json.loads((folder / "report.json").read_text())
    assert {
        "test_accuracy", "blank_image_accuracy", "blind_guess_accuracy", "accuracy_by_kind", "blind_guess_by_kind",
        "questions_asked", "questions_distinct", "questions_valid_share",
    } <= result.keys()  # fmt: skip
    assert result["questions_asked"] == 48
    assert set(result["accuracy_by_kind"]) == set(result["blind_guess_by_kind"]) == set(easy_vqa.KINDS)
    names = ("losses.png", "contact_sheet.png", "model/model.safetensors", "model/README.md", "evaluation/report.md")
    for name in ("report.md", *names):
        assert (folder / name).stat().st_size > 0
    assert set(result["llava_accuracy"]) == {"all", *easy_vqa.KINDS}
    text = (folder / "report.md").read_text()
    assert "| yes/no shape |" in text and "| SQ-LLaVA | LLaVA | best blind guess |" in text
    steps = result["steps"]
    for name, beside in (("CLIP", "Llama"), ("stage 1", "LLaVA")):
        assert steps[name]["begin"] < steps[beside]["begin"] + steps[beside]["seconds"]
        assert steps[beside]["begin"] < steps[name]["begin"] + steps[name]["seconds"]
    capfd.readouterr()
    run.main(["--quick", "--output-dir", str(folder)])
    assert capfd.readouterr().out.count("already complete") == len(run.STEPS)

    (folder / "steps" / "LLaVA.json").unlink()
    (folder / "data" / "stage1_train.json").unlink()
    with pytest.raises(SystemExit, match=r"Step 'LLaVA' failed\. Its error is in .*LLaVA\.log"):
        run.main(["--quick", "--output-dir", str(folder)])
    assert "stage1_train.json" in (folder / "LLaVA.log").read_text()
