"""Processor of SQ-LLaVA: images to square pixels, conversations to token ids and to the mask of what is in the loss.

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

In the loss are the answers, the questions of `vusr` turns, and the delimiter after each; so says
`apply_chat_template(..., return_assistant_tokens_mask=True)`.

The layout of MiniGPT-4 (https://arxiv.org/abs/2304.10592), `SQLlavaProcessor(..., **PROMPT_LAYOUTS["minigpt4"])`:

    <s>###Human: <Img><image></Img>What is it? ###Assistant: A dog.</s>

What becomes of images is said in `image_processing_sq_llava.py`.
"""

import difflib
import inspect
import json
from typing import Literal, get_args

from transformers import AddedToken, LlamaTokenizer, ProcessorMixin
from transformers.processing_utils import MultiModalData, ProcessingKwargs


# Relative in a checkpoint's folder and on the Hub, absolute in this library.
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

# Settings of the processor by the name of a layout. An answer ends in the end-of-sequence token, at which generation
# stops, where MiniGPT-4 looked for the `###` of the next turn. Before `###Assistant:` stands a space, as in the prompt
# by which the paper curates its data; the paper's template of stage 2 has none.
PROMPT_LAYOUTS = {
    "minigpt4": {
        "system_message": "",
        "user_marker": "###Human:",
        "assistant_marker": "###Assistant:",
        "image_begin": "<Img>",
        "image_end": "</Img>",
    }
}

PROCESSOR_SETTINGS = (
    "image_seq_length", "image_aspect_ratio", "text_prefix", "image_begin", "image_end", "system_message",
    "user_marker", "vusr_marker", "assistant_marker",
)  # fmt: skip
# What transformers itself writes into, or reads out of, a processor_config.json.
TRANSFORMERS_KEYS = {"auto_map", "processor_class", "transformers_version", "audio_tokenizer", "video_processor"}

TEMPLATE_HEADER = "{#- SQ-LLaVA: written by SQLlavaProcessor from its settings -#}\n"
# `{% generation %}` marks what is in the loss. A user turn flagged `self_question` is a vusr turn. `plain=True` gives
# the caption layout of stage 1, `ask=True` lets the prompt end in the vusr marker.
# Servers (vLLM, SGLang) read from the loop over `message['content']`, spelled so, that content may be a list of parts;
# else they write `<image>` into the text, which the template refuses.
TEMPLATE_BODY = r"""
{%- macro text_of(message, images_only=false) -%}
    {%- set content = message['content'] -%}
    {%- if content is undefined or content is none -%}
        {{- raise_exception("The turn of role '" ~ message['role'] ~ "' has no content: write '' if it is empty.") -}}
    {%- endif -%}
    {%- set ns = namespace(text='', typed='') -%}
    {%- if content is string -%}
        {%- set ns.typed = content -%}
        {%- set ns.text = '' if images_only else content -%}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {%- if message['role'] not in ['user', 'system'] or message['self_question'] -%}
                    {{- raise_exception("An image stands in a turn of role '" ~ message['role'] ~ "'" ~
                        (" flagged self_question" if message['self_question'] else "") ~
                        ": what the model says cannot hold images. Put it into a user turn.") -}}
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
    {%- for token in control_tokens -%}
        {%- if token in ns.typed -%}
            {{- raise_exception("The text of a turn of role '" ~ message['role'] ~ "' contains '" ~ token ~
                "', which is a control token of this model: remove it" ~
                (", or give the image as {'type': 'image'}." if token == image_token else ".")) -}}
        {%- endif -%}
    {%- endfor -%}
    {{- ns.text -}}
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
    {%- set system = text_of(messages[0]) if has_system else system_message -%}
    {{- text_prefix ~ system -}}
    {%- for message in (messages[1:] if has_system else messages) -%}
        {%- set text = text_of(message) -%}
        {%- set space = ' ' if loop.first and system else '' -%}
        {%- if message['role'] == 'vusr' or message['role'] == 'user' and message['self_question'] -%}
            {{- space ~ vusr_marker -}}
            {%- generation -%}{{- ' ' ~ text ~ eos_token -}}{%- endgeneration -%}
        {%- elif message['role'] == 'user' -%}
            {{- space ~ user_marker ~ ' ' ~ text -}}
        {%- elif message['role'] == 'assistant' -%}
            {{- ' ' ~ assistant_marker -}}
            {%- generation -%}{{- ' ' ~ text ~ eos_token -}}{%- endgeneration -%}
        {%- else -%}
            {{- raise_exception("Role '" ~ message['role'] ~ "': the roles are system (first only), user, vusr and "
                ~ "assistant.") -}}
        {%- endif -%}
    {%- endfor -%}
    {%- if add_generation_prompt -%}
        {{- vusr_marker if ask else ' ' ~ assistant_marker -}}
    {%- endif -%}
{%- endif -%}
""".strip()


class SQLlavaProcessorKwargs(ProcessingKwargs, total=False):
    # The chat template writes the beginning of the sequence. With the tokenizer's own in front of it,
    # `processor(text=processor.apply_chat_template(messages))` would begin twice.
    _defaults = {"text_kwargs": {"add_special_tokens": False}}


class SQLlavaProcessor(ProcessorMixin):
    r"""
    Joins an image processor, a tokenizer and the chat template. Registers `<image>`, `[vusr]` and, where the tokenizer
    has no padding token, `<pad>`; pads on the left, so that a batch generates what each prompt generates alone.

    Args:
        image_processor: The vision tower's image processor (CLIP, SigLIP or BLIP-2), or that of a saved SQ-LLaVA.
        tokenizer: A fast tokenizer with an end-of-sequence token, the delimiter.
        image_seq_length (`int`, defaults to 576): Number of tokens of one image, as in the model's configuration.
        image_aspect_ratio (`str`, defaults to `"pad"`):
            `"pad"`: pad to a square with the mean colour, then resize. `"crop"`: resize, then crop the centre.
        text_prefix (`str`, defaults to `""`):
            What text begins with that follows the beginning of the sequence or an image. The authors' code tokenizes
            such text apart, so that Llama's tokenizer puts a space before it: `" "` for checkpoints trained by it.
        image_begin, image_end (`str`, default to `""` and a line break):
            What stands around an image of a conversation. A line break alone is left out behind text.
        system_message (`str`): Stands before the conversation, unless that begins with a system turn.
        user_marker, assistant_marker (`str`): What a turn begins with; defaults as in Vicuna v1.
        vusr_marker (`str`, defaults to `"[vusr]"`):
            What a turn in which the model asks begins with. `"[vusr]"` is registered as a special token; any other
            marker, such as `"VUSER:"` of the released checkpoints, is plain text.
        delimiter (`str`, *optional*): The end-of-sequence token behind each answer: one of the tokenizer's added
            tokens, such as `"<|im_end|>"`. Default: the tokenizer's own. It is saved with the tokenizer.
        chat_template (`str` or `dict`, *optional*):
            A Jinja template, or several by their names; `"default"` is written from the settings above, unless given.
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
        delimiter: str | None = None,
        chat_template: str | dict[str, str] | None = None,
    ):
        if image_aspect_ratio not in get_args(ImageAspectRatio):
            raise ValueError(f"image_aspect_ratio is {image_aspect_ratio!r}: choose 'pad' or 'crop'.")
        if delimiter is not None:
            if delimiter not in tokenizer.get_added_vocab():
                raise ValueError(
                    f"The delimiter (in a recipe eos_token) is {delimiter!r}, none of the tokenizer's added tokens: "
                    f"give one of {', '.join(tokenizer.get_added_vocab())}."
                )
            tokenizer.eos_token = delimiter
        if tokenizer.eos_token is None:
            raise ValueError("The tokenizer has no eos_token, which ends every answer: set tokenizer.eos_token first.")
        if text_prefix.strip():
            raise ValueError(f"text_prefix is {text_prefix!r}: it may hold spaces only.")
        for name, marker in (("user", user_marker), ("vusr", vusr_marker), ("assistant", assistant_marker)):
            if not marker or marker != marker.strip():
                raise ValueError(f"{name}_marker is {marker!r}: it must not be empty, nor begin or end with a space.")
        # `from_pretrained` hands its keywords to the tokenizer too, which would save them as its own.
        for name in ("delimiter", *PROCESSOR_SETTINGS):
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
        self._register_tokens(tokenizer)
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.vusr_token_id = tokenizer.convert_tokens_to_ids(VUSR_TOKEN) if vusr_marker == VUSR_TOKEN else None
        self.control_tokens = self._find_control_tokens(tokenizer)
        templates = chat_template if isinstance(chat_template, dict) else {"default": chat_template}
        if (templates.get("default") or TEMPLATE_HEADER).startswith(TEMPLATE_HEADER):
            templates = {**templates, "default": self._write_chat_template(tokenizer)}
        chat_template = templates if len(templates) > 1 else templates["default"]
        tokenizer.chat_template = chat_template
        image_processor = _square_image_processor(image_processor, image_aspect_ratio)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_args_and_dict(cls, args, processor_dict, **kwargs):
        """As of transformers, which drops a setting that it does not know without a word."""
        known = {*inspect.signature(cls.__init__).parameters, *TRANSFORMERS_KEYS}
        for name in processor_dict:
            if name not in known and not name.startswith("_"):
                raise ValueError(
                    f"processor_config.json: SQLlavaProcessor has no setting {name!r}{_meant(name, known)}."
                )
        # Those of `from_pretrained` may be meant for the tokenizer, the image processor or the download.
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
            # transformers does not save this flag, and a reloaded tokenizer would give other tokens than it was
            # trained with (Mistral's puts a space after each special token, Llama's does not).
            tokenizer.init_kwargs["legacy"] = tokenizer.legacy

    def _find_control_tokens(self, tokenizer) -> list[str]:
        """
        What no text of a message may contain: it would forge an image, a turn or its end. Of the tokenizer's special
        tokens these are begin, end, padding and unknown token, and those that its chat template writes; other ones,
        such as a user's `<box>`, are text. The template that is written lists them, so that they are found again.
        """
        templates = tokenizer.chat_template or ""
        templates = "".join(templates.values()) if isinstance(templates, dict) else templates
        special_tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
        of_sequence = {token for token in named if token is not None}
        of_template = {token for token in special_tokens if token in templates}
        return sorted({IMAGE_TOKEN, VUSR_TOKEN, self.vusr_marker} | of_sequence | of_template)

    def _write_chat_template(self, tokenizer) -> str:
        # Trainers and servers tokenize a rendered template without adding special tokens: so the template writes the
        # beginning of the sequence, if this tokenizer begins with one.
        begins_with_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        settings = {
            "bos": tokenizer.bos_token if begins_with_bos else "",
            "system_message": self.system_message,
            "user_marker": self.user_marker,
            "vusr_marker": self.vusr_marker,
            "assistant_marker": self.assistant_marker,
            "image_token": IMAGE_TOKEN,
            "image_begin": self.image_begin,
            "image_end": self.image_end,
            "text_prefix": self.text_prefix,
            "control_tokens": self.control_tokens,
        }
        lines = [f"{{%- set {name} = {json.dumps(value)} -%}}\n" for name, value in settings.items()]
        return TEMPLATE_HEADER + "".join(lines) + TEMPLATE_BODY

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The text that takes the place of the `image_idx`-th `<image>`: one placeholder for each image token."""
        return self.image_token * self.image_seq_length

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs) -> MultiModalData:
        """The number of placeholders of images of the given sizes; used by inference engines (vLLM)."""
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
    """Our image processor with the size, mean and interpolation of a CLIP, SigLIP, BLIP-2 or LLaVA one."""
    # By name: remote code and an import are two classes.
    if type(image_processor).__name__.startswith("LlavaImageProcessor"):
        image_processor = SQLlavaImageProcessor.from_dict(image_processor.to_dict())
    elif type(image_processor).__name__ != "SQLlavaImageProcessor":
        size = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
        side = size["height"] if "height" in size else size["shortest_edge"]
        image_processor = SQLlavaImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            resample=image_processor.resample,
            image_mean=image_processor.image_mean,
            image_std=image_processor.image_std,
        )
    image_processor.do_pad = image_aspect_ratio == "pad"
    return image_processor


SQLlavaProcessor.register_for_auto_class()

__all__ = ["SQLlavaProcessor"]
