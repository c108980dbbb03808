"""Processor of SQ-LLaVA: turns images into pixels, and conversations into token ids and the loss mask.

    >>> from transformers import AutoProcessor
    >>> processor = AutoProcessor.from_pretrained("org/sq-llava-7b", trust_remote_code=True)
    >>> question = [{"type": "image", "path": "dog.png"}, {"type": "text", "text": "What is it?"}]
    >>> messages = [
    ...     {"role": "user", "content": question},
    ...     {"role": "assistant", "content": "A dog."},
    ...     {"role": "vusr", "content": "What is it doing?"},
    ...     {"role": "assistant", "content": "Running."},
    ... ]
    >>> print(processor.apply_chat_template(messages))
    <s>SYSTEM USER: <image>
    What is it? ASSISTANT: A dog.</s>[vusr] What is it doing?</s> ASSISTANT: Running.</s>

(SYSTEM stands for the system message.) The loss is on the answers, on the questions of `vusr` turns, and on the
delimiter after each. `apply_chat_template(..., return_assistant_tokens_mask=True)` returns this mask.

This is Vicuna's prompt layout. `SQLlavaProcessor(..., **PROMPT_LAYOUTS["chatml"])` gives that of Qwen and SmolLM, in
which `[vusr]` stands in the place of the role name:

    <|im_start|>user
    <image>
    What is it?<|im_end|>
    <|im_start|>assistant
    A dog.<|im_end|>
    <|im_start|>[vusr]
    What is it doing?<|im_end|>

`image_processing_sq_llava.py` processes the images.
"""

import difflib
import inspect
import json
from collections.abc import Sequence
from typing import Any, Literal, get_args

from transformers import AddedToken, LlamaTokenizer, ProcessorMixin
from transformers.processing_utils import MultiModalData, ProcessingKwargs


# In a Hub repository this file is part of a package, in a source checkout it is a top-level module.
try:
    from .image_processing_sq_llava import SQLlavaImageProcessor
except ImportError:
    from image_processing_sq_llava import SQLlavaImageProcessor


ImageAspectRatio = Literal["pad", "crop"]

IMAGE_TOKEN = "<image>"
VUSR_TOKEN = "[vusr]"
PAD_TOKEN = "<pad>"
# Section 3.1 of the paper, https://arxiv.org/abs/2403.11299.
SYSTEM_MESSAGE = (
    "The assistant gives helpful, detailed, and polite answers to the user's questions. Also, the assistant is a "
    "curious virtual user can ask complex questions that are relevant to the content in the image."
)

# How turns are written. `{begin}` is `turn_begin ~ marker ~ role_end`, and the text between stars is in the loss:
#     the user's turn       {begin} text_begin text user_end
#     the model's question  {begin} *text_begin text delimiter* turn_separator
#     the model's answer    before_answer {begin} thought *text_begin text delimiter* turn_separator
#     the system message    system_begin system_message system_end, before the first turn or after its {begin}
# The values are Vicuna's.
TURN_FORMAT = {
    "turn_begin": "",
    "role_end": "",
    "text_begin": " ",
    "user_end": "",
    "before_answer": " ",
    "turn_separator": "",
    "system_begin": "",
    "system_end": " ",
    "system_in_turn": False,
    # Whose white space is removed at both ends: none, spoken (answers and questions of the model) or all. A line break
    # at the beginning of an answer would otherwise join the one of `role_end` in one token.
    "trim": "none",
}


def _layout(user: str, assistant: str, image_begin: str = "", image_end: str = "\n", **others) -> dict:
    turns = {name: others.pop(name) for name in TURN_FORMAT if name in others}
    markers = {"user_marker": user, "assistant_marker": assistant, "image_begin": image_begin, "image_end": image_end}
    return {**markers, "turn_format": {**TURN_FORMAT, **turns}, **others}


def _layout_of_turns(begin: str, role_end: str, end: str, separator: str, assistant: str = "assistant", **others):
    """A layout in which every turn begins with a role name between two markers, and ends with the delimiter."""
    system = {"system_begin": f"{begin}system{role_end}", "system_end": f"{end}{separator}"}
    turns = {"turn_begin": begin, "role_end": role_end, "user_end": f"{end}{separator}", "turn_separator": separator}
    return _layout(
        "user", assistant, delimiter=end, **{"text_begin": "", "before_answer": "", **system, **turns, **others}
    )


def _mistral(text_begin: str, **others) -> dict:
    spaces = {"text_begin": text_begin, "before_answer": "", "trim": "spoken"}
    return _layout("[INST]", "[/INST]", delimiter="</s>", **spaces, **others)


BEFORE_THE_FIRST_TEXT = {"system_begin": "", "system_end": "\n\n", "system_in_turn": True}
# Name of a prompt layout -> settings of the processor. `mistral` is the format of Mistral's SentencePiece tokenizers,
# `mistral_tekken` that of Mistral Nemo, `mistral_v7` that of Mistral Small 3. In `minigpt4` an answer ends with the
# end-of-sequence token, at which generation stops; MiniGPT-4 itself stops at the `###` of the next turn. A space
# precedes `###Assistant:`, as in the prompt that the MiniGPT-4 paper uses to curate its data; the paper's template for
# stage 2 has no space.
PROMPT_LAYOUTS = {
    "vicuna": _layout("USER:", "ASSISTANT:"),
    "minigpt4": _layout("###Human:", "###Assistant:", "<Img>", "</Img>", system_message=""),
    "chatml": _layout_of_turns("<|im_start|>", "\n", "<|im_end|>", "\n", trim="spoken"),
    "llama3": _layout_of_turns("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "", trim="all"),
    "gemma": _layout_of_turns(
        "<start_of_turn>", "\n", "<end_of_turn>", "\n", "model", **BEFORE_THE_FIRST_TEXT, trim="all"
    ),
    "mistral": _mistral(" ", **BEFORE_THE_FIRST_TEXT),
    "mistral_tekken": _mistral("", **BEFORE_THE_FIRST_TEXT),
    "mistral_v7": _mistral("", system_begin="[SYSTEM_PROMPT]", system_end="[/SYSTEM_PROMPT]"),
}

PROCESSOR_SETTINGS = (
    "image_seq_length", "image_aspect_ratio", "text_prefix", "image_begin", "image_end", "system_message",
    "user_marker", "vusr_marker", "assistant_marker", "turn_format", "thought",
)  # fmt: skip
# Keys that transformers itself writes to, or reads from, a processor_config.json.
TRANSFORMERS_KEYS = {"auto_map", "processor_class", "transformers_version", "audio_tokenizer", "video_processor"}

AUTO_MAP = {
    "AutoImageProcessor": "image_processing_sq_llava.SQLlavaImageProcessor",
    "AutoProcessor": "processing_sq_llava.SQLlavaProcessor",
}

TEMPLATE_HEADER = "{#- SQ-LLaVA: written by SQLlavaProcessor from its settings -#}\n"
# `{% generation %}` marks the text that is in the loss. A user turn with `self_question` set is a vusr turn.
# `plain=True` gives the caption layout of stage 1. `ask=True` ends the prompt with the vusr marker.
# Servers (vLLM, SGLang) search the template for a loop over `message['content']`, in exactly this spelling, to learn
# that content may be a list of parts. Without it they write `<image>` into the text, which the template refuses.
TEMPLATE_BODY = r"""
{%- macro text_of(message, images_only=false) -%}
    {%- set content = message['content'] -%}
    {%- if content is undefined or content is none -%}
        {{- raise_exception("The turn of role '" ~ message['role'] ~ "' has no content: give '' if it is empty.") -}}
    {%- endif -%}
    {%- set ns = namespace(text='', typed='') -%}
    {%- if content is string -%}
        {%- set ns.typed = content -%}
        {%- set ns.text = '' if images_only else content -%}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {%- if message['role'] not in ['user', 'system'] or message['self_question'] -%}
                    {{- raise_exception("There is an image in a turn of role '" ~ message['role'] ~ "'" ~
                        (" with self_question" if message['self_question'] else "") ~
                        ": the model's own turns cannot hold images. Move it to a user turn.") -}}
                {%- endif -%}
                {%- if images_only -%}
                    {%- set ns.text = ns.text ~ image_token -%}
                {%- else -%}
                    {%- set closing = image_end if image_begin or not ns.typed else '' -%}
                    {%- set ns.text = ns.text ~ image_begin ~ image_token ~ text_prefix ~ closing -%}
                {%- endif -%}
            {%- elif part['type'] == 'text' -%}
                {%- set ns.typed = ns.typed ~ part['text'] -%}
                {%- if not images_only -%}
                    {%- set ns.text = ns.text ~ part['text'] -%}
                {%- endif -%}
            {%- else -%}
                {{- raise_exception("Content of type '" ~ part['type'] ~
                    "': only 'text' and 'image' are supported.") -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {#- Most texts have no `<`, and a language model may have hundreds of control tokens. -#}
    {%- for beginning in control_tokens -%}
        {%- for token in (control_tokens[beginning] if beginning in ns.typed else []) -%}
            {%- if token in ns.typed -%}
                {{- raise_exception("The text of a turn of role '" ~ message['role'] ~ "' contains '" ~ token ~
                    "', which is a control token of this model: remove it" ~
                    (", or give the image as {'type': 'image'}." if token == image_token else ".")) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endfor -%}
    {%- set spoken = message['role'] in ['assistant', 'vusr'] or message['self_question'] -%}
    {{- ns.text | trim if trim == 'all' or trim == 'spoken' and spoken else ns.text -}}
{%- endmacro -%}

{{- bos -}}
{%- if plain -%}
    {%- for message in messages -%}
        {%- if message['role'] == 'assistant' -%}
            {%- set text = text_of(message) -%}
            {%- generation -%}{{- text_prefix ~ text ~ '\n' -}}{%- endgeneration -%}
        {%- else -%}
            {{- text_of(message, images_only=true) -}}
        {%- endif -%}
    {%- endfor -%}
{%- else -%}
    {%- set has_system = messages and messages[0]['role'] == 'system' -%}
    {%- set turns = messages[1:] if has_system else messages -%}
    {%- set system = text_of(messages[0]) if has_system else system_message -%}
    {%- set system = system_begin ~ system ~ system_end if system else '' -%}
    {{- text_prefix ~ ('' if system_in_turn else system) -}}
    {%- for message in turns -%}
        {%- set text = text_of(message) -%}
        {%- set start = system if system_in_turn and loop.first else '' -%}
        {%- if message['role'] == 'vusr' or message['role'] == 'user' and message['self_question'] -%}
            {{- vusr_begin ~ start -}}
            {%- generation -%}{{- text_begin ~ text ~ eos_token -}}{%- endgeneration -%}
            {{- turn_separator -}}
        {%- elif message['role'] == 'user' -%}
            {{- user_begin ~ text_begin ~ start ~ text ~ user_end -}}
        {%- elif message['role'] == 'assistant' -%}
            {{- ('' if system and loop.first else before_answer) ~ assistant_begin ~ start -}}
            {%- generation -%}{{- text_begin ~ text ~ eos_token -}}{%- endgeneration -%}
            {{- turn_separator -}}
        {%- else -%}
            {{- raise_exception("Role '" ~ message['role'] ~ "': the roles are system (first only), user, vusr and "
                ~ "assistant.") -}}
        {%- endif -%}
    {%- endfor -%}
    {%- if add_generation_prompt -%}
        {%- set start = system if system_in_turn and not turns else '' -%}
        {%- set answer = ('' if system and not turns else before_answer) ~ assistant_begin -%}
        {{- (vusr_begin if ask else answer) ~ start -}}
    {%- endif -%}
{%- endif -%}
""".strip()


def begin_of_text(tokenizer) -> str:
    """
    The begin-of-sequence token, or `""` for a tokenizer that puts none before a text. Trainers and servers tokenize a
    rendered template without adding special tokens, so the template itself must write it.
    """
    begins_with_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return tokenizer.bos_token if begins_with_bos else ""


def write_chat_template(settings: dict, bos: str = "", control_tokens: Sequence[str] = ()) -> str:
    """
    Writes the chat template of a prompt layout.

    Args:
        settings (`dict`): Settings of [`SQLlavaProcessor`], such as those in `PROMPT_LAYOUTS`. Missing: Vicuna's.
        bos (`str`): The begin-of-sequence token, with which each text begins.
        control_tokens (`Sequence[str]`): Strings that no text of a message may contain.

    Returns:
        `str`: A Jinja template.
    """
    defaults = {"system_message": "", "vusr_marker": VUSR_TOKEN, "text_prefix": "", "thought": ""}
    settings = {**defaults, **PROMPT_LAYOUTS["vicuna"], **settings}
    turns = settings["turn_format"]
    begins = {
        f"{role}_begin": turns["turn_begin"] + settings[f"{role}_marker"] + turns["role_end"]
        for role in ("user", "vusr", "assistant")
    }
    begins["assistant_begin"] += settings["thought"]
    by_first_character = {}
    for token in control_tokens:
        by_first_character.setdefault(token[0], []).append(token)
    texts = {name: settings[name] for name in ("system_message", "image_begin", "image_end", "text_prefix")}
    written = {name: value for name, value in turns.items() if name not in ("turn_begin", "role_end")}
    variables = {"bos": bos, **texts, **begins, **written, "image_token": IMAGE_TOKEN}
    variables["control_tokens"] = by_first_character
    lines = [f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}\n" for name, value in variables.items()]
    return TEMPLATE_HEADER + "".join(lines) + TEMPLATE_BODY


class SQLlavaProcessorKwargs(ProcessingKwargs, total=False):
    # The chat template writes the begin-of-sequence token. If the tokenizer added its own as well,
    # `processor(text=processor.apply_chat_template(messages))` would have two.
    _defaults = {"text_kwargs": {"add_special_tokens": False}}


class SQLlavaProcessor(ProcessorMixin):
    r"""
    Joins an image processor, a tokenizer and the chat template. It registers the special tokens `<image>`, `[vusr]`
    and, if the tokenizer has no padding token, `<pad>`. It pads on the left, as generation in batches needs.

    Args:
        image_processor: The vision tower's image processor (CLIP, SigLIP or BLIP-2), or that of a saved SQ-LLaVA.
        tokenizer: A fast tokenizer with an end-of-sequence token, which is the delimiter.
        image_seq_length (`int`, defaults to 576): Number of tokens per image, as in the model's configuration.
        image_aspect_ratio (`str`, defaults to `"pad"`):
            `"pad"`: pad to a square with the mean colour, then resize. `"crop"`: resize, then crop the centre.
        text_prefix (`str`, defaults to `""`):
            Prefix of text that starts the sequence or follows an image. Use `" "` for checkpoints trained by the
            authors' code: it tokenizes such text on its own, where Llama's tokenizer puts a space before it.
        image_begin, image_end (`str`, default to `""` and a line break):
            Text before and after each image of a conversation. With an empty `image_begin`, `image_end` is left out
            if the turn has text before the image.
        system_message (`str`): Text before the conversation, unless the conversation starts with a system turn.
        user_marker, assistant_marker (`str`): Text that starts a turn. Defaults: those of Vicuna v1.
        vusr_marker (`str`, defaults to `"[vusr]"`):
            Text that starts a turn in which the model asks. `"[vusr]"` is registered as a special token; any other
            marker, such as `"VUSER:"` of the authors' checkpoints, is plain text.
        turn_format (`dict`, *optional*):
            How turns are written around their markers: values for the keys of `TURN_FORMAT`. Default: as in Vicuna.
            `PROMPT_LAYOUTS` has this setting and the markers for the formats of other language models.
        thought (`str`, defaults to `""`):
            Text before each answer that is not in the loss: the empty thought of a language model that thinks, such as
            `"<think>\n\n</think>\n\n"`. It makes the model answer at once.
        delimiter (`str`, *optional*): The end-of-sequence token after each answer: one of the tokenizer's added
            tokens, such as `"<|im_end|>"`. Default: the tokenizer's own. It is saved with the tokenizer.
        chat_template (`str` or `dict`, *optional*):
            A Jinja template, or a dict of named templates. The template `"default"` is written from the settings above
            unless it is given.

    Raises:
        ValueError: if a setting is wrong, or the tokenizer has no end-of-sequence token.
    """

    valid_processor_kwargs = SQLlavaProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_seq_length: int = 576,
        image_aspect_ratio: ImageAspectRatio = "pad",
        text_prefix: str = "",
        image_begin: str = "",
        image_end: str = "\n",
        system_message: str = SYSTEM_MESSAGE,
        user_marker: str = "USER:",
        vusr_marker: str = VUSR_TOKEN,
        assistant_marker: str = "ASSISTANT:",
        turn_format: dict[str, Any] | None = None,
        thought: str = "",
        delimiter: str | None = None,
        chat_template: str | dict[str, str] | None = None,
    ):
        if image_aspect_ratio not in get_args(ImageAspectRatio):
            raise ValueError(f"image_aspect_ratio is {image_aspect_ratio!r}: choose 'pad' or 'crop'.")
        ends = self._set_end_token(tokenizer, delimiter)
        if text_prefix.strip():
            raise ValueError(f"text_prefix is {text_prefix!r}: it may contain only spaces.")
        for name, marker in (("user", user_marker), ("vusr", vusr_marker), ("assistant", assistant_marker)):
            if not marker or marker != marker.strip():
                raise ValueError(f"{name}_marker is {marker!r}: it must not be empty or have white space at its ends.")
        turn_format = {**TURN_FORMAT, **(turn_format or {})}
        for name in turn_format.keys() - TURN_FORMAT.keys():
            raise ValueError(f"turn_format has no key {name!r}{_meant(name, set(TURN_FORMAT))}.")
        # `from_pretrained` also passes its keywords to the tokenizer, which would save them as its own settings. An
        # `auto_map` of the tokenizer's first model would name code that a saved SQ-LLaVA does not have.
        for name in ("auto_map", "delimiter", *PROCESSOR_SETTINGS):
            tokenizer.init_kwargs.pop(name, None)
        self.image_seq_length = image_seq_length
        self.image_aspect_ratio = image_aspect_ratio
        self.text_prefix = text_prefix
        self.image_begin = image_begin
        self.image_end = image_end
        self.system_message = system_message
        self.user_marker = user_marker
        self.vusr_marker = vusr_marker
        self.assistant_marker = assistant_marker
        self.turn_format = turn_format
        self.thought = thought
        self._register_tokens(tokenizer)
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.vusr_token_id = tokenizer.convert_tokens_to_ids(VUSR_TOKEN) if vusr_marker == VUSR_TOKEN else None
        self.control_tokens = self._find_control_tokens(tokenizer, ends)
        templates = chat_template if isinstance(chat_template, dict) else {"default": chat_template}
        self.writes_template = (templates.get("default") or TEMPLATE_HEADER).startswith(TEMPLATE_HEADER)
        if self.writes_template:
            templates = {**templates, "default": self._write_chat_template(tokenizer, self.control_tokens)}
        chat_template = templates if len(templates) > 1 else templates["default"]
        tokenizer.chat_template = chat_template
        image_processor = _square_image_processor(image_processor, image_aspect_ratio)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @staticmethod
    def _set_end_token(tokenizer, delimiter: str | None) -> set[str]:
        """Makes the delimiter the tokenizer's end token. Returns the end tokens that it has now and had before."""
        ends = {tokenizer.eos_token, delimiter} - {None}
        if delimiter is not None:
            if delimiter not in tokenizer.get_added_vocab():
                raise ValueError(
                    f"The delimiter (in a recipe: prompt_layout or eos_token) is {delimiter!r}, which is not one of "
                    "the tokenizer's added tokens: give one of "
                    f"{', '.join(tokenizer.get_added_vocab())}."
                )
            tokenizer.eos_token = delimiter
        if tokenizer.eos_token is None:
            raise ValueError("The tokenizer has no eos_token, which ends every answer: set tokenizer.eos_token first.")
        return ends

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, trust_remote_code: bool | None = None, **kwargs):
        """Like the method of transformers. Without `trust_remote_code`, it never asks on the terminal to run code."""
        kwargs["trust_remote_code"] = bool(trust_remote_code)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_args_and_dict(cls, args, processor_dict, **kwargs):
        """Refuses unknown settings, which the method of transformers would silently drop."""
        known = {*inspect.signature(cls.__init__).parameters, *TRANSFORMERS_KEYS}
        for name in processor_dict:
            if name not in known and not name.startswith("_"):
                raise ValueError(
                    f"processor_config.json: SQLlavaProcessor has no setting {name!r}{_meant(name, known)}."
                )
        # A keyword of `from_pretrained` may be for the tokenizer, the image processor or the download, so only a
        # misspelt name of our settings is an error.
        for name in kwargs:
            if name not in known and (meant := _meant(name, known)):
                raise ValueError(f"SQLlavaProcessor has no setting {name!r}{meant}")
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    def _register_tokens(self, tokenizer):
        new_tokens = [IMAGE_TOKEN] + [VUSR_TOKEN] * (self.vusr_marker == VUSR_TOKEN)
        if tokenizer.pad_token is None:
            new_tokens.append(PAD_TOKEN)
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new_tokens], True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = PAD_TOKEN
        tokenizer.padding_side = "left"
        if isinstance(tokenizer, LlamaTokenizer):
            # transformers does not save this flag. Without it, a reloaded tokenizer would give other tokens than in
            # training: Mistral's puts a space after each special token, Llama's does not.
            tokenizer.init_kwargs["legacy"] = tokenizer.legacy

    def _find_control_tokens(self, tokenizer, ends: set[str]) -> list[str]:
        """
        The strings that the text of a message must not contain, because they would fake an image, a turn or its end:
        `<image>`, the vusr markers, the tokenizer's begin, end, padding and unknown tokens, and every special token
        that its chat template or the prompt layout contains. Other special tokens, such as a user's `<box>`, are
        allowed. The template that we write lists these strings, so a reloaded processor finds them again.
        """
        templates = tokenizer.chat_template or ""
        templates = "".join(templates.values()) if isinstance(templates, dict) else templates
        templates += self._write_chat_template(tokenizer)
        special_tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
        of_sequence = {token for token in named if token is not None} | ends
        of_template = {token for token in special_tokens if token in templates}
        return sorted({IMAGE_TOKEN, VUSR_TOKEN, self.vusr_marker} | of_sequence | of_template)

    def _write_chat_template(self, tokenizer, control_tokens: Sequence[str] = ()) -> str:
        settings = {name: getattr(self, name) for name in PROCESSOR_SETTINGS}
        return write_chat_template(settings, begin_of_text(tokenizer), control_tokens)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The text that replaces one `<image>` of the prompt: one placeholder per image token."""
        return self.image_token * self.image_seq_length

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs) -> MultiModalData:
        """The number of placeholders for images of the given sizes. Inference engines such as vLLM call this."""
        if image_sizes is None:
            return MultiModalData()
        num_images = len(image_sizes)
        return MultiModalData(
            num_image_tokens=[self.image_seq_length] * num_images, num_image_patches=[1] * num_images
        )


def _meant(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return f": did you mean {close[0]!r}?" if close else ""


def _square_image_processor(image_processor, image_aspect_ratio: ImageAspectRatio):
    """Makes a [`SQLlavaImageProcessor`] with the settings of the image processor of CLIP, SigLIP, BLIP-2 or LLaVA."""
    # Compared by name: the class in remote code and the imported one are two classes.
    if type(image_processor).__name__.startswith("LlavaImageProcessor"):
        image_processor = SQLlavaImageProcessor.from_dict(image_processor.to_dict())
    elif type(image_processor).__name__ != "SQLlavaImageProcessor":
        size = (image_processor.crop_size if image_processor.do_center_crop else image_processor.size) or {}
        side = size.get("height") or size.get("shortest_edge")
        if side is None:
            raise ValueError(
                f"The image processor is a {type(image_processor).__name__}, whose images have no fixed size. Take "
                "that of a vision tower of fixed resolution, such as google/siglip2-base-patch16-384."
            )
        image_processor = SQLlavaImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            resample=image_processor.resample,
            image_mean=image_processor.image_mean,
            image_std=image_processor.image_std,
        )
    image_processor.do_pad = image_aspect_ratio == "pad"
    if "auto_map" in vars(image_processor):  # that of another model may name code that a saved SQ-LLaVA does not have
        image_processor.auto_map = dict(AUTO_MAP)
    return image_processor


SQLlavaProcessor.register_for_auto_class()

__all__ = ["SQLlavaProcessor"]
