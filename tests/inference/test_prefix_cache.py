"""Prompts that share what they begin with: every answer and question is that of its prompt alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList

from sq_llava.data.messages import place_images
from sq_llava.inference.assistant import Assistant
from sq_llava.inference.dialogues import Dialogues
from sq_llava.inference.prefix_cache import PrefixCache, allows_gaps, common_length, pad_left
from sq_llava.inference.sampling import SeededDraw
from tests import tiny


HISTORIES = [
    [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A dog."}],
    [{"role": "user", "content": "Is there a red circle?"}, {"role": "assistant", "content": "No, a blue square."}],
    [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There, in the green grass."}],
]
QUESTIONS = ["What animal is this?", "What animal is running in the green grass?", "Why?", "What colour is the shape?"]
# Families with positions, normalisation, head sharing and windows of their own; the window holds a prompt and more.
WINDOWED = {**tiny.TINY_LLAMA, "model_type": "mistral", "sliding_window": 512}
# Two layers of LFM2, the first a convolution over the tokens.
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


def make_assistant(**overrides) -> Assistant:
    processor = tiny.tiny_processor(system_message="Be kind.")
    return Assistant(tiny.tiny_model_for(processor, **overrides), processor)


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return make_assistant()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_questions_about_one_image_are_answered_as_one_by_one(family):
    assistant = make_assistant(**FAMILIES[family])
    first, second = tiny.picture(0), tiny.picture(1)
    requests = [(first, question) for question in QUESTIONS] + [(second, QUESTIONS[1]), (None, "Hello.")]
    requests.insert(2, (second, [*HISTORIES[1], {"role": "user", "content": "And the triangle?"}]))
    answers = assistant.answer_batch(requests, max_new_tokens=8)
    assert answers == [assistant.answer(*request, max_new_tokens=8) for request in requests]
    assert len(set(answers)) > len(answers) / 2


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_of_images_is_asked_about_as_one_by_one(family):
    assistant = make_assistant(**FAMILIES[family])
    images, seeds = [tiny.picture(seed) for seed in range(3)], [5, 6, 7]
    arguments = {"num_questions": 3, "max_new_tokens": 8}
    together = assistant.ask_batch(images, HISTORIES, seeds=seeds, **arguments)
    alone = [assistant.ask(*each, seed=seed, **arguments) for *each, seed in zip(images, HISTORIES, seeds)]
    assert together == alone
    assert len({question for questions in together for question in questions}) > 6


def test_each_image_is_described_in_the_batch_before_it_is_asked_about(assistant):
    images, seeds = [tiny.picture(seed) for seed in range(3)], [1, 1, 2]
    together = assistant.ask_batch(images, num_questions=2, max_new_tokens=7, seeds=seeds)
    alone = [assistant.ask(image, num_questions=2, max_new_tokens=7, seed=seed) for image, seed in zip(images, seeds)]
    assert together == alone


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral, short window"])
def test_talks_go_on_after_answers_of_different_lengths(family):
    assistant = make_assistant(**FAMILIES[family])
    model, tokenizer = assistant.model, assistant.processor.tokenizer
    # An end that comes early for some rows: the token that the second picture's answer has in its middle.
    images = [tiny.picture(seed) for seed in range(3)]
    prompts = [place_images(image, "What is it?") for image in images]
    probe = Dialogues(assistant.model, assistant.processor, [list(prompt) for prompt in prompts])
    probe.answer(10)
    generated = probe.cache.tokens[:, -9:]
    early = next(token for token in generated[1, 2:6].tolist() if token not in generated[0].tolist())
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, early]
    talks = Dialogues(assistant.model, assistant.processor, [list(prompt) for prompt in prompts])
    single = [Dialogues(assistant.model, assistant.processor, [list(prompt)]) for prompt in prompts]
    for _ in range(3):
        expected = [talk.answer(10)[0] for talk in single]
        assert talks.answer(10) == expected
        for conversation in [*talks.messages, *(talk.messages[0] for talk in single)]:
            conversation.append({"role": "user", "content": [{"type": "text", "text": "And then?"}]})


def test_images_of_a_batch_go_through_the_model_once(assistant, monkeypatch):
    model, seen = assistant.model.model, {"images": [], "tokens": []}
    vision, text = model.get_vision_features, model.language_model.forward
    monkeypatch.setattr(model, "get_vision_features", lambda p: seen["images"].append(len(p)) or vision(p))

    def count_tokens(*args, **kwargs):
        seen["tokens"].append(tuple(kwargs["inputs_embeds"].shape[:2]))
        return text(*args, **kwargs)

    monkeypatch.setattr(model.language_model, "forward", count_tokens)
    requests = [(tiny.picture(number), question) for number in range(2) for question in QUESTIONS]
    paired = [(requests[4 * (number // 4)][0], question) for number, (_, question) in enumerate(requests)]
    assistant.answer_batch(paired, max_new_tokens=3)
    assert seen["images"] == [2]
    # Prefixes once for each image, then what differs, then a token at a time.
    assert [rows for rows, _ in seen["tokens"]] == [2, 8, 8, 8]
    assert seen["tokens"][0][1] > model.config.image_seq_length
    assert seen["tokens"][1][1] < 40


def test_paths_name_one_image(assistant, tmp_path, monkeypatch):
    tiny.picture().save(tmp_path / "image.png")
    counted, vision = [], assistant.model.model.get_vision_features
    monkeypatch.setattr(assistant.model.model, "get_vision_features", lambda p: counted.append(len(p)) or vision(p))
    requests = [(tmp_path / "image.png", "Why?"), (str(tmp_path / "image.png"), "Where?")]
    assistant.answer_batch(requests, max_new_tokens=2)
    assert counted == [1]


def test_image_behind_what_prompts_share_is_no_prefix(assistant):
    image = tiny.picture()

    def late_image(text: str) -> list[dict]:
        return [*HISTORIES[0], {"role": "user", "content": [{"type": "text", "text": text}, {"type": "image"}]}]

    requests = [(image, late_image("Look:")), (image, late_image("What is this?"))]
    answers = assistant.answer_batch(requests, max_new_tokens=6)
    assert answers == [assistant.answer(*request, max_new_tokens=6) for request in requests]


@pytest.mark.parametrize(
    "settings", [{"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
)
def test_ways_of_decoding_with_a_cache_of_their_own_give_the_same(assistant, settings):
    requests = [(image, question) for image in [tiny.picture()] for question in QUESTIONS]
    answers = assistant.answer_batch(requests, max_new_tokens=6, **settings)
    assert answers == [assistant.answer(*request, max_new_tokens=6, **settings) for request in requests]


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
def test_a_seeded_draw_is_that_of_transformers(assistant, sampling):
    inputs = tiny.tiny_inputs(assistant.model.config, num_images=1)
    torch.manual_seed(11)
    expected = assistant.model.generate(
        **inputs, **sampling, do_sample=True, num_return_sequences=4, max_new_tokens=12
    )
    # Another row draws in between, from its own generator.
    rows = {name: value.repeat_interleave(8, dim=0) for name, value in inputs.items()}
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 11)]
    draw = LogitsProcessorList([SeededDraw(**sampling, generators=generators)])
    drawn = assistant.model.generate(**rows, do_sample=False, logits_processor=draw, max_new_tokens=12)
    assert torch.equal(drawn[4:, : expected.shape[1]], expected)
    if sampling["top_p"] > 0:
        assert not torch.equal(drawn[:4], drawn[4:])


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.0), ("top_k", 0), ("top_p", 1.5)])
def test_sampling_with_nothing_to_draw_from_is_refused(assistant, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        assistant.ask(tiny.picture(), HISTORIES[0], max_new_tokens=1, **{name: value})


def test_seeds_and_histories_that_do_not_fit_are_refused(assistant):
    with pytest.raises(ValueError, match="There are 1 seeds for 2 conversations"):
        assistant.ask_batch([tiny.picture(), tiny.picture(1)], HISTORIES[:2], 2, seeds=[0])
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
def test_a_continued_cache_gives_the_logits_of_whole_prompts(pairs, data):
    """Any prompts, then any others in their rows, repeated: as if each were read from its beginning."""
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


def test_layers_without_keys_and_short_windows_allow_no_gaps(assistant):
    assert allows_gaps(assistant.model, 10_000)
    windowed = make_assistant(text_config=WINDOWED).model
    assert allows_gaps(windowed, 512) and not allows_gaps(windowed, 513)
    assert not allows_gaps(make_assistant(text_config=CONVOLUTIONS).model, 10)


def test_model_with_layers_without_keys_asks_and_answers_without_a_cache():
    assistant = make_assistant(text_config=CONVOLUTIONS)
    images, seeds = [tiny.picture(0), tiny.picture(1)], [3, 4]
    together = assistant.ask_batch(images, HISTORIES[:2], num_questions=2, max_new_tokens=6, seeds=seeds)
    alone = zip(images, HISTORIES, seeds)
    assert together == [
        assistant.ask(image, history, num_questions=2, max_new_tokens=6, seed=seed) for image, history, seed in alone
    ]
    turns = assistant.converse(images[0], num_turns=2, max_new_tokens=6, seed=0)
    assert [turn["role"] for turn in turns] == ["user", "assistant", *["vusr", "assistant"] * 2]
