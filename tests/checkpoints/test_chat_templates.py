"""What a user's own chat template lacks is said when it is set."""

import pytest

from processing_sq_llava import SQLlavaProcessor
from sq_llava.checkpoints.chat_templates import MISSING, check_template, missing_in_template
from sq_llava.console import print_in_first_process
from tests import tiny


# A small template that knows everything.
TEMPLATE = """
{%- macro text_of(message) -%}
    {%- for part in message['content'] -%}
        {%- if part['type'] == 'image' -%}{{ '<image>' }}
        {%- else -%}
            {%- for token in ['<image>', '</s>'] -%}
                {%- if token in part['text'] -%}{{ raise_exception('no ' ~ token) }}{%- endif -%}
            {%- endfor -%}
            {{ part['text'] if not plain or message['role'] == 'assistant' }}
        {%- endif -%}
    {%- endfor -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- set text = text_of(message) -%}
    {%- if message['role'] == 'user' and not message['self_question'] -%}
        {{ text if plain else 'Q: ' ~ text }}
    {%- else -%}
        {{ '' if plain else '[vusr]' if message['self_question'] else 'A:' }}
        {%- generation -%}{{ text ~ ('\\n' if plain else eos_token) }}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{{- ('[vusr]' if ask else 'A:') if add_generation_prompt -}}
"""
# A replacement in this template, and what it then lacks.
BREAKS = {
    "no image": ("{{ '<image>' }}", "", {"image", "plain"}),
    "no loss": ("generation -%}", "if true -%}", {"generation", "self_question", "plain"}),
    "no end in the loss": ("else eos_token", "else ''", {"generation", "self_question"}),
    "no self-questions": ("'[vusr]' if message['self_question'] else ", "", {"self_question"}),
    "no captions": ("if plain", "if false", {"plain"}),
    "no asking": ("'[vusr]' if ask else", "'A:' if ask else", {"ask"}),
    "control tokens are text": ("token in part['text']", "false", {"control_tokens"}),
}


def processor_with(template: str) -> SQLlavaProcessor:
    return tiny.tiny_processor(chat_template=template)


def test_the_processors_own_template_and_a_complete_one_lack_nothing():
    assert missing_in_template(tiny.tiny_processor()) == {}
    assert missing_in_template(processor_with(TEMPLATE)) == {}


@pytest.mark.parametrize("name", BREAKS)
def test_what_a_template_lacks_is_named(name):
    before, after, lacking = BREAKS[name]
    assert before in TEMPLATE
    broken = TEMPLATE.replace(before, after).replace("endif true", "endif")
    assert missing_in_template(processor_with(broken)) == {key: MISSING[key] for key in MISSING if key in lacking}


def test_a_language_models_template_lacks_all_that_it_cannot_know(capsys):
    processor = processor_with("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}")
    assert set(missing_in_template(processor)) == set(MISSING)
    print_in_first_process.cache_clear()
    check_template(processor)
    said = capsys.readouterr().err
    assert all(f"The chat template is not this library's: {sentence}." in said for sentence in MISSING.values())
    with pytest.raises(ValueError, match="This run cannot use the chat template: it does not know plain=True"):
        check_template(processor, {"plain"})


def test_a_users_template_replaces_the_saved_one_and_is_saved(tmp_path):
    tiny.tiny_processor().save_pretrained(tmp_path)
    processor = SQLlavaProcessor.from_pretrained(tmp_path, chat_template=TEMPLATE)
    processor.save_pretrained(tmp_path)
    for each in (processor, SQLlavaProcessor.from_pretrained(tmp_path)):
        assert each.chat_template == each.tokenizer.chat_template == TEMPLATE
