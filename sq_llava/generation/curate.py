"""Plain images -> detailed descriptions, checked by rules and a person: MiniGPT-4's second-stage set.

    sq-llava generate-data curate photos --describer runs/demo/model --out described
    sq-llava generate-data curate photos --model gpt-4o --repair-model gpt-4o-mini --out described

Open described/review.html, decide, save decisions.json, then run the same command again with the decisions:

    sq-llava generate-data curate photos ... --out described --decisions decisions.json

The steps are those of MiniGPT-4 (section 3.2 of https://arxiv.org/abs/2304.10592):

1. A vision-language model describes each image. If a description has 80 tokens or fewer, the model is told once to
   continue, and the two texts are joined.
2. A language model repairs each text without seeing the image: repetitions, stray characters, an unfinished end.
3. Rules leave out texts that are still faulty (`text_rules.py`).
4. A person checks the rest.

The instruction in a row is drawn from a list; it is not the prompt that the describer was given. The answers of a
local describer are kept in OUT/descriptions.jsonl, of a server in OUT/answers.jsonl, and of the repairer in
OUT/repairs.jsonl. Each run makes all other files from these.

A local model runs on one GPU. To use several GPUs, start a run with its own `--shard` on each.
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
from sq_llava.early_checks import IMAGE_SUFFIXES, is_image_file
from sq_llava.generation.describing import Description, LocalDescriber, Prompts, Repairer, ServerDescriber
from sq_llava.generation.prompt_files import draw
from sq_llava.generation.review_sheet import Decision, Entry, check_decisions, read_decisions, write_sheet
from sq_llava.generation.rows import Card, Rejected, made_files, make_row, require_utf8, write_output
from sq_llava.generation.settings import CurateSettings
from sq_llava.generation.text_rules import count_words, first_fault, share_of_new_words, words_of
from sq_llava.llm_client.asking import Asked, ask_all
from sq_llava.llm_client.budget import spent_in
from sq_llava.llm_client.client import ChatRequest, Estimate
from sq_llava.llm_client.settings import SAMPLING
from sq_llava.output import output_lock
from sq_llava.resumable.run_note import RunNote


# The answers of the models on servers.
ANSWERS, REPAIRS = "answers.jsonl", "repairs.jsonl"
# The repairer is not in here: its answers are kept by request, and the descriptions do not depend on it.
IDENTITY = ("kind", "describer", "describer_hash", "prompts_hash", "num_shards", *SAMPLING)
# The repairer does not see the image. It may remove and correct words, but hardly add any.
MAX_NEW_WORDS = 0.3
REWRITTEN = "the repairer rewrote the text"
# A remark such as "Here is the repaired text:" shows in the first words.
NUM_FIRST_WORDS, MAX_NEW_FIRST_WORDS = 4, 1
REMARK = "the repairer added a remark before the text"
REPAIR = "repair"  # step of a refused repair in rejected.jsonl
DROPPED = "a person dropped the text"
# A long text that occurs twice comes from a describer that does not look. A short one can be true of several images.
SAID_BEFORE = "an earlier image of the shard has the same text"
MIN_WORDS_OF_ITS_OWN = 30

Describer = LocalDescriber | ServerDescriber


@dataclass(frozen=True)
class Curated:
    """
    Counts of a run. The repair of `num_refused` descriptions was refused. `num_open` images were not reached before
    the run stopped. `spent` is for all shards.
    """

    num_images: int
    num_continued: int
    num_kept: int
    num_checked: int
    num_refused: int
    reasons: dict[str, int]
    num_failed: int
    num_open: int = 0
    stopped: str | None = None
    spent: str = ""


def curate(settings: CurateSettings, describer: Describer, repairer: Repairer | None, command: str) -> Curated:
    """
    Describes, continues and repairs, applies the rules and the decisions, and writes `settings.out`.

    Args:
        settings (`CurateSettings`): Images, output folder and decisions.
        describer (`LocalDescriber` or `ServerDescriber`): Describes the images.
        repairer (`Repairer`, *optional*): Repairs the texts. Without it they stay as they are.
        command (`str`): The command, for the data card.

    Raises:
        ValueError: Before a model is asked, if the input is wrong, the folder holds another run, or another process
            makes the same shard. After that, if a decision is about a text that is not in the folder.
    """
    with output_lock(settings.out, settings.shard.lock):
        return _curate(settings, describer, repairer, command)


def _curate(settings: CurateSettings, describer: Describer, repairer: Repairer | None, command: str) -> Curated:
    decisions = read_decisions(settings.decisions) if settings.decisions else {}
    about = describe_run(settings, describer, repairer, command)
    note = RunNote(settings.out, about, IDENTITY)
    images, failures = openable(find_images(settings))
    described = describer.describe_all(images, note)
    if described.results:
        note.write()
    texts = repair_all(repairer, described)
    ruled = apply_rules(described.results, texts)
    passed = ruled.passed
    check_decisions(decisions, passed, settings.decisions)
    decided = {id: decision for (id, _), decision in decisions.items()}
    entries = (Entry(id, open_image(images[id]), text, decided.get(id)) for id, text in passed.items())
    write_sheet(settings.out / settings.shard.name("review.html"), entries, f"{len(passed):,} descriptions to check")
    dropped = [id for id, decision in decided.items() if decision.drops]
    rejected = [
        *ruled.rejected,
        *(Rejected(id, "server", *reply) for id, reply in described.unusable.items()),
        *(Rejected(id, "person", DROPPED, passed[id]) for id in dropped),
    ]
    rows = make_rows(settings, describer.prompts, described.results, ruled, decided)
    failures |= described.failures | texts.failures
    spent = used_by(settings, describer, repairer)
    write_output(settings.out, settings.shard, rows, rejected, failures, card_of(about | spent))
    return Curated(
        num_images=len(images),
        num_continued=sum(said.more is not None for said in described.results.values()),
        num_kept=len(rows),
        num_checked=sum(row["checked"] for row in rows),
        num_refused=len(ruled.refused),
        reasons=dict(Counter(each.reason for each in rejected if each.step != REPAIR).most_common()),
        num_failed=len(failures),
        num_open=described.num_open + texts.num_open,
        stopped=described.stopped or texts.stopped,
        spent=", ".join(f"{name}: {what}" for name, what in spent.items()),
    )


def used_by(settings: CurateSettings, describer: Describer, repairer: Repairer | None) -> dict[str, str]:
    """What the models on servers used, for all shards that are there."""
    used = {}
    if isinstance(describer, ServerDescriber):
        used["used to describe"] = ANSWERS, describer.client.settings
    if repairer is not None:
        used["used to repair"] = REPAIRS, repairer.client.settings
    return {
        name: str(spent_in(made_files(settings.out, journal, settings.shard), chat))
        for name, (journal, chat) in used.items()
    }


@dataclass(frozen=True)
class Ruled:
    """
    Attributes:
        passed (`dict`): The texts that pass, by image id.
        rejected (`list[Rejected]`): Descriptions that are left out, and refused repairs.
        refused (`set[str]`): Images whose description stays as it was, because its repair was refused.
    """

    passed: dict[str, str]
    rejected: list[Rejected]
    refused: set[str]


def make_rows(
    settings: CurateSettings,
    prompts: Prompts,
    described: Mapping[str, Description],
    ruled: Ruled,
    decided: Mapping[str, Decision],
) -> list[dict[str, Any]]:
    """A row for each text that was not dropped by a person, in the words of the person if it was edited."""
    rows = []
    for id, text in ruled.passed.items():
        decision = decided.get(id)
        if decision is not None and decision.drops:
            continue
        edited = decision.text if decision is not None else None
        rows.append(
            make_row(
                id,
                [id],
                [(draw(prompts.instructions, settings.seed, id), edited or text)],
                kind="description",
                continued=described[id].more is not None,
                repaired=text != described[id].text,
                repair_refused=id in ruled.refused,
                checked=decision is not None,
                edited=edited is not None,
            )
        )
    return rows


def find_images(settings: CurateSettings) -> dict[str, Path]:
    """
    The images of this shard. The id of an image is its path in the folder.

    Raises:
        ValueError: If the folder holds no images, or a file name is not UTF-8, or a link leads out of the folder.
    """
    root = settings.images
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder of images.")
    files = sorted(filter(is_image_file, root.rglob("*")))
    if not files:
        raise ValueError(f"{root}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    for file in files:
        require_utf8(file)
        if not file.resolve().is_relative_to(root.resolve()):
            raise ValueError(
                f"{file}: this link leads out of {root}, which training refuses. Copy the image into the folder."
            )
    return {file.relative_to(root).as_posix(): file for file in settings.shard.take(files[: settings.limit])}


def openable(images: Mapping[str, Path]) -> tuple[dict[str, Path], dict[str, str]]:
    """The images that can be opened, and the errors of the others."""
    whole, failures = {}, {}
    for id, path in track(images.items(), "Opening images", console=messages_console, transient=True):
        try:
            open_image(path)
            whole[id] = path
        except ValueError as error:
            failures[id] = str(error)
    return whole, failures


def repair_all(repairer: Repairer | None, described: Asked) -> Asked:
    """Repairs the descriptions. If the describer was stopped, uses only the repairs of earlier runs."""
    texts = {id: said.text for id, said in described.results.items()}
    if repairer is None:
        return Asked(texts, {}, 0)
    if described.stopped is not None:
        repairer.client.reads_only = True
    return ask_all(repairer.client, texts, repairer.repair, "Repairing")


def apply_rules(described: Mapping[str, Description], repaired: Asked) -> Ruled:
    """
    Divides texts into those that pass and those that are left out. If the server refuses to repair a description, its
    reply cannot be used, or the repairer does not do what it was told, the description stays as it was.

    Args:
        described (`Mapping`): The descriptions by image id.
        repaired ([`Asked`]): The same descriptions after repair, unusable replies, and failures of the server.
    """
    ruled, known = Ruled({}, [], repaired.failures.keys() | repaired.unusable.keys()), set()
    ruled.rejected.extend(Rejected(id, REPAIR, *reply) for id, reply in repaired.unusable.items())
    for id in described:
        if id not in repaired.results and id not in ruled.refused:
            continue  # not asked yet
        original = described[id].text
        text = repaired.results.get(id, original)
        if reason := _fault_of_repair(text, original):
            ruled.rejected.append(Rejected(id, REPAIR, reason, text))
            ruled.refused.add(id)
            text = original
        if reason := first_fault(text):
            ruled.rejected.append(Rejected(id, "rules", reason, text))
        elif text in known and count_words(text) >= MIN_WORDS_OF_ITS_OWN:
            ruled.rejected.append(Rejected(id, "rules", SAID_BEFORE, text))
        else:
            ruled.passed[id] = text
            known.add(text)
    return ruled


def _fault_of_repair(text: str, original: str) -> str | None:
    first_words = " ".join(words_of(text)[:NUM_FIRST_WORDS])
    if share_of_new_words(text, original) > MAX_NEW_WORDS or (original and not text):
        return REWRITTEN
    if NUM_FIRST_WORDS * share_of_new_words(first_words, original) > MAX_NEW_FIRST_WORDS:
        return REMARK
    return None


def estimate(
    settings: CurateSettings, describer: Describer, repairer: Repairer | None
) -> tuple[int, int, dict[str, Estimate]]:
    """
    Counts the missing work. Requests that depend on missing answers are counted at their maximum: every description is
    continued, and each has the maximum length.

    Returns:
        The number of images, how many of them have no description yet, and the requests to each model on a server.
    """
    images, _ = openable(find_images(settings))
    num_left = sum(describer.kept(image) is None for image in images.values())
    estimates = {}
    if isinstance(describer, ServerDescriber):
        requests = (request for image in images.values() for request in describer.requests_left(image))
        estimates[describer.name] = describer.client.estimate(requests)
    if repairer is not None:
        requests = _repairs_left(describer, repairer, images.values())
        estimates[f"{repairer.client.settings.model}, to repair"] = repairer.client.estimate(requests)
    return len(images), num_left, estimates


def _repairs_left(describer: Describer, repairer: Repairer, images: Iterable[Path]) -> Iterator[ChatRequest]:
    for image in images:
        said = describer.kept(image)
        yield from repairer.requests_left("text" * describer.longest if said is None else said.text)


def describe_run(
    settings: CurateSettings, describer: Describer, repairer: Repairer | None, command: str
) -> dict[str, Any]:
    """Everything that is needed to make the set again."""
    prompts = describer.prompts
    texts = [prompts.describe, prompts.go_on]
    chat = describer.client.settings if isinstance(describer, ServerDescriber) else None
    return {
        "kind": "curate",
        "command": command,
        "describer": describer.name if describer.hash is None else public_name(describer.name),
        "describer_hash": describer.hash,
        **{name: chat and getattr(chat, name) for name in SAMPLING},
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
            f"{about['describer']} described each image in detail, and continued short descriptions.{repaired} Rules "
            "left out refusals, repetitions, and unfinished or broken texts. A person compared each row with "
            "`checked` to its image and kept it, and corrected the text of those with `edited`; nobody looked at the "
            "other rows. With `repair_refused`, the description is not repaired, because the repair failed or said "
            "something else."
        ),
        settings=about,
        shares=("continued", "repaired", "repair_refused", "checked", "edited"),
        not_checked=(
            "Whether a description is true of its image, except for the rows that a person checked.",
            "The language of the texts. Refusals are recognised in English only.",
        ),
    )
