"""`sq-llava generate-data self`: a model asks and answers questions about plain images. Filters decide what is kept.

    sq-llava generate-data self photos --model runs/demo/model -n 8 --out runs/self

The model asks n questions about each image and answers each of them twice: with the image, and with a blank one. The
answers are scored (`scoring.py`) and the turns filtered (`filters.py`); a judge can check the rest (`judging.py`). The
kept turns of an image become one conversation, with the scores of each turn. Besides the usual files of made data:

    OUT/asked-*.jsonl, scored-*.jsonl, clip-*.jsonl    what the models gave for each image

A killed run resumes from these files and the judge's answers; there is no other state. With other filters, the same
command makes a new set without running the model. With `--shard i/n`, each shard is filtered as a set of its own.

No step can know whether an answer is right.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from accelerate import PartialState

from sq_llava.checkpoints.provenance import public_name
from sq_llava.evaluation.questions import ClipScorer, Picture, ask_about, read_pictures
from sq_llava.evaluation.results import hash_of_model
from sq_llava.generation.filters import Outcome, Turn, balance, filter_turns
from sq_llava.generation.judging import Exhibit, first_requests, judge_turns, read_prompt
from sq_llava.generation.rows import Card, Rejected, made_files, make_row, require_utf8, write_output
from sq_llava.generation.scoring import score_answers, score_each, score_with_clip
from sq_llava.generation.settings import SelfGeneration
from sq_llava.inference.assistant import load
from sq_llava.inference.processes import join_processes
from sq_llava.llm_client.asking import Asked
from sq_llava.llm_client.budget import spent_in
from sq_llava.llm_client.client import BYTES_PER_TOKEN, ChatClient, Estimate
from sq_llava.output import command_line, output_lock
from sq_llava.resumable.resume import read_lines
from sq_llava.resumable.run_note import RunNote
from sq_llava.stopping import INTERRUPTED


JUDGED = "answers.jsonl"  # of the judge
# A run resumes from the lines in its folder only if these are equal.
IDENTITY = ("model_hash", "ask", "dtype", "num_shards")
# Length of the hash of an image's content. The hash is in the image's id and is added to the seed.
DIGEST_LETTERS = 12
NOT_CHECKED = (
    "Whether the answers are right. They are the model's own, and a confident mistake passes the filters.",
    "Whether the questions are about what matters in an image.",
)


@dataclass(frozen=True)
class Made:
    """
    Counts of a run. `left_out` counts turns by filter and rule. `num_open` counts the images or turns that were not
    reached before the run stopped. `spent` is what the judge used in all shards.
    """

    num_images: int
    num_turns: int
    num_rows: int
    num_kept: int
    left_out: dict[str, int]
    num_failed: int
    num_open: int = 0
    stopped: str | None = None
    spent: str = ""


def generate(run: SelfGeneration) -> Made | None:
    """
    Asks, scores, filters and judges, then writes `run.out`.

    Args:
        run (`SelfGeneration`): Settings of the run.

    Returns:
        The counts of the run. On several processes (torchrun), all but the first return `None`.

    Raises:
        ValueError: Before a model is loaded, if there are no images, if an image is inside a table or outside the
            image root, if the folder holds another run, or if another process makes the same shard.
    """
    state, device = join_processes(run.device)
    with output_lock(run.out, run.shard.lock, needed=state.is_main_process):
        return _generate(run, state, device)


def _generate(run: SelfGeneration, state: PartialState, device: str) -> Made | None:
    pictures = read_images(run)
    client = None if run.judge is None else ChatClient(run.judge, run.out / run.shard.name(JUDGED))
    note = RunNote(run.out, describe(run), IDENTITY)
    stopped = None
    try:
        ask_and_score(run, pictures, device, note)
    except KeyboardInterrupt:
        if state.num_processes > 1:
            raise
        stopped = INTERRUPTED
    lines, failures, num_open = read_work(run, pictures)
    if not state.is_main_process:
        return None
    if lines:
        note.write()
    outcomes = filter_turns(as_turns(run, lines), run.filters)
    about, spent = note.about, ""
    if client is not None:
        client.reads_only = stopped is not None
        outcomes, asked = judge(run, client, outcomes)
        failures |= asked.failures
        num_open, stopped = num_open + asked.num_open, stopped or asked.stopped
        spent = str(spent_in(made_files(run.out, JUDGED, run.shard), run.judge))
        about = about | {"used by the judge": spent}
    made = write(run, pictures, outcomes, failures, about)
    return replace(made, num_open=num_open, stopped=stopped, spent=spent)


def read_images(run: SelfGeneration) -> list[Picture]:
    """
    The images of this shard. The id of an image is its path in the image root and a hash of its content. So a run is
    refused if an image has changed since its questions were made, but not if an image that failed was repaired. The
    questions about an image depend only on its content, not on order or shard.

    Raises:
        ValueError: If there are no images, or an image is inside a table or outside the image root.
    """
    root = root_of(run)
    pictures = []
    for picture in run.shard.take(read_pictures(run.images, run.image_root)[: run.limit]):
        if isinstance(picture.image, dict):
            raise ValueError(f"{run.images}, {picture.id}: the image is stored in the dataset. Save it as a file.")
        path = Path(picture.image)
        if isinstance(picture.image, Path):  # it comes from a folder; a dataset's row has a path in the resolved root
            path = Path(run.images).resolve() / path.name
        require_utf8(path)
        if not path.is_relative_to(root) or not path.resolve().is_relative_to(root):
            raise ValueError(f"{run.images}: {path} leads out of the image root {root}. Copy the image into it.")
        content = path.read_bytes() if path.is_file() else b""  # a missing file is recorded as failed later
        digest = hashlib.sha256(content).hexdigest()[:DIGEST_LETTERS]
        id = f"{path.relative_to(root).as_posix()}@{digest}"
        pictures.append(replace(picture, id=id, image=path, number=int(digest, 16)))
    return pictures


def root_of(run: SelfGeneration) -> Path:
    place = Path(run.images)
    return Path(run.image_root or (place if place.is_dir() else place.parent)).resolve()


def path_of(picture_id: str) -> str:
    """The image's path in the image root."""
    return picture_id.rpartition("@")[0]


def describe(run: SelfGeneration) -> dict[str, Any]:
    """Everything that is needed to repeat the run."""
    return {
        "kind": "self",
        "num_shards": run.shard.count,
        "model": public_name(run.model),
        "model_hash": hash_of_model(run.model),
        "ask": asdict(run.ask),
        "dtype": run.dtype,
        "filters": asdict(run.filters),
        "clip": run.clip and public_name(run.clip),
        "judge": run.judge and run.judge.model,
        "prompts_hash": run.judge and hashlib.sha256(read_prompt(run.prompts).encode()).hexdigest(),
        "command": command_line(),
    }


@cache
def clip_stem(run: SelfGeneration) -> str:
    """The prefix of the file names of this CLIP model's scores. Other weights give another prefix."""
    return f"clip-{hash_of_model(run.clip)[:DIGEST_LETTERS]}"


def ask_and_score(run: SelfGeneration, pictures: Sequence[Picture], device: str, note: RunNote) -> None:
    """Adds the missing lines to the folder. A model is loaded only if some of its lines are missing."""
    ids = [picture.id for picture in pictures]
    asked, scored = (read_lines(run.progress, stem, ids) for stem in ("asked", "scored"))
    if len(asked) < len(ids) or len(scored) < len(ids):
        assistant = load(run.model, device=device, dtype=run.dtype)
        lines = ask_about(assistant, pictures, run.progress, run.ask, run.batch_size, note)
        asked = {line["id"]: line for line in lines}
        lines = [asked[id] for id in ids]
        score_each(run.progress, "scored", pictures, lines, partial(score_answers, assistant))
    if run.clip is not None and len(read_lines(run.progress, clip_stem(run), ids)) < len(ids):
        scorer = ClipScorer(run.clip, device)
        lines = [asked[id] for id in ids]
        score_each(run.progress, clip_stem(run), pictures, lines, partial(score_with_clip, scorer))


def read_work(
    run: SelfGeneration, pictures: Sequence[Picture]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str], int]:
    """
    Reads the lines of all models.

    Returns:
        Image id -> its lines (asked, scored, CLIP); path -> error for images that failed; the number of other images.
    """
    ids = [picture.id for picture in pictures]
    stems = ["asked", "scored", *([] if run.clip is None else [clip_stem(run)])]
    found = [read_lines(run.progress, stem, ids, with_failed=True) for stem in stems]
    lines, failures = {}, {}
    for id in ids:
        of_image = [each[id] for each in found if id in each]
        error = next((line["error"] for line in of_image if line["error"] is not None), None)
        if error is not None:
            failures[path_of(id)] = error
        elif len(of_image) == len(stems):
            lines[id] = of_image
    return lines, failures, len(ids) - len(lines) - len(failures)


def as_turns(run: SelfGeneration, lines: dict[str, list[dict[str, Any]]]) -> list[Turn]:
    turns = []
    for id, (asked, scored, *clip) in lines.items():
        for number, (question, answer) in enumerate(zip(asked["questions"], asked["answers"], strict=True)):
            turns.append(
                Turn(
                    picture=path_of(id),
                    number=number,
                    question=question,
                    answer=answer,
                    blank_answer=asked["blank_answers"][number],
                    log_probability=scored["log_probability"][number],
                    blank_log_probability=scored["blank_log_probability"][number],
                    # If the limit cuts the answer off, the end of the turn is one token more than was generated.
                    is_cut=scored["num_tokens"][number] > run.ask.max_new_tokens,
                    clip_score=clip[0]["clip_score"][number] if clip else None,
                )
            )
    return turns


def turn_id(turn: Turn) -> str:
    return f"{turn.picture}#{turn.number}"


def exhibits_of(run: SelfGeneration, outcomes: Sequence[Outcome]) -> dict[str, Exhibit]:
    root = root_of(run)
    turns = [outcome.turn for outcome in outcomes if outcome.is_kept]
    return {turn_id(turn): Exhibit(root / turn.picture, turn.question, turn.answer) for turn in turns}


def judge(run: SelfGeneration, client: ChatClient, outcomes: Sequence[Outcome]) -> tuple[list[Outcome], Asked]:
    """
    The outcomes after the judge, balanced again: it may reject one answer more often than the other. Turns that it did
    not reach are missing.
    """
    asked = judge_turns(client, read_prompt(run.prompts), exhibits_of(run, outcomes))
    judged = []
    for outcome in outcomes:
        if not outcome.is_kept:
            judged.append(outcome)
        elif turn_id(outcome.turn) in asked.results:
            accepted = asked.results[turn_id(outcome.turn)]
            reason = "not readable" if accepted is None else "rejected"
            judged.append(outcome if accepted else replace(outcome, step="judge", reason=reason))
    return balance(judged, run.filters), asked


def write(
    run: SelfGeneration,
    pictures: Sequence[Picture],
    outcomes: Sequence[Outcome],
    failures: dict[str, str],
    about: dict[str, Any],
) -> Made:
    """Writes the rows, the rejected turns, the failures and the card."""
    of_picture: dict[str, list[Outcome]] = {}
    rejected = []
    for outcome in outcomes:
        if outcome.is_kept:
            of_picture.setdefault(outcome.turn.picture, []).append(outcome)
        else:
            text = f"{outcome.turn.question}\n{outcome.turn.answer}"
            rejected.append(Rejected(turn_id(outcome.turn), outcome.step, outcome.reason, text, outcome.scores))
    write_output(run.out, run.shard, map(as_row, of_picture.values()), rejected, failures, as_card(about))
    return Made(
        num_images=len(pictures),
        num_turns=len(outcomes),
        num_rows=len(of_picture),
        num_kept=len(outcomes) - len(rejected),
        left_out=dict(Counter(f"{each.step}: {each.reason}" for each in rejected)),
        num_failed=len(failures),
    )


def as_row(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The conversation about one image."""
    picture = outcomes[0].turn.picture
    turns = [(outcome.turn.question, outcome.turn.answer) for outcome in outcomes]
    scores = [outcome.scores for outcome in outcomes]
    return make_row(picture, [picture], turns, kind="self", types=[each["type"] for each in scores], scores=scores)


def as_card(about: dict[str, Any]) -> Card:
    summary = (
        f"Questions and answers about plain images. {about['model']} asked and answered them. The turns that passed "
        "the filters below are here, with the scores of each turn."
    )
    settings = {name: value for name, value in about.items() if name not in ("kind", "filters", "ask")}
    settings |= {f"ask, {name}": value for name, value in about["ask"].items()}
    settings |= {f"filter, {name}": value for name, value in about["filters"].items()}
    return Card("Questions that a model asked and answered itself", summary, settings, ["types"], NOT_CHECKED)


def estimate(run: SelfGeneration) -> tuple[int, int, Estimate | None]:
    """
    Counts the images, and estimates the cost of a judge.

    Returns:
        The number of images, the number of images to ask about, and an estimate for the judge. The estimate covers the
        turns that pass the filters; for images without lines, every turn that can be asked.
    """
    pictures = read_images(run)
    lines = read_work(run, pictures)[0] if run.progress.is_dir() else {}
    if run.judge is None:
        return len(pictures), len(pictures) - len(lines), None
    client = ChatClient(run.judge, run.out / run.shard.name(JUDGED), reads_only=True)
    prompt = read_prompt(run.prompts)
    known = exhibits_of(run, filter_turns(as_turns(run, lines), run.filters))
    requests = [
        request for request in first_requests(client, prompt, known) if client.journal.get(request.key) is None
    ]
    left = [picture for picture in pictures if picture.id not in lines]
    if left:  # the questions are unknown, but their maximum length is known
        longest = "x" * BYTES_PER_TOKEN * run.ask.max_new_tokens
        [request] = first_requests(client, prompt, {"": Exhibit(left[0].image, longest, longest)})
        requests += [request] * (len(left) * run.ask.num_questions)
    return len(pictures), len(left), client.estimate(requests)
