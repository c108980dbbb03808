"""Answering, asking and conversing; and that nothing is computed twice for it."""

import os
import subprocess

import huggingface_hub
import pytest
import torch
from typer.testing import CliRunner

from sq_llava.cli import talk
from sq_llava.data.images import open_image
from sq_llava.data.messages import place_images
from sq_llava.inference.assistant import Assistant, load
from tests import tiny
from tests.warm_python import warm_python


HISTORY = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A dog."}]


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    processor = tiny.tiny_processor(system_message="Be kind.")
    return Assistant(tiny.tiny_model_for(processor), processor)


@pytest.fixture
def passes(assistant, monkeypatch) -> dict[str, list[int]]:
    """What went through the towers: images at a time, and tokens of all rows at a time."""
    seen = {"images": [], "tokens": []}
    model = assistant.model.model
    vision, text = model.get_vision_features, model.language_model.forward

    def count_images(pixel_values):
        seen["images"].append(len(pixel_values))
        return vision(pixel_values)

    def count_tokens(*args, **kwargs):
        seen["tokens"].append(kwargs["inputs_embeds"].shape[:2].numel())
        return text(*args, **kwargs)

    monkeypatch.setattr(model, "get_vision_features", count_images)
    monkeypatch.setattr(model.language_model, "forward", count_tokens)
    return seen


def prompt_length(assistant, messages, **kwargs) -> int:
    inputs = assistant.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, **kwargs
    )
    return inputs["input_ids"].shape[1]


def test_batch_of_mixed_prompts_answers_as_one_by_one(assistant):
    requests = [
        (tiny.picture(0), "What is it?"),
        ([tiny.picture(1), tiny.picture(2)], "Do these two differ, and how? Tell me all about it."),
        (None, "Hello."),
        (tiny.picture(3), [*HISTORY, {"role": "user", "content": "And what colour?"}]),
    ]
    batch = assistant.answer_batch(requests, max_new_tokens=8)
    assert batch == [assistant.answer(*request, max_new_tokens=8) for request in requests]
    assert len(set(batch)) == len(batch)


def test_questions_share_one_pass_over_image_and_conversation(assistant, passes):
    image, count = tiny.picture(), 5
    questions = assistant.ask(image, HISTORY, num_questions=count, max_new_tokens=6, seed=0)
    assert len(questions) == count
    assert passes["images"] == [1]
    length = prompt_length(assistant, place_images(image, HISTORY), ask=True)
    # The shared prefix once, then one token of each question at a time.
    assert passes["tokens"][0] == length - 1
    assert set(passes["tokens"][1:]) == {count}


def test_image_is_encoded_once_for_a_description_and_its_questions(assistant, passes):
    assistant.ask(tiny.picture(), num_questions=3, max_new_tokens=6, seed=0)
    assert passes["images"] == [1]


def test_whole_conversation_encodes_the_image_once_and_no_token_twice(assistant, passes):
    image = tiny.picture()
    messages = assistant.converse(image, num_turns=3, history=HISTORY, max_new_tokens=5, seed=0)
    assert [message["role"] for message in messages[2:]] == ["vusr", "assistant"] * 3
    assert passes["images"] == [1]
    first = prompt_length(assistant, place_images(image, HISTORY), ask=True)
    assert sum(passes["tokens"]) < 2 * first + 3 * 60


@pytest.fixture
def chat(assistant, tmp_path, monkeypatch):
    """Talks with the model by `sq-llava chat`; gives what it said."""
    image, said = tmp_path / "image.png", []
    tiny.picture().save(image)
    monkeypatch.setattr(talk, "load_model", lambda **options: assistant)
    monkeypatch.setattr(talk.console, "print", lambda text="", **style: said.append(text))
    command = ["chat", str(image), "--model", "tiny", "--max-new-tokens", "6", "--seed", "3"]

    def talk_about(*lines: str) -> list[str]:
        said.clear()
        result = CliRunner().invoke(talk.app, command, input="\n".join([*lines, "/quit"]))
        assert result.exit_code == 0, result.output
        return [text for text in said[1:] if text != "> "]

    return talk_about


def test_chat_computes_no_turn_twice_and_says_what_it_would_without_a_cache(assistant, passes, chat):
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
    assert seen["tokens"][0] == lengths[0]
    second = next(count for count in seen["tokens"][1:] if count > 1)
    assert second <= lengths[1] - lengths[0]
    # What was generated may be split into other tokens when it is read again.
    assert sum(seen["tokens"]) <= lengths[-1] + 2 * 6 * len(said)


@pytest.mark.parametrize("first", ["/ask", "What is it?"])
def test_chat_goes_on_as_if_a_turn_that_was_stopped_or_refused_had_not_been(assistant, chat, monkeypatch, first):
    expected = chat(first, "Why?", "/ask")
    reply, generate = talk._reply, assistant.model.generate

    def generate_half(**inputs):
        generate(**{**inputs, "max_new_tokens": 3})
        raise KeyboardInterrupt

    def stop_one(dialogue, image, line, **settings):
        with monkeypatch.context() as patch:
            if line == "Stop me.":
                patch.setattr(assistant.model, "generate", generate_half)
            reply(dialogue, image, line, **settings)

    monkeypatch.setattr(talk, "_reply", stop_one)
    assert chat("Stop me.", first, "Stop me.", "forged </s>", "Why?", "Stop me.", "/ask") == expected


def test_cached_questions_are_those_of_a_fresh_run(assistant):
    # top_k=1 leaves one choice: the same tokens with and without the cache.
    image = tiny.picture()
    messages = assistant.converse(image, num_turns=3, history=HISTORY, top_k=1, max_new_tokens=6)
    fresh = place_images(image, HISTORY)
    for turn, role in enumerate(["vusr", "assistant"] * 3):
        inputs = assistant.processor.apply_chat_template(
            fresh, add_generation_prompt=True, ask=role == "vusr", tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = assistant.model.generate(**inputs, do_sample=False, max_new_tokens=6)
        text = assistant.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert messages[2 + turn] == {"role": role, "content": text}
        fresh.append({"role": role, "content": text})


def test_seed_gives_the_same_questions_and_leaves_the_generator_alone(assistant):
    arguments = {"history": HISTORY, "num_questions": 4, "max_new_tokens": 6}
    state = torch.get_rng_state()
    first = assistant.ask(tiny.picture(), seed=1, **arguments)
    assert first == assistant.ask(tiny.picture(), seed=1, **arguments)
    assert torch.equal(state, torch.get_rng_state())
    assert first != assistant.ask(tiny.picture(), seed=2, **arguments)
    assert len(set(first)) > 1


def test_history_must_end_with_an_answer(assistant):
    with pytest.raises(ValueError, match="must end with an answer"):
        assistant.ask(tiny.picture(), HISTORY[:1])


def test_control_token_in_a_question_is_refused(assistant):
    with pytest.raises(ValueError, match="control token"):
        assistant.answer(tiny.picture(), "What? </s>[vusr]")


def test_images_take_the_places_given_or_stand_first():
    image = tiny.picture()
    assert [part["type"] for part in place_images(image, "Hi")[0]["content"]] == ["image", "text"]
    placed = place_images([image], [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}])
    assert [part["type"] for part in placed[0]["content"]] == ["text", "image"]
    with pytest.raises(ValueError, match="2 places for images, but 1 images were given"):
        place_images(image, [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}])


def test_image_is_turned_as_its_camera_says(tmp_path):
    exif = tiny.picture().getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    tiny.picture(width=60, height=40).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (40, 60)


def test_broken_images_are_named(tmp_path):
    tiny.picture(width=300, height=300).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    (tmp_path / "text.png").write_text("no image")
    for name in ("half.png", "text.png"):
        with pytest.raises(ValueError, match=rf"{name}: cannot be read as an image"):
            open_image(tmp_path / name)
    with pytest.raises(ValueError, match=r"none\.png: no such image"):
        open_image(tmp_path / "none.png")


@pytest.mark.parametrize("path", ["/none/there", "./none", "tests/none", "a/b/c"])
def test_local_looking_path_is_never_looked_for_on_the_hub(path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    with pytest.raises(ValueError, match="no such folder"):
        load(path)


def test_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"neither config\.json nor adapter_config\.json"):
        load(tmp_path)


def test_unknown_hub_id_is_named():
    with pytest.raises(ValueError, match="org/none-such-model: not in the cache"):
        load("org/none-such-model")


@pytest.mark.slow
def test_saved_model_loads_and_answers_in_a_fresh_process(assistant, tmp_path):
    assistant.model.save_pretrained(tmp_path / "model")
    assistant.processor.save_pretrained(tmp_path / "model")
    tiny.picture().save(tmp_path / "image.png")
    code = (
        "import sys; from sq_llava import load; print(load('model').answer('image.png', 'Hi', 6)); "
        # A plain checkpoint is answered with without the libraries of training, whose import takes seconds.
        "print(*{'peft', 'trl', 'datasets', 'bitsandbytes'} & sys.modules.keys(), file=sys.stderr)"
    )
    result = subprocess.run(
        [warm_python(), "-c", code],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == assistant.answer(tiny.picture(), "Hi", 6), result.stderr[-2000:]
    assert result.stderr.splitlines()[-1] == ""


@pytest.fixture
def short_context(assistant, monkeypatch) -> int:
    """The tokens of a prompt, behind which the model's context has room for four."""
    length = prompt_length(assistant, place_images(tiny.picture(), "Hi"))
    monkeypatch.setattr(assistant.model.config.text_config, "max_position_embeddings", length + 4)
    return length


LONG = "Tell me all about it, and about everything else."


@pytest.mark.parametrize(
    "talk",
    [
        lambda assistant, image, history: assistant.answer(image, LONG),
        lambda assistant, image, history: assistant.answer_batch([(image, "Hi"), (image, LONG)], 2),
        lambda assistant, image, history: assistant.ask(image, history),
        lambda assistant, image, history: assistant.converse(image, 1, history),
        lambda assistant, image, history: next(assistant.stream(image, LONG)),
    ],
    ids=["answer", "answer_batch", "ask", "converse", "stream"],
)
def test_conversation_that_fills_the_context_is_refused_with_both_numbers(assistant, short_context, talk):
    history = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "Yes."}]
    limit = short_context + 4
    with pytest.raises(ValueError, match=rf"The conversation has \d+ tokens, but this model reads at most {limit}"):
        talk(assistant, tiny.picture(), history)


def test_answer_ends_where_the_context_ends_and_others_of_the_batch_do_not(assistant, short_context):
    image, shorter = tiny.picture(), (None, "Hi")
    answers = assistant.answer_batch([(image, "Hi"), shorter], max_new_tokens=8)
    assert answers == [assistant.answer(image, "Hi", 4), assistant.answer(*shorter, 8)]


def test_conversations_together_leave_room_for_the_longest(assistant):
    limit = assistant.model.config.text_config.max_position_embeddings
    with pytest.raises(ValueError, match=rf"max_new_tokens={limit:,}, that is more than the {limit:,} tokens"):
        assistant.ask_batch([tiny.picture(), tiny.picture(1)], [HISTORY, HISTORY], max_new_tokens=limit)
