"""Captions: metrics computed by hand, both layouts of each dataset, tokenizers, Java's metrics compared with ours."""

import json
import math
from functools import partial
from threading import Lock
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from sq_llava.evaluation import captions
from sq_llava.evaluation.caption_metrics import (
    _meteor_process,
    bleu,
    cider_d,
    has_java,
    meteor,
    ptb_words,
    rouge_l,
    words,
)
from sq_llava.evaluation.caption_statistics import CaptionStatistics
from sq_llava.evaluation.comparison import compare
from sq_llava.evaluation.results import write_results
from sq_llava.evaluation.run import Evaluation, describe
from tests.evaluation_layouts import (
    assess_answers,
    examples_of,
    figures,
    image_bytes,
    metrics_of,
    png,
    stored,
    write_image,
    write_json,
    write_parquet,
    write_split,
)


REFERENCES = {11: ["A dog runs fast."], 12: ["Two red cats sleep!", "Cats, sleeping."]}
ANSWERS = {"11": "A dog.", "12": "zebra"}
SPLITS = ("test", "test", "train")  # the third image, 13, is not scored
# CIDEr-D of "a dog" for "a dog runs fast". Each n-gram is in one image of two, so all weights are equal. 2 of 4 words
# and 1 of 3 bigrams match; the lengths are 1 and 3 bigrams.
CIDER_OF_DOG = 10 * (2 / math.sqrt(2 * 4) + 1 / math.sqrt(1 * 3)) / 4 * math.exp(-(2**2) / (2 * 6**2))


@pytest.fixture
def without_java(monkeypatch):
    monkeypatch.setattr(captions, "has_java", lambda: False)


def write_karpathy(folder, file_name, picture_folder, id_field):
    images = [
        {
            "split": split,
            "filename": f"{number}.png",
            "filepath": picture_folder,
            id_field: number,
            "imgid": number,
            "sentences": [{"raw": text, "tokens": []} for text in texts],
        }
        for split, (number, texts) in zip(SPLITS, [*REFERENCES.items(), (13, ["A boat."])])
    ]
    write_json(folder / file_name, {"images": images, "dataset": "made"})
    for number in REFERENCES:
        write_image(folder / picture_folder / f"{number}.png", number)


def write_coco(folder, layout):
    if layout == "folder":
        write_karpathy(folder, "dataset_coco.json", "val2014", "cocoid")
        return
    rows = []
    for number, texts in REFERENCES.items():
        image = {"image": stored(number)}
        if layout == "table and pictures":
            image = {"filepath": "val2014", "filename": f"{number}.png"}
            write_image(folder / "val2014" / f"{number}.png", number)
        rows.append({"cocoid": number, "sentences": texts, **image})
    write_split(folder / "data", "test", rows)


def write_flickr30k(folder, layout):
    if layout == "folder":
        write_karpathy(folder, "dataset_flickr30k.json", "flickr30k-images", "imgid")
        return
    rows = [
        {"img_id": str(number), "image": stored(number), "caption": texts, "split": split}
        for split, (number, texts) in zip(SPLITS, [*REFERENCES.items(), (13, ["A boat."])])
    ]
    write_split(folder / "data", "test", rows)


def write_nocaps(folder, layout):
    domains = {11: "in-domain", 12: "out-domain"}
    images = [{"id": number, "file_name": f"{number}.png", "domain": domains[number]} for number in REFERENCES]
    annotations = [{"image_id": number, "caption": text} for number, texts in REFERENCES.items() for text in texts]
    write_json(folder / "nocaps_val_4500_captions.json", {"images": images, "annotations": annotations[::-1]})
    if layout == "folder":
        for number in REFERENCES:
            write_image(folder / "val" / f"{number}.png", number)
        return
    rows = [
        {"image_id": number, "image": stored(number), "annotations_captions": texts[::-1]}
        for number, texts in REFERENCES.items()
    ]
    write_parquet(folder / "data" / "validation-00000-of-00003-55b5edbf01d47b39.parquet", rows)


def write_conceptual(folder, layout):
    texts = [texts[0] for texts in REFERENCES.values()]
    if layout == "parquet":
        rows = [{"image": stored(11 + number), "caption": text} for number, text in enumerate(texts)]
        write_split(folder, "validation", rows)
        return
    lines = [f"{text}\thttp://here/{number}" for number, text in enumerate(texts)]
    file = folder / "Validation_GCC-1.1.0-Validation.tsv"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(line + "\n" for line in lines))
    for number in range(2):
        write_image(folder / "images" / f"{number}.jpg", 11 + number)


WRITERS = {
    "coco_captions": write_coco,
    "flickr30k": write_flickr30k,
    "nocaps": write_nocaps,
    "conceptual_captions": write_conceptual,
}


def test_cider_d_and_bleu_by_hand():
    predictions, references = ["a dog", "zebra"], [["a dog runs fast"], ["two red cats sleep"]]
    assert cider_d(predictions, references) == pytest.approx(CIDER_OF_DOG / 2)
    assert cider_d(["a dog runs fast", "two red cats sleep"], references) == pytest.approx(10)
    assert bleu(predictions, references)[0] == pytest.approx(2 / 3 * math.exp(1 - 8 / 3))


def test_rouge_l_by_hand():
    # The longest common subsequence is "a fast": precision 2/3, recall 2/4; recall weighs 1.2 squared times as much.
    precision, recall, weight = 2 / 3, 2 / 4, 1.2**2
    of_first = (1 + weight) * precision * recall / (recall + weight * precision)
    assert rouge_l(["a big fast", "zebra"], [["a dog runs fast"], ["two red cats"]]) == pytest.approx(of_first / 2)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_weighted_metrics_equal_pycocoevalcap_on_repeated_images(data):
    letters = st.sampled_from("abcde")
    prediction, reference = (st.lists(letters, min_size=least, max_size=9).map(" ".join) for least in (0, 1))
    references = st.lists(reference, min_size=1, max_size=3)
    images = data.draw(st.lists(st.tuples(prediction, references), min_size=1, max_size=6))
    weights = data.draw(st.lists(st.integers(0, 3), min_size=len(images), max_size=len(images)).filter(any))
    repeated = [image for image, weight in zip(images, weights) for _ in range(weight)]
    figures = CaptionStatistics(*zip(*images)).figures(np.array(weights))
    assert figures.pop("CIDEr-D") == pytest.approx(cider_d(*zip(*repeated)), abs=1e-12)
    assert figures.pop("ROUGE-L") == pytest.approx(rouge_l(*zip(*repeated)), abs=1e-12)
    assert list(figures.values()) == pytest.approx(bleu(*zip(*repeated)), abs=1e-12)


@pytest.mark.parametrize("task", ["nocaps", "coco_captions"])
def test_two_runs_are_compared_by_resampling_images(task, tmp_path, without_java):
    WRITERS[task](tmp_path / "data", "folder")
    for run, answers in {"a": ANSWERS, "b": {"11": "A dog runs fast.", "12": "zebra"}}.items():
        result = assess_answers(task, tmp_path / "data", answers, tmp_path / run)
        write_results(
            [result], tmp_path / run, describe(Evaluation(str(tmp_path), [task], "-", tmp_path / run), {task: "-"})
        )
    found = {each.metric: each for each in compare(tmp_path / "a", tmp_path / "b", num_corpus_resamples=50)}
    cider = found["plain/CIDEr-D"]
    assert cider.second == pytest.approx(5)
    assert cider.low == 0  # a resample with only the second image
    assert cider.low <= cider.difference <= cider.high


def test_empty_captions_score_0():
    assert cider_d(["", ""], [["a dog"], ["a cat"]]) == 0
    assert bleu(["", ""], [["a dog"], ["a cat"]]) == [0, 0, 0, 0]


def test_words_are_lower_case_without_punctuation():
    found = words("The man’s T-shirt_2 'is' 3.5 Café-blue, O'Neil's!")
    assert " ".join(found) == "the man's t shirt 2 is 3 5 café blue o'neil's"


def test_prediction_is_cut_to_twenty_words():
    text = " ".join(f"w{number}," for number in range(25))
    assert captions.shorten(text) == " ".join(f"w{number}" for number in range(20))


@pytest.mark.parametrize("layout", ["parquet", "folder"])
@pytest.mark.parametrize("task", WRITERS)
def test_both_layouts_give_the_metrics_computed_by_hand(task, layout, tmp_path, without_java):
    WRITERS[task](tmp_path / task, layout)
    examples = examples_of(task, tmp_path)
    answers = dict(zip([example.id for example in examples], ANSWERS.values()))
    result = assess_answers(task, tmp_path, answers, tmp_path / "out")
    found = figures(result)
    assert found["plain/CIDEr-D"] == pytest.approx(CIDER_OF_DOG / 2)
    closest = 4 if task == "conceptual_captions" else 2  # "Cats, sleeping." is the closest in length to one word
    assert found["plain/BLEU-1"] == pytest.approx(2 / 3 * math.exp(1 - (4 + closest) / 3))
    assert {metric.num for metric in result.metrics if metric.name.startswith("plain/")} == {2}
    assert all(metric.standard_error > 0 for metric in result.metrics if metric.name.startswith("plain/CIDEr"))
    assert [example.prompt for example in examples] == ["Provide a one-sentence caption for the provided image."] * 2
    assert image_bytes(examples[1]) == [png(12)]
    written = json.loads((tmp_path / "out" / task / "captions.json").read_text())
    assert written == [{"image_id": int(id), "caption": answer} for id, answer in answers.items()]


def test_coco_table_without_images_uses_files_beside_it(tmp_path, without_java):
    write_coco(tmp_path, "table and pictures")
    assert [image_bytes(example) for example in examples_of("coco_captions", tmp_path)] == [[png(11)], [png(12)]]
    write_split(tmp_path / "data", "test", [{"cocoid": 1, "sentences": ["a"], "url": "u"}])
    with pytest.raises(ValueError, match=r"needs a column image, or .* columns are: cocoid, sentences, url"):
        examples_of("coco_captions", tmp_path)


@pytest.mark.parametrize("layout", ["parquet", "folder"])
def test_nocaps_has_metrics_for_each_domain(layout, tmp_path, without_java):
    write_nocaps(tmp_path, layout)
    result = assess_answers("nocaps", tmp_path, ANSWERS, tmp_path / "out")
    num = {name: metric.num for name, metric in metrics_of(result).items() if name.endswith("BLEU-1")}
    assert num == {"plain/BLEU-1": 2, "in-domain/plain/BLEU-1": 1, "out-domain/plain/BLEU-1": 1}
    assert figures(result)["in-domain/plain/BLEU-1"] == pytest.approx(math.exp(1 - 4 / 2))


def test_nocaps_table_alone_has_no_domains(tmp_path, without_java):
    write_nocaps(tmp_path, "parquet")
    (tmp_path / "nocaps_val_4500_captions.json").unlink()
    result = assess_answers("nocaps", tmp_path, ANSWERS, tmp_path / "out")
    assert {metric.name.split("/")[0] for metric in result.metrics} == {"plain"}


def test_nocaps_test_captions_are_written_for_the_server(tmp_path):
    write_json(tmp_path / "nocaps_test_image_info.json", {"images": [{"id": 4, "file_name": "4.png"}]})
    result = assess_answers("nocaps", tmp_path, {"4": "A cat."}, tmp_path / "out", split="test")
    file = tmp_path / "out" / "nocaps" / "captions.json"
    assert json.loads(file.read_text()) == [{"image_id": 4, "caption": "A cat."}]
    assert (result.metrics, result.missing) == ([], f"scored by a server: upload {file}")


def test_failed_caption_counts_as_empty(tmp_path, without_java):
    write_coco(tmp_path, "folder")
    result = assess_answers("coco_captions", tmp_path, {"11": "A dog runs fast.", "12": None}, tmp_path / "out")
    assert figures(result)["plain/CIDEr-D"] == pytest.approx(5)
    assert (result.num_failed, result.parsed_share) == (1, 0.5)


def test_wrong_files_are_named(tmp_path):
    write_coco(tmp_path / "coco", "folder")
    write_json(tmp_path / "coco" / "dataset_coco.json", {"images": [{"split": "test", "filename": "1.png"}]})
    with pytest.raises(ValueError, match=r"dataset_coco\.json, images 0: has no imgid, sentences, filepath"):
        examples_of("coco_captions", tmp_path / "coco")
    write_nocaps(tmp_path / "table", "parquet")
    write_json(tmp_path / "table" / "nocaps_val_4500_captions.json", {"images": [{"id": 11}]})
    with pytest.raises(ValueError, match=r"nocaps_val_4500_captions\.json, images 0: has no domain"):
        examples_of("nocaps", tmp_path / "table")
    (tmp_path / "captions.tsv").write_text("A dog.\n")
    with pytest.raises(ValueError, match=r"captions\.tsv, row 0: has 1 fields"):
        examples_of("conceptual_captions", tmp_path)
    images = [{"id": 4, "file_name": "4.png", "domain": "in-domain"}]
    write_json(tmp_path / "nocaps_val_4500_captions.json", {"images": images, "annotations": []})
    with pytest.raises(ValueError, match="has no caption for image 4"):
        examples_of("nocaps", tmp_path)


needs_java = pytest.mark.skipif(not has_java(), reason="needs a Java runtime")


@pytest.mark.slow
@needs_java
def test_penn_treebank_words_equal_those_of_pycocoevalcap():
    texts = ["A man's dog, running (fast).", "", "Zwei Bäume... at 10:30\u2028there -- ok", "A dog runs fast."]
    wrapped = {number: [{"caption": " ".join(text.split())}] for number, text in enumerate(texts)}
    assert ptb_words(texts) == [each[0] for each in PTBTokenizer().tokenize(wrapped).values()]


@pytest.mark.long
@pytest.mark.slow
@needs_java
def test_meteor_equals_that_of_pycocoevalcap():
    predictions = ["a man 's dog running", "", "zwei bäume at 10:30", "a dog runs fast"]
    references = [["a dog is running", "the dog ||| runs"], ["nothing"], ["two trees"], ["a dog runs fast"]]
    said = {number: [text] for number, text in enumerate(predictions)}
    # pycocoevalcap uses our Java process, because starting one takes ten seconds.
    java = SimpleNamespace(stdin=_meteor_process().stdin.buffer, stdout=_meteor_process().stdout.buffer)
    scorer = SimpleNamespace(meteor_p=java, lock=Lock())
    scorer._stat = partial(Meteor._stat, scorer)
    theirs, _ = Meteor.compute_score(scorer, dict(enumerate(references)), said)
    assert 0 < meteor(predictions, references) == theirs < 1


@pytest.mark.long
@needs_java
def test_java_adds_its_own_metrics(tmp_path):
    write_coco(tmp_path, "folder")
    found = figures(assess_answers("coco_captions", tmp_path, ANSWERS, tmp_path / "out"))
    assert found["ptb/CIDEr-D"] == found["plain/CIDEr-D"]
    assert 0 < found["ptb/METEOR"] == found["lmms_eval/METEOR"] < 1


@pytest.mark.slow
@needs_java
def test_caption_that_equals_its_reference_has_the_highest_cider_with_every_tokenizer(tmp_path):
    texts = {
        11: ["A man's T-shirt isn't (really) red, it's 3.5 times redder."],
        12: ["Two street-signs at 10:30 a.m."],
    }
    rows = [{"cocoid": number, "sentences": each, "image": stored(number)} for number, each in texts.items()]
    write_split(tmp_path / "data", "test", rows)
    answers = {str(number): each[0] for number, each in texts.items()}
    found = figures(assess_answers("coco_captions", tmp_path, answers, tmp_path / "out"))
    names = [f"{name}/CIDEr-D" for name in ("plain", "ptb", "lmms_eval")]
    assert [found[name] for name in names] == pytest.approx([10, 10, 10])
    assert found["ptb/ROUGE-L"] == found["lmms_eval/ROUGE-L"] == 1
