"""`sq-llava evaluate-questions`: reads images, lets the model ask about them, measures the questions, writes a report.

OUT/results.json      all metrics, and what is needed to repeat the run
OUT/asked-*.jsonl     questions and answers as they were generated; an interrupted run resumes from them
OUT/report.md         the metrics, with types.png, clip.png and pictures.png
"""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from accelerate import PartialState
from matplotlib.figure import Figure

from sq_llava.data.images import open_image
from sq_llava.evaluation.other_models import load_any
from sq_llava.evaluation.questions import (
    ASKED,
    ClipScorer,
    Picture,
    ask_about,
    captions_of,
    clip_figures,
    easy_vqa_figures,
    figures_of,
    hashes_of_pictures,
    read_pictures,
)
from sq_llava.evaluation.reading import evenly_spaced
from sq_llava.evaluation.results import environment, hash_of_all, hash_of_code, hash_of_model
from sq_llava.evaluation.settings import QuestionEvaluation
from sq_llava.inference.processes import join_processes
from sq_llava.output import output_lock, write_json, write_text, written_whole
from sq_llava.resumable.resume import read_lines
from sq_llava.resumable.run_note import RunNote


NUM_SHOWN = 12  # images in the report
# Size of the text beside an image. It has as much room as an image.
LINE_LETTERS = 40
NUM_LINES = 20
# A run resumes from the lines in its folder only if these fields are equal. Each line has the hash of its image.
IDENTITY = ("model", "model_hash", "images", "limit", "settings", "dtype")
LABELS = {
    "num_images": "images",
    "num_failed": "failed images",
    "num_questions": "questions",
    "distinct_questions": "share of distinct questions",
    "distinct_1": "share of distinct words",
    "distinct_2": "share of distinct word pairs",
    "self_bleu_of_an_image": "self-BLEU among the questions about an image (0 to 100)",
    "mean_words": "words per question",
    "answer_changes_without_the_image": "share of questions whose answer changes with a blank image",
}


def evaluate_questions(evaluation: QuestionEvaluation) -> dict[str, Any]:
    """
    Measures the questions of a model and writes `evaluation.out`.

    Returns:
        The metrics; an empty `dict` on all processes but the first.

    Raises:
        ValueError: If there are no images, if `truth` is set but no image's content is known, if the folder holds a
            different run, or if another process writes into it. Raised before the model is loaded.
    """
    if evaluation.truth not in (None, "easy_vqa"):
        raise ValueError(f"--truth {evaluation.truth}: unknown dataset. Only easy_vqa is supported.")
    state, device = join_processes(evaluation.device)
    with output_lock(evaluation.out, needed=state.is_main_process):
        return _evaluate(evaluation, state, device)


def _evaluate(evaluation: QuestionEvaluation, state: PartialState, device: str) -> dict[str, Any]:
    everything = read_pictures(evaluation.images, evaluation.image_root)
    pictures = evenly_spaced(everything, evaluation.limit)
    captions = captions_of(pictures) if evaluation.truth is not None else []
    hashes = hashes_of_pictures(pictures)
    about = describe(evaluation, hash_of_all(hashes))
    note = RunNote(evaluation.out, about, IDENTITY)
    read_lines(evaluation.out, ASKED, list(hashes), hashes=hashes)  # raises before the model is loaded
    scorer = ClipScorer(evaluation.clip, device) if evaluation.clip is not None else None
    assistant = load_any(evaluation.model, evaluation.dtype, device)
    asked = ask_about(assistant, pictures, evaluation.out, evaluation.settings, evaluation.batch_size, note, hashes)
    if not state.is_main_process:
        return {}
    figures = figures_of(asked)
    if evaluation.truth is not None:
        known = {question for picture in everything for question, _ in picture.pairs}
        figures["easy_vqa"] = easy_vqa_figures(asked, captions, known)
    cosines: dict[str, list[float]] = {}
    if scorer is not None:
        figures["clip"], cosines = clip_figures(scorer, asked, pictures)
    note.write()
    write_json(evaluation.out / "results.json", {**about, "figures": figures})
    write_report(evaluation.out, about, figures, cosines, asked, pictures)
    return figures


def describe(evaluation: QuestionEvaluation, data_hash: str) -> dict[str, Any]:
    """The fields of `results.json` that are needed to repeat the run."""
    return {
        "model": evaluation.model,
        "model_hash": hash_of_model(evaluation.model),
        "code_hash": hash_of_code(),
        "images": evaluation.images,
        "data_hash": data_hash,
        "truth": evaluation.truth,
        "limit": evaluation.limit,
        "settings": asdict(evaluation.settings),
        "clip": evaluation.clip,
        "dtype": evaluation.dtype,
        **environment(),
    }


def write_report(
    out: Path,
    about: dict[str, Any],
    figures: dict[str, Any],
    cosines: dict[str, list[float]],
    asked: Sequence[dict[str, Any]],
    pictures: Sequence[Picture],
) -> None:
    """Writes `report.md` and its charts."""
    lines = [f"# Questions of {about['model']}", "", f"    {about['command']}", ""]
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    lines += [f"Date {about['date']}, model {about['model_hash']}, code {about['code_hash']}, images "]
    lines += [f"{about['data_hash']}, seed {about['settings']['seed']}; Python {about['python']}, {packages}.", ""]
    lines += ["| metric | value |", "|---|--:|"]
    lines += [f"| {label} | {value} |" for label, value in metric_rows(figures)]
    _save(_draw_types(figures["types"]), out / "types.png")
    lines += ["", "![Types of questions](types.png)", ""]
    if "clip" in figures:
        lines += _clip_lines(figures["clip"], about["clip"])
        _save(_draw_cosines(cosines), out / "clip.png")
    _save(_draw_pictures(asked, pictures), out / "pictures.png")
    lines += ["![Images with the model's questions and its own answers](pictures.png)"]
    write_text(out / "report.md", "\n".join(lines) + "\n")


def metric_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and value of each metric that is one number, for a table."""
    rows = {label: figures[name] for name, label in LABELS.items()}
    if truth := figures.get("easy_vqa"):
        rows |= {
            f"share of questions with a true premise ({truth['num_premises']} questions)": truth["premise_is_true"],
            f"the same among the {truth['num_presuming']} questions that assume something": truth["presumed_is_true"],
            f"share of the model's answers that are correct ({truth['num_own_answers']} answers)": truth[
                "own_answer_is_right"
            ],
        }
    return [(label, _formatted(value)) for label, value in rows.items()]


def _formatted(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _clip_lines(clip: dict[str, float], path: str) -> list[str]:
    names = [name for name in clip if name != "texts_cut" and not name.endswith("_with_another_image")]
    rows = [
        f"| {name.replace('_', ' ')} | {clip[name]:.3f} | {clip[f'{name}_with_another_image']:.3f} |" for name in names
    ]
    head = ["| cosine similarity of text and image | with its image | with another image |", "|---|--:|--:|"]
    cut = f"Measured by the CLIP in {path}. {clip['texts_cut']:.1%} of the texts were cut to its maximum length."
    return [*head, *rows, "", cut, "", "![Cosine similarities of texts and their images](clip.png)", ""]


def _draw_types(types: dict[str, float]) -> Figure:
    figure, axis = plt.subplots(figsize=(7, 0.6 + 0.32 * len(types)))
    axis.barh(list(types), list(types.values()), color="#4477aa")
    axis.invert_yaxis()
    axis.set(xlabel="share of questions", xlim=(0, 1))
    return figure


def _draw_cosines(cosines: dict[str, list[float]]) -> Figure:
    figure, axis = plt.subplots(figsize=(7, 3.5))
    bins = np.histogram_bin_edges([value for values in cosines.values() for value in values], bins=40)
    for name, values in cosines.items():
        axis.hist(values, bins=bins, density=True, histtype="step", label=name.replace("_", " "))
    axis.set(xlabel="cosine similarity of text and image", ylabel="density")
    axis.legend()
    return figure


def _draw_pictures(asked: Sequence[dict[str, Any]], pictures: Sequence[Picture]) -> Figure:
    whole = [(line, picture) for line, picture in zip(asked, pictures, strict=True) if line["error"] is None]
    shown = evenly_spaced(whole, NUM_SHOWN)
    num_rows = -(-len(shown) // 3)
    figure, axes = plt.subplots(num_rows, 6, figsize=(16, 3.0 * num_rows), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, (line, picture) in enumerate(shown):
        image, text = axes[number // 3, 2 * (number % 3) : 2 * (number % 3) + 2]
        image.imshow(open_image(picture.image))
        pairs = zip(line["questions"], line["answers"])
        turns = [f"{_wrapped(question, '')}\n{_wrapped(answer, '   ')}" for question, answer in pairs]
        text.text(0, 1, _cut("\n".join(turns)), va="top", fontsize=8, transform=text.transAxes, parse_math=False)
    return figure


def _wrapped(text: str, indent: str) -> str:
    """Wraps a text. Matplotlib's own wrapping would write over the next image."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return textwrap.fill(printable, LINE_LETTERS, initial_indent=indent, subsequent_indent=indent)


def _cut(text: str) -> str:
    lines = text.splitlines()
    return text if len(lines) <= NUM_LINES else "\n".join([*lines[: NUM_LINES - 1], "..."])


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    with written_whole(path) as new:
        figure.savefig(new, dpi=110)
    plt.close(figure)
