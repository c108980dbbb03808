"""Decoding: greedy, beams, samples and assistants; batched or alone, with several images or none."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from modeling_sq_llava import CACHE_NAME
from tests.tiny import TINY_LLAMA, left_padded, tiny_config, tiny_inputs, tiny_model


NUM_NEW_TOKENS = 10


def generate(model, inputs, **kwargs):
    """`NUM_NEW_TOKENS` new tokens."""
    settings = {"do_sample": False, "min_new_tokens": NUM_NEW_TOKENS, "max_new_tokens": NUM_NEW_TOKENS, **kwargs}
    return model.generate(**inputs, **settings)[:, -NUM_NEW_TOKENS:]


def prompts_with(config, numbers_of_images):
    return [
        tiny_inputs(config, num_images=number, num_words=8 + 3 * row, seed=row)
        for row, number in enumerate(numbers_of_images)
    ]


def test_greedy_generation_equals_the_argmax_of_full_forward_passes(tiny_model):
    inputs = tiny_inputs(tiny_model.config, num_images=2)
    answer = generate(tiny_model, inputs)
    sequence = inputs["input_ids"]
    for token in answer[0]:
        with torch.no_grad():
            logits = tiny_model(input_ids=sequence, pixel_values=inputs["pixel_values"]).logits[0, -1]
        logits[[tiny_model.config.image_token_id, tiny_model.config.vusr_token_id, 2]] = -torch.inf
        assert logits.argmax() == token
        sequence = torch.cat([sequence, token.view(1, 1)], dim=1)
    assert len(set(answer[0].tolist())) > 3


@pytest.mark.slow
@pytest.mark.parametrize("numbers_of_images", [[1, 1], [2, 0, 1], [0, 0], [3, 1, 2]], ids=str)
@pytest.mark.parametrize(
    "decoding",
    [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 3}],
    ids=["greedy", "static cache", "no cache", "beams"],
)
def test_a_left_padded_batch_generates_what_each_prompt_generates_alone(decoding, numbers_of_images, tiny_model):
    prompts = prompts_with(tiny_model.config, numbers_of_images)
    alone = torch.cat([generate(tiny_model, prompt, **decoding) for prompt in prompts])
    assert torch.equal(generate(tiny_model, left_padded(prompts), **decoding), alone)
    assert len(alone.unique(dim=0)) == len(prompts)


@pytest.mark.parametrize("cache", [{"cache_implementation": "static"}, {"use_cache": False}], ids=["static", "none"])
def test_each_cache_gives_the_tokens_of_the_dynamic_one(cache, tiny_model):
    inputs = tiny_inputs(tiny_model.config, num_images=2)
    assert torch.equal(generate(tiny_model, inputs, **cache), generate(tiny_model, inputs))


def test_samples_of_a_prompt_see_its_own_images_in_their_order(tiny_model):
    prompts = prompts_with(tiny_model.config, [2, 0, 3])
    greedy = torch.cat([generate(tiny_model, prompt) for prompt in prompts])
    # With top_k=1, a sample equals the greedy answer if and only if it sees the same images.
    samples = generate(tiny_model, left_padded(prompts), do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(samples, greedy.repeat_interleave(3, dim=0))


def test_samples_differ_and_repeat_with_the_seed(tiny_model):
    inputs = tiny_inputs(tiny_model.config, num_images=2)
    settings = {"do_sample": True, "temperature": 1.2, "top_k": 300, "top_p": 0.95, "num_return_sequences": 4}
    torch.manual_seed(3)
    samples = generate(tiny_model, inputs, **settings)
    torch.manual_seed(3)
    assert torch.equal(generate(tiny_model, inputs, **settings), samples)
    assert len(samples.unique(dim=0)) == 4


def test_scores_of_beams_are_the_log_probabilities_of_their_tokens(tiny_model):
    inputs = tiny_inputs(tiny_model.config, num_images=2)
    outputs = tiny_model.generate(
        **inputs,
        do_sample=False,
        num_beams=3,
        num_return_sequences=3,
        min_new_tokens=NUM_NEW_TOKENS,
        max_new_tokens=NUM_NEW_TOKENS,
        suppress_tokens=None,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert len(outputs.sequences.unique(dim=0)) == 3
    for sequence, score in zip(outputs.sequences, outputs.sequences_scores):
        with torch.no_grad():
            logits = tiny_model(input_ids=sequence[None], pixel_values=inputs["pixel_values"]).logits[0]
        log_probabilities = logits[-NUM_NEW_TOKENS - 1 : -1].log_softmax(dim=-1)
        expected = log_probabilities.gather(1, sequence[-NUM_NEW_TOKENS:, None]).sum()
        torch.testing.assert_close(score, expected, atol=1e-3, rtol=1e-4)


def assistants(model):
    narrow = tiny_model(tiny_config(text_config={**TINY_LLAMA, "hidden_size": 32}), seed=1)
    return {
        "itself": model,
        "another": tiny_model(seed=1),
        "a narrower one": narrow,
        "a text model": AutoModelForCausalLM.from_config(model.config.text_config).eval(),
    }


@pytest.mark.parametrize("assistant", ["itself", "another", "a narrower one", "a text model"])
def test_an_assistant_model_changes_no_token(assistant, tiny_model):
    inputs = tiny_inputs(tiny_model.config, num_images=2)
    assistant = assistants(tiny_model)[assistant]
    assert torch.equal(generate(tiny_model, inputs, assistant_model=assistant), generate(tiny_model, inputs))


def test_prompt_lookup_changes_no_token_and_never_drafts_an_image(tiny_model):
    inputs = tiny_inputs(tiny_model.config, num_images=2)
    # The prompt ends with its first words again, so the look-up finds the image placeholders that follow them.
    inputs["input_ids"] = torch.cat([inputs["input_ids"], inputs["input_ids"][:, :4]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    own_config = GenerationConfig(max_new_tokens=NUM_NEW_TOKENS, min_new_tokens=NUM_NEW_TOKENS)
    for settings in ({}, {"generation_config": own_config}):
        drafted = generate(tiny_model, inputs, prompt_lookup_num_tokens=6, **settings)
        assert torch.equal(drafted, generate(tiny_model, inputs))


def test_markers_are_never_generated(tiny_model, tmp_path):
    markers = [tiny_model.config.image_token_id, tiny_model.config.vusr_token_id]
    with torch.no_grad():
        tiny_model.lm_head.weight[markers] *= 100.0
    inputs = tiny_inputs(tiny_model.config)
    assert torch.isin(generate(tiny_model, inputs, suppress_tokens=None), torch.tensor(markers)).any()
    assert not torch.isin(generate(tiny_model, inputs), torch.tensor(markers)).any()
    tiny_model.save_pretrained(tmp_path)
    again = type(tiny_model).from_pretrained(tmp_path)
    assert again.generation_config.suppress_tokens == markers


def test_a_conversation_continues_from_its_cache_without_its_images(tiny_model):
    inputs = tiny_inputs(tiny_model.config, num_images=2)
    first = tiny_model.generate(**inputs, do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
    more = torch.cat([first.sequences, torch.tensor([[17, 23, 42]])], dim=1)
    expected = generate(tiny_model, {"input_ids": more, "pixel_values": inputs["pixel_values"]})
    continued = {"input_ids": more, CACHE_NAME: first[CACHE_NAME], "attention_mask": torch.ones_like(more)}
    assert torch.equal(generate(tiny_model, continued), expected)


def test_pixel_values_may_be_none_without_images(tiny_model):
    text = tiny_inputs(tiny_model.config, num_images=0)
    assert torch.equal(generate(tiny_model, text, pixel_values=None), generate(tiny_model, text))
    assert torch.equal(
        generate(tiny_model, text, pixel_values=None, num_beams=2), generate(tiny_model, text, num_beams=2)
    )


@pytest.mark.parametrize("variant", ["paper", "released", "none"])
def test_generation_runs_in_half_precision(variant):
    model = tiny_model(tiny_config(prototype_variant=variant)).to(torch.bfloat16)
    assert generate(model, tiny_inputs(model.config)).shape == (1, NUM_NEW_TOKENS)
