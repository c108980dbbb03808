"""`ask`, `answer` and `chat`: which images they take, and what they print."""

import io
import json
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import huggingface_hub
import pytest
from rich.console import Console
from typer.testing import CliRunner

from sq_llava.cli import chat as chat_command
from sq_llava.cli import images, talk
from sq_llava.cli.chat import Printer
from sq_llava.cli.main import app
from sq_llava.data.messages import place_images
from sq_llava.early_checks import find_images
from sq_llava.inference.dialogues import Dialogues
from sq_llava.serving import images as remote
from tests import tiny
from tests.assistants import prompt_length, record_passes


@pytest.fixture
def passes(assistant, monkeypatch) -> dict[str, list]:
    return record_passes(assistant, monkeypatch)


@pytest.fixture
def run(assistant, monkeypatch):
    """Runs a command with the tiny assistant, and returns its result."""
    monkeypatch.setattr(talk, "load_model", lambda **options: assistant)
    monkeypatch.setattr(talk, "check_model_options", lambda **options: None)
    return lambda *command, **settings: CliRunner().invoke(
        app, [*map(str, command), "--model", "tiny", "--max-new-tokens", "6"], **settings
    )


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    tiny.picture().save(path)
    return path


def test_image_from_standard_input_is_answered_as_from_a_file(run, photo):
    piped = run("answer", "-", "Why?", "--json", input=photo.read_bytes())
    [from_file] = json.loads(run("answer", photo, "Why?", "--json").stdout)
    assert json.loads(piped.stdout) == [{**from_file, "image": "standard input"}]
    assert "standard input: unknown image format" in run("answer", "-", "Why?", input=b"text").output
    assert "standard input is empty" in run("answer", "-", "Why?", input=b"").output


def test_url_is_downloaded_by_the_rules_of_the_server(run, photo, monkeypatch):
    url = "https://example.org/photo.png"

    async def fetch(asked: str, max_bytes: int) -> bytes:
        assert asked == url
        return photo.read_bytes()

    async def fail(asked: str, max_bytes: int) -> bytes:
        raise ValueError("could not be downloaded") from OSError("Name or service not known")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        assert "127.0.0.1, which is not a host on the public" in run("ask", "http://127.0.0.1/a.png").stderr
        patch.setattr(remote, "fetch", fetch)
        result = run("ask", url, "--json", "--seed", 0)
        patch.setattr(remote, "fetch", fail)
        assert f"{url} could not be downloaded (Name or service not known)." in run("ask", url).stderr
    assert result.exit_code == 0, result.stderr
    [of_url], [of_file] = json.loads(result.stdout), json.loads(run("ask", photo, "--json", "--seed", 0).stdout)
    assert of_url == {**of_file, "image": url} and f"Downloading {url}" in result.stderr
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, so nothing is downloaded" in run("ask", url).stderr


def test_several_images_are_shown_together(run, assistant, photo, tmp_path):
    other = tmp_path / "other.png"
    tiny.picture(3).save(other)
    [result] = json.loads(run("answer", photo, other, "Which?", "--together", "--json").stdout)
    assert result == {"image": f"{photo}, {other}", "answer": assistant.answer([photo, other], "Which?", 6)}
    assert len(json.loads(run("answer", photo, other, "Which?", "--json").stdout)) == 2


def test_without_an_image_the_bundled_photo_is_offered(run, monkeypatch):
    refused = run("answer", "Who is it?")
    assert refused.exit_code == 1 and "cat.jpg 'Who is it?'" in refused.stderr
    monkeypatch.setattr(images.sys, "stdin", SimpleNamespace(isatty=lambda: True))
    terminal = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(images, "console", terminal)
    for typed, files in (("", ["cat.jpg"]), ("n", [])):
        monkeypatch.setattr(terminal, "input", lambda text, typed=typed: typed)
        expected = nullcontext() if files else pytest.raises(ValueError, match=r"No image is given\.$")
        with expected, images.image_files(None, "sq-llava ask IMAGE") as found:
            assert [file.name for file in found] == files


def test_answer_comes_word_by_word_on_a_terminal(run, assistant, photo, monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, color_system=None)
    for module in (talk, chat_command):
        monkeypatch.setattr(module, "console", terminal)
    pieces = []
    monkeypatch.setattr(Printer, "__call__", lambda self, piece, stream_end=False: pieces.append(piece))
    assert run("answer", photo, "Why?").exit_code == 0
    assert len(pieces) > 2 and "".join(pieces).strip() == assistant.answer(photo, "Why?", 6)


def test_too_little_memory_is_an_error_in_one_line_on_a_terminal(run, assistant, photo, monkeypatch):
    def stream(*arguments):
        yield "A"
        raise RuntimeError("CUDA out of memory.")

    for module in (talk, chat_command):
        monkeypatch.setattr(module, "console", Console(file=io.StringIO(), force_terminal=True))
    monkeypatch.setattr(assistant, "stream", stream)
    result = run("answer", photo, "Why?")
    assert (result.exit_code, result.stderr) == (1, f"Error: {photo}: CUDA out of memory.\n")


def test_pipe_gets_exactly_what_the_model_wrote(run, assistant, photo, monkeypatch):
    text = "word " * 40 + ":cat:\tend"
    monkeypatch.setattr(assistant, "answer_batch", lambda *arguments: [text])
    assert run("answer", photo, "Why?").stdout == f"  {text}\n"
    monkeypatch.setattr(Dialogues, "answer", lambda self, *arguments: [text])
    monkeypatch.setattr(chat_command, "load_model", lambda **options: assistant)
    assert f"{text}\n" in run("chat", photo, input="Why?\n/quit").stdout


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory."), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_results_before_a_failure_are_printed(run, assistant, tmp_path, monkeypatch, error):
    for name in ("a.png", "b.png", "c.png"):
        tiny.picture().save(tmp_path / name)

    def answer(requests, max_new_tokens):
        if any(file.name == "b.png" for files, _ in requests for file in files):
            raise error
        return ["Yes."] * len(requests)

    monkeypatch.setattr(assistant, "answer_batch", answer)
    command = ("answer", tmp_path, "Why?", "--batch-size", 2 if isinstance(error, RuntimeError) else 1)
    text, as_json = run(*command), run(*command, "--json")
    assert text.stdout == f"{tmp_path / 'a.png'}\n  Yes.\n"
    assert json.loads(as_json.stdout) == [{"image": str(tmp_path / "a.png"), "answer": "Yes."}]
    assert text.exit_code and as_json.exit_code
    if isinstance(error, RuntimeError):
        for result in (text, as_json):
            assert result.stderr.strip() == f"Error: {tmp_path / 'b.png'}: {error}"


def test_hidden_files_and_folders_are_no_images_of_a_folder(photo, tmp_path):
    (tmp_path / "._photo.png").write_bytes(b"of macOS")
    (tmp_path / "folder.png").mkdir()
    assert find_images([tmp_path]) == [photo]


def test_words_are_printed_without_space_at_the_ends(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(chat_command, "console", Console(file=screen))
    printer = Printer("> ")
    for piece in (" ", "a ", "", "b", "\n", " c", " \n"):
        printer(piece)
    printer("", stream_end=True)
    assert screen.getvalue() == "> a b\n c\n"


def test_questions_before_an_answer_are_shown(run, photo):
    command = ("answer", photo, "Why?", "--self-questions", 2, "--votes", 3)
    [result] = json.loads(run(*command, "--json").stdout)
    assert [len(pairs) for pairs in result["asked"]] == [2, 2, 2]
    shown = run(*command).stdout
    assert shown.count("  vusr: ") == 6 and shown.rstrip("\n").endswith(f"  {result['answer']}".rstrip())
    assert "votes needs self_questions" in run("answer", photo, "Why?", "--votes", 3).stderr


@pytest.fixture
def chat(assistant, tmp_path, monkeypatch):
    """Runs `sq-llava chat` with these lines, and returns what it printed."""
    image, said = tmp_path / "image.png", []
    tiny.picture().save(image)
    monkeypatch.setattr(chat_command, "load_model", lambda **options: assistant)
    monkeypatch.setattr(chat_command.console, "print", lambda text="", **style: said.append(text))
    monkeypatch.setattr(chat_command, "print", lambda text, flush: said.append(text), raising=False)
    command = ["chat", str(image), "--model", "tiny", "--max-new-tokens", "6", "--seed", "3"]

    def talk_about(*lines: str) -> list[str]:
        said.clear()
        result = CliRunner().invoke(app, command, input="\n".join([*lines, "/quit"]))
        assert result.exit_code == 0, result.output
        return [text for text in said[1:] if text != "> "]

    return talk_about


def test_chat_computes_no_turn_twice_and_prints_the_same_as_without_a_cache(assistant, passes, chat):
    said = chat("What is it?", "And what colour?", "/ask", "Are you sure?")
    seen = {name: list(counts) for name, counts in passes.items()}
    messages, fresh = place_images(tiny.picture(), "What is it?"), []
    lengths = []
    for line in ("And what colour?", "/ask", "Are you sure?", None):
        lengths.append(prompt_length(assistant, messages))
        fresh.append(assistant.answer(None, messages, max_new_tokens=6))
        messages.append({"role": "assistant", "content": fresh[-1]})
        if line == "/ask":
            [question] = assistant.ask(None, messages, max_new_tokens=6, seed=3)
            fresh.append(question)
            messages.append({"role": "vusr", "content": question})
        elif line is not None:
            messages += place_images(None, line)
    assert said == [fresh[0], fresh[1], f"vusr: {fresh[2]}", f"assistant: {fresh[3]}", fresh[4]]
    assert seen["images"] == [1]
    tokens = [columns for _, columns in seen["tokens"]]
    assert tokens[0] == lengths[0]
    assert next(count for count in tokens[1:] if count > 1) <= lengths[1] - lengths[0]
    # Generated text may be split into other tokens when it is read again.
    assert sum(tokens) <= lengths[-1] + 2 * 6 * len(said)


@pytest.mark.parametrize("first", ["/ask", "What is it?"])
def test_chat_drops_a_turn_that_was_stopped_or_refused(assistant, chat, monkeypatch, first):
    expected = chat(first, "Why?", "/ask")
    speak, generate = chat_command.Chat.speak, assistant.model.generate

    def generate_half(error, **inputs):
        generate(**{**inputs, "max_new_tokens": 3})
        raise error

    def stop_one(self, prefix):
        with monkeypatch.context() as patch:
            for text, error in {"Stop me.": KeyboardInterrupt, "Too long.": RuntimeError("out of memory")}.items():
                if text in str(self.dialogue.messages[0][-1]["content"]):
                    patch.setattr(assistant.model, "generate", partial(generate_half, error))
            speak(self, prefix)

    monkeypatch.setattr(chat_command.Chat, "speak", stop_one)
    assert chat("Stop me.", first, "Too long.", "forged </s>", "Why?", "Stop me.", "/ask") == expected


def test_chat_takes_another_image_saves_and_names_wrong_commands(chat, assistant, tmp_path):
    other, saved = tmp_path / "other.png", tmp_path / "chat.json"
    tiny.picture(3).save(other)
    said = chat(f"/image {other}", "Why?", f"/save {saved}", f"/save {saved}", "/image none.png", "/nothing", "/help")
    answer = assistant.answer(other, "Why?", 6)
    assert said[1] == answer
    assert json.loads(saved.read_text()) == {
        "image": str(other),
        "messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": answer}],
    }
    for command in ("/ask", "/image", "/new", "/save", "/help", "/quit"):
        assert command in said[-1]


def test_chat_takes_an_image_from_a_url_and_keeps_it(chat, assistant, tmp_path, monkeypatch):
    url, other = "https://example.org/other.png", tmp_path / "other.png"
    tiny.picture(3).save(other)
    monkeypatch.setattr(images, "_download", {url: other.read_bytes()}.__getitem__)
    said = chat(f"/image {url}", "/image -", "/image", "Why?", "/new", "Why?")
    assert said == [f"Now about {url}.", *[assistant.answer(other, "Why?", 6)] * 2]


def test_chat_saves_in_the_home_folder_over_no_other_file(chat, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "old.json").write_text("old")
    chat("/save ~/old.json", "/save ~/new.json")
    assert (tmp_path / "old.json").read_text() == "old" and (tmp_path / "new.json").is_file()
