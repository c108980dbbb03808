"""Questions that a model asks: metrics computed by hand, their properties, and a whole run with a tiny model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPProcessor

from sq_llava.evaluation.question_metrics import distinct_n, question_type, self_bleu, type_shares
from sq_llava.evaluation.question_run import QuestionEvaluation, _draw_pictures, evaluate_questions
from sq_llava.evaluation.questions import ClipScorer, Picture, captions_of, easy_vqa_figures, figures_of, read_pictures
from sq_llava.inference.settings import AskSettings
from tests import tiny
from tests.evaluation_layouts import write_image, write_json
from tests.processes import lines_of


TEXTS = st.lists(st.text(alphabet="abc ", min_size=1, max_size=12), min_size=2, max_size=6)


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("What color is it?", "what"),
        ("How many dogs are there?", "how many"),
        ("How does it move?", "how"),
        ("Is it a cat or a dog?", "choice"),
        ("Is there a cat?", "yes/no"),
        ("Why is he running?", "why"),
        ("In which city was this taken?", "which"),
        ("Describe the scene.", "request"),
        ("Can you describe the scene?", "request"),
        ("And the dog?", "other"),
        ("Somewhat blue?", "other"),  # "what" inside a word
    ],
)
def test_types_of_questions(question, kind):
    assert question_type(question) == kind


def test_shares_of_types_add_up_to_one():
    shares = type_shares(["What?", "What is it?", "Why?", "Is it?"])
    assert shares == {"what": 0.5, "why": 0.25, "yes/no": 0.25}


def test_distinct_n_by_hand():
    assert distinct_n(["is it red", "is it blue"], 1) == 4 / 6
    assert distinct_n(["is it red", "is it blue"], 2) == 3 / 4
    assert distinct_n(["red"], 2) == 0


def test_self_bleu_is_100_for_copies_and_low_for_different_texts():
    assert self_bleu(["is there a red shape here?"] * 3) == pytest.approx(100)
    assert self_bleu(["is there a dog?", "what colour does her big hat have?"]) < 15
    assert self_bleu(["alone"]) is None


@given(TEXTS, st.randoms(use_true_random=False))
def test_order_of_questions_does_not_matter(texts, draw):
    shuffled = list(texts)
    draw.shuffle(shuffled)
    assert distinct_n(shuffled, 2) == distinct_n(texts, 2)
    assert self_bleu(shuffled) == pytest.approx(self_bleu(texts))


@given(TEXTS)
def test_metrics_stay_in_their_bounds(texts):
    assert 0 <= distinct_n(texts, 1) <= 1
    assert -1e-9 <= self_bleu(texts) <= 100 + 1e-9


def line(*turns: tuple[str, str, str], error=None) -> dict:
    questions, answers, blank = ([turn[number] for turn in turns] for number in range(3))
    return {"id": "0", "first": "", "questions": questions, "answers": answers, "blank_answers": blank, "error": error}


def test_share_of_answers_that_change_without_the_image_and_failures():
    asked = [line(("What?", "red", "red"), ("Why?", "so", "no")), line(error="ValueError: broken")]
    figures = figures_of(asked)
    assert figures["answer_changes_without_the_image"] == 0.5
    assert (figures["num_images"], figures["num_failed"], figures["num_questions"]) == (2, 1, 2)


def test_truth_of_premises_on_easy_vqa():
    pairs = (("what color is the shape?", "red"), ("what shape is present?", "circle"))
    known = {question for question, _ in pairs} | {"what is the blue shape?", "is there a square?"}
    asked = line(
        ("what color is the shape?", "red", ""),  # true premise, right answer
        ("what is the blue shape?", "circle", ""),  # assumes a blue shape
        ("what is the the?", "?", ""),  # not an easy-VQA question
    )
    captions = captions_of([Picture("0", None, pairs), Picture("1", None, ())])
    assert captions == ["a red circle", None]
    figures = easy_vqa_figures([asked, asked], captions, known)
    assert figures["premise_is_true"] == pytest.approx(1 / 3)
    assert (figures["presumed_is_true"], figures["num_presuming"]) == (0.0, 1)
    assert (figures["own_answer_is_right"], figures["num_own_answers"]) == (1.0, 1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A folder with a model, a CLIP with its processor, images, and a dataset about them."""
    root = tmp_path_factory.mktemp("parts")
    tiny.save_model(root / "model")
    tiny.save_towers(root)
    rows = []
    for number in range(3):
        write_image(root / "images" / f"{number}.png", number)
        for question, answer in (("What?", "A dog."), ("Where?", "There.")):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            rows.append({"id": len(rows), "image": f"{number}.png", "conversations": turns})
    write_json(root / "rows.json", rows)
    tokenizer = tiny.llama_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    CLIPProcessor(tiny.tiny_image_processor(), tokenizer).save_pretrained(root / "clip")
    return root


@pytest.fixture
def evaluation(parts, tmp_path) -> QuestionEvaluation:
    settings = AskSettings(num_questions=3, after="What is it?", max_new_tokens=8)
    return QuestionEvaluation(str(parts / "model"), str(parts / "images"), tmp_path / "out", settings, device="cpu")


def test_rows_with_the_same_file_are_one_picture(parts):
    pictures = read_pictures(str(parts / "rows.json"), str(parts / "images"))
    assert [Path(picture.id).name for picture in pictures] == ["0.png", "1.png", "2.png"]
    assert pictures[1].pairs == (("What?", "A dog."), ("Where?", "There."))


def test_folder_without_images_is_named(tmp_path):
    with pytest.raises(ValueError, match="contains neither images"):
        read_pictures(str(tmp_path))


@pytest.mark.slow
def test_evaluation_writes_figures_report_and_pictures(evaluation, parts):
    figures = evaluate_questions(replace(evaluation, clip=str(parts / "clip")))
    assert (figures["num_images"], figures["num_questions"]) == (3, 9)
    assert -1 <= figures["clip"]["questions"] <= 1
    results = json.loads((evaluation.out / "results.json").read_text())
    assert results["figures"] == figures
    report = (evaluation.out / "report.md").read_text()
    for picture in ("types.png", "clip.png", "pictures.png"):
        assert f"]({picture})" in report
        assert (evaluation.out / picture).stat().st_size > 5000
    for name in ("model_hash", "code_hash", "data_hash"):
        assert results[name] in report
    assert "seed 0; Python 3" in report and "transformers " in report
    assert f"| questions | {figures['clip']['questions']:.3f} |" in report


@pytest.mark.slow
def test_stopped_run_resumes_with_the_same_questions(evaluation):
    evaluate_questions(evaluation)
    file = evaluation.out / "asked-0.jsonl"
    whole = file.read_bytes()
    file.write_bytes(b"".join(whole.splitlines(keepends=True)[:1]) + b'{"id": "cut')
    evaluate_questions(evaluation)
    assert file.read_bytes() == whole


@pytest.mark.slow
def test_batch_size_does_not_change_questions_and_answers(evaluation, tmp_path):
    asked = []
    for batch_size in (1, 3):
        out = tmp_path / str(batch_size)
        evaluate_questions(replace(evaluation, out=out, batch_size=batch_size))
        asked.append((out / "asked-0.jsonl").read_bytes())
    assert asked[0] == asked[1]


@pytest.mark.slow
def test_other_settings_or_images_in_the_same_folder_are_refused(evaluation, parts, tmp_path):
    images = shutil.copytree(parts / "images", tmp_path / "images")
    evaluation = replace(evaluation, images=str(images), limit=1)
    evaluate_questions(evaluation)
    with pytest.raises(ValueError, match="a run with settings"):
        evaluate_questions(replace(evaluation, settings=replace(evaluation.settings, temperature=0.7)))
    write_image(images / "0.png", 7)
    with pytest.raises(ValueError, match=r"the line for .*0\.png' is about other data"):
        evaluate_questions(evaluation)


def test_missing_truth_is_reported_before_the_model_is_loaded(evaluation):
    with pytest.raises(ValueError, match="no image has questions and answers of easy-VQA"):
        evaluate_questions(replace(evaluation, model="/no/model", truth="easy_vqa"))


@pytest.mark.slow
def test_broken_image_is_recorded_and_counted(evaluation, parts, tmp_path):
    folder = tmp_path / "images"
    write_image(folder / "a.png")
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:80])
    figures = evaluate_questions(replace(evaluation, images=str(folder)))
    assert (figures["num_images"], figures["num_failed"]) == (2, 1)
    assert "cannot be read as an image" in lines_of(evaluation.out / "asked-0.jsonl")[1]["error"]


def test_cosines_equal_those_of_the_clip(parts):
    scorer = ClipScorer(str(parts / "clip"), "cpu")
    images = [tiny.picture(0), tiny.picture(1)]
    inputs = scorer.processor(text=["red circle"], images=images, return_tensors="pt")
    with torch.inference_mode():
        expected = scorer.model(**inputs).logits_per_text / scorer.model.logit_scale.exp()
    torch.testing.assert_close(scorer.cosines(images, ["red circle"]), expected, rtol=0, atol=1e-5)


def test_long_texts_do_not_overlap_other_pictures():
    turn = ("What is the animal in the foreground of this picture doing there? " * 3, "It is standing. " * 20, "")
    figure = _draw_pictures([line(*[turn] * 4)] * 4, [Picture(str(n), tiny.picture(n)) for n in range(4)])
    figure.tight_layout()
    renderer = figure.canvas.get_renderer()
    for number in (1, 3):  # texts of the first two pictures of the first row
        [text] = figure.axes[number].texts
        box, following = (each.get_window_extent(renderer) for each in (text, figure.axes[number + 1]))
        below = figure.axes[number + 6].get_window_extent(renderer)
        assert box.x1 <= following.x0 and box.y0 >= below.y1
    plt.close(figure)


def test_model_that_is_not_a_complete_clip_is_refused(parts):
    with pytest.raises(ValueError, match="is not a complete CLIP"):
        ClipScorer(str(parts / "llama"), "cpu")
