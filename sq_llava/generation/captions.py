"""Image-caption pairs -> a set for stage 1: LLaVA's filter by noun phrases, and an instruction before each caption.

    python -m spacy download en_core_web_sm
    sq-llava generate-data captions cc3m.jsonl --image-root images --spacy-model en_core_web_sm --out chosen

This is LLaVA's filter from CC3M to 595K pairs (section 4.2 and appendix of https://arxiv.org/abs/2304.08485). A noun
phrase that occurs in fewer than 3 captions selects none. Any other phrase selects all of its captions, or 100 random
ones if there are more. The paper goes from the rarest phrase to the most frequent one. Here, the 100 are drawn from
all captions of a phrase, so the order does not matter, and all phrases are computed at once.

The paper leaves two things open. Here, phrases are compared in lower case and without leading articles and pronouns
("A dog" and "the dog" are equal, "it" is no phrase), and a phrase counts once per caption.

The phrases are appended to OUT/phrases*.jsonl as spaCy finds them: 3 million captions take hours, everything after
that takes minutes. A run that was killed resumes from there. With `--shard i/n`, several machines share the work.

Rows that cannot be used are listed in OUT/bad_rows.jsonl. If they are many, the run ends before spaCy starts.

Nothing is downloaded, neither images nor the spaCy pipeline, and no image is opened.
"""

import json
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from sq_llava.console import needs_extra
from sq_llava.data.rows import read_row
from sq_llava.generation.bad_rows import BadRows
from sq_llava.generation.caption_files import BadRow, Caption, CaptionFile
from sq_llava.generation.prompt_files import draw, hash_of, read_instructions
from sq_llava.generation.rows import Card, Rejected, Shard, make_row, write_output
from sq_llava.generation.settings import CaptionSettings
from sq_llava.output import output_lock
from sq_llava.resumable.jsonl import LineWriter, read_complete_lines
from sq_llava.resumable.run_note import RunNote, check_note, hash_of_file


MIN_FREQUENCY = 3
MAX_CAPTIONS = 100

# Components of spaCy's pipelines that noun phrases do not need.
UNUSED_COMPONENTS = ["ner", "lemmatizer", "senter", "textcat"]
NOT_PART_OF_A_PHRASE = ("DET", "PRON")
TEXTS_AT_A_TIME = 1000


REJECTED = {
    "image": "the image file is missing",
    "rare": f"none of its phrases is in {MIN_FREQUENCY} or more captions",
    "not drawn": f"its phrases are in more than {MAX_CAPTIONS} captions, and it was not drawn",
}
SAME_ID = "an earlier row has the same id. Give each row its own id."
IDENTITY = ("kind", "captions_hash", "limit", "spacy_model")


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """The last step of SplitMix64 (https://doi.org/10.1145/2660193.2660195): each bit affects all output bits."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


@dataclass(frozen=True)
class Choice:
    """
    Attributes:
        taken (`np.ndarray` of bool, `(num_captions,)`): Captions that are in the set.
        common (`np.ndarray` of bool, `(num_captions,)`): Captions with a phrase that is in `MIN_FREQUENCY` captions.
        num_phrases (`int`): Number of different phrases.
        num_rare (`int`): Phrases in fewer than `MIN_FREQUENCY` captions.
        num_capped (`int`): Phrases in more than `MAX_CAPTIONS` captions.
    """

    taken: np.ndarray
    common: np.ndarray
    num_phrases: int
    num_rare: int
    num_capped: int


def choose(rows: np.ndarray, phrases: np.ndarray, ids: np.ndarray, seed: int) -> Choice:
    """
    LLaVA's filter. Which captions of a phrase are drawn depends only on the seed, the phrase and the ids of its
    captions: neither on the order of the rows nor on the shards that read them.

    Args:
        rows (`np.ndarray` of int, `(num_pairs,)`): Caption `rows[i]` has phrase `phrases[i]`. No pair occurs twice.
        phrases (`np.ndarray` of uint64, `(num_pairs,)`): Hashes of phrases.
        ids (`np.ndarray` of uint64, `(num_captions,)`): Hashes of the captions' ids.
        seed (`int`): Seed of the draw.
    """
    _, number_of, frequencies = np.unique(phrases, return_inverse=True, return_counts=True)
    ranks = _mixed(ids[rows] ^ _mixed(phrases + np.asarray([seed % 2**64], dtype=np.uint64)))
    order = np.lexsort((ranks, number_of))
    begins = np.cumsum(frequencies) - frequencies
    places = np.empty_like(order)
    places[order] = np.arange(len(order)) - begins[number_of[order]]
    is_common = frequencies[number_of] >= MIN_FREQUENCY
    taken, common = np.zeros(len(ids), dtype=bool), np.zeros(len(ids), dtype=bool)
    taken[rows[is_common & (places < MAX_CAPTIONS)]] = True
    common[rows[is_common]] = True
    num_rare, num_capped = int((frequencies < MIN_FREQUENCY).sum()), int((frequencies > MAX_CAPTIONS).sum())
    return Choice(taken, common, len(frequencies), num_rare, num_capped)


def load_pipeline(model: str):
    """
    Loads a spaCy pipeline that finds noun phrases.

    Raises:
        ValueError: If spaCy or the pipeline is not installed, or the pipeline has no parser.
    """
    with needs_extra("captions"):
        import spacy
    try:
        pipeline = spacy.load(model, exclude=UNUSED_COMPONENTS)
    except OSError as error:
        raise ValueError(
            f"--spacy-model {model}: is neither an installed pipeline nor a folder. spaCy's own pipelines are "
            f"installed with: python -m spacy download {model}"
        ) from error
    if "parser" not in pipeline.pipe_names:
        raise ValueError(
            f"--spacy-model {model}: has the components {', '.join(pipeline.pipe_names)}. Noun phrases need a parser "
            "and parts of speech; en_core_web_sm has both."
        )
    return pipeline


def phrases_of(document) -> list[str]:
    """The distinct noun phrases of a text that a spaCy pipeline has read, sorted."""
    phrases = set()
    for chunk in document.noun_chunks:
        words = dropwhile(lambda token: token.pos_ in NOT_PART_OF_A_PHRASE, chunk)
        phrases.add(" ".join(token.lower_ for token in words))
    return sorted(phrases - {""})


class PhraseJournal:
    """
    The phrases found so far, in OUT/phrases*.jsonl: the file of this run, and the files of other shards.

    Args:
        folder (`Path`): OUT.
        name (`str`): Name of the file that this run appends to.
        num_rows (`int`): Number of rows of the input.
        note ([`RunNote`], *optional*): The note of the run. It is written before the first phrases.
    """

    def __init__(self, folder: Path, name: str, num_rows: int, note: RunNote | None = None):
        self.note = note
        self.folder = folder
        self.own = folder / name
        self.num_rows = num_rows

    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        The rows and phrases as [`choose`] takes them, and for each row whether its phrases are known. A line that a
        kill cut off is skipped.
        """
        rows, hashes, is_read = array("q"), array("Q"), np.zeros(self.num_rows, dtype=bool)
        for path in sorted(self.folder.glob("phrases*.jsonl")):
            with path.open("rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):
                        break
                    row, phrases = json.loads(line)
                    if not is_read[row]:  # a run over all rows and a shard may both have read it
                        is_read[row] = True
                        rows.extend([row] * len(phrases))
                        hashes.extend(map(hash_of, phrases))
        return np.asarray(rows), np.asarray(hashes), is_read

    def append(self, found: Iterator[tuple[int, Sequence[str]]]) -> Iterator[int]:
        """Writes the phrases of each row to the file, then yields the row."""
        read_complete_lines(self.own)  # removes a line that a kill cut off
        with LineWriter(self.own) as file:
            for row, phrases in found:
                if self.note is not None:
                    self.note.write()
                file.add([[row, phrases]])
                yield row


@dataclass(frozen=True)
class Known:
    """
    The results of one pass over the captions.

    Attributes:
        ids (`np.ndarray` of uint64, `(num_rows,)`): Hashes of the captions' ids.
        is_sound (`np.ndarray` of bool, `(num_rows,)`): Rows that can be used.
        has_image (`np.ndarray` of bool, `(num_rows,)`): Sound rows whose image file exists.
        bad ([`BadRows`]): The other rows.
    """

    ids: np.ndarray
    is_sound: np.ndarray
    has_image: np.ndarray
    bad: BadRows


def look_at(captions: CaptionFile, image_root: Path, max_bad_share: float) -> Known:
    """
    Checks all captions before long work starts. A row is bad if it cannot be read, has an image outside of the root,
    or repeats an id.

    Raises:
        ValueError: If there are no rows, or too many are bad.
    """
    if not image_root.is_dir():
        raise ValueError(f"--image-root {image_root}: no such folder.")
    root = image_root.resolve()
    ids, has_image, lines, errors = array("Q"), array("b"), array("q"), {}
    for number, caption in enumerate(captions):
        error = caption.error if isinstance(caption, BadRow) else _path_error(caption, root)
        if error is not None:
            errors[number] = error
        ids.append(hash_of(caption.id) if error is None else 0)
        has_image.append(error is None and os.path.isfile(os.path.join(root, caption.image)))
        lines.append(caption.line or 0)
    if not ids:
        raise ValueError(f"{captions.path}: holds no rows.")
    known = Known(np.asarray(ids), np.ones(len(ids), dtype=bool), np.asarray(has_image) > 0, BadRows(max_bad_share))
    known.is_sound[list(errors)] = False
    sound = np.flatnonzero(known.is_sound)
    first = sound[np.unique(known.ids[sound], return_index=True)[1]]
    errors |= dict.fromkeys(np.setdiff1d(sound, first).tolist(), SAME_ID)
    known.is_sound[list(errors)] = known.has_image[list(errors)] = False
    numbers = sorted(errors)
    for number, place in zip(numbers, captions.places((number, lines[number]) for number in numbers)):
        known.bad.add(place, errors[number])
    known.bad.judge(len(ids))
    return known


def _path_error(caption: Caption, root: Path) -> str | None:
    faults = read_row(make_row(caption.id, [caption.image], [("", caption.text)]), root).faults
    return next((f"{fault.message} {fault.fix}" for fault in faults if fault.level == "error"), None)


def find_phrases(
    settings: CaptionSettings, captions: CaptionFile, wanted: np.ndarray, journal: PhraseJournal, progress: Progress
) -> None:
    """Lets spaCy read the captions that are `wanted` (bool, one per caption); appends their phrases to the journal."""
    if not wanted.any():
        return
    pipeline = load_pipeline(settings.spacy_model)
    bar = progress.add_task("Finding noun phrases", total=int(wanted.sum()))
    texts = ((caption.text, number) for number, caption in enumerate(captions) if wanted[number])
    documents = pipeline.pipe(texts, as_tuples=True, batch_size=TEXTS_AT_A_TIME, n_process=settings.num_proc)
    for _ in journal.append((number, phrases_of(document)) for document, number in documents):
        progress.advance(bar)


@dataclass(frozen=True)
class Chosen:
    """The outcome of a run. `choice` is `None` if phrases of other shards are missing."""

    choice: Choice | None
    known: Known


def generate(settings: CaptionSettings, command: str, progress: Progress) -> Chosen:
    """
    Finds the phrases of this shard. When the phrases of all shards are known, chooses the captions and writes the set.

    Raises:
        ValueError: Before long work starts, if the input is wrong, if `settings.out` holds another run, or if another
            process makes the same shard.
    """
    with output_lock(settings.out, settings.shard.lock):
        return _generate(settings, command, progress)


def _generate(settings: CaptionSettings, command: str, progress: Progress) -> Chosen:
    instructions = read_instructions(settings.prompts / "instructions.txt")
    captions = CaptionFile(settings.captions, settings.limit, settings.image_root)
    known = look_at(captions, settings.image_root, settings.max_bad_share)
    about = describe(settings, command)
    note = RunNote(settings.out, about, IDENTITY)
    known.bad.write(settings.out)
    journal = PhraseJournal(settings.out, settings.shard.name("phrases.jsonl"), len(known.ids), note)
    wanted = known.has_image & ~journal.read()[2]
    is_ours = np.arange(len(wanted)) % settings.shard.count == settings.shard.index
    find_phrases(settings, captions, wanted & is_ours, journal, progress)
    rows, phrases, is_read = journal.read()
    if (known.has_image & ~is_read).any():
        return Chosen(None, known)
    note.write()
    # An earlier run may have read a caption whose image is gone now.
    is_there = known.has_image[rows]
    choice = choose(rows[is_there], phrases[is_there], known.ids, settings.seed)
    chosen = (
        make_row(each.id, [each.image], [(draw(instructions, settings.seed, each.id), each.text)], kind="caption")
        for each, is_taken in zip(captions, choice.taken)
        if is_taken
    )
    card = card_of(about, choice, known)
    write_output(settings.out, Shard(), chosen, _rejected(captions, known, choice), {}, card)
    return Chosen(choice, known)


def count(settings: CaptionSettings) -> tuple[int, int, BadRows]:
    """Counts this shard's captions that have an image, and those of them that spaCy has not read yet."""
    check_note(settings.out, describe(settings, ""), IDENTITY)
    captions = CaptionFile(settings.captions, settings.limit, settings.image_root)
    known = look_at(captions, settings.image_root, settings.max_bad_share)
    ours = settings.shard.take(known.has_image)
    is_read = PhraseJournal(settings.out, "phrases.jsonl", len(known.ids)).read()[2]
    return int(ours.sum()), int((ours & ~settings.shard.take(is_read)).sum()), known.bad


def _rejected(captions: CaptionFile, known: Known, choice: Choice) -> Iterator[Rejected]:
    for number, caption in enumerate(captions):
        if choice.taken[number] or not known.is_sound[number]:
            continue
        reason = "not drawn" if choice.common[number] else "rare" if known.has_image[number] else "image"
        yield Rejected(caption.id, "filter", REJECTED[reason], caption.text)


def describe(settings: CaptionSettings, command: str) -> dict[str, Any]:
    """Everything that is needed to make the set again."""
    return {
        "kind": "captions",
        "command": command,
        "captions": settings.captions.name,
        "captions_hash": hash_of_file(settings.captions),
        "limit": settings.limit,
        "spacy_model": Path(settings.spacy_model).name,
        "seed": settings.seed,
        "instructions_hash": hash_of_file(settings.prompts / "instructions.txt"),
    }


def card_of(about: dict[str, Any], choice: Choice, known: Known) -> Card:
    return Card(
        title="Captions chosen by their noun phrases",
        summary=(
            f"{choice.taken.sum():,} of {known.is_sound.sum():,} captions, chosen so that no concept is too frequent. "
            f"spaCy found {choice.num_phrases:,} different noun phrases. {choice.num_rare:,} are in fewer than "
            f"{MIN_FREQUENCY} captions and selected none. {choice.num_capped:,} are in more than {MAX_CAPTIONS}, "
            f"of which {MAX_CAPTIONS} were drawn. Each caption answers an instruction from a list. {known.bad} "
            "could not be used."
        ),
        settings=about,
        not_checked=("Whether a caption is true of its image, and whether the image can be opened.",),
    )
