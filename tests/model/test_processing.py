"""The processor: chat template, loss mask, markers, settings."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import ProcessorMixin

from processing_sq_llava import PAD_TOKEN, SQLlavaProcessor
from tests.tiny import TOKENIZERS, byte_level_tokenizer, llama_tokenizer, picture, tiny_processor


IMAGE = {"type": "image", "image": picture()}


def user(*parts, **flags):
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content, **flags}


def assistant(text):
    return {"role": "assistant", "content": text}


def vusr(text):
    return {"role": "vusr", "content": text}


@pytest.fixture
def processor(any_tokenizer):
    """With each kind of tokenizer."""
    return tiny_processor(any_tokenizer, system_message="SYSTEM")


# Conversation -> the whole rendered text; the part between ⟦ and ⟧ is in the loss. SYSTEM is the system message. <s>,
# </s> and [vusr] are replaced by the tokenizer's own tokens and the processor's marker.
LAYOUTS = {
    "two turns, the second asked by the model": (
        [user(IMAGE, "What animal is this?"), assistant("A dog."), vusr("What is it doing?"), assistant("Running.")],
        "<s>SYSTEM USER: <image>\nWhat animal is this? ASSISTANT:⟦ A dog.</s>⟧[vusr]⟦ What is it doing?</s>⟧"
        " ASSISTANT:⟦ Running.</s>⟧",
    ),
    "user turns with the flag of a self-question": (
        [
            *[user(IMAGE, "What?"), assistant("A dog."), user("Where?", self_question=True), assistant("Here.")],
            *[user("Why?", self_question=False), assistant("No idea.")],
        ],
        "<s>SYSTEM USER: <image>\nWhat? ASSISTANT:⟦ A dog.</s>⟧[vusr]⟦ Where?</s>⟧ ASSISTANT:⟦ Here.</s>⟧"
        "USER: Why? ASSISTANT:⟦ No idea.</s>⟧",
    ),
    "four turns, two asked by the model": (
        [
            *[user(IMAGE, "What?"), assistant("A dog."), vusr("Where?"), assistant("Here.")],
            *[user("Why?"), assistant("No idea."), vusr("When?"), assistant("Now.")],
        ],
        "<s>SYSTEM USER: <image>\nWhat? ASSISTANT:⟦ A dog.</s>⟧[vusr]⟦ Where?</s>⟧ ASSISTANT:⟦ Here.</s>⟧"
        "USER: Why? ASSISTANT:⟦ No idea.</s>⟧[vusr]⟦ When?</s>⟧ ASSISTANT:⟦ Now.</s>⟧",
    ),
    "the model asks first": (
        [vusr("Where?"), assistant("Here.")],
        "<s>SYSTEM [vusr]⟦ Where?</s>⟧ ASSISTANT:⟦ Here.</s>⟧",
    ),
    "text only": (
        [user("What is a dog?"), assistant("An animal.")],
        "<s>SYSTEM USER: What is a dog? ASSISTANT:⟦ An animal.</s>⟧",
    ),
    "several images in a turn": (
        [user(IMAGE, IMAGE, "Compare them."), assistant("Both are red.")],
        "<s>SYSTEM USER: <image>\n<image>\nCompare them. ASSISTANT:⟦ Both are red.</s>⟧",
    ),
    "images in several turns": (
        [user(IMAGE, "What?"), assistant("A dog."), user(IMAGE, "And this?"), assistant("A cat.")],
        "<s>SYSTEM USER: <image>\nWhat? ASSISTANT:⟦ A dog.</s>⟧USER: <image>\nAnd this? ASSISTANT:⟦ A cat.</s>⟧",
    ),
    "images between texts": (
        [user("First ", IMAGE, " then ", IMAGE, "."), assistant("Yes.")],
        "<s>SYSTEM USER: First <image> then <image>. ASSISTANT:⟦ Yes.</s>⟧",
    ),
    "an image alone": ([user(IMAGE), assistant("A dog.")], "<s>SYSTEM USER: <image>\n ASSISTANT:⟦ A dog.</s>⟧"),
    "a system turn of its own": (
        [{"role": "system", "content": "Be brief."}, user(IMAGE, "What?"), assistant("A dog.")],
        "<s>Be brief. USER: <image>\nWhat? ASSISTANT:⟦ A dog.</s>⟧",
    ),
    "an empty system turn": (
        [{"role": "system", "content": ""}, user("What?"), assistant("A dog.")],
        "<s>USER: What? ASSISTANT:⟦ A dog.</s>⟧",
    ),
    "answer with a leading space": (
        [user(IMAGE, "What?"), assistant(" A dog."), vusr("  Where?"), assistant("   Here.")],
        "<s>SYSTEM USER: <image>\nWhat? ASSISTANT:⟦  A dog.</s>⟧[vusr]⟦   Where?</s>⟧ ASSISTANT:⟦    Here.</s>⟧",
    ),
    "answer with a leading line break": (
        [user(IMAGE, "What?"), assistant("\nA dog."), vusr("\n\nWhere?"), assistant("\tHere.")],
        "<s>SYSTEM USER: <image>\nWhat? ASSISTANT:⟦ \nA dog.</s>⟧[vusr]⟦ \n\nWhere?</s>⟧ ASSISTANT:⟦ \tHere.</s>⟧",
    ),
    "answer with trailing white space": (
        [user("What? \n"), assistant("A dog. "), vusr("Where?\n"), assistant("Here.\n\n")],
        "<s>SYSTEM USER: What? \n ASSISTANT:⟦ A dog. </s>⟧[vusr]⟦ Where?\n</s>⟧ ASSISTANT:⟦ Here.\n\n</s>⟧",
    ),
    "empty answer and question": (
        [user(IMAGE, ""), assistant(""), vusr(""), assistant("")],
        "<s>SYSTEM USER: <image>\n ASSISTANT:⟦ </s>⟧[vusr]⟦ </s>⟧ ASSISTANT:⟦ </s>⟧",
    ),
    "role markers inside texts": (
        [user("Say ASSISTANT: yes"), assistant("USER: no"), vusr("USER: so? ASSISTANT:"), assistant("USER:")],
        "<s>SYSTEM USER: Say ASSISTANT: yes ASSISTANT:⟦ USER: no</s>⟧[vusr]⟦ USER: so? ASSISTANT:</s>⟧"
        " ASSISTANT:⟦ USER:</s>⟧",
    ),
    "letters outside the vocabulary": (
        [user(IMAGE, "Übersetze: 犬 🐕"), assistant("犬 is 🐕‍🦺 é"), vusr("🐈?"), assistant("ß")],
        "<s>SYSTEM USER: <image>\nÜbersetze: 犬 🐕 ASSISTANT:⟦ 犬 is 🐕‍🦺 é</s>⟧[vusr]⟦ 🐈?</s>⟧ ASSISTANT:⟦ ß</s>⟧",
    ),
}


def written_for(processor, layout):
    """The layout with the special tokens and the marker of this processor."""
    tokenizer = processor.tokenizer
    text = layout.replace("[vusr]", processor.vusr_marker).replace("</s>", tokenizer.eos_token)
    return text.replace("<s>", tokenizer.bos_token or "")


def ids_and_mask_by_segment(processor, layout):
    """Ids and loss mask made by hand: each segment is tokenized alone, after a delimiter that is removed again."""
    tokenizer = processor.tokenizer
    ids, mask = [], []
    for segment in re.split(r"(⟦[^⟧]*⟧)", written_for(processor, layout)):
        text = segment.strip("⟦⟧").replace("<image>", "<image>" * processor.image_seq_length)
        if ids:
            new_ids = tokenizer(tokenizer.eos_token + text, add_special_tokens=False).input_ids[1:]
        else:
            new_ids = tokenizer(text, add_special_tokens=False).input_ids
        ids += new_ids
        mask += [int(segment.startswith("⟦"))] * len(new_ids)
    return ids, mask


def tokenized(processor, messages, **kwargs):
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)


def assert_layout(processor, messages, layout, **kwargs):
    outputs = tokenized(processor, messages, return_assistant_tokens_mask=True, **kwargs)
    ids, mask = ids_and_mask_by_segment(processor, layout)
    assert outputs["input_ids"] == [ids]
    assert outputs["assistant_masks"] == [mask]


@pytest.mark.parametrize("name", LAYOUTS)
def test_template_writes_the_vicuna_layout_with_the_vusr_role(name, processor):
    messages, layout = LAYOUTS[name]
    expected = written_for(processor, re.sub("[⟦⟧]", "", layout))
    assert processor.apply_chat_template(messages) == expected
    assert processor.tokenizer.apply_chat_template(messages, tokenize=False) == expected


@pytest.mark.slow
@pytest.mark.parametrize("vusr_marker", ["[vusr]", "VUSER:"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_mask_is_the_answers_and_the_vusr_questions_token_by_token(name, vusr_marker, any_tokenizer):
    messages, layout = LAYOUTS[name]
    assert_layout(tiny_processor(any_tokenizer, system_message="SYSTEM", vusr_marker=vusr_marker), messages, layout)


def test_loss_mask_is_right_after_hundreds_of_image_tokens(any_tokenizer):
    messages, layout = LAYOUTS["images in several turns"]
    assert_layout(tiny_processor(any_tokenizer, system_message="SYSTEM", image_seq_length=576), messages, layout)


def test_loss_mask_of_a_left_padded_batch_is_that_of_each_conversation(processor):
    names = ["two turns, the second asked by the model", "text only", "several images in a turn"]
    outputs = processor.apply_chat_template(
        [LAYOUTS[name][0] for name in names],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "return_tensors": "pt"},
    )
    assert outputs["pixel_values"].shape == (3, 3, 42, 42)
    for row, name in enumerate(names):
        ids, mask = ids_and_mask_by_segment(processor, LAYOUTS[name][1])
        padding = len(outputs["input_ids"][row]) - len(ids)
        assert list(outputs["input_ids"][row]) == [processor.tokenizer.pad_token_id] * padding + ids
        assert list(outputs["attention_mask"][row]) == [0] * padding + [1] * len(ids)
        assert list(outputs["assistant_masks"][row]) == [0] * padding + mask


def test_rendering_then_tokenizing_gives_the_ids_of_doing_both_at_once(processor, any_tokenizer, image):
    messages = LAYOUTS["images in several turns"][0]
    at_once = tokenized(processor, messages, add_generation_prompt=True)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    in_two_steps = processor(text=prompt, images=[image, image])
    assert in_two_steps["input_ids"] == at_once["input_ids"]
    assert in_two_steps["input_ids"][0].count(any_tokenizer.bos_token_id) == int(any_tokenizer.bos_token is not None)


def test_default_system_message_is_the_papers(tiny_processor):
    assert tiny_processor.apply_chat_template([user("What?")]) == (
        "<s>The assistant gives helpful, detailed, and polite answers to the user's questions. Also, the assistant is "
        "a curious virtual user can ask complex questions that are relevant to the content in the image. USER: What?"
    )


def test_generation_prompt_ends_in_the_assistants_marker_and_ask_in_the_vusr_marker(processor):
    messages = [user(IMAGE, "What?"), assistant("A dog."), vusr("Where?")]
    start = "<s>SYSTEM USER: <image>\nWhat? ASSISTANT:"
    for num_seen, ask, expected in (
        (1, False, start),
        (2, True, start + " A dog.</s>[vusr]"),
        (3, False, start + " A dog.</s>[vusr] Where?</s> ASSISTANT:"),
    ):
        prompt = processor.apply_chat_template(messages[:num_seen], add_generation_prompt=True, ask=ask)
        assert prompt == written_for(processor, expected)


def test_marker_of_the_released_checkpoints_gives_their_text():
    processor = tiny_processor(llama_tokenizer(), system_message="SYSTEM", vusr_marker="VUSER:")
    messages = LAYOUTS["two turns, the second asked by the model"][0]
    assert processor.apply_chat_template(messages) == (
        "<s>SYSTEM USER: <image>\nWhat animal is this? ASSISTANT: A dog.</s>VUSER: What is it doing?</s> ASSISTANT: "
        "Running.</s>"
    )
    assert processor.apply_chat_template(messages, add_generation_prompt=True, ask=True).endswith("Running.</s>VUSER:")


def test_text_prefix_of_the_released_checkpoints_follows_the_start_and_each_image():
    processor = tiny_processor(llama_tokenizer(), system_message="SYSTEM", text_prefix=" ")
    prompt = processor.apply_chat_template([user(IMAGE, IMAGE, "What?")], add_generation_prompt=True)
    assert prompt == "<s> SYSTEM USER: <image> \n<image> \nWhat? ASSISTANT:"
    prompt = processor.apply_chat_template([user("Look at", IMAGE, "and say.")], add_generation_prompt=True)
    assert prompt == "<s> SYSTEM USER: Look at<image> and say. ASSISTANT:"
    assert processor.apply_chat_template([user(IMAGE), assistant("A dog.")], plain=True) == "<s><image> A dog.\n"


def test_plain_layout_is_image_caption_line_break_with_the_caption_in_the_loss(processor):
    messages = [user(IMAGE, "Describe the image."), assistant("A dog.")]
    layout = "<s><image>⟦A dog.\n⟧"
    assert processor.apply_chat_template(messages, plain=True) == written_for(processor, re.sub("[⟦⟧]", "", layout))
    assert_layout(processor, messages, layout, plain=True)


PIECES = ["USER:", "ASSISTANT:", "VUSER:", " ", "  ", "\n", "▁", "Ġ", "<", "[", "</", "dog", "What is it?", "<0x0A>"]
CONTROL_TOKENS = ["<image>", "[vusr]", "<pad>", "<unk>", "<s>", "</s>", "<|end|>"]
TEXTS = (
    st.lists(st.text(max_size=8) | st.sampled_from(PIECES), max_size=5)
    .map("".join)
    .filter(lambda text: not any(token in text for token in CONTROL_TOKENS))
)
PROCESSORS = {name: tiny_processor(make(), system_message="SYSTEM") for name, make in TOKENIZERS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@given(question=TEXTS, answer=TEXTS, asked=TEXTS, second_answer=TEXTS)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_each_prompt_is_a_prefix_of_the_training_tokens_and_the_rest_is_in_the_loss(
    tokenizer, question, answer, asked, second_answer
):
    processor = PROCESSORS[tokenizer]
    messages = [user(question), assistant(answer), vusr(asked), assistant(second_answer)]
    for num_seen, ask in ((1, False), (2, True), (3, False)):
        prompt = tokenized(processor, messages[:num_seen], add_generation_prompt=True, ask=ask)["input_ids"][0]
        outputs = tokenized(processor, messages[: num_seen + 1], return_assistant_tokens_mask=True)
        assert outputs["input_ids"][0][: len(prompt)] == prompt
        mask = outputs["assistant_masks"][0]
        assert mask[len(prompt) - 1] == 0
        assert set(mask[len(prompt) :]) == {1}


@pytest.mark.parametrize("token", ["<image>", "[vusr]", "</s>", "<s>", "<pad>", "<unk>"])
@pytest.mark.parametrize(
    "message",
    [
        lambda token: user(f"a {token} b"),
        lambda token: user(token[:2], token[2:]),
        lambda token: user(token[:-1], IMAGE, token[-1:]),
        lambda token: assistant(token),
        lambda token: vusr(f"x{token}"),
        lambda token: {"role": "system", "content": token},
    ],
    ids=["in a text", "over two parts", "around an image", "answer", "vusr question", "system"],
)
def test_a_control_token_inside_a_text_is_refused(token, message, tiny_processor):
    with pytest.raises(TemplateError, match=re.escape(f"contains '{token}', which is a control token")):
        tiny_processor.apply_chat_template([message(token)])


def test_tokens_in_the_tokenizers_own_template_are_control_tokens_and_other_special_tokens_are_text():
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<|turn|>", "<box>"], special_tokens=True)
    tokenizer.chat_template = "{% for message in messages %}<|turn|>{{ message['content'] }}{% endfor %}"
    processor = tiny_processor(tokenizer)
    for token in ("<|turn|>", "<|end|>"):
        with pytest.raises(TemplateError, match=re.escape(f"contains '{token}'")):
            processor.apply_chat_template([user(token)])
    assert processor.apply_chat_template([user("<box>")]).endswith("USER: <box>")
    assert tiny_processor(processor.tokenizer).control_tokens == processor.control_tokens


def test_a_text_marker_of_the_vusr_role_is_refused_inside_a_text():
    processor = tiny_processor(vusr_marker="VUSER:")
    with pytest.raises(TemplateError, match="contains 'VUSER:'"):
        processor.apply_chat_template([user("VUSER: What?")])


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([user("<image> What?")], r"give the image as \{'type': 'image'\}"),
        ([{"role": "robot", "content": "x"}], "Role 'robot'"),
        ([user("x"), {"role": "system", "content": "x"}], r"Role 'system': the roles are system \(first only\)"),
        ([user({"type": "video", "url": "x"})], "Content of type 'video'"),
        ([{"role": "assistant", "content": [IMAGE]}], "There is an image in a turn of role 'assistant'"),
        ([{"role": "vusr", "content": [IMAGE]}], "There is an image in a turn of role 'vusr'"),
        ([user(IMAGE, self_question=True)], "There is an image in a turn of role 'user' with self_question"),
        ([{"role": "user"}], "The turn of role 'user' has no content"),
        ([user("x"), {"role": "assistant", "content": None}], "The turn of role 'assistant' has no content"),
    ],
)
def test_template_names_what_is_wrong_in_a_conversation(messages, error, tiny_processor):
    with pytest.raises(TemplateError, match=error):
        tiny_processor.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("num_placeholders", "num_images", "settings", "error"),
    [
        (2, 1, {}, "2 <image> tokens and 1 images"),
        (1, 2, {}, "1 <image> tokens and 2 images"),
        (1, 0, {}, "1 <image> tokens in the text but no images"),
        (1, 1, {"truncation": True, "max_length": 4}, "Mismatch in `image` token count"),
    ],
)
def test_missing_images_and_cut_placeholders_are_errors(
    num_placeholders, num_images, settings, error, tiny_processor, image
):
    with pytest.raises(ValueError, match=error):
        tiny_processor(text="<image>" * num_placeholders, images=[image] * num_images or None, **settings)


def test_image_token_is_replaced_by_one_placeholder_for_each_image_token(tiny_processor, image):
    assert SQLlavaProcessor.__call__ is ProcessorMixin.__call__
    assert tiny_processor.replace_image_token({}, 0) == "<image>" * 9
    assert tiny_processor(text="<image> a", images=[image]).input_ids[0].count(tiny_processor.image_token_id) == 9


def test_special_tokens_are_registered_once_and_only_where_missing(any_tokenizer):
    size = len(any_tokenizer)
    processor = tiny_processor(any_tokenizer)
    tokenizer = processor.tokenizer
    assert (processor.image_token_id, processor.vusr_token_id) == (size, size + 1)
    assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == (PAD_TOKEN, size + 2, size + 3)
    assert tokenizer.padding_side == "left"
    for token in ("<image>", "[vusr]", "<pad>"):
        assert len(tokenizer(token, add_special_tokens=False).input_ids) == 1
        assert tokenizer.decode(tokenizer(f"a{token}").input_ids, skip_special_tokens=True).strip() == "a"
    tiny_processor(tokenizer)
    assert len(tokenizer) == size + 3


def test_no_token_is_registered_for_a_text_marker_or_beside_an_own_padding_token():
    tokenizer = byte_level_tokenizer()
    tokenizer.pad_token = "<|end|>"
    processor = tiny_processor(tokenizer, vusr_marker="VUSER:")
    assert processor.vusr_token_id is None
    assert processor.tokenizer.pad_token == "<|end|>"
    assert not {"<pad>", "[vusr]"} & processor.tokenizer.get_vocab().keys()


@pytest.mark.parametrize("vusr_marker", ["[vusr]", "VUSER:"])
def test_saving_and_loading_keeps_settings_tokens_and_template(vusr_marker, any_tokenizer, tmp_path):
    processor = tiny_processor(
        any_tokenizer,
        system_message="SYSTEM",
        user_marker="Human:",
        vusr_marker=vusr_marker,
        assistant_marker="Robot:",
        image_aspect_ratio="crop",
    )
    processor.save_pretrained(tmp_path)
    again = SQLlavaProcessor.from_pretrained(tmp_path)
    assert (tmp_path / "processing_sq_llava.py").is_file()
    assert again.vusr_marker == vusr_marker
    assert (again.image_token_id, again.vusr_token_id) == (processor.image_token_id, processor.vusr_token_id)
    assert again.chat_template == again.tokenizer.chat_template == processor.chat_template
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    assert again.tokenizer.padding_side == "left"
    messages = [user(IMAGE, "What?"), assistant("A dog."), vusr("Where?"), assistant("\nHere.")]
    assert "Robot: A dog." in again.apply_chat_template(messages)
    before, after = tokenized(processor, messages), tokenized(again, messages)
    assert after["input_ids"] == before["input_ids"]
    assert (after["pixel_values"][0] == before["pixel_values"][0]).all()


def test_a_setting_changed_at_loading_changes_the_template(tmp_path):
    tiny_processor(system_message="SYSTEM").save_pretrained(tmp_path)
    processor = SQLlavaProcessor.from_pretrained(tmp_path, system_message="OTHER")
    assert processor.apply_chat_template([user("What?")]) == "<s>OTHER USER: What?"
    processor.save_pretrained(tmp_path)
    assert "OTHER" not in (tmp_path / "tokenizer_config.json").read_text()


def test_an_unknown_setting_is_refused_when_given_and_when_saved(tmp_path):
    with pytest.raises(TypeError, match="sytem_message"):
        tiny_processor(sytem_message="x")
    tiny_processor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no setting 'sytem_message': did you mean 'system_message'\?"):
        SQLlavaProcessor.from_pretrained(tmp_path, sytem_message="x")
    assert SQLlavaProcessor.from_pretrained(tmp_path, model_max_length=99).tokenizer.model_max_length == 99
    file = tmp_path / "processor_config.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({**saved, "transformers_version": "9.0.0"}))
    SQLlavaProcessor.from_pretrained(tmp_path)
    for name in ("vuser_marker", "padding"):
        file.write_text(json.dumps({**saved, name: "x"}))
        with pytest.raises(ValueError, match=f"processor_config.json: SQLlavaProcessor has no setting '{name}'"):
            SQLlavaProcessor.from_pretrained(tmp_path)


def test_the_delimiter_can_be_chosen_and_is_saved_with_the_tokenizer(tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    processor = tiny_processor(tokenizer, delimiter="<|im_end|>")
    processor.save_pretrained(tmp_path)
    for chosen in (processor, SQLlavaProcessor.from_pretrained(tmp_path)):
        assert chosen.apply_chat_template([user("Hi"), assistant("Hello")]).endswith("ASSISTANT: Hello<|im_end|>")
    with pytest.raises(ValueError, match=r"eos_token\) is 'word', .* give one of <\|end\|>, <\|im_end\|>"):
        SQLlavaProcessor.from_pretrained(tmp_path, delimiter="word")


def test_an_own_template_is_kept(tmp_path):
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tiny_processor(chat_template=template).save_pretrained(tmp_path)
    assert SQLlavaProcessor.from_pretrained(tmp_path).apply_chat_template([{"role": "user", "content": "x"}]) == "x"


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"image_aspect_ratio": "stretch"}, "image_aspect_ratio is 'stretch': choose 'pad' or 'crop'"),
        ({"vusr_marker": ""}, "vusr_marker is ''"),
        ({"user_marker": "USER: "}, "user_marker is 'USER: '"),
        ({"text_prefix": "|"}, "it may contain only spaces"),
        ({"assistant_marker": "\n"}, "assistant_marker is"),
    ],
)
def test_wrong_settings_are_refused(settings, error):
    with pytest.raises(ValueError, match=error):
        tiny_processor(**settings)


def test_a_tokenizer_without_delimiter_is_refused():
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        tiny_processor(tokenizer)
