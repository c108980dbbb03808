"""Prompts with a common prefix: every answer and question must be the same as for its prompt alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList

from sq_llava.data.messages import place_images
from sq_llava.inference.dialogues import Dialogues
from sq_llava.inference.prefix_cache import PrefixCache, allows_gaps, common_length, pad_left
from sq_llava.inference.sampling import SeededDraw
from tests import tiny
from tests.assistants import HISTORIES, assert_batch_equals_one_by_one, record_passes, tiny_assistant


IMAGES = [tiny.picture(seed) for seed in range(3)]
QUESTIONS = ["What animal is this?", "What animal is running in the green grass?", "Why?", "What colour is the shape?"]
# Language models with other positions, normalisation, head sharing and windows. This window is longer than a prompt.
WINDOWED = {**tiny.TINY_LLAMA, "model_type": "mistral", "sliding_window": 512}
# Two layers of LFM2. The first one is a convolution over the tokens.
CONVOLUTIONS = {**tiny.TINY_LLAMA, "model_type": "lfm2", "layer_types": ["conv", "full_attention"]}
FAMILIES = {
    "llama": {},
    "siglip": {"vision_config": dict(tiny.TINY_SIGLIP)},
    "released": {"prototype_variant": "released"},
    "no prototypes": {"prototype_variant": "none", "projector_type": "linear"},
    "qwen2": {"text_config": {**tiny.TINY_LLAMA, "model_type": "qwen2"}},
    "qwen3": {"text_config": {**tiny.TINY_LLAMA, "model_type": "qwen3", "head_dim": 16}},
    "mistral": {"text_config": WINDOWED},
    "mistral, short window": {"text_config": {**WINDOWED, "sliding_window": 24}},
    "gpt_neox": {"text_config": {**tiny.TINY_LLAMA, "model_type": "gpt_neox"}},
    "phi": {"text_config": {**tiny.TINY_LLAMA, "model_type": "phi"}},
}


def assert_asked_as_alone(assistant, histories=None, **settings) -> list[list[str]]:
    """Asks about three images in a batch, and one by one with the same seeds. Returns the questions."""
    seeds = [5, 6, 6]
    together = assistant.ask_batch(IMAGES, histories, seeds=seeds, **settings)
    alone = zip(IMAGES, histories or [None] * 3, seeds, strict=True)
    assert together == [assistant.ask(image, history, seed=seed, **settings) for image, history, seed in alone]
    return together


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_questions_about_one_image_are_answered_as_one_by_one(family):
    first, second, _ = IMAGES
    requests = [(first, question) for question in QUESTIONS] + [(second, QUESTIONS[1]), (None, "Hello.")]
    requests.insert(2, (second, [*HISTORIES[1], {"role": "user", "content": "And the triangle?"}]))
    answers = assert_batch_equals_one_by_one(tiny_assistant(**FAMILIES[family]), requests, max_new_tokens=8)
    assert len(set(answers)) > len(answers) / 2


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_of_images_is_asked_about_as_one_by_one(family):
    assistant = tiny_assistant(**FAMILIES[family])
    asked = assert_asked_as_alone(assistant, HISTORIES, num_questions=3, max_new_tokens=8)
    assert len({question for questions in asked for question in questions}) > 6


def test_each_image_is_described_in_the_batch_before_it_is_asked_about(assistant):
    assert_asked_as_alone(assistant, num_questions=2, max_new_tokens=7)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral, short window"])
def test_dialogues_continue_after_answers_of_different_lengths(family):
    assistant = tiny_assistant(**FAMILIES[family])

    def dialogues(*images) -> Dialogues:
        return Dialogues(assistant.model, assistant.processor, [place_images(each, "What is it?") for each in images])

    # Some answers must end early: a token in the middle of the second answer becomes an end token.
    probe = dialogues(*IMAGES)
    probe.answer(10)
    generated = probe.cache.tokens[:, -9:]
    early = next(token for token in generated[1, 2:6].tolist() if token not in generated[0].tolist())
    assistant.model.generation_config.eos_token_id = [assistant.processor.tokenizer.eos_token_id, early]
    together, single = dialogues(*IMAGES), [dialogues(image) for image in IMAGES]
    for _ in range(3):
        assert together.answer(10) == [each.answer(10)[0] for each in single]
        for conversation in [*together.messages, *(each.messages[0] for each in single)]:
            conversation.append({"role": "user", "content": [{"type": "text", "text": "And then?"}]})


def test_images_of_a_batch_go_through_the_model_once(assistant, monkeypatch):
    passes = record_passes(assistant, monkeypatch)
    assistant.answer_batch([(image, question) for image in IMAGES[:2] for question in QUESTIONS], max_new_tokens=3)
    assert passes["images"] == [2]
    # First the prefix of each image, then the rest of each prompt, then one token at a time.
    assert [rows for rows, _ in passes["tokens"]] == [2, 8, 8, 8]
    assert passes["tokens"][0][1] > assistant.model.config.image_seq_length
    assert passes["tokens"][1][1] < 40


def test_equal_paths_are_one_image(assistant, tmp_path, monkeypatch):
    path, passes = tmp_path / "image.png", record_passes(assistant, monkeypatch)
    tiny.picture().save(path)
    assistant.answer_batch([(path, "Why?"), (str(path), "Where?")], max_new_tokens=2)
    assert passes["images"] == [1]


def test_image_after_the_common_prefix_is_not_shared(assistant):
    def late_image(text: str) -> tuple:
        turn = {"role": "user", "content": [{"type": "text", "text": text}, {"type": "image"}]}
        return IMAGES[0], [*HISTORIES[0], turn]

    assert_batch_equals_one_by_one(assistant, [late_image("Look:"), late_image("What is this?")], max_new_tokens=6)


@pytest.mark.parametrize(
    "settings", [{"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
)
def test_decoding_with_another_cache_gives_the_same(assistant, settings):
    requests = [(IMAGES[0], question) for question in QUESTIONS]
    assert_batch_equals_one_by_one(assistant, requests, max_new_tokens=6, **settings)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.2, "top_k": 300, "top_p": 0.95},
        {"temperature": 0.7, "top_k": 5, "top_p": 1.0},
        {"temperature": 2.0, "top_k": 10_000, "top_p": 0.5},
        {"temperature": 1.0, "top_k": 50, "top_p": 0.0},
    ],
    ids=str,
)
def test_seeded_draw_equals_that_of_transformers(assistant, sampling):
    inputs = tiny.tiny_inputs(assistant.model.config, num_images=1)
    torch.manual_seed(11)
    expected = assistant.model.generate(
        **inputs, **sampling, do_sample=True, num_return_sequences=4, max_new_tokens=12
    )
    # Other rows draw in between, from their own generator.
    rows = {name: value.repeat_interleave(8, dim=0) for name, value in inputs.items()}
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 11)]
    draw = LogitsProcessorList([SeededDraw(**sampling, generators=generators)])
    drawn = assistant.model.generate(**rows, do_sample=False, logits_processor=draw, max_new_tokens=12)
    assert torch.equal(drawn[4:, : expected.shape[1]], expected)
    if sampling["top_p"] > 0:
        assert not torch.equal(drawn[:4], drawn[4:])


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.0), ("top_k", 0), ("top_p", 1.5)])
def test_sampling_setting_out_of_range_is_refused(assistant, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        assistant.ask(tiny.picture(), HISTORIES[0], max_new_tokens=1, **{name: value})


def test_seeds_and_histories_that_do_not_fit_are_refused(assistant):
    with pytest.raises(ValueError, match="There are 1 seeds for 2 conversations"):
        assistant.ask_batch(IMAGES[:2], HISTORIES[:2], 2, seeds=[0])
    with pytest.raises(ValueError, match="The history ends with the role None"):
        assistant.ask(tiny.picture(), [])


def test_draws_have_the_probabilities_of_the_warped_softmax():
    scores = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0]]).expand(40_000, -1)
    draw = SeededDraw(temperature=1.5, top_k=4, top_p=0.8, generators=[torch.Generator().manual_seed(0)])
    shares = torch.bincount(draw(None, scores).argmax(dim=-1), minlength=6) / len(scores)
    kept = (scores[0, :4] / 1.5).softmax(dim=-1)
    assert kept[:2].sum() < 0.8 < kept[:3].sum()
    torch.testing.assert_close(shares[:3], kept[:3] / kept[:3].sum(), atol=0.01, rtol=0)
    assert shares[3:].sum() == 0


TOKENS = st.lists(st.integers(1, 9), min_size=2, max_size=12)


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=4), st.data())
def test_continued_cache_gives_the_logits_of_whole_prompts(pairs, data):
    """Reads any prompts, then continues rows, also repeated ones, with other prompts."""
    model = TEXT_MODEL
    cache = PrefixCache(model, len(pairs))
    with torch.inference_mode():
        cache.read([first for first, _ in pairs], {})
        rows = data.draw(st.lists(st.integers(0, len(pairs) - 1), min_size=1, max_size=5))
        kept = [data.draw(st.integers(0, len(pairs[row][0]))) for row in rows]
        prompts = [pairs[row][0][:length] + pairs[row][1] for row, length in zip(rows, kept)]
        selected = cache.select(rows)
        inputs = selected.continue_with(prompts)
        width = selected.tokens.shape[1]
        position_ids = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)[:, width:]
        logits = model(
            input_ids=inputs["input_ids"][:, width:],
            attention_mask=inputs["attention_mask"],
            position_ids=position_ids,
            cache=selected.states,
        ).logits[:, -1]
        for row, prompt in zip(logits, prompts):
            torch.testing.assert_close(
                row, model(input_ids=torch.tensor([prompt])).logits[0, -1], atol=1e-4, rtol=1e-4
            )


TEXT_MODEL = tiny.tiny_model()


@given(TOKENS, TOKENS)
def test_common_length_is_the_longest(one, other):
    length = common_length(one, other)
    assert one[:length] == other[:length]
    assert length in (len(one), len(other)) or one[length] != other[length]


def test_left_padding():
    tokens, mask = pad_left([[1, 2, 3], [4]], 9)
    assert tokens.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_short_attention_windows_allow_no_gaps(assistant):
    assert allows_gaps(assistant.model, 10_000)
    windowed = tiny_assistant(text_config=WINDOWED).model
    assert allows_gaps(windowed, 512) and not allows_gaps(windowed, 513)


def test_model_with_recurrent_layers_asks_and_answers_without_a_cache():
    assistant = tiny_assistant(text_config=CONVOLUTIONS)
    assert not allows_gaps(assistant.model, 10)
    assert_asked_as_alone(assistant, HISTORIES, num_questions=2, max_new_tokens=6)
    turns = assistant.converse(IMAGES[0], num_turns=2, max_new_tokens=6, seed=0)
    assert [turn["role"] for turn in turns] == ["user", "assistant", *["vusr", "assistant"] * 2]
