"""Captions: COCO (Karpathy's test split), Flickr30k (the same), NoCaps, Conceptual Captions.

    sq-llava evaluate --model M --tasks coco_captions,flickr30k,nocaps,conceptual_captions --data DIR

All tasks use the prompt of LLaVA's and lmms-eval's caption tasks. (For Karpathy's split, lmms-eval uses another one:
"Describe the image briefly.") Predictions and references are lower-cased and stripped of punctuation by the same
tokenizer; predictions are then cut to 20 words, as in the SQ-LLaVA paper. Metrics are computed over the whole corpus.
They come in three forms that cannot be compared with each other:

    plain/       tokenized by `caption_metrics.words`; always available
    ptb/         tokenized by the Penn Treebank tokenizer, and METEOR; needs a Java runtime
    lmms_eval/   as ptb/, but the prediction is not cut, as in lmms-eval 0.7.3

SPICE is not computed. `captions.json` holds the captions in the COCO results format, for other scorers and for the
NoCaps server (https://eval.ai/web/challenges/challenge-page/355), which alone has the captions of the test split.

Columns in the Hub's layout:
    coco_captions         cocoid, sentences (strings, or objects with `raw`), and either image, or filepath and
                          filename of an image file beside the table (yerevann/coco-karpathy on the Hub has no images)
    flickr30k             img_id, image, caption (strings). A column `split` selects Karpathy's 1,000 test images.
                          Without it all rows are used, as in lmms-eval: lmms-lab-encoder/flickr30k has 31,783
    nocaps                image_id, image, annotations_captions. The domains are read from
                          nocaps_val_4500_captions.json beside the table, if it exists
    conceptual_captions   image, caption
The authors' files:
    coco_captions         Karpathy's dataset_coco.json, and val2014/
    flickr30k             Karpathy's dataset_flickr30k.json, and flickr30k-images/
    nocaps                nocaps_val_4500_captions.json (images: id, file_name, domain; annotations: image_id, caption)
                          and val/; with --split test: nocaps_test_image_info.json and test/
    conceptual_captions   Validation_GCC-1.1.0-Validation.tsv (caption, url) and images/<row, from 0>.jpg. A missing
                          image makes its example fail. To score only the images that can still be downloaded, remove
                          the other rows and add a third column with the image names
"""

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sq_llava.evaluation.caption_metrics import bleu, cider_d, has_java, meteor, ptb_words, rouge_l, words
from sq_llava.evaluation.caption_statistics import CaptionStatistics
from sq_llava.evaluation.reading import Data, TaskImage, check_fields, read_json_list
from sq_llava.evaluation.short_answers import write_upload
from sq_llava.evaluation.task import Example, Record, Score, Task


PROMPT = "Provide a one-sentence caption for the provided image."
MAX_WORDS = 20
NOTE = """\
Tokenizers: `plain/` is this project's own (lower case, no punctuation); do not compare it with published results.
`ptb/` is the Penn Treebank tokenizer with predictions cut to 20 words, and `lmms_eval/` the same with whole
predictions, as in lmms-eval 0.7.3 with pycocoevalcap 1.2. These two and METEOR are present only if the run had a Java
runtime. SPICE is not computed.
"""
NOCAPS_CAPTIONS = "nocaps_val_4500_captions.json"


def _example(number: Any, image: TaskImage, captions: Any, **details: str) -> Example:
    """`captions`: a string, a list of strings or of objects with `raw`, or `None` if only a server has them."""
    if not str(number).isdecimal():
        raise ValueError(f"Image id {number!r} is not a number, which scorers and servers require.")
    texts = [captions] if isinstance(captions, str) else captions or []
    reference = [
        each if isinstance(each, str) else check_fields(each, ["raw"], f"image {number}")["raw"] for each in texts
    ]
    return Example(id=str(int(number)), prompt=PROMPT, images=[image], reference=reference or None, details=details)


def _karpathy_reader(file_name: str, folder: str | None) -> Callable[[Data], list[Example]]:
    """A reader of Karpathy's JSON. The images are in `folder`, or in each row's own `filepath` if it is `None`."""

    def read(data: Data) -> list[Example]:
        file = data.file(file_name)
        fields = ["split", "filename", "imgid", "sentences", *([] if folder else ["filepath"])]
        examples = []
        for row in read_json_list(file, "images", fields):
            if row["split"] == (data.split or "test"):
                image = data.image(file.parent / (folder or row["filepath"]), row["filename"])
                examples.append(_example(row.get("cocoid", row["imgid"]), image, row["sentences"]))
        return examples

    return read


def read_coco(data: Data) -> list[Example]:
    if not data.is_table:
        return _karpathy_reader("dataset_coco.json", None)(data)
    examples = []
    for row in data.rows(["cocoid", "sentences"], default_split="test"):
        if "image" not in row and (data.folder is None or not {"filepath", "filename"} <= row.keys()):
            raise ValueError(
                f"{data}: needs a column image, or columns filepath and filename of image files beside the table. "
                f"Its columns are: {', '.join(row)}."
            )
        image = row["image"] if "image" in row else data.image(data.folder, f"{row['filepath']}/{row['filename']}")
        examples.append(_example(row["cocoid"], image, row["sentences"]))
    return examples


def read_flickr30k(data: Data) -> list[Example]:
    if not data.is_table:
        return _karpathy_reader("dataset_flickr30k.json", "flickr30k-images")(data)
    return [
        _example(row["img_id"], row["image"], row["caption"])
        for row in data.rows(["img_id", "image", "caption"], default_split="test")
        if row.get("split", "test") == "test"
    ]


def read_nocaps(data: Data) -> list[Example]:
    if not data.is_table:
        return _read_nocaps_files(data)
    rows = data.rows(["image_id", "image", "annotations_captions"], default_split="validation")
    file = data.find(NOCAPS_CAPTIONS) if data.folder is not None else None
    known = [] if file is None else read_json_list(file, "images", ["id", "domain"])
    domains = {row["id"]: row["domain"] for row in known}
    return [
        _example(
            row["image_id"],
            row["image"],
            row["annotations_captions"],
            **({"domain": domains[row["image_id"]]} if row["image_id"] in domains else {}),
        )
        for row in rows
    ]


def _read_nocaps_files(data: Data) -> list[Example]:
    is_test = data.split_of_files("validation", "val", "test") == "test"
    file = data.file("nocaps_test_image_info.json" if is_test else NOCAPS_CAPTIONS)
    captions: dict[int, list[str]] = {}
    for row in [] if is_test else read_json_list(file, "annotations", ["image_id", "caption"]):
        captions.setdefault(row["image_id"], []).append(row["caption"])
    examples = []
    for row in read_json_list(file, "images", ["id", "file_name"] if is_test else ["id", "file_name", "domain"]):
        if not is_test and row["id"] not in captions:
            raise ValueError(f"{file}: has no caption for image {row['id']}.")
        image = data.image(file.parent / ("test" if is_test else "val"), row["file_name"])
        domain = {"domain": row["domain"]} if "domain" in row else {}
        examples.append(_example(row["id"], image, captions.get(row["id"]), **domain))
    return examples


def read_conceptual_captions(data: Data) -> list[Example]:
    if data.is_table:
        rows = data.rows(["image", "caption"], default_split="validation")
        return [_example(number, row["image"], row["caption"]) for number, row in enumerate(rows)]
    data.split_of_files("validation")
    file = data.file("Validation_GCC-1.1.0-Validation.tsv", "*.tsv")
    examples = []
    with file.open(encoding="utf-8-sig", newline="") as lines:
        for number, row in enumerate(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)):
            if len(row) not in (2, 3):
                raise ValueError(
                    f"{file}, row {number}: has {len(row)} fields, expected caption, url and, optionally, image name."
                )
            name = row[2] if len(row) == 3 else f"{number}.jpg"
            examples.append(_example(number, data.image(file.parent / "images", name), [row[0]]))
    return examples


def shorten(answer: str) -> str:
    """
    Lower-cases a prediction, removes punctuation and cuts it to 20 words, as in the paper.

        >>> shorten("A dog runs, fast.")
        'a dog runs fast'
    """
    return " ".join(words(answer)[:MAX_WORDS])


def score(example: Example, answer: str) -> Score:
    """Only parses the caption. The metrics are computed over the whole corpus."""
    return Score({}, is_parsed=bool(words(answer)), prediction=shorten(answer))


def corpus_metrics(records: Sequence[Record]) -> dict[str, float]:
    if records[0].example.reference is None:
        return {}
    figures = {}
    for name, predictions, references in _tokenize(records):
        figures |= corpus_figures(name, predictions, references)
        if name != "plain":
            figures[f"{name}/METEOR"] = meteor(predictions, references)
    return figures


def weighted_metrics(records: Sequence[Record]) -> Callable[[np.ndarray], dict[str, float]]:
    """As `corpus_metrics`, but without METEOR and with a weight for each image."""
    statistics = {}
    if records[0].example.reference is not None:
        statistics = {name: CaptionStatistics(*texts) for name, *texts in _tokenize(records)}

    def figures(weights: np.ndarray) -> dict[str, float]:
        found = {name: each.figures(weights) for name, each in statistics.items()}
        return {f"{name}/{metric}": value for name, each in found.items() for metric, value in each.items()}

    return figures


def _tokenize(records: Sequence[Record]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yields the name of each tokenizer with the tokenized predictions and references."""
    answers = [record.answer for record in records]
    references = [record.example.reference for record in records]
    yield "plain", list(map(shorten, answers)), [[" ".join(words(text)) for text in texts] for texts in references]
    if has_java():
        tokenized = iter(ptb_words([*answers, *(text for each in references for text in each)]))
        whole = [next(tokenized) for _ in answers]
        references = [[next(tokenized) for _ in each] for each in references]
        yield "ptb", [" ".join(text.split()[:MAX_WORDS]) for text in whole], references
        yield "lmms_eval", whole, references


def corpus_figures(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """CIDEr-D, BLEU and ROUGE-L of texts that the tokenizer `name` has tokenized."""
    precision = {f"{name}/BLEU-{number}": value for number, value in enumerate(bleu(predictions, references), start=1)}
    rouge = {f"{name}/ROUGE-L": rouge_l(predictions, references)}
    return {f"{name}/CIDEr-D": cider_d(predictions, references), **precision, **rouge}


def write_submission(records: Sequence[Record], folder: Path) -> Path:
    """Writes `[{image_id, caption}, ...]` with the unchanged answers of the model."""
    return write_upload(
        folder / "captions.json", {int(record.example.id): record.answer for record in records}, "image_id", "caption"
    )


def _task(name: str, title: str, hub_id: str | None, read: Callable[[Data], list[Example]], **more: Any) -> Task:
    return Task(
        name=name,
        title=title,
        hub_id=hub_id,
        read=read,
        score=score,
        corpus_metrics=corpus_metrics,
        weighted_metrics=weighted_metrics,
        main_metric="plain/CIDEr-D",
        write_submission=write_submission,
        max_new_tokens=64,
        note=NOTE,
        metrics_are_shares=False,
        **more,
    )


COCO_TASK = _task("coco_captions", "COCO captions, Karpathy's test split", None, read_coco)
FLICKR30K_TASK = _task("flickr30k", "Flickr30k captions", "lmms-lab-encoder/flickr30k", read_flickr30k)
NOCAPS_TASK = _task("nocaps", "NoCaps", "lmms-lab-encoder/NoCaps", read_nocaps, breakdown="domain")
CONCEPTUAL_TASK = _task("conceptual_captions", "Conceptual Captions, validation", None, read_conceptual_captions)
