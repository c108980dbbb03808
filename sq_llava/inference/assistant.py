"""Load an SQ-LLaVA, and let it answer, ask, and talk to itself.

    >>> from sq_llava import load
    >>> assistant = load("runs/demo/model")
    >>> assistant.answer("image.png", "what color is the shape?")
    >>> assistant.ask("image.png", num_questions=5)
    >>> assistant.converse("image.png", num_turns=3)

This module never runs the code in a checkpoint's folder: it uses the library's own classes.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from threading import Event

import numpy as np
import torch
from transformers import (
    BitsAndBytesConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from modeling_sq_llava import CACHE_NAME, SQLlavaForConditionalGeneration
from processing_sq_llava import SQLlavaProcessor
from sq_llava.checkpoints.load import load_checkpoint
from sq_llava.console import needs_extra
from sq_llava.data.messages import images_of, place_images, place_images_of_all
from sq_llava.data.shared_images import image_prefix, prefix_number
from sq_llava.early_checks import require_device, require_dtype
from sq_llava.inference.asking_first import Considered, answer_after_asking
from sq_llava.inference.dialogues import Dialogues
from sq_llava.inference.prefix_cache import PrefixCache, allows_gaps
from sq_llava.inference.prompts import decode, model_inputs, pixel_inputs, room_in_context, token_ids
from sq_llava.inference.settings import AskSettings, SelfQuestioning


@dataclass
class Assistant:
    """A model in evaluation mode, with its processor."""

    model: SQLlavaForConditionalGeneration
    processor: SQLlavaProcessor

    def answer(
        self,
        images,
        messages,
        max_new_tokens: int = 512,
        self_questions: int = 0,
        votes: int = 1,
        seed: int | None = None,
        **generate_kwargs,
    ) -> str:
        """
        Answers a question or continues a conversation. Decoding is greedy unless `generate_kwargs` say otherwise.

        Args:
            images: One image or a list of images (paths or PIL images), or `None`. They fill the image parts of
                `messages` in order. If there are no image parts, the images go before the text of the first user
                turn.
            messages: A question, or a list of messages that ends with a user turn.
            max_new_tokens (`int`): Maximum length of the answer, in tokens. The answer is shorter if the model's
                context ends first.
            self_questions (`int`): Number of questions that the model asks itself about the image, and answers,
                before it answers (`sq_llava/inference/asking_first.py`).
            votes (`int`): With `self_questions`: do this several times, and take the most frequent answer.
            seed (`int`, *optional*): With `self_questions`: random seed of the questions. To repeat a sampled answer,
                call `transformers.set_seed` first.
            generate_kwargs: Passed to `generate`, e.g. `do_sample=True, temperature=0.7`. With
                `cache_implementation="static"`, transformers compiles the decoding on a GPU, once for each length. Not
                with `self_questions`.

        Returns:
            The answer, stripped.

        Raises:
            ValueError: if the conversation fills the model's context, or `seed` is given without `self_questions`.
        """
        if self_questions or votes != 1:
            if generate_kwargs:
                raise ValueError(
                    f"self_questions is given, so answers are greedy: remove {', '.join(generate_kwargs)}."
                )
            settings, seeds = SelfQuestioning(self_questions, votes), None if seed is None else [seed]
            return self.consider_batch([(images, messages)], settings, max_new_tokens, seeds)[0].answer
        if seed is not None:
            raise ValueError(
                f"seed is {seed}, but there are no self_questions, whose seed it is. To repeat a sampled answer, call "
                "transformers.set_seed first."
            )
        return self.answer_batch([(images, messages)], max_new_tokens, **generate_kwargs)[0]

    def render(self, messages: list[dict]) -> str:
        """The prompt of a conversation as text, by the model's chat template."""
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def consider_batch(
        self,
        requests: list[tuple],
        settings: SelfQuestioning,
        max_new_tokens: int = 512,
        seeds: list[int] | None = None,
    ) -> list[Considered]:
        """
        Answers several requests after questions of its own: [`answer_after_asking`].

        Args:
            requests (`list[tuple]`): Pairs `(images, messages)`, as in [`Assistant.answer`].
        """
        conversations = place_images_of_all(requests)
        return answer_after_asking(self.model, self.processor, conversations, settings, max_new_tokens, seeds)

    @torch.inference_mode()
    def answer_batch(self, requests: list[tuple], max_new_tokens: int = 512, **generate_kwargs) -> list[str]:
        """
        Answers several requests in one left-padded batch. The answers are the same as one by one. Requests about the
        same images (equal paths, or the same PIL objects) share one pass over their common prefix.

        Args:
            requests (`list[tuple]`): Pairs `(images, messages)`, as in [`Assistant.answer`].

        Returns:
            One answer for each request, stripped.
        """
        conversations = place_images_of_all(requests)
        prompts = token_ids(self.processor, conversations)
        rooms = [room_in_context(self.model, [len(prompt)], max_new_tokens) for prompt in prompts]
        least = min(rooms)
        settings = {"do_sample": False, **generate_kwargs, "max_new_tokens": least}
        if least < max(rooms) and not _is_plain(self.model, settings):
            # The result could depend on the maximum length, as that of a beam search does.
            return [self.answer(*request, max_new_tokens, **generate_kwargs) for request in requests]
        images = [images_of(conversation) for conversation in conversations]
        prefixes = _prefixes_with_images(prompts, images, self.processor.image_token_id)
        if len(set(prefixes)) < len(requests) and _can_share(self.model, prompts, settings):
            inputs = self._read_prefixes(prompts, images, prefixes)
        else:
            inputs = model_inputs(self.model, self.processor, prompts, list(chain.from_iterable(images)))
        new_tokens = self.model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        answers = decode(self.processor, new_tokens)
        # The longest prompt leaves the least room in the context. Only its own answer may be cut short.
        end = self.model.generation_config.eos_token_id
        has_ended = torch.isin(new_tokens.cpu(), torch.tensor([] if end is None else end, dtype=torch.long)).any(dim=1)
        for row, room in enumerate(rooms):
            if room > least and not has_ended[row]:
                answers[row] = self.answer(*requests[row], max_new_tokens, **generate_kwargs)
        return answers

    def _read_prefixes(self, prompts: list[list[int]], images: list[list], prefixes: list[tuple[int, int]]) -> dict:
        """Inputs for `generate`, with the cached states of each different prefix."""
        first = {prefix: number for number, prefix in reversed([*enumerate(prefixes)])}
        cache = PrefixCache(self.model, len(first))
        # `read` does not process the last token.
        openings = [prompts[number][: size + 1] for (_, size), number in first.items()]
        shown = list(chain.from_iterable(images[number] for number in first.values()))
        cache.read(openings, pixel_inputs(self.model, self.processor, shown))
        row_of_prefix = {prefix: row for row, prefix in enumerate(first)}
        cache = cache.select([row_of_prefix[prefix] for prefix in prefixes])
        return {**cache.continue_with(prompts), CACHE_NAME: cache.states}

    def stream(
        self, images, messages, max_new_tokens: int = 512, ask: bool = False, **generate_kwargs
    ) -> Iterator[str]:
        """
        Answers or asks, and yields the text piece by piece. To stop the generation at the next token, close the
        iterator. The other arguments and errors are those of [`Assistant.answer`].

        Args:
            ask (`bool`): Generate a question instead of an answer.

        Yields:
            Pieces of the text. The joined text is not stripped.
        """
        conversation = place_images(images, messages)
        prompts = token_ids(self.processor, [conversation], ask)
        max_new_tokens = room_in_context(self.model, [len(prompts[0])], max_new_tokens)
        inputs = model_inputs(self.model, self.processor, prompts, images_of(conversation))
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
            # Otherwise, the streamer would wait forever if the generation failed.
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
        temperature: float = AskSettings.temperature,
        top_k: int = AskSettings.top_k,
        top_p: float = AskSettings.top_p,
        max_new_tokens: int = 300,
        seed: int | None = None,
    ) -> list[str]:
        """
        Samples questions about an image. The image and the conversation so far go through the model once for all
        questions. The default sampling settings are those of the authors' code.

        Args:
            image: Path or PIL image, or a list of them.
            history (`list[dict]`, *optional*): Messages that end with an answer. Default: the model first describes
                the image.
            num_questions (`int`): Number of questions.
            temperature, top_k, top_p: Sampling settings.
            max_new_tokens (`int`): Maximum length of a question (and of the description), in tokens.
            seed (`int`, *optional*): Random seed. The same seed gives the same questions.

        Returns:
            The questions, stripped.

        Raises:
            ValueError: if `history` does not end with an answer, a sampling setting is out of range, or the
                conversation fills the model's context.
        """
        histories, seeds = None if history is None else [history], None if seed is None else [seed]
        return self.ask_batch([image], histories, num_questions, temperature, top_k, top_p, max_new_tokens, seeds)[0]

    def ask_batch(
        self,
        images: list,
        histories: list[list[dict]] | None = None,
        num_questions: int = 1,
        temperature: float = AskSettings.temperature,
        top_k: int = AskSettings.top_k,
        top_p: float = AskSettings.top_p,
        max_new_tokens: int = 300,
        seeds: list[int] | None = None,
    ) -> list[list[str]]:
        """
        Samples questions about several images in one batch. The other arguments are those of [`Assistant.ask`].

        Args:
            images: One entry for each conversation: a path, a PIL image, or a list of them.
            histories (`list[list[dict]]`, *optional*): One history for each entry of `images`.
            seeds (`list[int]`, *optional*): One seed for each entry of `images`. With it, the questions are those of
                [`Assistant.ask`] with that seed, whatever else is in the batch.

        Returns:
            `num_questions` questions for each entry of `images`.
        """
        dialogues = Dialogues.start(self.model, self.processor, images, histories, max_new_tokens, seeds)
        return dialogues.ask(num_questions, temperature, top_k, top_p, max_new_tokens)

    def converse(
        self,
        image,
        num_turns: int = 3,
        history: list[dict] | None = None,
        temperature: float = AskSettings.temperature,
        top_k: int = AskSettings.top_k,
        top_p: float = AskSettings.top_p,
        max_new_tokens: int = 300,
        seed: int | None = None,
    ) -> list[dict]:
        """
        The model asks itself a question and answers it, `num_turns` times. The other arguments are those of
        [`Assistant.ask`].

        Returns:
            Messages: `history` (default: a description of the image), then `num_turns` pairs of messages with the
            roles `vusr` and `assistant`, whose contents are text.
        """
        histories, seeds = None if history is None else [history], None if seed is None else [seed]
        dialogues = Dialogues.start(self.model, self.processor, [image], histories, max_new_tokens, seeds)
        for _ in range(num_turns):
            dialogues.ask_next(temperature, top_k, top_p, max_new_tokens)
            dialogues.answer(max_new_tokens)
        return dialogues.messages[0]


def load(
    path: str,
    device: str | None = None,
    dtype: str = "auto",
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    trust_chat_template: bool = False,
    **kwargs,
) -> Assistant:
    """
    Loads a model with its processor.

    Args:
        path (`str`): A plain checkpoint, an adapter folder, or a Hub id.
        device (`str`, *optional*): `"cuda"`, `"mps"`, `"cpu"`, ... Default: the first one available.
        dtype (`str`): `"auto"` (as saved), `"float32"`, `"bfloat16"` or `"float16"`.
        load_in_4bit, load_in_8bit (`bool`): Load the weights of both towers in 4 or 8 bits, with bitsandbytes.
        trust_chat_template (`bool`): Accept a chat template that the processor did not write from its settings.
        kwargs: Passed to the model's `from_pretrained`, e.g. `revision`. With `device_map`, do not give `device`.

    Raises:
        ValueError: if the model does not exist, is not an SQ-LLaVA or is incomplete; if the device or dtype does not
            exist; if bitsandbytes is needed and not installed.
    """
    require_device(device)
    require_dtype(str(dtype).removeprefix("torch."))
    if load_in_4bit or load_in_8bit:
        kwargs["quantization_config"] = _bits(load_in_4bit, load_in_8bit, dtype)
        kwargs.setdefault("device_map", {"": device or best_device()})
    model, processor = load_checkpoint(str(path), dtype=dtype, trust_chat_template=trust_chat_template, **kwargs)
    if "device_map" not in kwargs:
        model.to(device or best_device())
    return Assistant(model.eval(), processor)


def _bits(load_in_4bit: bool, load_in_8bit: bool, dtype: str) -> BitsAndBytesConfig:
    if load_in_4bit and load_in_8bit:
        raise ValueError("load_in_4bit and load_in_8bit are both given: give only one of them.")
    with needs_extra("quantization"):
        import_module("bitsandbytes")
    if load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute_dtype = "bfloat16" if dtype == "auto" else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


class _IsClosed(StoppingCriteria):
    """Stops the generation when its iterator is closed."""

    def __init__(self):
        self.event = Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def _prefixes_with_images(prompts: list[list[int]], images: list[list], image_token_id: int) -> list[tuple[int, int]]:
    """The number and the length of what each prompt can share: the tokens up to its last image, as in training."""
    prefixes = []
    for prompt, of_prompt in zip(map(np.array, prompts), images):
        size = image_prefix(prompt, image_token_id) or len(prompt) - 1
        prefixes.append((prefix_number(prompt[:size], of_prompt), size))
    return prefixes


def _is_plain(model: SQLlavaForConditionalGeneration, settings: dict) -> bool:
    """`True` if `generate` extends each row token by token, up to the EOS token of the model's generation config."""
    known = {"do_sample", "temperature", "top_k", "top_p", "num_beams", "max_new_tokens"}
    return settings.keys() <= known and (settings.get("num_beams", model.generation_config.num_beams) or 1) == 1


def _can_share(model: SQLlavaForConditionalGeneration, prompts: list[list[int]], settings: dict) -> bool:
    """`True` if `generate` accepts a filled cache with these settings, and the model allows padding inside a row."""
    length = 2 * max(map(len, prompts)) + settings["max_new_tokens"]
    is_dynamic = model.generation_config.cache_implementation is None
    return is_dynamic and _is_plain(model, settings) and allows_gaps(model, length)
