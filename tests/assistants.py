"""Tiny assistants for tests, and a record of what goes through a model."""

from sq_llava.data.messages import place_images
from sq_llava.inference.assistant import Assistant
from tests import tiny


HISTORIES = [
    [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A dog."}],
    [{"role": "user", "content": "Is there a red circle?"}, {"role": "assistant", "content": "No, a blue square."}],
    [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There, in the green grass."}],
]


def tiny_assistant(system_message: str = "Be kind.", **overrides) -> Assistant:
    """`overrides` are fields of `SQLlavaConfig`."""
    processor = tiny.tiny_processor(system_message=system_message)
    return Assistant(tiny.tiny_model_for(processor, **overrides), processor)


def record_passes(assistant: Assistant, monkeypatch) -> dict[str, list]:
    """For each pass: the number of images through the vision tower; rows and columns through the language model."""
    passes, model = {"images": [], "tokens": []}, assistant.model.model
    vision, text = model.get_vision_features, model.language_model.forward

    def see(pixel_values):
        passes["images"].append(len(pixel_values))
        return vision(pixel_values)

    def read(*args, **kwargs):
        passes["tokens"].append(tuple(kwargs["inputs_embeds"].shape[:2]))
        return text(*args, **kwargs)

    monkeypatch.setattr(model, "get_vision_features", see)
    monkeypatch.setattr(model.language_model, "forward", read)
    return passes


def prompt_length(assistant: Assistant, messages: list[dict], **kwargs) -> int:
    """Tokens of a prompt."""
    inputs = assistant.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, **kwargs
    )
    return inputs["input_ids"].shape[1]


def assert_batch_equals_one_by_one(assistant: Assistant, requests: list[tuple], **settings) -> list[str]:
    """Checks that a batch gives the same answers as single calls, and returns them."""
    answers = assistant.answer_batch(requests, **settings)
    assert answers == [assistant.answer(*request, **settings) for request in requests]
    return answers


def assert_converses_as_without_a_cache(assistant: Assistant, image, history: list[dict], num_turns: int) -> None:
    """With top_k=1 there is only one choice: the tokens must be the same with and without the cache."""
    messages = assistant.converse(image, num_turns=num_turns, history=history, top_k=1, max_new_tokens=6)
    fresh = place_images(image, history)
    for turn, role in enumerate(["vusr", "assistant"] * num_turns):
        inputs = assistant.processor.apply_chat_template(
            fresh, add_generation_prompt=True, ask=role == "vusr", tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = assistant.model.generate(**inputs, do_sample=False, max_new_tokens=6)
        text = assistant.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert messages[2 + turn] == {"role": role, "content": text}
        fresh.append({"role": role, "content": text})
