"""Images -> detailed descriptions that were checked: MiniGPT-4's second-stage set.

    sq-llava generate-data curate photos --describer runs/demo/model --out described
    sq-llava generate-data curate photos --model gpt-4o --repair-model gpt-4o-mini --out described

and, after a look at described/review.html, which saves decisions.json, the same command again with

    sq-llava generate-data curate photos ... --out described --decisions decisions.json

As in section 3.2 of MiniGPT-4's paper: a vision-language model describes each image; one whose answer has 80 tokens or
fewer is told to go on, once, and the two are joined; a language model, which does not see the image, repairs each text
(repeats, stray characters, an unfinished end); rules leave out what is still wrong (`text_rules.py`); a person looks
at the rest. The instruction of a row is drawn from a list, not the one that the describer was given.

Answers of a local describer are kept in OUT/descriptions.jsonl, of a server in OUT/answers.jsonl, of the repairer in
OUT/repairs.jsonl: all else is made of these anew. What it does not do: ask one model on several GPUs; `--shard` does.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

from sq_llava.checkpoints.provenance import public_name
from sq_llava.console import messages_console
from sq_llava.data.images import open_image
from sq_llava.early_checks import IMAGE_SUFFIXES
from sq_llava.generation.captions import draw
from sq_llava.generation.describing import Description, LocalDescriber, Prompts, Repairer, ServerDescriber
from sq_llava.generation.review_sheet import Entry, check_decisions, read_decisions, write_sheet
from sq_llava.generation.rows import Card, Rejected, make_row, require_utf8, write_output
from sq_llava.generation.settings import CurateSettings
from sq_llava.generation.text_rules import first_fault, share_of_new_words, words_of
from sq_llava.llm_client.asking import Asked, ask_all
from sq_llava.llm_client.client import ChatRequest, Estimate
from sq_llava.resumable.run_note import check_note, write_note


# Repairs are kept by what was sent: with another repairer, the descriptions stay.
IDENTITY = ("kind", "describer", "describer_hash", "prompts_hash", "num_shards")
# A repairer that does not see the image may take away and mend, but not tell more.
MAX_NEW_WORDS = 0.3
REWRITTEN = "it is not the text that was to be repaired"
# Nor say that it has: of the first words, so many are its own then.
NUM_FIRST_WORDS, MAX_NEW_FIRST_WORDS = 4, 1
REMARK = "it begins with words that are not in the text that was to be repaired"
DROPPED = "a person dropped it"
# What a describer says that does not look. Texts of fewer words may well be true of several images.
SAID_BEFORE = "an earlier image of the shard has the same text"
MIN_WORDS_OF_ITS_OWN = 30

Describer = LocalDescriber | ServerDescriber


@dataclass(frozen=True)
class Curated:
    """Counts of a run; `num_open` images were not reached before it was stopped."""

    num_images: int
    num_continued: int
    num_kept: int
    num_checked: int
    reasons: dict[str, int]
    num_failed: int
    num_open: int = 0
    stopped: str | None = None


def curate(settings: CurateSettings, describer: Describer, repairer: Repairer | None, command: str) -> Curated:
    """
    Describes, continues, repairs, applies the rules and the decisions, and writes `settings.out`.

    Args:
        repairer (`Repairer`, *optional*): Without one, texts stay as the describer gave them.
        command (`str`): For the card.

    Raises:
        ValueError: before a model is asked, if the input is wrong or the folder holds another run; for decisions that
            are not about what is in the folder.
    """
    decisions = read_decisions(settings.decisions) if settings.decisions else {}
    about = describe_run(settings, describer, repairer, command)
    images, failures = openable(find_images(settings))
    write_note(settings.out, check_note(settings.out, about, IDENTITY), f"-{settings.shard.index}")
    described = describer.describe_all(images)
    texts = repair_all(repairer, described)
    passed, rejected = apply_rules(described.results, texts.results)
    check_decisions(decisions, passed, settings.decisions)
    decided = {id: decision for (id, _), decision in decisions.items()}
    write_review(settings, images, passed, decided)
    rejected += [Rejected(id, "person", DROPPED, text) for id, text in passed.items() if decided.get(id) == "drop"]
    rows = make_rows(settings, describer.prompts, described.results, passed, decided)
    failures |= described.failures | texts.failures
    write_output(settings.out, settings.shard, rows, rejected, failures, card_of(about))
    return Curated(
        num_images=len(images),
        num_continued=sum(said.more is not None for said in described.results.values()),
        num_kept=len(rows),
        num_checked=sum(row["checked"] for row in rows),
        reasons=dict(Counter(each.reason for each in rejected).most_common()),
        num_failed=len(failures),
        num_open=described.num_open + texts.num_open,
        stopped=described.stopped or texts.stopped,
    )


def write_review(
    settings: CurateSettings, images: Mapping[str, Path], texts: Mapping[str, str], decided: Mapping[str, str]
) -> None:
    """Writes the sheet on which a person keeps or drops each text, with what was decided before."""
    entries = (Entry(id, open_image(images[id]), text, decided.get(id)) for id, text in texts.items())
    path = settings.out / settings.shard.name("review.html")
    write_sheet(path, entries, f"{len(texts):,} descriptions to check")


def make_rows(
    settings: CurateSettings,
    prompts: Prompts,
    described: Mapping[str, Description],
    texts: Mapping[str, str],
    decided: Mapping[str, str],
) -> list[dict[str, Any]]:
    """A row for each text that no person dropped."""
    return [
        make_row(
            id,
            [id],
            [(draw(prompts.instructions, settings.seed, id), text)],
            kind="description",
            continued=described[id].more is not None,
            repaired=text != described[id].text,
            checked=id in decided,
        )
        for id, text in texts.items()
        if decided.get(id) != "drop"
    ]


def find_images(settings: CurateSettings) -> dict[str, Path]:
    """
    The images of a shard by their paths in the folder, which are their ids.

    Raises:
        ValueError: if there are none, or one leads out of the folder or has a name that no JSON can hold.
    """
    root = settings.images
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder of images.")
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"{root}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    for file in files:
        require_utf8(file)
        if not file.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{file}: leads out of {root}, which training would refuse: copy the image there.")
    return {file.relative_to(root).as_posix(): file for file in settings.shard.take(files[: settings.limit])}


def openable(images: Mapping[str, Path]) -> tuple[dict[str, Path], dict[str, str]]:
    """The images that can be opened, and why the others cannot."""
    whole, failures = {}, {}
    for id, path in track(images.items(), "Opening images", console=messages_console, transient=True):
        try:
            open_image(path)
            whole[id] = path
        except ValueError as error:
            failures[id] = str(error)
    return whole, failures


def repair_all(repairer: Repairer | None, described: Asked) -> Asked:
    """The texts that are left; where the describer was stopped, what was repaired before."""
    texts = {id: said.text for id, said in described.results.items()}
    if repairer is None:
        return Asked(texts, {}, 0)
    if described.stopped is not None:
        repairer.client.reads_only = True
    return ask_all(repairer.client, texts, repairer.repair, "Repairing")


def apply_rules(
    described: Mapping[str, Description], texts: Mapping[str, str]
) -> tuple[dict[str, str], list[Rejected]]:
    """The texts that pass, and those that do not. `texts` are what the repairer made of those `described`."""
    passed, rejected, known = {}, [], set()
    for id, text in texts.items():
        first_words = " ".join(words_of(text)[:NUM_FIRST_WORDS])
        if share_of_new_words(text, described[id].text) > MAX_NEW_WORDS:
            rejected.append(Rejected(id, "repair", REWRITTEN, text))
        elif NUM_FIRST_WORDS * share_of_new_words(first_words, described[id].text) > MAX_NEW_FIRST_WORDS:
            rejected.append(Rejected(id, "repair", REMARK, text))
        elif reason := first_fault(text):
            rejected.append(Rejected(id, "rules", reason, text))
        elif text in known and len(words_of(text)) >= MIN_WORDS_OF_ITS_OWN:
            rejected.append(Rejected(id, "rules", SAID_BEFORE, text))
        else:
            passed[id] = text
            known.add(text)
    return passed, rejected


def estimate(settings: CurateSettings, describer: Describer, repairer: Repairer | None) -> dict[str, Estimate]:
    """
    What is still to be asked of which model. Of what depends on answers that are not there yet the most is taken:
    every description is continued, and as long as it may be.
    """
    images, _ = openable(find_images(settings))
    estimates = {}
    if isinstance(describer, ServerDescriber):
        requests = (request for image in images.values() for request in describer.requests_left(image))
        estimates[describer.name] = describer.client.estimate(requests)
    if repairer is not None:
        requests = _repairs_left(describer, repairer, images.values())
        estimates[f"{repairer.client.settings.model}, to repair"] = repairer.client.estimate(requests)
    return estimates


def _repairs_left(describer: Describer, repairer: Repairer, images: Iterable[Path]) -> Iterator[ChatRequest]:
    for image in images:
        said = describer.kept(image)
        yield from repairer.requests_left("text" * describer.longest if said is None else said.text)


def describe_run(
    settings: CurateSettings, describer: Describer, repairer: Repairer | None, command: str
) -> dict[str, Any]:
    """What it takes to make the set again."""
    prompts = describer.prompts
    texts = [prompts.describe, prompts.go_on]
    return {
        "kind": "curate",
        "command": command,
        "describer": describer.name if describer.hash is None else public_name(describer.name),
        "describer_hash": describer.hash,
        "repairer": repairer and repairer.client.settings.model,
        "prompts_hash": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        "num_shards": settings.shard.count,
        "seed": settings.seed,
        "decisions": settings.decisions and settings.decisions.name,
    }


def card_of(about: Mapping[str, Any]) -> Card:
    repaired = f" {about['repairer']} repaired the texts without seeing the images." if about["repairer"] else ""
    return Card(
        title="Descriptions of images",
        summary=(
            f"{about['describer']} described each image in detail, and went on where it had said little.{repaired} "
            "Rules left out refusals, repeats, unfinished and broken texts. Rows with `checked` were looked at by a "
            "person beside their image and kept; the others were not."
        ),
        settings=about,
        shares=("continued", "repaired", "checked"),
        not_checked=(
            "Whether a description is true of its image, but for the rows that a person checked.",
            "In which language a text is: the rules are made for English.",
        ),
    )
