"""Recognises the chat format of a language model: the prompt layout `auto` of a model that is made from parts.

    >>> tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen3-1.7B")
    >>> settings, sentence = layout_settings("auto", tokenizer, "Qwen/Qwen3-1.7B")
    >>> processor = SQLlavaProcessor(image_processor, tokenizer, **settings)

The language model's own chat template renders a short conversation. The layout that renders the same text is taken.
The processor writes a template of its own in this layout, because the language model's knows no images, no turns in
which the model asks, and no loss.
"""

from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from processing_sq_llava import PROMPT_LAYOUTS, begin_of_text, write_chat_template


AUTO = "auto"
USER = {"role": "user", "content": "Kiwi"}
ANSWER = {"role": "assistant", "content": "Plum"}
NEXT = {"role": "user", "content": "Fig"}
SYSTEM = {"role": "system", "content": "Pear"}
# What a template may write differently although the turns are equal.
OTHER_PROBES = {
    "system messages": [SYSTEM, USER],
    "earlier answers": [USER, ANSWER, NEXT],
    "the last answer": [USER, ANSWER],
}
# Before a template, this takes the place of the function that gives today's date.
ANOTHER_DAY = "{%- macro strftime_now(format) -%} 1 January 2000 {%- endmacro -%}"
TODAYS_DATE, SYSTEM_END = "today's date", "the end of its system message"


@dataclass(frozen=True)
class ChatFormat:
    """
    The chat format of a language model.

    Attributes:
        layout (`str`): A name in `PROMPT_LAYOUTS`.
        system_message (`str`): The message that the template writes if a conversation has none.
        thought (`str`): The empty thought with which answers begin, or `""`.
        differences (`list[str]`): What the layout writes differently than the template.
    """

    layout: str
    system_message: str
    thought: str
    differences: list[str]

    @property
    def settings(self) -> dict:
        """Settings of the processor."""
        return PROMPT_LAYOUTS[self.layout] | {"system_message": self.system_message, "thought": self.thought}


def recognise_chat_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """
    Finds the prompt layout that writes a conversation as the tokenizer's chat template does.

    Raises:
        ValueError: if there is no chat template, or no layout fits. The message can follow "because".
    """
    if not tokenizer.chat_template:
        raise ValueError("its tokenizer has no chat template")
    messages = [USER, ANSWER, NEXT]
    try:
        prompt = _own_text(tokenizer, messages, add_generation_prompt=True)
        dated = prompt != _dated_text(tokenizer, messages, add_generation_prompt=True)
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"its chat template renders no plain conversation: {error}") from error
    formats = []
    for layout in PROMPT_LAYOUTS:
        if (found := _match(tokenizer, layout, prompt)) is not None:
            differences = _differences(tokenizer, layout, *found) + [TODAYS_DATE] * dated
            formats.append(ChatFormat(layout, *found[:2], differences))
    if not formats:
        raise ValueError(
            f"its chat template writes none of the known layouts ({', '.join(PROMPT_LAYOUTS)}), but {prompt!r}"
        )
    return min(formats, key=lambda found: len(found.differences))  # layouts can differ in the system message only


def layout_settings(
    prompt_layout: str | None, tokenizer: PreTrainedTokenizerBase, text_model: str
) -> tuple[dict, str]:
    """
    The settings of the processor for a new model.

    Args:
        prompt_layout (`str`, *optional*): A name in `PROMPT_LAYOUTS`. Default: `"auto"`, the language model's own.
        tokenizer: The tokenizer of the language model.
        text_model (`str`): The language model's name, for the sentence.

    Returns:
        The settings, and a sentence that says what was chosen. In the language model's own layout, the settings have
        its system message and its empty thought.
    """
    if prompt_layout in ("vicuna", "minigpt4"):  # these two leave the language model's format on purpose
        return PROMPT_LAYOUTS[prompt_layout], f"prompt_layout: {prompt_layout}, as the settings say."
    own = reason = None
    try:
        own = recognise_chat_format(tokenizer)
    except ValueError as error:
        reason = error
    if prompt_layout in (None, AUTO):
        if own is None:
            lost = " Its own turns are not used. chat_template_path in a recipe can keep them."
            lost = lost if tokenizer.chat_template else ""
            return {}, f"prompt_layout: vicuna. {text_model}: {reason}.{lost}"
        return own.settings, f"prompt_layout: {own.layout}, as in the chat template of {text_model}. {_details(own)}"
    if own is not None and own.layout == prompt_layout:
        return own.settings, f"prompt_layout: {own.layout}, the language model's own. {_details(own)}"
    return PROMPT_LAYOUTS[prompt_layout], f"prompt_layout: {prompt_layout}, but not that of {text_model}."


def layout_name(settings: dict) -> str:
    """The name of the prompt layout in a `processor_config.json`, or `"custom"`."""
    # Older checkpoints have no turn_format; theirs is Vicuna's.
    found = {**PROMPT_LAYOUTS["vicuna"], **settings}
    for name, layout in PROMPT_LAYOUTS.items():
        if all(found[key] == layout[key] for key in PROMPT_LAYOUTS["vicuna"]):
            return name
    return "custom"


def _match(tokenizer: PreTrainedTokenizerBase, layout: str, prompt: str) -> tuple[str, str, str] | None:
    """
    The system message and the thought in a prompt of this layout, and all text before its first turn. `None` if the
    prompt is of another layout.
    """
    row = PROMPT_LAYOUTS[layout]
    turns = _our_text(tokenizer, row, [USER, ANSWER, NEXT], add_generation_prompt=True)
    header = turns[len(_our_text(tokenizer, row, [USER, ANSWER, NEXT])) :]
    _, found, thought = prompt.rpartition(header)
    if not found or (thought and "</" not in thought):  # a thought that stays open is the model's to end
        return None
    prompt = prompt.replace(thought, "") if thought else prompt
    if not prompt.endswith(turns):
        return None
    system = prompt.removesuffix(turns).removeprefix(begin_of_text(tokenizer))
    begin, end = (row["turn_format"][name] for name in ("system_begin", "system_end"))
    if not system:
        return "", thought, ""
    if row["turn_format"]["system_in_turn"] or not system.startswith(begin):
        return None
    if system.endswith(end):
        return system.removeprefix(begin).removesuffix(end), thought, system
    # SmolLM3's template leaves the turn of its own system message open. Here it ends like the others.
    return (system.removeprefix(begin).rstrip(), thought, system) if begin else None


def _differences(
    tokenizer: PreTrainedTokenizerBase, layout: str, system_message: str, thought: str, own_system: str
) -> list[str]:
    """Names what the layout with the values of [`_match`] writes differently than the tokenizer's own template."""
    settings = PROMPT_LAYOUTS[layout] | {"system_message": system_message, "thought": thought}
    begin, end = (settings["turn_format"][name] for name in ("system_begin", "system_end"))
    our_system = begin + system_message + end if system_message else ""
    differences = [SYSTEM_END] if own_system != our_system else []
    for name, messages in OTHER_PROBES.items():
        prompts = messages[-1]["role"] == "user"
        try:
            own = _own_text(tokenizer, messages, add_generation_prompt=prompts)
        except (TemplateError, TypeError, KeyError, ValueError):
            own = ""
        ours = begin_of_text(tokenizer) + _our_text(tokenizer, settings, messages, add_generation_prompt=prompts)
        if (own.replace(own_system, our_system, 1) if own_system else own) != ours:
            differences.append(name)
    return differences


def _own_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict], add_generation_prompt: bool) -> str:
    """The text of the tokenizer's own template, without the lines that depend on today's date."""
    text = _dated_text(tokenizer, messages, add_generation_prompt)
    # A date that is written into a checkpoint would be wrong on every later day.
    other = _dated_text(tokenizer, messages, add_generation_prompt, ANOTHER_DAY)
    lines = zip(text.splitlines(keepends=True), other.splitlines(keepends=True))
    return "".join(line for line, on_other_day in lines if line == on_other_day)


def _dated_text(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], add_generation_prompt: bool, before: str = ""
) -> str:
    """The text of the tokenizer's own template. `before` is put in front of the template."""
    return tokenizer.apply_chat_template(
        messages,
        chat_template=before + tokenizer.get_chat_template(),
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=False,  # templates of models that think know this variable; the others ignore it
    )


def _our_text(tokenizer, settings: dict, messages: list[dict], add_generation_prompt: bool = False) -> str:
    [text], _ = render_jinja_template(
        [messages],
        chat_template=write_chat_template(settings),
        add_generation_prompt=add_generation_prompt,
        eos_token=settings.get("delimiter", tokenizer.eos_token),
    )
    return text


def _details(own: ChatFormat) -> str:
    details = f"System message: {own.system_message!r}." if own.system_message else "No system message."
    if own.thought:
        details += f" Every answer begins with {own.thought!r}, which is not in the loss."
    if own.differences:
        details += f" That template writes differently: {', '.join(own.differences)}."
    return details
