"""Load a SQ-LLaVA, let it answer, ask, and talk to itself.

    >>> from sq_llava.inference import load
    >>> assistant = load("runs/demo/model")
    >>> assistant.answer("image.png", "what color is the shape?")
    >>> assistant.ask("image.png", num_questions=5)
    >>> assistant.converse("image.png", num_turns=3)

`path` is a plain checkpoint, an adapter folder, or a Hub id. What this module does not do: run the code in a
checkpoint's folder; the library's own classes are used.
"""

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import torch
from huggingface_hub import hf_hub_download
from jinja2 import TemplateError
from transformers import BitsAndBytesConfig, DynamicCache, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.utils import is_bitsandbytes_available

from modeling_sq_llava import SQLlavaForConditionalGeneration
from processing_sq_llava import SQLlavaProcessor
from sq_llava.checkpoint import is_adapter, is_missing_folder, load_checkpoint
from sq_llava.images import open_image


# The authors' code lets the model describe the image first: in training, no conversation begins with a self-question.
DESCRIBE = "Can you describe the image in detail?"


@dataclass
class Assistant:
    """A model in evaluation mode, with its processor."""

    model: SQLlavaForConditionalGeneration
    processor: SQLlavaProcessor

    def answer(self, images, messages, max_new_tokens: int = 512, **generate_kwargs) -> str:
        """
        Answers, greedily unless `generate_kwargs` say otherwise.

        Args:
            images: One image or a list (paths or PIL images), or `None`. They take the places of the image parts of
                `messages`; where there are none, they stand before the first user turn's text.
            messages: A question, or a list of messages whose last one is the user's.

        Returns:
            The answer, stripped.
        """
        return self.answer_batch([(images, messages)], max_new_tokens, **generate_kwargs)[0]

    @torch.inference_mode()
    def answer_batch(self, requests: list[tuple], max_new_tokens: int = 512, **generate_kwargs) -> list[str]:
        """Answers several `(images, messages)` in one left-padded batch: the same answers as one by one."""
        conversations = [place_images(images, messages) for images, messages in requests]
        inputs = _encode(self, conversations)
        settings = {"do_sample": False, **generate_kwargs, "max_new_tokens": max_new_tokens}
        output = self.model.generate(**inputs, **settings)
        return _decode(self, output[:, inputs["input_ids"].shape[1] :])

    def stream(
        self, images, messages, max_new_tokens: int = 512, ask: bool = False, **generate_kwargs
    ) -> Iterator[str]:
        """
        Answers, or asks, piece by piece; arguments as in [`Assistant.answer`]. Closing the iterator ends the
        generation at its next token.

        Args:
            max_new_tokens (`int`): At most; fewer where the model's context ends before.
            ask (`bool`): Generate a question instead of an answer.

        Yields:
            The pieces of the text, which together are not stripped.

        Raises:
            ValueError: if the conversation fills the model's context.
        """
        inputs = _encode(self, [place_images(images, messages)], ask=ask)
        length, limit = inputs["input_ids"].shape[1], self.model.config.text_config.max_position_embeddings
        if length >= limit:
            raise ValueError(
                f"The conversation has {length} tokens, of {limit} that this model reads: begin a new one."
            )
        max_new_tokens = min(max_new_tokens, limit - length)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        is_closed = _IsClosed()
        settings = {"do_sample": False, **generate_kwargs, "max_new_tokens": max_new_tokens}
        with ThreadPoolExecutor(max_workers=1) as executor:
            generation = executor.submit(
                self.model.generate,
                **inputs,
                **settings,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([is_closed]),
            )
            # The streamer itself would wait forever for a generation that failed.
            generation.add_done_callback(lambda _: streamer.end())
            try:
                yield from streamer
            finally:
                is_closed.event.set()
            generation.result()

    def ask(
        self,
        image,
        history: list[dict] | None = None,
        num_questions: int = 1,
        temperature: float = 1.2,
        top_k: int = 300,
        top_p: float = 0.95,
        max_new_tokens: int = 300,
        seed: int | None = None,
    ) -> list[str]:
        """
        Samples questions about an image, with the release's settings by default. The image and the conversation so
        far go through the model once for all questions.

        Args:
            image: Path or PIL image, or a list of them.
            history (`list[dict]`, *optional*): Messages that end with an answer. Default: the model describes
                the image.
            num_questions (`int`): How many to sample.
            seed (`int`, *optional*): For the same questions again.

        Returns:
            The questions, stripped.
        """
        talk = _Talk.start(self, image, history, max_new_tokens)
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_new_tokens": max_new_tokens}
        with _seeded(seed):
            return talk.ask(num_questions, **sampling)

    def converse(
        self,
        image,
        num_turns: int = 3,
        history: list[dict] | None = None,
        temperature: float = 1.2,
        top_k: int = 300,
        top_p: float = 0.95,
        max_new_tokens: int = 300,
        seed: int | None = None,
    ) -> list[dict]:
        """
        The model asks itself and answers, turn after turn; arguments as in [`Assistant.ask`].

        Returns:
            `history` (default: a description of the image), followed by `num_turns` turns of the roles `vusr` and
            `assistant`, contents as text.
        """
        talk = _Talk.start(self, image, history, max_new_tokens)
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_new_tokens": max_new_tokens}
        with _seeded(seed):
            for _ in range(num_turns):
                question = talk.ask(1, **sampling)[0]
                talk.messages.append({"role": "vusr", "content": question})
                talk.answer(max_new_tokens)
        return talk.messages


def load(
    path: str,
    device: str | None = None,
    dtype: str = "auto",
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    **kwargs,
) -> Assistant:
    """
    Args:
        path (`str`): A plain checkpoint, an adapter folder, or a Hub id.
        device (`str`, *optional*): `"cuda"`, `"mps"`, `"cpu"`, ...; default: the first of these there is.
        dtype (`str`): `"auto"` (as saved), `"float32"`, `"bfloat16"`, `"float16"`.
        load_in_4bit, load_in_8bit (`bool`): Let bitsandbytes hold the towers' weights in so many bits.
        kwargs: As for `from_pretrained` of the model. With `device_map`, leave `device` out.

    Raises:
        ValueError: if the path is that of a folder which is not there, or holds no model; without bitsandbytes.
    """
    if load_in_4bit or load_in_8bit:
        kwargs["quantization_config"] = _bits(load_in_4bit, load_in_8bit, dtype)
        kwargs.setdefault("device_map", {"": device or best_device()})
    path = str(path)
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not is_adapter(folder):
            raise ValueError(f"{path} holds neither config.json nor adapter_config.json: give a folder with a model.")
        path = str(folder)
    elif is_missing_folder(path):
        raise ValueError(f"{path}: no such folder. Give one with a model, or a Hub id such as org/name.")
    else:
        try:
            hf_hub_download(path, "config.json", revision=kwargs.get("revision"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not in the cache, and not to be had from the Hub: {error}") from error
    model, processor = load_checkpoint(path, dtype=dtype, **kwargs)
    if "device_map" not in kwargs:
        model.to(device or best_device())
    return Assistant(model.eval(), processor)


def _bits(load_in_4bit: bool, load_in_8bit: bool, dtype: str) -> BitsAndBytesConfig:
    if load_in_4bit and load_in_8bit:
        raise ValueError("load_in_4bit and load_in_8bit are both given: choose one.")
    if not is_bitsandbytes_available():
        raise ValueError("load_in_4bit and load_in_8bit need bitsandbytes: pip install bitsandbytes.")
    if load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute_dtype = "bfloat16" if dtype == "auto" else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


class _IsClosed(StoppingCriteria):
    """Ends a generation that nobody reads any more."""

    def __init__(self):
        self.event = Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


@dataclass
class _Talk:
    """A conversation with the model's cache for it: what was seen once is not computed again."""

    assistant: Assistant
    messages: list[dict]
    cache: DynamicCache = field(default_factory=DynamicCache)
    cached_ids: list[int] = field(default_factory=list)

    @classmethod
    def start(cls, assistant: Assistant, image, history: list[dict] | None, max_new_tokens: int) -> "_Talk":
        if history:
            if history[-1]["role"] != "assistant":
                raise ValueError(
                    f"history ends with a turn of role {history[-1]['role']!r}: it must end with an answer."
                )
            return cls(assistant, place_images(image, history))
        talk = cls(assistant, place_images(image, DESCRIBE))
        talk.answer(max_new_tokens)
        return talk

    @torch.inference_mode()
    def answer(self, max_new_tokens: int) -> None:
        """Answers the last turn greedily, and appends the answer."""
        inputs = self._uncached_inputs(ask=False)
        output = self.assistant.model.generate(
            **inputs, past_key_values=self.cache, do_sample=False, max_new_tokens=max_new_tokens
        )
        # The cache holds all but the last token, which was never fed.
        self.cached_ids = output[0, :-1].tolist()
        prompt_length = inputs["input_ids"].shape[1]
        text = _decode(self.assistant, output[:, prompt_length:])[0]
        self.messages.append({"role": "assistant", "content": text})

    @torch.inference_mode()
    def ask(self, num_questions: int, **sampling) -> list[str]:
        """Samples questions; the conversation stays as it is."""
        inputs = self._uncached_inputs(ask=True)
        ids = inputs.pop("input_ids")
        mask = inputs.pop("attention_mask")
        # One pass over all but the last token, which `generate` begins with.
        uncached_ids = ids[:, len(self.cached_ids) : -1]
        if uncached_ids.shape[1]:
            self.assistant.model(
                input_ids=uncached_ids,
                attention_mask=mask[:, :-1],
                past_key_values=self.cache,
                logits_to_keep=1,
                **inputs,
            )
            self.cached_ids = ids[0, :-1].tolist()
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(num_questions)
        output = self.assistant.model.generate(
            input_ids=ids.repeat(num_questions, 1),
            attention_mask=mask.repeat(num_questions, 1),
            past_key_values=cache,
            do_sample=True,
            **sampling,
        )
        return _decode(self.assistant, output[:, ids.shape[1] :])

    def _uncached_inputs(self, ask: bool) -> dict[str, torch.Tensor]:
        """The inputs for the next turn; without the pixels once the cache holds the images."""
        inputs = _encode(self.assistant, [self.messages], ask=ask)
        ids = inputs["input_ids"][0].tolist()
        common = 0
        while common < min(len(ids) - 1, len(self.cached_ids)) and ids[common] == self.cached_ids[common]:
            common += 1
        if common < len(self.cached_ids):
            # Text is not always split into the tokens that it was generated as.
            self.cache.crop(common - len(self.cached_ids))
            self.cached_ids = self.cached_ids[:common]
        if self.cached_ids:
            inputs.pop("pixel_values", None)
        return inputs


def place_images(images, messages: str | list[dict]) -> list[dict]:
    """
    Messages in which every image part holds its image; see [`Assistant.answer`] for the arguments.

    Raises:
        ValueError: if there are more images than places for them, or fewer.
    """
    images = [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
    images = [open_image(image) for image in images]
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    messages = [{**message, "content": _as_parts(message["content"])} for message in messages]
    empty = [part for message in messages for part in message["content"] if part.keys() == {"type"}]
    if images and not empty and not any(part["type"] == "image" for m in messages for part in m["content"]):
        first_user_turn = next((message for message in messages if message["role"] == "user"), None)
        if first_user_turn is None:
            raise ValueError("There are images, but no user turn to put them into.")
        empty = [{"type": "image"} for _ in images]
        first_user_turn["content"] = [*empty, *first_user_turn["content"]]
    if len(empty) != len(images):
        raise ValueError(f"The messages have {len(empty)} places for images, but {len(images)} images were given.")
    for part, image in zip(empty, images):
        part["image"] = image
    return messages


def _as_parts(content: str | list[dict]) -> list[dict]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else [dict(part) for part in content]


def _encode(assistant: Assistant, conversations: list[list[dict]], ask: bool = False) -> dict[str, torch.Tensor]:
    try:
        inputs = assistant.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            ask=ask,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "add_special_tokens": False},
        )
    except TemplateError as error:
        raise ValueError(str(error)) from error
    return dict(inputs.to(assistant.model.device))


def _decode(assistant: Assistant, token_ids: torch.Tensor) -> list[str]:
    return [text.strip() for text in assistant.processor.batch_decode(token_ids, skip_special_tokens=True)]


@contextmanager
def _seeded(seed: int | None):
    """Seeds the sampling inside of a `with`, and puts the generators back; without a seed, does nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
