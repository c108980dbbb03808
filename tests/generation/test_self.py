"""Self-generated data: scores computed by hand, interrupted runs, shards, filters, a judge, and the command."""

import json
import multiprocessing
import shutil
import signal
import time
import zlib
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from transformers import CLIPProcessor

from sq_llava.data.rows import load_rows
from sq_llava.data.sources import DataSource
from sq_llava.evaluation import questions
from sq_llava.evaluation.questions import AskSettings
from sq_llava.generation import self_generation
from sq_llava.generation.filters import FilterSettings
from sq_llava.generation.judging import Exhibit, judge_turns
from sq_llava.generation.rows import Shard
from sq_llava.generation.scoring import mean_log_probabilities
from sq_llava.generation.self_generation import SelfGeneration, estimate, generate
from sq_llava.inference import assistant, dialogues, prompts
from sq_llava.inference.assistant import Assistant
from sq_llava.llm_client.client import ChatClient, ChatSettings
from tests import tiny
from tests.chat_server import Reply, chat_server
from tests.generation.commands import generate_data, texts_of
from tests.processes import ended, fork, lines_of, sq_llava


pytestmark = pytest.mark.slow


NUM_IMAGES, NUM_QUESTIONS = 5, 3
NO_FILTERS = FilterSettings("off", 0.0, None, None, None, None, None)
STATE = ("asked-0.jsonl", "scored-0.jsonl")


@pytest.fixture(scope="module", autouse=True)
def model_that_asks():
    """A random model does not produce words. This fixture turns its texts into words, different for each text."""
    decode = prompts.decode
    words = tiny.CORPUS[2].split()

    def in_words(*arguments):
        numbers = [zlib.crc32(text.encode()) for text in decode(*arguments)]
        return [f"{words[number % 16]} {words[number // 16 % 16]}?" for number in numbers]

    with pytest.MonkeyPatch.context() as patch:
        for module in (assistant, dialogues):
            patch.setattr(module, "decode", in_words)
        yield


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A model, images, and a dataset about some of them."""
    root = tmp_path_factory.mktemp("parts")
    tiny.save_model(root / "model")
    (root / "images").mkdir()
    for number in range(NUM_IMAGES):
        tiny.picture(number).save(root / "images" / f"{number}.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    rows = [{"id": number, "image": f"images/{number}.png", "conversations": turns} for number in (2, 4, 2)]
    (root / "rows.json").write_text(json.dumps(rows))
    return root


def settings_of(parts: Path, out: Path) -> SelfGeneration:
    ask = AskSettings(NUM_QUESTIONS, "What is it?", max_new_tokens=8)
    model, images = str(parts / "model"), str(parts / "images")
    return SelfGeneration(model, images, out, ask, NO_FILTERS, device="cpu", batch_size=2)


@pytest.fixture
def run(parts, tmp_path) -> SelfGeneration:
    return settings_of(parts, tmp_path / "out")


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory) -> Path:
    """The folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    generate(settings_of(parts, out))
    return out


@pytest.fixture
def counts(monkeypatch) -> dict[str, list[str]]:
    """Records the ids of images in the order in which they are asked about, and scored."""
    seen = {"asked": [], "scored": []}
    ask, score = questions._ask_together, self_generation.score_answers

    def ask_and_count(assistant, batch, settings):
        seen["asked"] += [picture.id for picture in batch]
        return ask(assistant, batch, settings)

    def score_and_count(assistant, picture, asked):
        seen["scored"].append(picture.id)
        return score(assistant, picture, asked)

    monkeypatch.setattr(questions, "_ask_together", ask_and_count)
    monkeypatch.setattr(self_generation, "score_answers", score_and_count)
    return seen


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.name != "run.json"}


def finished(run: SelfGeneration, whole: Path) -> SelfGeneration:
    """A run whose folder already holds all questions, answers and scores."""
    shutil.copytree(whole, run.out)
    return run


def test_rows_are_read_as_a_source_with_a_score_for_each_turn(whole, parts):
    rows = lines_of(whole / "data.jsonl")
    assert [row["id"] for row in rows] == [f"{number}.png" for number in range(NUM_IMAGES)]
    for row in rows:
        assert len(row["messages"]) == 2 * len(row["scores"]) == 2 * len(row["types"]) == 2 * NUM_QUESTIONS
        assert all(each["log_probability"] <= 0 for each in row["scores"])
    read = [load_rows([DataSource(str(whole / name), str(parts / "images"))]) for name in ("data.jsonl", "llava.json")]
    for source in read:
        assert [row["messages"] for row in source] == [row["messages"] for row in rows]
    assert read[0][1]["images"] == [str((parts / "images" / "1.png").resolve())]
    card = (whole / "README.md").read_text()
    assert f"{NUM_IMAGES} rows, {NUM_IMAGES * NUM_QUESTIONS} turns" in card and str(parts) not in card

    for row, asked in zip(rows, lines_of(whole / "asked-0.jsonl"), strict=True):
        assert (texts_of(row)[::2], texts_of(row)[1::2]) == (asked["questions"], asked["answers"])
        assert [each["blank_answer"] for each in row["scores"]] == asked["blank_answers"]


def test_log_probability_is_the_mean_over_the_answers_tokens_and_its_end():
    processor = tiny.tiny_processor()
    assistant = Assistant(tiny.tiny_model_for(processor), processor)
    picture, question, answer = tiny.picture(3), "What animal is this?", "A dog in the grass."
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    tokens = prompts.token_ids(processor, [[{"role": "user", "content": content}]])
    prompt = prompts.model_inputs(assistant.model, processor, tokens, [picture])
    spoken = processor.tokenizer(f" {answer}</s>", add_special_tokens=False, return_tensors="pt")["input_ids"]
    prompt["input_ids"] = torch.cat([prompt["input_ids"], spoken], dim=1)
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    with torch.inference_mode():
        logits = assistant.model(**prompt).logits[0, -spoken.shape[1] - 1 : -1]
    expected = logits.log_softmax(dim=-1).gather(1, spoken.T).mean().item()

    turns = [(picture, question, answer), (tiny.picture(4), question, answer), (picture, "Why?", "no " * 30)]
    [first, other, _], [num_tokens, _, _] = mean_log_probabilities(assistant, turns)
    assert first == pytest.approx(expected, abs=1e-3)
    assert num_tokens == spoken.shape[1]
    assert other != first  # it sees the image
    assert mean_log_probabilities(assistant, turns[1:2])[0][0] == pytest.approx(other, abs=1e-3)


@pytest.mark.parametrize(("place", "num_before"), [("asked", 0), ("asked", 2), ("scored", 0), ("scored", 3)])
def test_interrupted_run_resumes_and_makes_the_same_files(run, whole, counts, monkeypatch, place, num_before):
    module, name = {"asked": (questions, "_ask_together"), "scored": (self_generation, "score_answers")}[place]
    original = getattr(module, name)

    def interrupt(*arguments):
        if len(counts[place]) >= num_before:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupt)
        made = generate(run)
    assert made.stopped is not None and made.num_open == NUM_IMAGES - (num_before if place == "scored" else 0)
    assert len(lines_of(run.out / "data.jsonl")) == NUM_IMAGES - made.num_open
    assert generate(run).stopped is None
    assert files_of(run.out) == files_of(whole)
    assert [len(each) for each in counts.values()] == [NUM_IMAGES, NUM_IMAGES]  # nothing twice


def test_line_that_a_kill_cut_off_is_made_again(run, whole, counts):
    finished(run, whole)
    for name in STATE:
        file = run.out / name
        file.write_bytes(file.read_bytes()[:-9])
    generate(run)
    assert files_of(run.out) == files_of(whole)
    assert [len(each) for each in counts.values()] == [1, 1]


def test_other_filters_make_the_set_again_without_a_model(run, whole, monkeypatch):
    finished(run, whole)
    monkeypatch.setattr(self_generation, "load", None)
    scores = [score["log_probability"] for row in lines_of(whole / "data.jsonl") for score in row["scores"]]
    limit = sorted(scores)[len(scores) // 2]
    made = generate(replace(run, filters=replace(NO_FILTERS, min_log_probability=limit)))
    assert made.num_kept == sum(score >= limit for score in scores) < len(scores)
    assert made.left_out == {"confidence: low log-probability": len(scores) - made.num_kept}
    rejected = lines_of(run.out / "rejected.jsonl")
    assert all(each["log_probability"] < limit and each["step"] == "confidence" for each in rejected)
    assert f"| confidence: low log-probability | {len(rejected)} |" in (run.out / "README.md").read_text()
    assert generate(run).num_kept == len(scores)
    assert files_of(run.out) == files_of(whole)


def test_shards_make_together_what_one_run_makes(run, whole):
    for index in range(2):
        generate(replace(run, shard=Shard(index, 2)))
    of_shards = [row for index in range(2) for row in lines_of(run.out / f"data-0000{index}-of-00002.jsonl")]
    rows = lines_of(whole / "data.jsonl")
    for row in (*of_shards, *rows):
        for scores in row["scores"]:
            del scores["set_overlap"]  # each shard is filtered as a set of its own
    assert sorted(of_shards, key=lambda row: row["id"]) == rows
    assert "path: data-*-of-00002.jsonl" in (run.out / "README.md").read_text()


def test_higher_limit_asks_only_about_the_new_images(run, whole, counts):
    generate(replace(run, limit=2))
    assert len(lines_of(run.out / "data.jsonl")) == len(counts["asked"]) == 2
    generate(run)
    assert len(counts["asked"]) == NUM_IMAGES
    assert (run.out / "data.jsonl").read_bytes() == (whole / "data.jsonl").read_bytes()


def test_dataset_gives_its_images_and_none_of_its_questions(run, parts, whole):
    generate(replace(run, images=str(parts / "rows.json"), image_root=str(parts)))
    rows = lines_of(run.out / "data.jsonl")
    assert [row["images"] for row in rows] == [["images/2.png"], ["images/4.png"]]
    assert "A dog." not in (run.out / "data.jsonl").read_text()
    same = lines_of(whole / "data.jsonl")
    assert [row["messages"] for row in rows] == [
        same[2]["messages"],
        same[4]["messages"],
    ]  # an image has its own draws


@pytest.fixture
def images(parts, tmp_path) -> Path:
    """A copy of the images."""
    return shutil.copytree(parts / "images", tmp_path / "images")


def test_broken_image_is_listed_and_the_others_are_made(run, parts, images):
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:80])
    made = generate(replace(run, images=str(images)))
    assert (made.num_failed, made.num_rows, made.num_open) == (1, NUM_IMAGES - 1, 0)
    [failure] = lines_of(run.out / "failures.jsonl")
    assert failure["id"] == "1.png" and "cannot be read as an image" in failure["error"]
    shutil.copy(parts / "images" / "1.png", images)  # the image is repaired, and the run resumes
    made = generate(replace(run, images=str(images)))
    assert (made.num_failed, made.num_rows) == (0, NUM_IMAGES)


def test_changed_image_is_refused(run, images):
    run = replace(run, images=str(images), limit=1)
    generate(run)
    tiny.picture(9).save(images / "0.png")
    with pytest.raises(
        ValueError, match=r"has a line for '0\.png@\w+', which is not in the input: .* --limit .* another --out"
    ):
        generate(run)


@pytest.mark.parametrize("change", [{"temperature": 0.7}, {"seed": 1}, {"num_questions": 2}, {"after": None}])
def test_other_questions_or_shards_in_the_same_folder_are_refused(run, whole, change):
    finished(run, whole)
    with pytest.raises(ValueError, match=f"contains answers of a run with ask of {next(iter(change))}"):
        generate(replace(run, ask=replace(run.ask, **change)))
    with pytest.raises(ValueError, match="num_shards 1, but this run has 2"):
        generate(replace(run, shard=Shard(0, 2)))


def test_image_outside_of_the_root_is_refused(run, parts, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.png").symlink_to(parts / "images" / "0.png")
    with pytest.raises(ValueError, match=r"a\.png leads out of the image root .*links\. Copy the image into it"):
        generate(replace(run, images=str(tmp_path / "links")))


def test_image_inside_of_a_table_is_refused(run, parts, tmp_path):
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
    image = {"bytes": (parts / "images" / "0.png").read_bytes(), "path": None}
    datasets.Dataset.from_list([{"messages": turns, "images": [image]}]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"row 0: the image is stored in the dataset\. Save it as a file"):
        generate(replace(run, images=str(tmp_path / "rows.parquet")))


def test_clip_scores_are_added_without_asking_again(run, whole, tmp_path, monkeypatch):
    finished(run, whole)
    tiny.save_towers(tmp_path)
    tokenizer = tiny.llama_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    CLIPProcessor(tiny.tiny_image_processor(), tokenizer).save_pretrained(tmp_path / "clip")
    monkeypatch.setattr(self_generation, "load", None)
    clip = str(tmp_path / "clip")
    generate(replace(run, clip=clip))
    rows = lines_of(run.out / "data.jsonl")
    scores = [score["clip_score"] for row in rows for score in row["scores"]]
    scorer = questions.ClipScorer(clip, "cpu")
    expected = []
    for number, row in enumerate(rows):
        texts = texts_of(row)
        pairs = [f"{question} {answer}" for question, answer in zip(texts[::2], texts[1::2], strict=True)]
        expected += (2.5 * scorer.cosines([tiny.picture(number)], pairs).clamp_min(0)).squeeze(1).tolist()
    assert scores == pytest.approx(expected, abs=1e-3)
    limit = max(scores)
    assert limit > 0
    made = generate(replace(run, clip=clip, filters=replace(NO_FILTERS, min_clip_score=limit)))
    assert made.left_out == {"clip: low CLIPScore": sum(score < limit for score in scores)}
    with pytest.raises(ValueError, match="--min-clip-score needs --clip"):
        replace(run, filters=replace(NO_FILTERS, min_clip_score=limit))


@pytest.fixture
def judged(run, whole, monkeypatch) -> SelfGeneration:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    return finished(run, whole)


def by_a_judge(run: SelfGeneration, server, **settings) -> SelfGeneration:
    settings = {
        "concurrency": 2,
        "retries": 0,
        "max_tokens": 64,
        "attempts": 3,
        "option_prefix": "--judge-",
        **settings,
    }
    return replace(run, judge=ChatSettings("judge", server.url, **settings))


def test_judge_sees_image_question_and_answer_and_is_paid_once(judged, whole):
    def reply(request, number):
        text = request["messages"][1]["content"][1]["text"]
        return {first: "Accept: it is right.", second: "reject\nNo.", third: "Hm."}.get(
            text, "<think>reject?</think>\naccept"
        )

    asked = lines_of(whole / "asked-0.jsonl")[0]
    pairs = zip(asked["questions"], asked["answers"], strict=True)
    first, second, third = (f"Question: {question}\nAnswer: {answer}" for question, answer in pairs)
    num_turns = NUM_IMAGES * NUM_QUESTIONS
    with chat_server(reply) as server:
        made = generate(by_a_judge(judged, server))
        files = files_of(judged.out)
        assert len(server.requests) == num_turns + 2  # an unreadable answer is asked for three times
        assert generate(by_a_judge(judged, server)) == made
        assert len(server.requests) == num_turns + 2 and files_of(judged.out) == files
    assert made.left_out == {"judge: rejected": 1, "judge: not readable": 1}
    assert made.spent == f"{num_turns + 2} requests, {110 * (num_turns + 2):,} tokens"
    assert f"- used by the judge: `{made.spent}`".encode() in files["README.md"]
    assert [each["id"] for each in lines_of(judged.out / "rejected.jsonl")] == ["0.png#1", "0.png#2"]
    assert server.requests[0]["messages"][1]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert b"secret" not in b"".join(files.values())


@pytest.mark.parametrize(
    ("text", "verdict"),
    [("**Accept**", True), ("Verdict: reject.", False), ("## Decision\n\n**Accepted**", True), ("I accept", None)],
)
def test_verdict_is_read_behind_a_label_and_marks(text, verdict, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    image = tmp_path / "0.png"
    tiny.picture().save(image)
    with chat_server(lambda request, number: text) as server:
        client = ChatClient(ChatSettings("judge", server.url), tmp_path / "answers.jsonl")
        assert judge_turns(client, "Judge.", {"a": Exhibit(image, "What?", "A boat.")}).results == {"a": verdict}


def test_judge_stops_at_its_cap_and_resumes_later(judged):
    num_turns = NUM_IMAGES * NUM_QUESTIONS
    with chat_server(lambda request, number: "accept") as server:
        made = generate(by_a_judge(judged, server, max_requests=4))
        assert (len(server.requests), made.num_kept, made.num_open) == (4, 4, num_turns - 4)
        assert "--judge-max-requests 4" in made.stopped
        made = generate(by_a_judge(judged, server))
        assert (len(server.requests), made.num_kept, made.num_open) == (num_turns, num_turns, 0)


def test_turn_that_the_judge_did_not_answer_is_listed_and_tried_again(judged):
    def reply(request, number):
        return Reply(status=400, body="{}") if len(server.requests) <= 3 else "accept"

    with chat_server(reply) as server:
        made = generate(by_a_judge(judged, server, concurrency=1))
        assert (made.num_failed, made.num_kept) == (3, NUM_IMAGES * NUM_QUESTIONS - 3)
        assert generate(by_a_judge(judged, server)).num_failed == 0


def test_estimate_counts_what_is_left(run, whole, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judge = ChatSettings("judge", max_tokens=50, input_price=1.0, output_price=2.0)
    num_images, num_left, found = estimate(replace(run, judge=judge))
    assert (num_images, num_left, found.num_requests) == (NUM_IMAGES, NUM_IMAGES, NUM_IMAGES * NUM_QUESTIONS)
    assert found.completion_tokens == 50 * found.num_requests and found.cost > 0
    assert not run.out.exists()
    assert estimate(finished(run, whole)) == (NUM_IMAGES, 0, None)


def arguments_of(run: SelfGeneration) -> list[str]:
    arguments = ["self", run.images, "--model", run.model, "--out", str(run.out), "--device", "cpu"]
    arguments += ["-n", str(NUM_QUESTIONS), "--after", "What is it?", "--max-new-tokens", "8", "--blank-test", "off"]
    return [*arguments, "--min-log-probability", "-99", "--batch-size", "1"]


def start(run: SelfGeneration, log: Path, processes: int = 1) -> list[multiprocessing.Process]:
    """The command in processes of its own."""
    return fork(sq_llava, ("generate-data", *arguments_of(run)), log, processes=processes)


def test_command_reports_what_is_kept_and_a_dry_run_does_nothing(run):
    result = generate_data(*arguments_of(run), "--dry-run")
    assert result.exit_code == 0, result.output
    assert "5 of 5 images are left, with 3 questions each." in result.stdout and not run.out.exists()
    result = generate_data(*arguments_of(run))
    assert result.exit_code == 0, result.output
    assert "15 turns about 5 images" in result.stdout
    assert len(lines_of(run.out / "data.jsonl")) == NUM_IMAGES


@pytest.mark.long
def test_killed_command_resumes_without_asking_again(run, tmp_path):
    log = tmp_path / "log"
    (child,) = start(run, log)
    asked = run.out / "asked-0.jsonl"
    while not (asked.is_file() and asked.read_bytes().count(b"\n") >= 2):
        assert child.is_alive(), log.read_text()[-3000:]
        time.sleep(0.005)
    child.kill()
    assert ended([child]) == [-signal.SIGKILL]
    kept = asked.read_bytes().splitlines()
    assert len(kept) < NUM_IMAGES and not (run.out / "data.jsonl").exists()
    other = replace(run, out=tmp_path / "other")
    assert ended(start(run, log) + start(other, log)) == [0, 0], log.read_text()[-3000:]
    assert asked.read_bytes().splitlines()[:2] == kept[:2]
    assert len(asked.read_bytes().splitlines()) == NUM_IMAGES
    own, others = files_of(run.out), files_of(other.out)
    assert own.pop("README.md") != others.pop("README.md")  # the command in it names the folder
    assert own == others


@pytest.mark.long
def test_two_processes_make_what_one_makes(run, tmp_path):
    log, other = tmp_path / "log", replace(run, out=tmp_path / "other")
    assert ended(start(run, log)) == [0], log.read_text()[-3000:]
    assert ended(start(other, log, processes=2)) == [0, 0], log.read_text()[-3000:]
    for name in ("data.jsonl", "rejected.jsonl"):
        assert (run.out / name).read_bytes() == (other.out / name).read_bytes()
    shares = [len(lines_of(other.out / f"asked-{rank}.jsonl")) for rank in (0, 1)]
    assert sum(shares) == NUM_IMAGES and min(shares) > 0
