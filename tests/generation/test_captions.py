"""Image-caption pairs chosen by noun phrases: the filter alone, and the command with a small spaCy pipeline."""

import json
import random
import shutil
import signal
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sq_llava.data.rows import load_rows
from sq_llava.data.sources import DataSource
from sq_llava.generation import captions as choosing
from sq_llava.generation.captions import CaptionFile, PhraseJournal, choose, phrases_of
from sq_llava.generation.prompt_files import draw, hash_of, read_instructions
from sq_llava.generation.settings import PROMPTS
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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", "", r"captions must be in a \.json"),
        ("c.tsv", "a dog\thttp://host/1.jpg\n", "c.tsv, line 1: has no column caption and no column image, only"),
        ("c.json", '{"image": 1}', "cannot be read as JSON"),
        ("c.jsonl", "{]\n", "c.jsonl, row 0: cannot be read as JSON"),
        ("c.jsonl", "[]\n", "expected an object with image and caption"),
        ("c.jsonl", '{"image": "a.png", "caption": " "}\n', "row 0: caption is ' '"),
        ("c.jsonl", '{"image": 3, "caption": "a"}\n', "row 0: image is 3"),
        ("c.jsonl", '{"image": "../a.png", "caption": "a"}\n', "row 0 .*is outside the image root"),
        ("c.jsonl", '{"image": "http://host/a.png", "caption": "a"}\n', "row 0 .*is a URL"),
        ("c.jsonl", '{"id": 1, "image": "a.png", "caption": "a"}\n' * 2, "row 1: an earlier row has the same id"),
        ("c.jsonl", "", "holds no rows"),
    ],
)
def test_wrong_captions_are_refused_with_their_row(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        choosing.look_at(CaptionFile(file), tmp_path)


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
    """A horse in 2 captions, a cat in 4, and a dog in 130. The image of one dog is missing."""
    texts = ["it has the horse"] * 2 + ["it has the cat"] * 4 + ["it has the dog"] * 130
    rows = [{"image": f"{number}.png", "caption": text} for number, text in enumerate(texts)]
    file = write_captions(tmp_path_factory.mktemp("captions"), rows)
    (file.parent / "images" / "6.png").unlink()
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
    assert "3 different noun phrases" in card and "104 rows" in card


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
