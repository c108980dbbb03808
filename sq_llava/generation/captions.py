"""Captions of images -> a set for stage 1: LLaVA's filter by noun phrases, and an instruction before each caption.

    python -m spacy download en_core_web_sm
    sq-llava generate-data captions cc3m.jsonl --image-root images --spacy-model en_core_web_sm --out chosen

The filter is that of LLaVA (section 4.1 of its paper), which made 595K pairs of CC3M: a noun phrase that stands in
fewer than 3 captions is passed over; of any other all captions are taken, but a random 100 where there are more. The
paper goes from the rarest phrase up; as the 100 are drawn of all captions of their phrase, whatever was taken before,
what is taken in the end does not depend on that order, and is computed for all phrases at once.

Two things the paper leaves open: phrases are compared in lower case and without the articles and pronouns that they
begin with ("A dog" and "the dog" are one, "it" is none), and a phrase counts once in a caption.

What spaCy found is appended to OUT/phrases*.jsonl as it comes: reading 3 million captions takes hours, all that
follows minutes. A run that was killed resumes from there; with `--shard i/n`, several machines read a part each. What
this does not do: download images or the spaCy pipeline, or look at the images at all.
"""

import csv
import hashlib
import json
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
from sq_llava.data.sources import JsonFile
from sq_llava.generation.rows import Card, Rejected, Shard, make_row, write_output
from sq_llava.generation.settings import CaptionSettings
from sq_llava.resumable.jsonl import to_line
from sq_llava.resumable.run_note import check_note, hash_of_file, write_note


MIN_FREQUENCY = 3
MAX_CAPTIONS = 100

# Components of spaCy's pipelines that noun phrases do not need.
UNUSED_COMPONENTS = ["ner", "lemmatizer", "senter", "textcat"]
NOT_PART_OF_A_PHRASE = ("DET", "PRON")
TEXTS_AT_A_TIME = 1000


REJECTED = {
    "image": "there is no such image",
    "rare": f"no phrase of it is in {MIN_FREQUENCY} captions",
    "not drawn": f"its phrases are in more than {MAX_CAPTIONS} captions, and it was not drawn",
}
IDENTITY = ("kind", "captions_hash", "limit", "spacy_model")


@dataclass(frozen=True)
class Caption:
    """One row of the input; `id` is its own, or else its number."""

    id: str
    image: str
    text: str


class CaptionFile:
    """
    The rows of a `.json` (a list), `.jsonl`, `.csv` or `.tsv` file (whose first line names its columns), which have
    `image` and `caption`, and may have an `id`. They are read anew each time they are gone through, none is held.

    Raises:
        ValueError: if the file is of another kind; when it is gone through: with file, row, field, value and mend.
    """

    def __init__(self, path: Path, limit: int | None = None):
        if path.suffix not in (".json", ".jsonl", ".csv", ".tsv"):
            raise ValueError(f"{path}: give captions as .json, .jsonl, .csv or .tsv.")
        if not path.is_file():
            raise ValueError(f"{path}: no such file.")
        self.path = path
        self.limit = limit
        self._json = JsonFile(str(path)) if path.suffix.startswith(".json") else None
        if self._json is not None and self._json.broken:
            raise ValueError(f"{path}, behind row {len(self._json) - 1}: cannot be read as JSON: {self._json.broken}.")

    def __iter__(self) -> Iterator[Caption]:
        rows = self._table() if self._json is None else self._json.rows(range(len(self._json)))
        for number, row in enumerate(rows):
            if number == self.limit:
                return
            yield self._caption(row, number)

    def _table(self) -> Iterator[dict[str, Any]]:
        with self.path.open(encoding="utf-8-sig", newline="") as lines:
            # In .tsv a quotation mark is one: a caption may begin with it, and not end.
            tab = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
            reader = csv.DictReader(lines, **(tab if self.path.suffix == ".tsv" else {}))
            missing = {"image", "caption"} - set(reader.fieldnames or ())
            if missing:
                raise ValueError(
                    f"{self.path}, line 1: has no {' and no '.join(sorted(missing))} among {reader.fieldnames}: let "
                    "the first line name the columns, image and caption (and id, if there is one)."
                )
            yield from reader

    def _caption(self, row: Any, number: int) -> Caption:
        place = f"{self.path}, row {number}"
        if isinstance(row, ValueError):
            raise ValueError(f"{place}: cannot be read as JSON: {row}") from row
        if not isinstance(row, dict):
            raise ValueError(f"{place}: is {row!r:.100}: expected an object with image and caption.")
        for name in ("image", "caption"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise ValueError(
                    f"{place}: {name} is {row.get(name)!r:.100}: expected a text. Mend or remove the row."
                )
        return Caption(str(row.get("id", number)), row["image"], " ".join(row["caption"].split()))


def hash_of(text: str) -> int:
    """64 bits: among the few million phrases of a large set two alike are not to be expected (one in a million)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """The last step of SplitMix64: each bit of a number acts on all bits of the outcome."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


@dataclass(frozen=True)
class Choice:
    """
    Attributes:
        taken (`np.ndarray` of bool): For each caption, whether it is in the set.
        common (`np.ndarray` of bool): For each caption, whether a phrase of it stands in `MIN_FREQUENCY` captions.
        num_phrases, num_rare, num_capped (`int`): Different phrases; those in fewer captions than that; those of
            whose captions `MAX_CAPTIONS` were drawn.
    """

    taken: np.ndarray
    common: np.ndarray
    num_phrases: int
    num_rare: int
    num_capped: int


def choose(rows: np.ndarray, phrases: np.ndarray, ids: np.ndarray, seed: int) -> Choice:
    """
    LLaVA's filter. Which captions of a phrase are drawn depends on the seed, the phrase and the captions' ids alone,
    so neither on the order of the rows nor on who read them.

    Args:
        rows (`np.ndarray` of int): With `phrases`: the caption `rows[i]` has the phrase `phrases[i]`. No pair twice.
        phrases (`np.ndarray` of uint64): Hashes of phrases.
        ids (`np.ndarray` of uint64): Hashes of the ids of all captions.
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
    A spaCy pipeline that finds noun phrases.

    Raises:
        ValueError: if spaCy, or the pipeline, is not there, or has no parser.
    """
    with needs_extra("captions"):
        import spacy
    try:
        pipeline = spacy.load(model, exclude=UNUSED_COMPONENTS)
    except OSError as error:
        raise ValueError(
            f"--spacy-model {model}: no such pipeline is installed, and no such folder is here. Of spaCy's own, "
            f"install it with: python -m spacy download {model}"
        ) from error
    if "parser" not in pipeline.pipe_names:
        raise ValueError(
            f"--spacy-model {model}: has the components {', '.join(pipeline.pipe_names)}: noun phrases need a parser "
            "and parts of speech, as en_core_web_sm has them."
        )
    return pipeline


def phrases_of(document) -> list[str]:
    """The different noun phrases of a text that a spaCy pipeline has read, sorted."""
    phrases = set()
    for chunk in document.noun_chunks:
        words = dropwhile(lambda token: token.pos_ in NOT_PART_OF_A_PHRASE, chunk)
        phrases.add(" ".join(token.lower_ for token in words))
    return sorted(phrases - {""})


class PhraseJournal:
    """
    The phrases that were found, in OUT/phrases*.jsonl: one file of this run, and those of other shards.

    Args:
        folder (`Path`): OUT.
        name (`str`): Of the file to append to.
        num_rows (`int`): Of the input.
    """

    def __init__(self, folder: Path, name: str, num_rows: int):
        self.folder = folder
        self.own = folder / name
        self.num_rows = num_rows

    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Returns rows and phrases as [`choose`] takes them, and for each row whether its phrases are known. A line that
        a kill has cut off is passed over.
        """
        rows, hashes, is_read = array("q"), array("Q"), np.zeros(self.num_rows, dtype=bool)
        for path in sorted(self.folder.glob("phrases*.jsonl")):
            with path.open("rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):
                        break
                    row, phrases = json.loads(line)
                    if not is_read[row]:  # the shards may have overlapped with a run over all rows
                        is_read[row] = True
                        rows.extend([row] * len(phrases))
                        hashes.extend(map(hash_of, phrases))
        return np.asarray(rows), np.asarray(hashes), is_read

    def append(self, found: Iterator[tuple[int, Sequence[str]]]) -> Iterator[int]:
        """Writes down the phrases of one row after another, and yields the row."""
        self._drop_cut_line()
        with self.own.open("ab", buffering=0) as file:
            for row, phrases in found:
                file.write(to_line([row, phrases]).encode())
                yield row

    def _drop_cut_line(self) -> None:
        if self.own.is_file():
            with self.own.open("rb+") as file:
                content = file.read()
                file.truncate(content.rfind(b"\n") + 1)


@dataclass(frozen=True)
class Known:
    """Of all captions of a file: the hashes of their ids, and whether the image is there."""

    ids: np.ndarray
    has_image: np.ndarray


def look_at(captions: CaptionFile, image_root: Path) -> Known:
    """
    Goes through the captions once, before long work starts.

    Raises:
        ValueError: for the first row that is wrong, whose image lies outside of the root, or whose id is there twice.
    """
    if not image_root.is_dir():
        raise ValueError(f"--image-root {image_root}: no such folder.")
    root = image_root.resolve()
    ids, has_image = array("Q"), array("b")
    for number, caption in enumerate(captions):
        faults = read_row(make_row(caption.id, [caption.image], [("", caption.text)]), root).faults
        for fault in faults:
            if fault.level == "error":
                raise ValueError(f"{captions.path}, row {number} (id {caption.id!r}): {fault.message} {fault.fix}")
        ids.append(hash_of(caption.id))
        has_image.append((root / caption.image).is_file())
    if not ids:
        raise ValueError(f"{captions.path}: no rows.")
    known = Known(np.asarray(ids), np.asarray(has_image).astype(bool))
    unique, first = np.unique(known.ids, return_index=True)
    if len(unique) < len(ids):
        again = np.setdiff1d(np.arange(len(ids)), first)[0]
        raise ValueError(f"{captions.path}, row {again}: its id stands in an earlier row, too: give each row its own.")
    return known


def find_phrases(
    settings: CaptionSettings, captions: CaptionFile, wanted: np.ndarray, journal: PhraseJournal, progress: Progress
) -> None:
    """Lets spaCy read the captions that are `wanted` (bool for each), and writes down their phrases as they come."""
    if not wanted.any():
        return
    pipeline = load_pipeline(settings.spacy_model)
    bar = progress.add_task("Finding noun phrases", total=int(wanted.sum()))
    texts = ((caption.text, number) for number, caption in enumerate(captions) if wanted[number])
    documents = pipeline.pipe(texts, as_tuples=True, batch_size=TEXTS_AT_A_TIME, n_process=settings.num_proc)
    for _ in journal.append((number, phrases_of(document)) for document, number in documents):
        progress.advance(bar)


def generate(settings: CaptionSettings, command: str, progress: Progress) -> Choice | None:
    """
    Makes the set, as far as the phrases of all shards are there.

    Returns:
        [`Choice`] or `None`, if the phrases of other shards are still missing.

    Raises:
        ValueError: before long work starts, if the input is wrong or `settings.out` holds another run.
    """
    instructions = read_instructions(settings.prompts / "instructions.txt")
    captions = CaptionFile(settings.captions, settings.limit)
    known = look_at(captions, settings.image_root)
    about = describe(settings, command)
    write_note(settings.out, check_note(settings.out, about, IDENTITY), f"-{settings.shard.index}")
    journal = PhraseJournal(settings.out, settings.shard.name("phrases.jsonl"), len(known.ids))
    wanted = known.has_image & ~journal.read()[2]
    is_ours = np.arange(len(wanted)) % settings.shard.count == settings.shard.index
    find_phrases(settings, captions, wanted & is_ours, journal, progress)
    rows, phrases, is_read = journal.read()
    if (known.has_image & ~is_read).any():
        return None
    choice = choose(rows, phrases, known.ids, settings.seed)
    chosen = (
        make_row(each.id, [each.image], [(draw(instructions, settings.seed, each.id), each.text)], kind="caption")
        for each, is_taken in zip(captions, choice.taken)
        if is_taken
    )
    write_output(settings.out, Shard(), chosen, _rejected(captions, known, choice), {}, card_of(about, choice))
    return choice


def count(settings: CaptionSettings) -> tuple[int, int]:
    """Of this shard: the captions with an image, and those that spaCy has not read yet."""
    check_note(settings.out, describe(settings, ""), IDENTITY)
    known = look_at(CaptionFile(settings.captions, settings.limit), settings.image_root)
    ours = settings.shard.take(known.has_image)
    is_read = PhraseJournal(settings.out, "phrases.jsonl", len(known.ids)).read()[2]
    return int(ours.sum()), int((ours & ~settings.shard.take(is_read)).sum())


def _rejected(captions: CaptionFile, known: Known, choice: Choice) -> Iterator[Rejected]:
    for number, caption in enumerate(captions):
        if choice.taken[number]:
            continue
        reason = "not drawn" if choice.common[number] else "rare" if known.has_image[number] else "image"
        yield Rejected(caption.id, "filter", REJECTED[reason], caption.text)


def read_instructions(path: Path) -> list[str]:
    """
    The lines of a file, without empty ones and those that begin with `#`.

    Raises:
        ValueError: if there is none.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    instructions = [line for line in lines if line and not line.startswith("#")]
    if not instructions:
        raise ValueError(f"{path}: holds no instruction: write one a line.")
    return instructions


def draw(instructions: Sequence[str], seed: int, id: str) -> str:
    return instructions[hash_of(f"{seed} {id}") % len(instructions)]


def describe(settings: CaptionSettings, command: str) -> dict[str, Any]:
    """What it takes to make the set again."""
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


def card_of(about: dict[str, Any], choice: Choice) -> Card:
    return Card(
        title="Captions chosen by their noun phrases",
        summary=(
            f"Of {len(choice.taken):,} captions {choice.taken.sum():,}, so that no concept is too frequent. They have "
            f"{choice.num_phrases:,} different noun phrases, by spaCy; {choice.num_rare:,} of these are in fewer than "
            f"{MIN_FREQUENCY} captions and chose none; of each of the {choice.num_capped:,} that are in more than "
            f"{MAX_CAPTIONS}, so many captions were drawn. Each answers an instruction that was drawn from a list."
        ),
        settings=about,
        not_checked=("Whether a caption is true of its image, and whether the image can be opened.",),
    )
