"""Captions and boxes -> conversations, descriptions and reasoning, written by a text-only language model.

    export OPENAI_API_KEY=...
    sq-llava generate-data llava captions_train2017.json --instances instances_train2017.json \
        --model gpt-4o --max-cost 20 --input-price 2.5 --output-price 10 --out runs/coco

This is how LLaVA's data was made (section 3 of https://arxiv.org/abs/2304.08485). Instead of an image, the model reads
its captions and boxes. Each kind of row has a system message and a few examples, followed by the current image. The
prompts are this project's own; `sq_llava/generation/prompts/llava` can be copied and edited. The seed and the image
decide the kind of row, by default in LLaVA's shares, 58 : 23 : 77.

No image is opened. Errors in the captions remain in the data.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sq_llava.generation.bad_rows import BadRows
from sq_llava.generation.prompt_files import read_prompt_file
from sq_llava.generation.rows import Card, Rejected, made_files, make_row, write_output
from sq_llava.generation.scenes import Box, Scene, read_scenes
from sq_llava.generation.settings import PROMPTS, LlavaSettings
from sq_llava.generation.turns import Turn, fault_of, parse_turns, without_rulers
from sq_llava.json_text import parse_json
from sq_llava.llm_client.asking import Asked, ask_all
from sq_llava.llm_client.budget import spent_in
from sq_llava.llm_client.client import ChatClient, Estimate, Messages
from sq_llava.llm_client.settings import SAMPLING
from sq_llava.output import output_lock
from sq_llava.resumable.run_note import RunNote, hash_of_file


KINDS = ("conversation", "detail", "reasoning")
# A run resumes from the answers in its folder only if these are equal.
IDENTITY = (
    *("kind", "captions_hash", "instances_hash", "prompts_hash", "model", *SAMPLING),
    *("shares", "kinds_per_image", "seed", "num_shards"),
)
JOURNAL = "answers.jsonl"


@dataclass(frozen=True)
class Task:
    """A row to be made: its image, its kind, and the request if it is a detailed description."""

    id: str
    scene: Scene
    kind: str
    question: str | None


@dataclass(frozen=True)
class Prompts:
    """
    Args:
        systems (`dict`): The system message of each kind.
        examples (`dict`): The messages of the worked examples of each kind.
        questions (`tuple[str, ...]`): Requests for a detailed description.
        sha256 (`str`): Hash of all files of prompts.
    """

    systems: Mapping[str, str]
    examples: Mapping[str, Messages]
    questions: tuple[str, ...]
    sha256: str


def read_prompts(folder: Path = PROMPTS / "llava") -> Prompts:
    """
    Reads `<kind>.md`, `detail_questions.txt` and `examples.json` of a folder.

    Raises:
        ValueError: If a file is missing, empty or malformed. The message names the file.
    """
    names = (*(f"{kind}.md" for kind in KINDS), "detail_questions.txt", "examples.json")
    contents = {name: read_prompt_file(folder / name, "llava") for name in names}
    questions = tuple(filter(None, map(str.strip, contents["detail_questions.txt"].splitlines())))
    return Prompts(
        {kind: contents[f"{kind}.md"].strip() for kind in KINDS},
        _read_examples(contents["examples.json"], folder / "examples.json", questions),
        questions,
        hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest(),
    )


def _read_examples(content: str, path: Path, questions: tuple[str, ...]) -> dict[str, Messages]:
    examples = {kind: [] for kind in KINDS}
    try:
        for number, each in enumerate(parse_json(content)):
            boxes = tuple(Box(box["label"], tuple(box["box"])) for box in each.get("boxes") or [])
            scene = Scene("", "", tuple(each["captions"]), boxes)
            for kind in KINDS:
                question = questions[number % len(questions)] if kind == "detail" else None
                said = each[kind] if kind == "detail" else _write_turns(each[kind])
                examples[kind] += [
                    {"role": "user", "content": describe(scene, question)},
                    {"role": "assistant", "content": said},
                ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: {error!r}. Expected a list of objects with captions (texts), boxes (label and box), "
            "conversation and reasoning (lists of [question, answer]), and detail (a text)."
        ) from error
    return examples


def _write_turns(turns: Iterable[Turn]) -> str:
    return "\n\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in turns)


def describe(scene: Scene, question: str | None = None) -> str:
    """The text that the model reads instead of an image."""
    lines = ["Sentences:", *(f"- {caption}" for caption in scene.captions)]
    if scene.boxes:
        lines += ["", "Objects:"]
        lines += [f"- {box.label}: [{', '.join(f'{edge:.3f}' for edge in box.corners)}]" for box in scene.boxes]
    if question is not None:
        lines += ["", f"Request: {question}"]
    return "\n".join(lines)


def parse_shares(text: str) -> dict[str, float]:
    """
    Reads shares such as `conversation=58,detail=23,reasoning=77`. A kind without a share is not made.

    Raises:
        ValueError: If the text has another form.
    """
    shares = dict.fromkeys(KINDS, 0.0)
    for part in text.split(","):
        kind, _, share = part.strip().partition("=")
        try:
            shares[kind], is_known = float(share), kind in KINDS
        except ValueError:
            is_known = False
        if not is_known or not 0 <= shares[kind] < float("inf"):
            raise ValueError(f"--shares {text}: expected, for example, conversation=58,detail=23,reasoning=77.")
    if not any(shares.values()):
        raise ValueError(f"--shares {text}: at least one share must be above 0.")
    return shares


def draw_tasks(
    scenes: Iterable[Scene], shares: Mapping[str, float], kinds_per_image: int, prompts: Prompts, seed: int
) -> Iterator[Task]:
    """The rows to be made: `kinds_per_image` different kinds per image. The draw depends only on seed and image."""
    for scene in scenes:
        # Weighted sampling without replacement: the largest values of u ** (1 / share) are drawn.
        # Efraimidis and Spirakis, https://doi.org/10.1016/j.ipl.2005.11.003.
        drawn = {kind: uniform(seed, scene.id, kind) ** (1 / share) for kind, share in shares.items() if share}
        for kind in sorted(drawn, key=drawn.get, reverse=True)[:kinds_per_image]:
            place = int(uniform(seed, scene.id, "question") * len(prompts.questions))
            question = prompts.questions[place] if kind == "detail" else None
            yield Task(f"{scene.id}-{kind}", scene, kind, question)


def uniform(seed: int, *names: str) -> float:
    """A number from 0 to 1 that depends only on the arguments."""
    digest = hashlib.sha256(json.dumps([seed, *names]).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def messages_of(task: Task, prompts: Prompts) -> Messages:
    return [
        {"role": "system", "content": prompts.systems[task.kind]},
        *prompts.examples[task.kind],
        {"role": "user", "content": describe(task.scene, task.question)},
    ]


def read_answer(task: Task, text: str, seed: int = 0) -> tuple[dict[str, Any] | None, list[Rejected]]:
    """
    Makes a row from the model's text. The image comes before or after the first question, as in LLaVA's data; seed and
    row decide.

    Returns:
        The row (`None` if no part of the text is usable), and the parts that were left out. A conversation ends before
        the first turn that breaks a rule, because later turns may refer to that turn.
    """
    if task.kind == "detail":
        turns = [(task.question, without_rulers(text))]
    else:
        try:
            turns = parse_turns(text)
        except ValueError as error:
            return None, [Rejected(task.id, task.kind, str(error), text)]
        if task.kind == "reasoning" and len(turns) > 1:
            return None, [Rejected(task.id, task.kind, "several questions", text)]
    kept: list[Turn] = []
    rejected: list[Rejected] = []
    for place, turn in enumerate(turns):
        reason = fault_of(turn, task.kind, kept)
        if reason is not None:
            reasons = [reason, *["after a dropped turn"] * (len(turns) - place - 1)]
            rejected = [
                Rejected(task.id, task.kind, why, _write_turns([each])) for why, each in zip(reasons, turns[place:])
            ]
            break
        kept.append(turn)
    image_last = uniform(seed, task.id, "place of the image") < 0.5
    return make_row(task.id, [task.scene.image], kept, image_last, kind=task.kind) if kept else None, rejected


def read_tasks(settings: LlavaSettings, prompts: Prompts) -> tuple[dict[str, Task], BadRows]:
    """
    The rows to be made, by their ids, and the parts of the input that cannot be used.

    Raises:
        ValueError: If the shares are wrong, or the captions and boxes cannot be read, or too many are bad.
    """
    shares, bad = parse_shares(settings.shares), BadRows(settings.max_bad_share)
    scenes = settings.shard.take(read_scenes(settings.captions, settings.instances, bad)[: settings.limit])
    tasks = draw_tasks(scenes, shares, settings.kinds_per_image, prompts, settings.seed)
    return {task.id: task for task in tasks}, bad


def estimate(settings: LlavaSettings) -> tuple[Estimate, BadRows]:
    """Estimates the cost of the missing rows. No request is sent, and no file is written."""
    prompts = read_prompts(settings.prompts)
    client = ChatClient(settings.chat, settings.out / settings.shard.name(JOURNAL), reads_only=True)
    tasks, bad = read_tasks(settings, prompts)
    requests = (client.request(messages_of(task, prompts)) for task in tasks.values())
    return client.estimate(request for request in requests if client.journal.get(request.key) is None), bad


@dataclass(frozen=True)
class Made:
    """
    The outcome of a run.

    Args:
        num_rows (`int`): Number of rows made from all answers so far.
        reasons (`Mapping[str, int]`): Why texts were left out, and how many.
        spent (`str`): What the requests of all shards used.
        bad ([`BadRows`]): What in the input cannot be used.
    """

    asked: Asked
    num_rows: int
    reasons: Mapping[str, int]
    spent: str
    bad: BadRows


def generate(settings: LlavaSettings, command: str) -> Made:
    """
    Asks for each row, then writes the output folder, also if the run stops early.

    Args:
        settings (`LlavaSettings`): Input, server, prompts and output folder.
        command (`str`): The command, for the data card.

    Raises:
        ValueError: Before anything is asked, if the input is wrong, the folder holds another run, or a run is active.
    """
    with output_lock(settings.out, settings.shard.lock):
        return _generate(settings, command)


def _generate(settings: LlavaSettings, command: str) -> Made:
    prompts = read_prompts(settings.prompts)
    tasks, bad = read_tasks(settings, prompts)
    client = ChatClient(settings.chat, settings.out / settings.shard.name(JOURNAL))
    note = RunNote(settings.out, describe_run(settings, prompts, command), IDENTITY)
    client.before_answer = note.write
    bad.write(settings.out)
    asked = ask_all(client, tasks, lambda task: write_row(client, task, prompts, settings.seed), "Asking")
    if asked.results:
        note.write()
    rows = [row for row, _ in asked.results.values() if row is not None]
    rejected = [each for _, left_out in asked.results.values() for each in left_out]
    rejected += [Rejected(id, "server", *reply) for id, reply in asked.unusable.items()]
    answered_by = ", ".join(client.report()["answered_by"])
    spent = str(spent_in(made_files(settings.out, JOURNAL, settings.shard), settings.chat))
    card = _card(note.about | {"answered by": answered_by, "used": spent}, bad)
    write_output(settings.out, settings.shard, rows, rejected, asked.failures, card)
    reasons = Counter(f"{each.step}: {each.reason}" for each in rejected)
    return Made(asked, len(rows), dict(reasons.most_common()), spent, bad)


def write_row(
    client: ChatClient, task: Task, prompts: Prompts, seed: int
) -> tuple[dict[str, Any] | None, list[Rejected]]:
    """What [`read_answer`] makes of the first answer that gives a row, or of the last answer if none does."""
    for text in client.answers(messages_of(task, prompts)):
        row, rejected = read_answer(task, text, seed)
        if row is not None:
            break
    return row, rejected


def describe_run(settings: LlavaSettings, prompts: Prompts, command: str) -> dict[str, Any]:
    """Everything that is needed to make the set again."""
    return {
        "kind": "llava",
        "command": command,
        "captions": settings.captions.name,
        "captions_hash": hash_of_file(settings.captions),
        "instances_hash": hash_of_file(settings.instances) if settings.instances is not None else None,
        "prompts_hash": prompts.sha256,
        "model": settings.chat.model,
        **{name: getattr(settings.chat, name) for name in SAMPLING},
        "shares": settings.shares,
        "kinds_per_image": settings.kinds_per_image,
        "limit": settings.limit,
        "seed": settings.seed,
        "num_shards": settings.shard.count,
    }


def _card(about: Mapping[str, Any], bad: BadRows) -> Card:
    return Card(
        title="Instructions from captions and boxes",
        summary=(
            "Conversations, detailed descriptions and reasoning about images. The language model that wrote them read "
            "captions and boxes instead of the images, as for LLaVA (https://arxiv.org/abs/2304.08485). "
            f"{bad} could not be used."
        ),
        settings=about,
        shares=("kind",),
        not_checked=(
            "Whether a text is true of its image: neither a person nor a model looked at the images.",
            "Whether the captions and boxes are right.",
            "Whether a text offends or stereotypes.",
            "The language of the texts. Refusals, doubts and mentions of the sources are recognised in English only.",
        ),
    )
