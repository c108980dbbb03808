"""Image-caption pairs chosen by noun phrases: the filter alone, and the command with a small spaCy pipeline."""

import json
import random
import re
import shutil
import signal
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.progress import Progress

from sq_llava.data.rows import load_rows
from sq_llava.data.sources import DataSource
from sq_llava.generation import captions as choosing
from sq_llava.generation.caption_files import BadRow, CaptionFile
from sq_llava.generation.captions import PhraseJournal, choose, phrases_of
from sq_llava.generation.prompt_files import draw, hash_of, read_instructions
from sq_llava.generation.settings import PROMPTS, CaptionSettings
from tests.generation.commands import generate_data, made, texts_of
from tests.processes import ended, fork, lines_of, sq_llava
from tests.runs import die


NOUNS = ("dog", "cat", "house", "tree", "boat", "horse")
# For each word: part of speech, head, and relation to the head. A parser can learn these sentences by heart.
PATTERNS = {
    "a {} stands near the {}": ("DET NOUN VERB ADP DET NOUN", [1, 2, 2, 2, 5, 3], "det nsubj ROOT prep det pobj"),
    "the red {} and a big {}": (
        "DET ADJ NOUN CCONJ DET ADJ NOUN",
        [2, 2, 2, 2, 6, 6, 2],
        "det amod ROOT cc det amod conj",
    ),
    "it has the {}": ("PRON VERB DET NOUN", [1, 1, 3, 1], "nsubj ROOT det dobj"),
}


def chosen(captions: dict[str, list[str]], seed: int = 0) -> set[str]:
    """Ids of the chosen captions. `captions`: id -> noun phrases."""
    pairs = [(row, hash_of(phrase)) for row, phrases in enumerate(captions.values()) for phrase in phrases]
    rows, phrases = np.array(pairs, dtype=object).reshape(-1, 2).T
    ids = np.array([hash_of(id) for id in captions], dtype=np.uint64)
    choice = choose(rows.astype(np.int64), phrases.astype(np.uint64), ids, seed)
    return {id for id, is_taken in zip(captions, choice.taken) if is_taken}


def of_the_paper(captions: dict[str, list[str]], rank) -> set[str]:
    """The filter as the paper describes it: one phrase after another, from the rarest to the most frequent."""
    of_phrase = defaultdict(list)
    for id, phrases in captions.items():
        for phrase in phrases:
            of_phrase[phrase].append(id)
    pool = set()
    for phrase in sorted(of_phrase, key=lambda phrase: len(of_phrase[phrase])):
        if len(of_phrase[phrase]) >= 3:
            pool |= set(sorted(of_phrase[phrase], key=lambda id: rank(phrase, id))[:100])
    return pool


some_captions = st.lists(st.sets(st.sampled_from("abcdefgh"), max_size=3), min_size=1, max_size=40).map(
    lambda all_phrases: {str(number): sorted(phrases) for number, phrases in enumerate(all_phrases)}
)


@given(some_captions)
def test_filter_selects_as_in_the_paper_if_nothing_is_drawn(captions):
    assert chosen(captions) == of_the_paper(captions, rank=lambda phrase, id: id)


@settings(max_examples=20)
@given(st.integers(min_value=0), st.integers(0, 2**32), st.lists(st.integers(1, 260), min_size=1, max_size=4))
def test_each_phrase_selects_100_captions_at_most_in_any_order_of_rows(seed, shuffle, sizes):
    captions = {
        f"{phrase} {number}": [f"phrase {phrase}", *(["shared"] * (number == 0))]
        for phrase, size in enumerate(sizes)
        for number in range(size)
    }
    taken = chosen(captions, seed)
    counts = Counter(phrase for id in taken for phrase in captions[id] if phrase != "shared")
    for phrase, size in enumerate(sizes):
        count = counts[f"phrase {phrase}"]
        # 101 if the caption with the shared phrase is not among the 100.
        assert count in (100, 101) if size > 100 else count == size if size >= 3 else count <= 1
    shuffled = list(captions.items())
    random.Random(shuffle).shuffle(shuffled)
    assert chosen(dict(shuffled), seed) == taken


def test_another_seed_draws_as_many_other_captions():
    captions = {str(number): ["a dog"] for number in range(400)}
    first, second = chosen(captions, 0), chosen(captions, 1)
    assert len(first) == len(second) == 100
    assert 10 <= len(first & second) <= 45  # 25 are expected


def test_draws_of_two_phrases_are_independent():
    captions = {str(number): ["a dog", "the sea"] for number in range(400)}
    assert 160 <= len(chosen(captions)) <= 190  # 175 are expected; 100 if both draws were equal


def test_caption_without_phrases_is_not_taken():
    assert chosen({"0": [], "1": ["a"], "2": ["a"], "3": ["a"]}) == {"1", "2", "3"}


def write_captions(folder: Path, rows: list[dict], name: str = "captions.jsonl") -> Path:
    (folder / "images").mkdir()
    for row in rows:
        (folder / "images" / row["image"]).write_bytes(b"not looked at")
    file = folder / name
    if file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        separator = "\t" if file.suffix == ".tsv" else ","
        lines = [separator.join(rows[0]), *(separator.join(row.values()) for row in rows)]
        file.write_text("\n".join(lines) + "\n")
    return file


@pytest.mark.parametrize("name", ["c.json", "c.jsonl", "c.csv", "c.tsv"])
def test_captions_are_read_alike_from_each_kind_of_file(tmp_path, name):
    rows = [{"image": "0.png", "caption": "a  dog "}, {"image": "1.png", "caption": "the sea"}]
    captions = CaptionFile(write_captions(tmp_path, rows, name))
    expected = [("0", "0.png", "a dog"), ("1", "1.png", "the sea")]
    assert [(each.id, each.image, each.text) for each in captions] == expected
    assert len(list(captions)) == 2  # a second time
    assert len(list(CaptionFile(captions.path, limit=1))) == 1


def test_unclosed_quotation_mark_hides_no_row_of_a_tsv(tmp_path):
    rows = [{"image": "0.png", "caption": '"a dog'}, {"image": "1.png", "caption": "the sea"}]
    captions = CaptionFile(write_captions(tmp_path, rows, "c.tsv"))
    assert [each.text for each in captions] == ['"a dog', "the sea"]


@pytest.mark.parametrize("name", ["c.csv", "C.CSV", "c.jsonl", "C.JSONL"])
def test_empty_id_is_no_id(tmp_path, name):
    null = '{"image": "0.png", "caption": "a dog", "id": null}\n'
    table = "image,caption,id\n0.png,a dog,\n1.png,the sea,\n"
    (tmp_path / name).write_text(table if name.lower() == "c.csv" else null * 2)
    assert [each.id for each in CaptionFile(tmp_path / name)] == ["0", "1"]


def test_captions_read_before_are_not_chosen_if_their_image_or_row_cannot_be_used_any_more(tmp_path):
    file = write_captions(tmp_path, [{"image": f"{n}.png", "caption": "a dog"} for n in range(5)])
    with file.open("a") as lines:
        lines.write('{"image": "5.png", "caption": ""}\n')
    (tmp_path / "images" / "3.png").unlink()
    out = tmp_path / "out"
    out.mkdir()
    list(PhraseJournal(out, "phrases.jsonl", 6).append((row, ["dog"]) for row in range(6)))
    run = CaptionSettings(file, tmp_path / "images", out, "no pipeline")
    choosing.generate(run, "the command", Progress(disable=True))
    assert [row["id"] for row in lines_of(out / "data.jsonl")] == ["0", "1", "2", "4"]
    [rejected] = lines_of(out / "rejected.jsonl")
    assert (rejected["id"], rejected["reason"]) == ("3", "the image file is missing")


def read(file: Path, content: str | bytes) -> list[tuple[str, str]]:
    """Image and caption of each row of a file with this content; the error in place of a row that cannot be used."""
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    rows = CaptionFile(file, image_root=file.parent)
    return [each.error if isinstance(each, BadRow) else (each.image, each.text) for each in rows]


def test_tsv_of_conceptual_captions_has_no_header_and_files_or_urls(tmp_path):
    files = "a dog\tdogs/1.jpg\nthe sea\t2.jpg\n"
    assert read(tmp_path / "c.tsv", files) == [("dogs/1.jpg", "a dog"), ("2.jpg", "the sea")]
    assert read(tmp_path / "c.tsv", "1.jpg\ta dog\n") == [("1.jpg", "a dog")]  # the other way round
    (tmp_path / "sea.png").touch()
    urls = "a dog\thttp://host/dog.png?size=3\nthe sea\thttps://host/x/sea.png\n"
    assert read(tmp_path / "c.tsv", urls) == [("00000/000000000.jpg", "a dog"), ("sea.png", "the sea")]
    rows = CaptionFile(tmp_path / "c.tsv")
    assert rows._file_of_url("http://host/a", 120_034) == "00012/000120034.jpg"  # as img2dataset names it


def test_other_names_of_columns_and_llavas_pretraining_set_are_read(tmp_path):
    assert read(tmp_path / "metadata.csv", 'file_name,text\n1.jpg,"a dog, a cat"\n') == [("1.jpg", "a dog, a cat")]
    turns = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "a dog"}]
    row = {"id": "004539375", "image": "00453/004539375.jpg", "conversations": turns}
    two = {"image": "1.jpg", "conversations": [*turns, {"from": "human", "value": "Why?"}, turns[1]]}
    read_rows = read(tmp_path / "blip_laion_cc_sbu_558k.json", json.dumps([row, two, {**row, "conversations": []}]))
    assert read_rows[0] == ("00453/004539375.jpg", "a dog")
    assert read_rows[1].startswith("has 2 answers and 1 images, expected one image")
    assert "'conversations' is []" in read_rows[2]
    assert next(iter(CaptionFile(tmp_path / "blip_laion_cc_sbu_558k.json"))).id == "004539375"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", "", r"captions must be in a \.json"),
        ("c.tsv", "a dog\ta cat\n", "line 1: has no column caption and no column image, only .*without a header"),
        ("c.csv", "a dog,1.jpg\n", "c.csv, line 1: has no column caption and no column image"),
        ("c.tsv", "image\ttitle\n", "c.tsv, line 1: has no column caption, only"),
        ("c.tsv", "\ufeffcaption\timage\n".encode("utf-16"), "line 1: the file is in UTF-16. Save it again as UTF-8"),
        ("c.json", '{"image": 1}', "cannot be read as JSON"),
        ("c.jsonl", "", "holds no rows"),
        ("c.tsv", "", "holds no rows"),
    ],
)
def test_file_that_cannot_be_read_is_refused(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=message):
        choosing.look_at(CaptionFile(file), tmp_path, 0.1)


@pytest.mark.parametrize(
    ("name", "line", "error"),
    [
        ("c.jsonl", "{]", "cannot be read as JSON"),
        ("c.jsonl", b'{"image": "a.png", "caption": "caf\xe9"}', "is not UTF-8: .*byte 0xe9"),
        ("c.jsonl", "[]", "expected an object with image and caption"),
        ("c.jsonl", '{"image": "a.png", "caption": " "}', "caption is ' ', expected a text"),
        ("c.jsonl", '{"image": 3, "caption": "a"}', "image is 3"),
        ("c.jsonl", '{"image": "../a.png", "caption": "a"}', "is outside the image root"),
        ("c.jsonl", '{"image": "s3://bucket/a.png", "caption": "a"}', "is a URL"),
        ("c.jsonl", '{"image": "0.png", "caption": "a", "id": 0}', "an earlier row has the same id"),
        ("c.tsv", b"a.png\tcaf\xe9\t5", r"caption is 'caf\\udce9', which is not UTF-8"),
        ("c.tsv", b"a.png\ta dog\tcaf\xe9", r"id is 'caf\\udce9', which is not UTF-8"),
        ("c.tsv", "a.png", "has 1 columns, expected 3"),
        ("c.tsv", "a.png\ta dog\t5\tmore", "has 4 columns, expected 3"),
        ("c.csv", 'a.png,"' + "dog " * 40_000 + '",5', "field larger than field limit"),
    ],
)
def test_bad_row_is_listed_with_its_line_and_the_others_are_used(tmp_path, name, line, error):
    good = [f'{{"image": "{n}.png", "caption": "a dog", "id": {n}}}' for n in range(3)]
    if not name.endswith("l"):
        separator = "\t" if name == "c.tsv" else ","
        good = [separator.join((f"{n}.png", "a dog", str(n))) for n in range(3)]
        (tmp_path / name).write_text(separator.join(("image", "caption", "id")) + "\n")
    with (tmp_path / name).open("ab") as file:
        for each in (good[0], "", line, good[1], good[2]):
            file.write((each.encode() if isinstance(each, str) else each) + b"\n")
    known = choosing.look_at(CaptionFile(tmp_path / name), tmp_path, 0.1)
    [(place, found)] = known.bad.found
    first_line = 3 if name == "c.jsonl" else 4
    assert place == f"{tmp_path / name}, line {first_line} (row 1)" and re.search(error, found)
    assert known.is_sound.tolist() == [True, False, True, True]


def test_too_many_bad_rows_end_the_run_before_spacy_starts(tmp_path):
    rows = ['{"image": "a.png"}'] * 30 + ['{"image": "a.png", "caption": "a"}'] * 70
    file = tmp_path / "c.jsonl"
    file.write_text("\n".join(rows))
    message = (
        r"30 of 100 rows cannot be used, a larger share than --max-bad-share 0\.1\.(?s:.*)"
        r"c.jsonl, line 1 \(row 0\): caption is None(?s:.*)line 5 (?s:.*)and 25 more"
    )
    with pytest.raises(ValueError, match=message):
        choosing.look_at(CaptionFile(file), tmp_path, 0.1)
    assert len(choosing.look_at(CaptionFile(file), tmp_path, 0.3).bad) == 30
    with pytest.raises(ValueError, match="No row can be used"):
        choosing.look_at(CaptionFile(file, limit=20), tmp_path, 1.0)


def test_instruction_is_drawn_by_seed_and_id(tmp_path):
    file = tmp_path / "instructions.txt"
    file.write_text("# not this\nSay it.\n\nShow it.\n")
    instructions = read_instructions(file)
    assert instructions == ["Say it.", "Show it."]
    drawn = [[draw(instructions, seed, str(id)) for id in range(200)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert 70 <= drawn[0].count("Say it.") <= 130
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no instruction"):
        read_instructions(file)


@pytest.mark.slow
def test_missing_pipeline_is_an_error_with_the_command_that_installs_it(monkeypatch):
    pytest.importorskip("spacy")
    with pytest.raises(ValueError, match="python -m spacy download en_core_web_sm"):
        choosing.load_pipeline("en_core_web_sm")
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ValueError, match=r"spacy is not installed: pip install 'sq-llava\[captions\]'"):
        choosing.load_pipeline("en_core_web_sm")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A spaCy pipeline that has learned a few sentences by heart: parts of speech, and parse trees."""
    spacy = pytest.importorskip("spacy")
    from spacy.tokens import Doc
    from spacy.training import Example
    from spacy.util import fix_random_seed

    fix_random_seed(0)
    language = spacy.blank("en")
    embed = {"@architectures": "spacy.HashEmbedCNN.v2", "pretrained_vectors": None, "width": 32, "depth": 1}
    embed |= {"embed_size": 200, "window_size": 1, "maxout_pieces": 2, "subword_features": False}
    tagger = {"@architectures": "spacy.Tagger.v2", "tok2vec": embed}
    parser = {"@architectures": "spacy.TransitionBasedParser.v2", "state_type": "parser", "tok2vec": embed}
    parser |= {"extra_state_tokens": False, "hidden_width": 32, "maxout_pieces": 2, "use_upper": True}
    language.add_pipe("morphologizer", config={"model": tagger})
    # By default, labels that occur fewer than 30 times are merged.
    language.add_pipe("parser", config={"model": parser, "min_action_freq": 1})
    examples = []
    for pattern, (parts, heads, labels) in PATTERNS.items():
        for place, noun in enumerate(NOUNS):
            words = pattern.format(noun, NOUNS[place - 1]).split()
            truth = Doc(language.vocab, words=words, pos=parts.split(), heads=heads, deps=labels.split())
            examples.append(Example(language.make_doc(" ".join(words)), truth))
    optimizer = language.initialize(lambda: examples)
    for _ in range(60):
        language.update(examples, sgd=optimizer)
    folder = tmp_path_factory.mktemp("pipeline")
    language.to_disk(folder)
    return folder


@pytest.mark.slow
def test_noun_phrases_are_compared_without_case_articles_and_pronouns(pipeline):
    language = choosing.load_pipeline(str(pipeline))
    assert phrases_of(language("a boat stands near the tree")) == ["boat", "tree"]
    assert phrases_of(language("the red horse and a big boat")) == ["big boat", "red horse"]
    assert phrases_of(language("it has the cat")) == ["cat"]


def test_pipeline_without_a_parser_is_refused(tmp_path):
    pytest.importorskip("spacy").blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(ValueError, match="Noun phrases need a parser"):
        choosing.load_pipeline(str(tmp_path / "blank"))


@pytest.fixture(scope="module")
def captions(tmp_path_factory) -> Path:
    """A horse in 2 captions, a cat in 4, and a dog in 130. The image of one dog is missing, and one row is bad."""
    texts = ["it has the horse"] * 2 + ["it has the cat"] * 4 + ["it has the dog"] * 130
    rows = [{"image": f"{number}.png", "caption": text} for number, text in enumerate(texts)]
    file = write_captions(tmp_path_factory.mktemp("captions"), rows)
    (file.parent / "images" / "6.png").unlink()
    with file.open("a") as lines:
        lines.write('{"image": "136.png", "caption": ""}\n')
    return file


def options(file: Path, pipeline: Path, out: Path) -> list[str]:
    settings = [file, "--image-root", file.parent / "images", "--spacy-model", pipeline, "--out", out]
    return ["captions", *map(str, settings)]


@pytest.fixture(scope="module")
def whole(captions, pipeline, tmp_path_factory) -> Path:
    """The folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    result = generate_data(*options(captions, pipeline, out))
    assert result.exit_code == 0, result.output
    assert "104 of 136 captions" in result.stdout
    assert "1 row of the input cannot be used." in result.stderr
    assert "line 137 (row 136): caption is ''" in result.stderr
    [bad] = lines_of(out / "bad_rows.jsonl")
    assert bad["place"] == f"{captions}, line 137 (row 136)" and bad["error"].startswith("caption is ''")
    return out


def test_command_writes_a_set_that_training_reads(captions, whole):
    rows = load_rows([DataSource(str(whole / "data.jsonl"), str(captions.parent / "images"))])
    assert len(rows) == 104
    instructions = read_instructions(PROMPTS / "captions" / "instructions.txt")
    for row in rows:
        assert row["messages"][0]["content"][0] == {"type": "image"}
        question, answer = texts_of(row)
        assert question in instructions and answer in ("it has the cat", "it has the dog")
    reasons = Counter(line["reason"] for line in lines_of(whole / "rejected.jsonl"))
    assert sorted(reasons.values()) == [1, 2, 29]
    assert reasons["the image file is missing"] == 1
    card = (whole / "README.md").read_text()
    assert "3 different noun phrases" in card and "104 rows" in card and "1 row of the input could not" in card


@pytest.mark.slow
def test_shards_choose_together_what_one_run_chooses(captions, pipeline, whole, tmp_path):
    command = options(captions, pipeline, tmp_path / "out")
    for shard in ("2/3", "1/3"):
        result = generate_data(*command, "--shard", shard)
        assert result.exit_code == 0 and "This shard is done." in " ".join(result.stderr.split())
        assert not (tmp_path / "out" / "data.jsonl").exists()
    result = generate_data(*command, "--shard", "3/3", "--dry-run")
    assert "45 captions with an image, 45 of them not yet read" in result.stdout
    assert generate_data(*command, "--shard", "3/3").exit_code == 0
    assert made(tmp_path / "out") == made(whole)


def test_another_seed_needs_no_spacy_and_other_captions_are_refused(captions, pipeline, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    command = options(captions, pipeline, out)
    monkeypatch.setattr(choosing, "load_pipeline", lambda model: pytest.fail("spaCy is loaded"))
    assert generate_data(*command, "--seed", 1).exit_code == 0
    assert made(out) != made(whole)
    assert generate_data(*command).exit_code == 0
    assert made(out) == made(whole)
    for more in ((), ("--dry-run",)):
        result = generate_data(*command, "--limit", 100, *more)
        assert result.exit_code == 1 and "limit" in result.stderr


@pytest.mark.parametrize("cut", [0, 40, -1])
def test_run_resumes_from_a_journal_that_is_cut_off_anywhere(captions, pipeline, whole, tmp_path, cut):
    out = tmp_path / "out"
    out.mkdir()
    journal = (whole / "phrases.jsonl").read_bytes()
    (out / "run.json").write_bytes((whole / "run.json").read_bytes())
    (out / "phrases.jsonl").write_bytes(journal[:cut])
    assert generate_data(*options(captions, pipeline, out)).exit_code == 0
    assert made(out) == made(whole)
    assert (out / "phrases.jsonl").read_bytes() == journal  # no row was read twice


def kill_at_row_50() -> None:
    append = PhraseJournal.append

    def killed(self, found):
        for number, row in enumerate(append(self, found)):
            yield row
            if number == 50:
                die()

    PhraseJournal.append = killed


@pytest.mark.slow
def test_killed_run_resumes_and_makes_the_same_files(captions, pipeline, whole, tmp_path):
    command = options(captions, pipeline, tmp_path / "out")
    journal = tmp_path / "out" / "phrases.jsonl"
    children = fork(sq_llava, ("generate-data", *command), tmp_path / "log", (kill_at_row_50,))
    assert ended(children) == [-signal.SIGKILL]
    assert len(journal.read_text().splitlines()) == 51
    assert generate_data(*command).exit_code == 0
    assert len(journal.read_text().splitlines()) == 135
    assert made(tmp_path / "out") == made(whole)
