"""Rows in a batch, compared with `generate()`; and text that comes in pieces, compared with the whole text."""

import time

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from sq_llava.data.messages import place_images
from sq_llava.inference.assistant import Assistant
from sq_llava.serving.decoding import Batch, Prompt, Row, RowText, Sampling, _join_caches
from sq_llava.serving.engine import Engine, Failure, Generation
from tests import tiny
from tests.assistants import tiny_assistant


TOKENIZERS = {name: make() for name, make in tiny.TOKENIZERS.items()}
REQUESTS = [
    (tiny.picture(0), "What is it?"),
    ([tiny.picture(1), tiny.picture(2)], "Do these two differ, and how? Tell me all about it."),
    (None, "Hello."),
    (tiny.picture(3), "Is there a red circle in the picture?"),
]


def encode(assistant: Assistant, images, text: str):
    return assistant.processor.apply_chat_template(
        place_images(images, text), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def prompt_of(inputs) -> Prompt:
    return Prompt(inputs["input_ids"][0].tolist(), inputs.get("pixel_values"))


def row(assistant: Assistant, index: int = 0, **sampling) -> Row:
    return Row.begin(Sampling(**sampling), index, assistant.processor.tokenizer, assistant.model.device)


def run(batch: Batch) -> None:
    while batch.rows:
        batch.step()


def generated(assistant: Assistant, inputs, seed: int | None = None, **settings) -> list[int]:
    if seed is not None:
        torch.manual_seed(seed)
    output = assistant.model.generate(**inputs, **settings)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def test_greedy_rows_that_join_one_after_another_equal_generate(assistant):
    batch, rows = Batch(assistant.model), []
    lengths = [5 + 3 * number for number in range(len(REQUESTS))]
    for length, request in zip(lengths, REQUESTS):
        rows.append(row(assistant, max_new_tokens=length))
        batch.join([prompt_of(encode(assistant, *request))], [rows[-1:]])
        batch.step()
        batch.step()
    run(batch)
    assert_equal_generate(assistant, rows, lengths)


def assert_equal_generate(assistant: Assistant, rows: list[Row], lengths: list[int]) -> None:
    for one, request, length in zip(rows, REQUESTS, lengths, strict=True):
        expected = generated(assistant, encode(assistant, *request), do_sample=False, max_new_tokens=length)
        assert one.text.ids == expected


def in_one_pass(assistant: Assistant) -> list[Row]:
    batch = Batch(assistant.model)
    rows = [row(assistant, max_new_tokens=9) for _ in REQUESTS]
    batch.join([prompt_of(encode(assistant, *request)) for request in REQUESTS], [[one] for one in rows])
    run(batch)
    return rows


def test_prompts_in_one_pass_equal_generate(assistant):
    assert_equal_generate(assistant, in_one_pass(assistant), [9] * len(REQUESTS))


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.8}, {"temperature": 1.0, "top_k": 7}], ids=str
)
def test_sampled_row_among_others_equals_generate_with_its_seed(assistant, sampling):
    inputs = encode(assistant, *REQUESTS[0])
    expected = generated(assistant, inputs, 5, do_sample=True, max_new_tokens=12, **{"top_k": 0, **sampling})
    batch = Batch(assistant.model)
    mine = row(assistant, index=2, max_new_tokens=12, seed=3, **sampling)  # the index is added to the seed
    other = row(assistant, max_new_tokens=20, temperature=1.0, seed=9)
    batch.join([prompt_of(encode(assistant, *REQUESTS[1])), prompt_of(inputs)], [[other], [mine]])
    run(batch)
    assert mine.text.ids == expected
    assert len(other.text.ids) == 20


def test_markers_are_never_generated(assistant):
    batch = Batch(assistant.model)
    batch.join([prompt_of(encode(assistant, *REQUESTS[0]))], [[row(assistant, max_new_tokens=1)]])
    markers = [assistant.model.config.image_token_id, assistant.model.config.vusr_token_id]
    batch.logits = batch.logits.index_fill(1, torch.tensor(markers), 1e4)
    (only,) = batch.step()
    assert not set(only.text.ids) & set(markers)


def test_padding_leaves_with_the_longest_row(assistant):
    batch = Batch(assistant.model)
    short, long = (prompt_of(encode(assistant, *REQUESTS[index])) for index in (2, 1))
    batch.join([long, short], [[row(assistant, max_new_tokens=1)], [row(assistant, max_new_tokens=3)]])
    batch.step()
    assert batch.mask.shape == (1, len(short.input_ids) + 1)
    assert batch.cache.get_seq_length() == len(short.input_ids) + 1


def test_sliding_window_of_a_language_model_is_kept(assistant):
    text_config = {**tiny.TINY_LLAMA, "model_type": "mistral", "sliding_window": 8}
    sliding = tiny_assistant(text_config=text_config)
    rows = in_one_pass(sliding)
    assert_equal_generate(sliding, rows, [9] * len(REQUESTS))
    config = LlamaConfig(**{**text_config, "model_type": "llama"})
    wide = tiny_assistant(text_config=config.to_dict())
    wide.model.load_state_dict(sliding.model.state_dict())
    assert generated(wide, encode(wide, *REQUESTS[1]), max_new_tokens=9) != rows[1].text.ids


def test_unsupported_generation_setting_is_refused():
    model = tiny_assistant().model
    model.generation_config.repetition_penalty = 1.2
    with pytest.raises(ValueError, match=r"repetition_penalty is 1\.2"):
        Batch(model)


def pieces_of(tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[str, list[str]]:
    text, pieces = RowText(tokenizer, stop), []
    for number, token_id in enumerate(ids, 1):
        text.push(token_id, number == len(ids))
        is_last = number == len(ids) or text.is_stopped
        pieces.append(text.take(is_last))
        if is_last:
            break
    return "".join(pieces), pieces


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(sorted(TOKENIZERS)), numbers=st.lists(st.integers(0, 10_000), max_size=30))
def test_pieces_of_any_tokens_are_the_whole_text(name, numbers):
    tokenizer = TOKENIZERS[name]
    ids = [number % len(tokenizer) for number in numbers]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assume("\ufffd" not in whole)
    assert pieces_of(tokenizer, ids)[0] == whole.strip()


def test_space_after_a_special_token_is_kept():
    tokenizer = TOKENIZERS["llama"]
    word = tokenizer("p", add_special_tokens=False).input_ids
    ids = [*word, tokenizer.unk_token_id, *word]
    assert pieces_of(tokenizer, ids)[0] == tokenizer.decode(ids, skip_special_tokens=True) == "p p"


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(sorted(TOKENIZERS)), text=st.text(max_size=20))
def test_pieces_of_any_text_are_that_text(name, text):
    ids = TOKENIZERS[name](text, add_special_tokens=False).input_ids
    assert pieces_of(TOKENIZERS[name], ids)[0] == TOKENIZERS[name].decode(ids, skip_special_tokens=True).strip()


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(sorted(TOKENIZERS)),
    text=st.text("aé日 \n😀b", max_size=20),
    stop=st.lists(st.text("aé日 \n😀b", min_size=1, max_size=3), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string(name, text, stop):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    found = pieces_of(tokenizer, ids, tuple(stop))[0]
    # If stop strings overlap, the first complete one ends the text: the others are never generated.
    assert found in {whole[: whole.find(string)].strip() for string in stop if string in whole} or {whole.strip()}
    assert not any(string in found for string in stop)


def test_character_of_several_tokens_comes_in_one_piece():
    tokenizer = TOKENIZERS["llama"]
    ids = tokenizer("a 😀 b", add_special_tokens=False).input_ids
    text, pieces = pieces_of(tokenizer, ids)
    assert text == "a 😀 b"
    assert len([piece for piece in pieces if piece]) < len(ids) and "\ufffd" not in "".join(pieces)


def test_cancelled_request_leaves_the_queue(assistant):
    engine = Engine(assistant, max_batch_size=4)
    prompt, pieces = prompt_of(encode(assistant, *REQUESTS[2])), []
    running = Generation(prompt, Sampling(50), 1, lambda piece: None)
    gone = [Generation(prompt, Sampling(50), 4, lambda piece: None) for _ in range(10)]
    wanted = Generation(prompt, Sampling(2), 1, pieces.append)
    for generation in (running, *gone, wanted):
        engine.submit(generation)
    for generation in gone:
        generation.cancel()
    engine._join(engine._take_waiting())
    engine._advance()
    assert not engine.waiting and len(engine.batch.rows) == 2 and len(pieces) == 1


def test_request_that_fails_to_join_leaves_the_running_ones_alone(assistant, monkeypatch):
    running, joining = (encode(assistant, *REQUESTS[index]) for index in (2, 0))
    expected = generated(assistant, running, do_sample=False, max_new_tokens=60)
    forward, width = assistant.model.forward, joining["input_ids"].shape[1]
    pieces, failures = [], []

    def fail_on_one(**inputs):
        if inputs["input_ids"].shape[1] == width:
            raise RuntimeError("out of memory")
        return forward(**inputs)

    monkeypatch.setattr(assistant.model, "forward", fail_on_one)
    with Engine(assistant, max_batch_size=2) as engine:
        generation = Generation(prompt_of(running), Sampling(60), 1, pieces.append)
        engine.submit(generation)
        while not pieces:
            time.sleep(0.001)
        engine.submit(Generation(prompt_of(joining), Sampling(60), 1, failures.append))
    assert failures == [Failure("The model failed on this request.")]
    assert generation.rows[0].text.ids == expected and len(pieces) == 60


def test_cache_is_as_before_if_another_cannot_be_joined(assistant):
    batches = [Batch(assistant.model), Batch(assistant.model)]
    for batch, request in zip(batches, (REQUESTS[2], REQUESTS[1])):
        batch.join([prompt_of(encode(assistant, *request))], [[row(assistant, max_new_tokens=5)]])
    first, second = batches
    before = [(layer.keys, layer.values) for layer in first.cache.layers]
    last = second.cache.layers[-1]
    last.values = last.values[:, :1]  # another number of heads
    with pytest.raises(RuntimeError, match="Sizes of tensors"):
        _join_caches(first.cache, first.mask, second.cache, second.mask)
    for (keys, values), layer in zip(before, first.cache.layers):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
