"""Checks what a user's own chat template lacks. The template that `SQLlavaProcessor` writes lacks nothing.

>>> missing_in_template(processor)
{'plain': 'it does not know plain=True, the captions of stage 1'}
"""

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from processing_sq_llava import SQLlavaProcessor
from sq_llava.console import print_in_first_process


MISSING = {
    "image": "it does not write <image> once for each part {'type': 'image'} of a user's turn",
    "generation": "it does not mark exactly the answers and their end tokens with {% generation %}, for the loss",
    "self_question": "it does not begin a user's turn that has self_question with the vusr marker and mark its text "
    "with {% generation %}",
    "plain": "it does not know plain=True, the captions of stage 1",
    "ask": "it does not end with the vusr marker for ask=True, which lets the model ask",
    "control_tokens": "it takes a text with <image> or an end token, which fakes an image or the end of a turn",
}


def missing_in_template(processor: SQLlavaProcessor) -> dict[str, str]:
    """
    Renders short conversations with the processor's chat template.

    Returns:
        `dict[str, str]`: What the template lacks, as keys and sentences of `MISSING`.
    """
    if processor.writes_template:
        return {}
    tokenizer = processor.tokenizer
    end, image_token, marker = tokenizer.eos_token, processor.image_token, processor.vusr_marker

    def render(*messages: dict, **settings) -> tuple[str, list[str]]:
        """The text, and the parts of it that are in the loss. Both are empty if the template refuses."""
        try:
            [text], [spans] = render_jinja_template(
                [list(messages)],
                chat_template=tokenizer.get_chat_template(),
                return_assistant_tokens_mask=True,
                **tokenizer.special_tokens_map,
                **settings,
            )
        except (TemplateError, TypeError):
            return "", []
        return text, [text[begin:stop].strip() for begin, stop in spans]

    def turn(role: str, text: str, **flags) -> dict:
        return {"role": role, "content": [{"type": "text", "text": text}], **flags}

    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Kiwi"}]}
    answer, asked = turn("assistant", "Plum"), turn("user", "Fig", self_question=True)
    text, spoken = render(user, answer)
    asking, spoken_asking = render(user, answer, asked, answer)
    plain, caption = render(user, answer, plain=True)
    prompt, _ = render(user, answer, add_generation_prompt=True, ask=True)
    passes = {
        "image": text.count(image_token) == 1,
        "generation": spoken == [f"Plum{end}"],
        "self_question": marker in asking and spoken_asking == [f"Plum{end}", f"Fig{end}", f"Plum{end}"],
        "plain": caption == ["Plum"] and plain.strip().endswith(f"{image_token}Plum"),
        "ask": marker in prompt.removeprefix(text),
        "control_tokens": not any(render(turn("user", f"a {token} b"), answer)[0] for token in (image_token, end)),
    }
    return {name: sentence for name, sentence in MISSING.items() if not passes[name]}


def check_template(processor: SQLlavaProcessor, needed: set[str] = frozenset()) -> None:
    """
    Prints what a user's own chat template lacks.

    Args:
        needed (`set[str]`): Keys of `MISSING` that a run needs.

    Raises:
        ValueError: if one of these is missing.
    """
    missing = missing_in_template(processor)
    if lacking := [missing[name] for name in MISSING if name in missing and name in needed]:
        raise ValueError(
            f"This run cannot use the chat template: {'; '.join(lacking)}. Mend the template (docs/checkpoints.md "
            "shows what it needs), or remove chat_template_path and set prompt_layout."
        )
    for sentence in missing.values():
        print_in_first_process(f"The chat template is not this library's: {sentence}.")
