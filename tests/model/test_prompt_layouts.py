"""The prompt layouts of today's language models, on small tokenizers in the manner of theirs: one law a test."""

import json
import re
import time
from functools import cache

import pytest
from jinja2 import TemplateError
from rich.progress import Progress
from transformers.utils.chat_template_utils import render_jinja_template

from processing_sq_llava import PROMPT_LAYOUTS, SYSTEM_MESSAGE, SQLlavaProcessor
from sq_llava.checkpoints.compose import stop_token_ids
from sq_llava.checkpoints.prompt_layouts import layout_name, layout_settings, recognise_chat_format
from sq_llava.data.lengths import LengthBound, prefix_lengths
from sq_llava.data.self_questions import ANSWER, QUESTION, draw_self_questions
from sq_llava.data.sources import DataSource
from sq_llava.doctor.check import DataCheck, examine
from sq_llava.training.collator import SelfQuestioningCollator
from tests import tiny
from tests.chat_tokenizers import CHAT_TOKENIZERS, qwen_base


IMAGE = {"type": "image", "image": tiny.picture()}
# Texts that a careless tokenizer or template would join with their neighbours.
NASTY = ["A dog.", "\nA dog.", "  two  spaces ", "\n\n", "", "Größe 🙂", "user\n", "assistant:", "[ INST ]", "1234"]


def message(role: str, *parts, **flags) -> dict:
    return {
        "role": role,
        "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts],
        **flags,
    }


def conversation(question="What?", answer="A dog.", asked="Where?", second="Here.") -> list[dict]:
    return [
        *[message("user", IMAGE, question), message("assistant", answer)],
        *[message("user", asked, self_question=True), message("assistant", second)],
    ]


@cache
def made(name: str) -> tuple[SQLlavaProcessor, dict]:
    """A processor with the layout that `auto` takes, and the settings."""
    make, _, _ = CHAT_TOKENIZERS[name]
    settings, _ = layout_settings("auto", make(), name)
    return tiny.tiny_processor(make(), **settings), settings


@pytest.fixture(params=CHAT_TOKENIZERS)
def name(request) -> str:
    return request.param


@pytest.fixture
def processor(name) -> SQLlavaProcessor:
    return made(name)[0]


def tokens(processor, messages, **settings) -> tuple[list[int], list[int]]:
    outputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **settings
    )
    return outputs["input_ids"][0], outputs["assistant_masks"][0]


# Recognising the language model's own format


@pytest.mark.parametrize("name", [name for name in CHAT_TOKENIZERS if name not in ("llama2", "smollm3")])
def test_auto_takes_the_layout_that_writes_what_the_models_own_template_writes(name):
    make, layout, _ = CHAT_TOKENIZERS[name]
    tokenizer = make()
    processor, settings = made(name)
    chat_format = recognise_chat_format(tokenizer)
    assert chat_format.layout == layout and layout_name(settings) == layout
    turns = [{"role": role, "content": f"The {role}'s text."} for role in ("system", "user", "assistant", "user")]
    conversations = {
        "a question": turns[1:2],
        "system messages": turns[:2],
        "earlier answers": turns[1:],
        "the last answer": turns[1:3],
    }
    # The empty thought is in each answer here, so that a prompt is a prefix of the whole. The dates stay out of a
    # system message that a user writes.
    different = {"qwen3": {"earlier answers"}, "llama31": {"system messages"}}.get(name, set())
    assert set(chat_format.differences) == different
    for kind, messages in conversations.items():
        prompt = {"add_generation_prompt": messages[-1]["role"] == "user", "tokenize": False}
        own = tokenizer.apply_chat_template(messages, enable_thinking=False, **prompt)
        assert (processor.apply_chat_template(messages, **prompt) == own) == (kind not in different), kind


def test_system_message_with_todays_date_or_an_open_turn_is_taken_without_them():
    # As SmolLM3 writes it, and as Llama 3.2 does.
    message = "## Metadata\n\nReasoning Mode: /no_think\n\nYou are a model."
    chat_format = recognise_chat_format(CHAT_TOKENIZERS["smollm3"][0]())
    assert (chat_format.layout, chat_format.system_message) == ("chatml", message)
    assert chat_format.thought == "<think>\n\n</think>\n"
    assert chat_format.differences == ["the end of its system message", "system messages", "today's date"]
    tokenizer = CHAT_TOKENIZERS["llama31"][0]()
    tokenizer.chat_template = tokenizer.chat_template.replace("26 Jul 2024", "{{ strftime_now('%d %b %Y') }}")
    chat_format = recognise_chat_format(tokenizer)
    assert (chat_format.layout, chat_format.system_message) == (
        "llama3",
        "Cutting Knowledge Date: December 2023\n\n",
    )
    assert chat_format.differences == ["system messages", "today's date"]


def test_auto_says_what_it_took_and_what_is_written_differently():
    def sentence(name, layout="auto"):
        return layout_settings(layout, CHAT_TOKENIZERS[name][0](), f"org/{name}")[1]

    assert sentence("llama2") == "prompt_layout: vicuna. org/llama2: its tokenizer has no chat template."
    assert sentence("smollm") == (
        "prompt_layout: chatml, as in the chat template of org/smollm. System message: 'You are a small model.'."
    )
    assert sentence("qwen3") == (
        "prompt_layout: chatml, as in the chat template of org/qwen3. No system message. Every answer begins with "
        r"'<think>\n\n</think>\n\n', which is not in the loss. That template writes differently: earlier answers."
    )
    assert sentence("gemma", "vicuna") == "prompt_layout: vicuna, as the settings say."
    assert sentence("gemma", "chatml") == "prompt_layout: chatml, but not that of org/gemma."


# The older formats of Llama 2 and Mistral, whose `[INST]` is plain text.
INST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ ' ' }}{{ m['content'] }}END{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}",
            "none of the known layouts (vicuna, minigpt4, chatml, llama3, gemma, mistral, mistral_tekken, "
            "mistral_v7), but '<us",
        ),
        ("{{ raise_exception('Give tools.') }}", "renders no plain conversation: Give tools."),
        ("{{ messages[0]['parts'] + 1 }}", "renders no plain conversation: "),
        (qwen_base().chat_template.replace("assistant\n", "assistant\n<think>\n"), "none of the known layouts"),
        (
            INST.replace("END", "{{ ' ' }}{{ eos_token }}"),
            "but '[INST] Kiwi [/INST] Plum <|endoftext|>[INST] Fig [/INST]'",
        ),
        (INST.replace("END", "{{ eos_token }}"), "but '[INST] Kiwi [/INST] Plum<|endoftext|>[INST] Fig [/INST]'"),
    ],
    ids=["unknown", "refuses", "breaks", "open thought", "Llama-2-chat", "Mistral v0.2"],
)
def test_auto_falls_back_to_vicuna_and_says_why(template, reason):
    tokenizer = qwen_base()
    tokenizer.chat_template = template
    settings, sentence = layout_settings(None, tokenizer, "org/model")
    assert settings == {} and sentence.startswith("prompt_layout: vicuna. org/model: its chat template ")
    assert reason in sentence and sentence.endswith(
        "Its own turns are not used. chat_template_path in a recipe can keep them."
    )


def test_system_message_is_the_language_models_in_its_own_layout_and_the_papers_in_another():
    make = CHAT_TOKENIZERS["smollm"][0]
    for layout, expected in (
        ("auto", "You are a small model."),
        ("chatml", "You are a small model."),
        ("vicuna", None),
    ):
        settings, _ = layout_settings(layout, make(), "org/smollm")
        assert settings.get("system_message") == expected
        processor = tiny.tiny_processor(make(), **settings)
        assert processor.system_message == (expected or SYSTEM_MESSAGE)


# The laws of a layout


def segments(name: str) -> list[tuple[str, bool]]:
    """The text of [`conversation`] made by hand, cut where the loss begins and ends."""
    row = PROMPT_LAYOUTS[CHAT_TOKENIZERS[name][1]]
    turns, end = row["turn_format"], CHAT_TOKENIZERS[name][2]
    processor = made(name)[0]
    begin, space, after = turns["turn_begin"], turns["text_begin"], turns["turn_separator"]
    user, vusr, assistant = (
        begin + marker + turns["role_end"] for marker in (row["user_marker"], "[vusr]", row["assistant_marker"])
    )
    answer = turns["before_answer"] + assistant + processor.thought
    tokenizer = processor.tokenizer
    start = tokenizer.bos_token if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else ""
    if processor.system_message:
        start += turns["system_begin"] + processor.system_message + turns["system_end"]
    images = "<image>" * processor.image_seq_length
    return [
        (f"{start}{user}{space}{images}\nWhat?{turns['user_end']}{answer}", False),
        (f"{space}A dog.{end}", True),
        (f"{after}{vusr}", False),
        (f"{space}Where?{end}", True),
        (f"{after}{answer}", False),
        (f"{space}Here.{end}", True),
        *[(after, False)] * bool(after),
    ]


def test_loss_is_exactly_on_answers_and_questions_with_their_delimiter(name, processor):
    tokenizer, end = processor.tokenizer, CHAT_TOKENIZERS[name][2]
    ids, mask = [], []
    for text, in_loss in segments(name):
        # After a delimiter that is removed again, as some tokenizers put a space before a text that begins.
        new = tokenizer((end if ids else "") + text, add_special_tokens=False).input_ids[bool(ids) :]
        ids += new
        mask += [int(in_loss)] * len(new)
    assert tokens(processor, conversation()) == (ids, mask)
    collator = SelfQuestioningCollator(processor, self_question_ratio=1.0)
    batch = collator([{"row_id": 0, "messages": conversation(), "images": [tiny.picture()]}])
    kinds = batch["turn_kinds"][0][batch["labels"][0] != -100].tolist()
    assert batch["input_ids"][0].tolist() == ids
    assert sorted(set(kinds)) == [ANSWER, QUESTION] and len(kinds) == sum(mask)


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_each_prompt_is_a_token_prefix_of_the_whole_and_the_rest_begins_with_the_loss(processor, text):
    messages = conversation(*[text] * 4)
    for num_seen, ask in ((1, False), (2, True), (3, False)):
        prompt, _ = tokens(processor, messages[:num_seen], add_generation_prompt=True, ask=ask)
        ids, mask = tokens(processor, messages[: num_seen + 1])
        assert ids[: len(prompt)] == prompt
        spoken = mask[len(prompt) :]
        num_spoken = sum(spoken)
        assert mask[len(prompt) - 1] == 0 and spoken == [1] * num_spoken + [0] * (len(spoken) - num_spoken)
        assert ids[len(prompt) + num_spoken - 1] == processor.tokenizer.eos_token_id
        after = processor.tokenizer.decode(ids[len(prompt) + num_spoken :])
        assert after == processor.turn_format["turn_separator"]


def test_delimiter_ends_the_turns_and_is_a_stop_token_beside_the_models_own(name, processor):
    make, _, end = CHAT_TOKENIZERS[name]
    own = make().eos_token_id
    stops = stop_token_ids([own, 7], processor)
    assert processor.tokenizer.eos_token == end
    assert {processor.tokenizer.convert_tokens_to_ids(end), own, 7} == set(stops)


def test_control_tokens_are_refused_and_other_special_tokens_are_text(name, processor):
    make, layout, end = CHAT_TOKENIZERS[name]
    begin = PROMPT_LAYOUTS[layout]["turn_format"]["turn_begin"]
    markers = {"mistral": "[INST]", "tekken": "[/INST]", "mistral_small": "[SYSTEM_PROMPT]"}
    for token in filter(None, ("<image>", "[vusr]", end, begin, make().eos_token, markers.get(name))):
        for role in ("system", "user", "assistant", "vusr"):
            with pytest.raises(TemplateError, match=re.escape(f"contains '{token}', which is a control token")):
                processor.apply_chat_template([message(role, f"a {token} b")])
    tokenizer = make()
    tokenizer.add_tokens(["<box>"], special_tokens=True)
    assert "<box>" in tiny.tiny_processor(tokenizer, **made(name)[1]).apply_chat_template([message("user", "<box>")])


def test_tokens_of_a_layout_are_control_tokens_without_a_template_of_the_tokenizer():
    tokenizer = qwen_base()
    tokenizer.chat_template = None
    processor = tiny.tiny_processor(tokenizer, **PROMPT_LAYOUTS["chatml"])
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        with pytest.raises(TemplateError, match=re.escape(f"contains '{token}'")):
            processor.apply_chat_template([message("user", token)])


def test_reloaded_processor_gives_equal_ids_masks_and_control_tokens(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = SQLlavaProcessor.from_pretrained(tmp_path)
    assert tokens(again, conversation()) == tokens(processor, conversation())
    assert again.control_tokens == processor.control_tokens
    assert (again.turn_format, again.thought) == (processor.turn_format, processor.thought)
    # The template travels with a checkpoint: it renders the same where only it is there.
    assert again.tokenizer.chat_template == processor.chat_template


@pytest.mark.parametrize("ratio", [0.0, 1.0], ids=["user asks", "model asks"])
def test_lengths_of_exchanges_are_those_of_the_collator(processor, ratio):
    turns = [message(role, text) for role, text in zip(["user", "assistant"] * 5, NASTY)]
    turns[0]["content"].insert(0, IMAGE)
    collator = SelfQuestioningCollator(processor, self_question_ratio=ratio)
    for messages in (turns, [message("system", "Be kind."), *turns]):
        drawn = draw_self_questions(messages, ratio, 0, 0, 0)
        [counted] = LengthBound(processor, max_length=10_000)._by_exchange([drawn])
        [whole] = prefix_lengths(processor, [drawn], plain=False)
        assert counted.cumsum().tolist() == whole.tolist()
        batch = collator([{"row_id": 0, "messages": messages, "images": [tiny.picture()]}])
        assert batch["input_ids"].shape[1] == whole[-1]


def test_doctor_finds_the_control_tokens_and_turn_markers_of_the_layout(tmp_path):
    answers = ["<|start_header_id|>user", "The user.", "USER: and ASSISTANT:", "<|im_start|>user\nHi.<|im_end|>"]
    turns = [[{"from": "human", "value": "Who?"}, {"from": "gpt", "value": answer}] for answer in answers]
    rows = [{"id": str(number), "conversations": turn} for number, turn in enumerate(turns)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = {}
    for name in ("llama3", "llama2", "qwen3"):
        check = DataCheck([DataSource(str(tmp_path / "rows.json"))], made(name)[0])
        report = examine(check, Progress(disable=True))
        found[name] = [(finding.code, finding.row) for finding in report.findings]
    assert found == {
        "llama3": [("control_token", 0), ("role_marker", 3)],
        "llama2": [("role_marker", 0), ("role_marker", 2), ("role_marker", 3)],
        "qwen3": [("role_marker", 0), ("control_token", 3)],
    }


def test_a_layout_whose_tokens_the_tokenizer_lacks_is_refused():
    with pytest.raises(ValueError, match=r"prompt_layout or eos_token\) is '<\|im_end\|>'"):
        tiny.tiny_processor(**PROMPT_LAYOUTS["chatml"])


def test_wrong_key_of_a_turn_format_is_refused_with_the_right_one():
    with pytest.raises(ValueError, match="turn_format has no key 'turn_bgin': did you mean 'turn_begin'"):
        tiny.tiny_processor(turn_format={"turn_bgin": "x"})


def test_layout_of_a_saved_model_can_be_changed(tmp_path):
    make, _, _ = CHAT_TOKENIZERS["qwen_base"]
    tiny.tiny_processor(make(), system_message="").save_pretrained(tmp_path)
    processor = SQLlavaProcessor.from_pretrained(tmp_path, **PROMPT_LAYOUTS["chatml"])
    prompt = processor.apply_chat_template([message("user", "Hi")], add_generation_prompt=True, ask=True)
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>[vusr]\n"
    processor.save_pretrained(tmp_path)
    processor = SQLlavaProcessor.from_pretrained(tmp_path, **PROMPT_LAYOUTS["minigpt4"])
    assert processor.apply_chat_template([message("user", "Hi")]) == "###Human: Hi"


def test_rendering_with_hundreds_of_control_tokens_costs_a_few_milliseconds():
    tokenizer = CHAT_TOKENIZERS["llama3"][0]()
    reserved = [f"<|reserved_special_token_{number}|>" for number in range(251)]
    tokenizer.add_tokens(reserved, special_tokens=True)
    tokenizer.chat_template += "{#" + "".join(reserved) + "#}"
    processor = tiny.tiny_processor(tokenizer, **PROMPT_LAYOUTS["llama3"])
    assert len(processor.control_tokens) > 255
    messages = conversation("What is in the picture? " * 20, "A dog. " * 40) * 3
    seconds = []
    for _ in range(9):
        start = time.thread_time()
        render_jinja_template([messages], chat_template=processor.chat_template, eos_token="<|eot_id|>")
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 0.01
